"""A save that several workers share: the same bytes, whoever makes which shard, and is killed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from customized_models import (
    BaseModelMismatch,
    CompleteModel,
    CustomizedModel,
    InUseError,
    InvalidArgumentError,
    Job,
    JobCancelled,
    JobFailed,
    JobLost,
    Merger,
    ModelRegistry,
)
from customized_models.catalog.jobs import WORKERS
from customized_models.files.safetensors import Checkpoint
from customized_models.merging.journal import Journal
from customized_models.merging.sharing import Portion
from customized_models.models import no_progress
from customized_models.sources import proven_merge
from customized_models.testing import tiny_llama, tiny_lora
from tests.jobs.storages import (
    Apart,
    Counting,
    DeadlyShard,
    DeadlyToHelpers,
    DeadlyToWorkers,
    GatedShards,
    Shared,
)
from tests.waiting import until


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def shared(
    registry: ModelRegistry,
    customized: CustomizedModel,
    pool: ThreadPoolExecutor,
    kind: Callable[[Path], Shared] = Shared,
    workers: int = 2,
) -> Job[CompleteModel]:
    """The job of a save whose workers have a storage of that kind."""
    database = registry.catalog.database.url
    of_workers = ModelRegistry(registry.root, storage=kind(registry.root), database=database)
    return Merger(of_workers, executor=pool).save(customized, workers=workers)


def made_by_helpers(job: Job[CompleteModel]) -> int:
    """How many shards helpers have begun."""
    return sum(len(found.split(", ")) for found in re.findall(r"helper \S+ makes (.*)", job.log))


def digest_of_one(registry: ModelRegistry, customized: CustomizedModel) -> str:
    """Of the model that one worker makes."""
    return Merger(registry).save(customized).result(progress=False).digest


def nothing_is_left(registry: ModelRegistry) -> bool:
    return list((registry.root / ".staging").iterdir()) == []


@pytest.mark.slow
def test_three_workers_make_what_one_does(
    each_registry: ModelRegistry, tiny_adapter: Path, pool: ThreadPoolExecutor
) -> None:
    registry = each_registry
    customized = registry.register(tiny_adapter, train_name="support")
    job = shared(registry, customized, pool, workers=3)
    complete = job.result(progress=False)
    pool.shutdown()
    assert made_by_helpers(job) > 0
    assert nothing_is_left(registry)
    assert complete.digest == digest_of_one(registry, customized)
    assert dict(complete.recipe) == dict(next(iter(registry.complete_models())).recipe)
    Merger(registry).verify(complete)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_tied_tensors_experts_and_full_models_come_out_the_same(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    registry = ModelRegistry(tmp_path / "models")
    tied = tiny_llama(tmp_path / "tied", tied=True)
    untying = tiny_lora(tmp_path / "untying", tied, target_modules=["q_proj", "lm_head"])
    experts = mixtral(tmp_path / "experts")
    stacked = tiny_lora(
        tmp_path / "stacked",
        experts,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    full = tiny_llama(tmp_path / "full", tied=True)
    shard = next(full.glob("model-00002-*"))
    values = {name: 2 * tensor for name, tensor in load_file(shard).items()}
    save_file(values, shard, {"format": "pt"})
    registry.add_base_model("tied", tied)
    registry.add_base_model("experts", experts)
    for trained, base in ((untying, "tied"), (stacked, "experts"), (full, "tied")):
        customized = registry.register(trained, train_name=trained.name, base_model=base)
        job = shared(registry, customized, pool)
        assert job.result(progress=False).digest == digest_of_one(registry, customized)
        assert made_by_helpers(job) > 0
        (registry.root / "helped").unlink()


def mixtral(directory: Path) -> Path:
    """Its experts lie one by one, and those of a layer in several shards."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).bfloat16().save_pretrained(directory, max_shard_size="20KB")
    return directory


@pytest.mark.slow
def test_an_executor_with_less_room_than_workers_does_it_all_the_same(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    with ThreadPoolExecutor(1) as pool:
        job = Merger(registry, executor=pool).save(customized, workers=3)
        assert job.result(progress=False).digest == digest_of_one(registry, customized)
    assert made_by_helpers(job) == 0


@pytest.mark.slow
def test_each_worker_reads_of_the_base_what_its_shards_need(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    base = tiny_llama(
        tmp_path / "base",
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        shard_size="4MB",
    )
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("base", base)
    adapter = tiny_lora(tmp_path / "adapter", base)
    customized = registry.register(adapter, train_name="support")

    job = shared(registry, customized, pool, Counting)
    job.result(progress=False)
    pool.shutdown()

    reads = [int(path.read_text()) for path in (registry.root / "reads").iterdir()]
    assert made_by_helpers(job) > 0
    assert len(reads) == 2
    # The samples of the proof, read of base and result, and the adapter are beside it.
    print(size, reads)
    assert max(reads) < 1.2 * size
    assert size < sum(reads) < 1.6 * size


@pytest.mark.slow
def test_a_helper_whose_directory_nobody_else_sees_makes_nothing(
    registry: ModelRegistry, customized: CustomizedModel, pool: ThreadPoolExecutor
) -> None:
    job = shared(registry, customized, pool, Apart)
    assert job.result(progress=False).digest == digest_of_one(registry, customized)
    pool.shutdown()
    assert f"helper {job.id}.h1" in job.log
    assert made_by_helpers(job) == 0


# Who is killed, or stopped


@pytest.mark.slow
def test_another_helper_goes_on_after_one_that_was_killed(
    registry: ModelRegistry, customized: CustomizedModel, pool: ThreadPoolExecutor
) -> None:
    job = shared(registry, customized, pool, DeadlyToHelpers)
    complete = job.result(progress=False)
    pool.shutdown()
    assert f"helper {job.id}.h1 has nothing" not in job.log
    assert nothing_is_left(registry)
    assert complete.digest == digest_of_one(registry, customized)


@pytest.mark.slow
def test_another_worker_takes_over_what_helpers_of_a_killed_one_have_made(
    each_registry: ModelRegistry, tiny_adapter: Path, pool: ThreadPoolExecutor
) -> None:
    registry = each_registry
    customized = registry.register(tiny_adapter, train_name="support")
    job = shared(registry, customized, pool, DeadlyToWorkers)
    complete = job.result(progress=False)
    pool.shutdown()
    assert f"worker {job.id}.1 has gone without a word" in job.log
    assert nothing_is_left(registry)
    assert list(registry.complete_models()) == [complete]
    assert complete.digest == digest_of_one(registry, customized)


@pytest.mark.slow
def test_a_shard_that_kills_its_makers_ends_the_job_with_what_they_said(
    registry: ModelRegistry, customized: CustomizedModel, pool: ThreadPoolExecutor
) -> None:
    job = shared(registry, customized, pool, DeadlyShard)
    with pytest.raises(JobFailed, match=rf"{WORKERS} workers were killed.*model-00003.* is deadly"):
        job.result(progress=False)
    pool.shutdown()
    assert len(registry.complete_models()) == 0
    registry.delete(customized)


@pytest.mark.slow
def test_all_workers_of_a_save_stop_when_it_is_cancelled(
    registry: ModelRegistry, customized: CustomizedModel, pool: ThreadPoolExecutor
) -> None:
    job = shared(registry, customized, pool, GatedShards)
    for of_a_helper in (False, True):
        until((registry.root / f"waiting-{of_a_helper}").exists)
    job.cancel()
    (registry.root / "gate").touch()
    with pytest.raises(JobCancelled):
        job.result(progress=False)
    pool.shutdown()
    assert nothing_is_left(registry)
    registry.delete(customized)


@pytest.mark.slow
def test_a_base_that_has_changed_is_refused_whoever_reads_it(
    registry: ModelRegistry, customized: CustomizedModel, pool: ThreadPoolExecutor, tiny_base: Path
) -> None:
    import shutil

    base = registry.root.parent / "changed"
    shutil.copytree(tiny_base, base)
    registry.relocate_base_model(customized.base, base)
    for shard in base.glob("*.safetensors"):  # all but the first, whoever that falls to
        if not shard.name.startswith("model-00001"):
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)
    with pytest.raises(BaseModelMismatch):
        Merger(registry, executor=pool).save(customized, workers=2).result(progress=False)
    assert len(registry.complete_models()) == 0


def test_several_workers_need_an_executor(
    registry: ModelRegistry, customized: CustomizedModel, pool: ThreadPoolExecutor
) -> None:
    with pytest.raises(InvalidArgumentError, match="executor"):
        Merger(registry).save(customized, workers=2)
    for wrong in (0, "2"):
        with pytest.raises(InvalidArgumentError, match="workers"):
            Merger(registry, executor=pool).save(customized, workers=wrong)  # type: ignore[arg-type]


# What each may rely on


def test_a_shard_is_noted_once_all_that_it_was_made_of_is_compared(tmp_path: Path) -> None:
    base = mixtral(tmp_path / "base")
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("base", base)
    adapter = tiny_lora(
        tmp_path / "adapter",
        base,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    customized = registry.register(adapter, train_name="support")
    known = next(iter(registry.base_models()))
    (tmp_path / "out").mkdir()
    with proven_merge(registry.shelf, known, customized) as (merged, check):
        journal = Journal(tmp_path / "out", "key")
        portion = Portion(merged, check, tmp_path / "out", journal, {}, no_progress)
        shards = list(Checkpoint.open(base).shards)
        portion.make(shards[2:3])
        elsewhere = merged.layout.read_from - {shards[2]}
        assert elsewhere
        assert journal.shards == {}
        others = portion.finish()
        assert [*journal.shards] == shards[2:3]
        assert others == {*shards} - {shards[2]} - elsewhere


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(st.sampled_from(["work", "help", "claim", "kill"]), max_size=15), data=st.data()
)
def test_a_shard_has_one_maker_that_lives(
    registry: ModelRegistry, steps: list[str], data: st.DataObject
) -> None:
    catalog = registry.catalog
    arguments = {"customized": "a", "workers": 3}
    id = str(catalog.jobs.add("save", lambda id: f"a_s_{id.hex}", arguments, (), None))
    held: dict[str, set[str]] = {}
    for step in steps:
        if step in ("work", "help"):
            try:
                owner = catalog.jobs.take_up(id, (), None, "")
            except InUseError:
                continue
            if owner is None:
                return
            held[owner] = set()
        elif held:
            owner = data.draw(st.sampled_from(sorted(held)))
            if step == "kill":
                with catalog.database.write() as connection:
                    catalog.leases.end(connection, owner)
                del held[owner]
                with pytest.raises(JobLost):
                    catalog.shares.claim(id, "abc", 1, catalog.lease(owner))
            else:
                others = set[str]().union(*(held[one] for one in held if one != owner))
                mine = catalog.shares.claim(id, "abc", 1, catalog.lease(owner))
                assert mine == sorted({*"abc"} - others)[:1]
                held[owner].update(mine)
        workers = [owner for owner in held if not catalog.jobs.helper_number(owner)]
        assert len(workers) <= 1
