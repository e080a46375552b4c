"""`Merger`: a customized model becomes a complete one, in the background, and can do so again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from attrs import evolve

from ..arguments import instance, refused, whole
from ..cards.readme import render
from ..errors import InvalidArgumentError, UnsupportedQuantizationError, shown
from ..evicting import parents_of
from ..files.checking import FileCheck
from ..files.digests import FileDigest, digest_of
from ..files.documents import to_document
from ..files.manifest import README, Manifest
from ..files.streams import copy_file
from ..files.writing import write_file
from ..jobs.isolated import run_isolated
from ..jobs.job import Job
from ..jobs.work import Work
from ..models import BaseModel, CompleteModel, CustomizedModel, Progress
from ..naming import complete_name
from ..registry import ModelRegistry
from ..sources import CompletedSource, proven_merge
from .journal import Journal
from .plan import MergePlan, plan_merge
from .proof import check_rebuilt, derive_again, prove
from .sharing import Portion, share_out, take_part
from .writing import lineage_metadata, write_checkpoint


class Merger:
    """Merges customized models of a registry into their bases.

    A model may be given by its name.

    >>> complete = Merger(registry).save(customized).result()       # doctest: +SKIP

    Args:
        registry: Where the models are.
        executor: Runs the jobs, such as a pool of `concurrent.futures` or Dask's
            `Client.get_executor()`, whose hosts all see the registry's storage and database, and
            the base models where they were added; it says how many run at once. Processes of this
            host do, as many as the registry's `max_running`, if None.

    Raises:
        InvalidArgumentError: One of them is of another type.
    """

    def __init__(self, registry: ModelRegistry, *, executor: Executor | None = None) -> None:
        instance("registry", registry, ModelRegistry)
        self._catalog = registry.catalog
        self._shelf = registry.shelf
        self._queue = registry.queue.run_by(executor)
        self._has_executor = executor is not None

    def __repr__(self) -> str:
        return f"Merger({self._shelf!r})"

    def save(
        self,
        customized: CustomizedModel | str,
        *,
        quantization: str | None = None,
        workers: int = 1,
    ) -> Job[CompleteModel]:
        """Merge the adapter into its base and publish the result; returns at once.

        A full model is published without a merge: its tensors as they are, with the tokenizer and
        configuration files that it lacks from its base.

        Every tensor that the adapter changes has the bits that PEFT's `merge_and_unload` gives it;
        every other one has the base's bytes, or what an FP8 or MXFP4 base dequantizes to. Before
        anything is published, adapter and base have been compared, byte for byte, with what was
        registered, and a sample of the result with what PEFT itself makes of them. After a kill,
        the next save of the same model takes over the shards that were complete.

        Args:
            customized: What to save.
            quantization: Refused.
            workers: How many of the executor's workers share the shards, for a model that is large:
                each merges those that nobody has begun, and reads and compares the part of the base
                that they need; one of them proves and publishes it all. The result is the same.

        Raises:
            InvalidArgumentError: There are to be several workers, but there is no executor.
            UnsupportedQuantizationError: `quantization` was given. It belongs to deployment.
            NotFoundError: The customized model has been deleted.
            JobFailed: The executor takes no more work.
        """
        if quantization is not None:
            raise UnsupportedQuantizationError(
                f"a complete model is not quantized (asked for {shown(quantization)}): there is no "
                f"standard format for quantized complete models. Quantization belongs to "
                f"deployment: Deployer(registry).deploy(complete, quantization=...)"
            )
        count = whole("workers", workers)
        if count < 1:
            raise InvalidArgumentError("workers takes 1 or more")
        if count > 1 and not self._has_executor:
            raise InvalidArgumentError(
                "several workers are an executor's: Merger(registry, executor=...). Without one, "
                "one process merges with all of this host's processors"
            )
        return self._start(self._customized(customized), {"workers": count} if count > 1 else {})

    def save_many(
        self, customized_models: Iterable[CustomizedModel | str]
    ) -> list[Job[CompleteModel]]:
        """As `save` for each of several; returns at once. None is saved if one is not there.

        Jobs with the same base follow each other, and each host reads a base once for all of them:
        it keeps it in memory, compared with what was added and sealed, until half a minute after
        the last. Where that would take more than a quarter of the memory that is left, or where
        memory cannot be sealed, as on macOS, each job reads its base for itself.

        >>> jobs = merger.save_many(registry.customized_models())           # doctest: +SKIP
        >>> for job in as_completed(jobs):                                  # doctest: +SKIP
        ...     print(job.result().name)

        Returns:
            Their jobs, in the order of the models.

        Raises:
            NotFoundError: A customized model has been deleted.
            JobFailed: The executor takes no more work.
        """
        alone = isinstance(customized_models, str | CustomizedModel)
        if alone or not isinstance(customized_models, Iterable):
            raise refused("customized_models", customized_models, "several models, or their names")
        models = [self._customized(given) for given in customized_models]
        by_base = sorted(range(len(models)), key=lambda n: models[n].base)
        several = {base for base, count in Counter(m.base for m in models).items() if count > 1}
        jobs = {
            n: self._start(models[n], {"in_memory": models[n].base in several}) for n in by_base
        }
        return [jobs[n] for n in range(len(models))]

    def _customized(self, given: CustomizedModel | str) -> CustomizedModel:
        return self._catalog.levels.meant("customized", given, CustomizedModel)

    def _complete(self, given: CompleteModel | str) -> CompleteModel:
        """A value may be of a model that has been deleted."""
        if isinstance(given, CompleteModel):
            return given
        return self._catalog.levels.meant("complete", given, CompleteModel)

    def _start(
        self, customized: CustomizedModel, arguments: Mapping[str, Any]
    ) -> Job[CompleteModel]:
        base = self._catalog.levels.get(BaseModel, customized.base)
        return self._queue.submit(
            "save",
            lambda id: complete_name(customized.name, id),
            {"customized": customized.name, **arguments},
            (customized.key, base.key),
        )

    def warm_up(self) -> None:
        """Start now the process that jobs of this one will be forked from; returns at once.

        It imports torch, transformers and PEFT, which takes some seconds and half a gigabyte; a job
        then starts in milliseconds. Without this, the first job starts it. It ends ten minutes
        after its last job, and with this process, and is replaced if environment variables have
        changed; jobs go on. Each process of an executor starts one for itself, with its first job.

        >>> merger.warm_up()                                             # doctest: +SKIP
        """
        self._queue.warm_up()

    def plan(self, customized: CustomizedModel | str) -> MergePlan:
        """What `save` would change, write and need; refused where `save` would be.

        Headers are read, the adapter, and of the base what it takes to see that every tensor
        changes and none overflows: for a plain LoRA or a stack of experts the first rows. What
        PEFT's own module merges, as for other types, is merged for it. It runs in a process of its
        own, because it sets globals of torch, transformers and PEFT.

        Raises:
            UnsupportedError, BaseModelMismatch, MergeError: `save` would end with the same error.
            BaseModelMissingError: The base model's files are gone.
            NotFoundError: The customized model has been deleted.
        """
        known = self._customized(customized)
        base = self._catalog.levels.get(BaseModel, known.base)
        with self._shelf.checkout(known), self._shelf.checkout(base):
            return run_isolated(plan_merge, self._shelf, base, known)

    def verify(self, complete: CompleteModel | str) -> None:
        """Merge again, in a process of its own, and compare every stored byte.

        Returns when it is done, which takes as long as a save. `ModelRegistry.verify` compares with
        the manifest alone and needs no parents.

        Raises:
            IntegrityError: The bytes are not those of the manifest, or not what base and adapter
                give; the message names tensors and files.
            NotReproducible: They are not, but versions, threads or processor differ as well.
            NotFoundError: The complete model or one of its parents has been deleted.
            EvictedError: Its bytes were dropped; `ModelRegistry.rebuild` compares what it makes.
            BaseModelMissingError, BaseModelMismatch: The base model's files are gone or changed.
        """
        known = self._complete(complete)
        with self._parents(known) as (base, customized), self._shelf.checkout(known):
            run_isolated(derive_again, self._shelf, base, customized, known)

    def rebuild(self, complete: CompleteModel | str) -> Job[CompleteModel]:
        """Save again what `complete` was, deleted or not: the same digest under a new name.

        The job ends with `NotReproducible` if other bytes come out; nothing is published then. The
        bytes of a model that was evicted come back with `ModelRegistry.rebuild`.

        Raises:
            NotFoundError: The customized model or the base model has been deleted.
            BaseModelMissingError, BaseModelMismatch: The base model's files are gone or changed.
        """
        known = self._complete(complete)
        with self._parents(known) as (_, customized):
            expected = {"digest": known.digest, "recipe": dict(known.recipe)}
            return self._start(customized, {"expected": expected})

    @contextmanager
    def _parents(self, complete: CompleteModel) -> Iterator[tuple[BaseModel, CustomizedModel]]:
        """What it was made of, kept while the block lasts."""
        with self._catalog.database.read() as connection:
            base, customized = parents_of(self._catalog, connection, complete)
        with self._shelf.checkout(customized), self._shelf.checkout(base):
            yield base, customized


def help_save(work: Work) -> None:
    """The part of a worker that makes shards of a save which another one does.

    Raises:
        JobCancelled: The job has ended, or is to stop.
    """
    catalog, shelf = work.catalog, work.shelf
    customized = catalog.levels.get(CustomizedModel, work.arguments["customized"])
    base = catalog.levels.get(BaseModel, customized.base)
    with (
        shelf.storage.staging(f"save-{work.lease.owner}") as staging,
        proven_merge(shelf, base, customized) as (merged, check),
    ):
        journal = Journal(staging, _key(_parents(base, customized), merged))
        lineage = lineage_metadata(base, customized)
        take_part(Portion(merged, check, staging, journal, lineage, work.progress), work)


def _parents(base: BaseModel, customized: CustomizedModel) -> dict[str, str]:
    return {"base": base.digest, "customized": customized.digest}


def _key(parents: Mapping[str, str], merged: CompletedSource) -> str:
    """What the bytes of all shards depend on."""
    return digest_of([parents, merged.merge.recipe])


def run_save(work: Work) -> None:
    """The worker's part of `Merger.save`."""
    catalog, shelf = work.catalog, work.shelf
    customized = catalog.levels.get(CustomizedModel, work.arguments["customized"])
    base = catalog.levels.get(BaseModel, customized.base)
    with _merged(work, base, customized) as (staging, manifest):
        if expected := work.arguments.get("expected"):
            manifest = check_rebuilt(expected, manifest)
        complete = CompleteModel(
            name=work.name,
            customized=customized.name,
            base=base.name,
            train_name=customized.train_name,
            saving_id=work.id,
            created=datetime.now(UTC),
            digest=manifest.digest,
            customized_digest=customized.digest,
            base_digest=base.digest,
            recipe=manifest.recipe,
            card=customized.card,
        )
        record = {"model": to_document(complete), "base": to_document(base)}
        evolve(manifest, record=record).write(staging)
        write_file(staging / README, render(complete, base).encode())
        with catalog.database.write() as connection:
            work.lease.check(connection)
            shelf.announce(connection, complete, work.lease)
        shelf.publish(
            complete,
            staging,
            work.lease,
            with_it=lambda connection: work.end(connection, "succeeded"),
        )


@contextmanager
def merged_again(
    work: Work, base: BaseModel, customized: CustomizedModel, complete: CompleteModel
) -> Iterator[Path]:
    """A staging directory with the bytes that `complete` had, but for its manifest and card.

    Raises:
        NotReproducible: Other bytes come out.
    """
    with _merged(work, base, customized) as (staging, manifest):
        check_rebuilt({"digest": complete.digest, "recipe": dict(complete.recipe)}, manifest)
        yield staging


@contextmanager
def _merged(
    work: Work, base: BaseModel, customized: CustomizedModel
) -> Iterator[tuple[Path, Manifest]]:
    """A staging directory with the merge of two models, proven, and its manifest without record."""
    catalog, shelf = work.catalog, work.shelf
    in_memory = work.progress if work.arguments.get("in_memory") else None
    with (
        shelf.storage.staging(f"save-{work.lease.owner}") as staging,
        proven_merge(shelf, base, customized, in_memory=in_memory) as (merged, check),
    ):
        parents = _parents(base, customized)
        journal = Journal(staging, _key(parents, merged))
        for lost in [*work.before, *catalog.jobs.give_up_saves_of(customized.name)]:
            with shelf.storage.staging(f"save-{lost}") as abandoned:
                journal.take_over(abandoned, merged.merge.shards, work.progress)
        lineage = lineage_metadata(base, customized)
        compared = frozenset[str]()
        if work.arguments.get("workers", 1) > 1:
            portion = Portion(merged, check, staging, journal, lineage, work.progress)
            compared = share_out(portion, work)
        content = _write(merged, staging, work.progress, check, journal, lineage)
        prove(merged, staging, str(work.id), work.progress)
        check.finish(work.progress, but=compared)
        yield staging, Manifest("complete", content, parents, merged.merge.recipe, {})


def _write(
    merged: CompletedSource,
    staging: Path,
    progress: Progress,
    check: FileCheck,
    journal: Journal,
    metadata: Mapping[str, str],
) -> dict[str, FileDigest]:
    """Weights and small files into `staging`; their digests."""
    merge, layout = merged.merge, merged.layout
    content = dict(
        write_checkpoint(
            merge,
            layout,
            staging,
            progress,
            merge.changed,
            check=check,
            journal=journal,
            metadata=metadata,
        )
    )
    taken_over = {name for file in journal.taken_over for name in merge.shards[file]}
    elsewhere = taken_over & merge.changed
    merge.finish(elsewhere, saw_change=bool(elsewhere) and journal.saw_change)
    journal.end()
    for name, path in merged.source.files.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        content[name] = copy_file(path, staging / name)
    return content
