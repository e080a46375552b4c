"""Takes over the adapters in a directory tree that a Trainer, or a tool on top of it, has left.

First a plan, which says for every directory what would be done and why not; then the plan is
carried out. What is registered already, under whatever name, is not registered again.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from attrs import evolve, field, frozen

from . import arguments
from .adapters.intake import PICKLED, WEIGHTS
from .adapters.settings import CONFIG
from .cards.checkpoints import State, best_step, checkpoint_step, is_unfinished
from .cards.reading import trainer_state
from .display import html_table, text_table
from .errors import (
    BaseModelMismatch,
    CustomizedModelsError,
    DatabaseError,
    MalformedError,
    UnsafeFileError,
    UnsupportedAdapterError,
    listed,
    shown,
)
from .files.reading import existing_directory, json_object
from .files.writing import disk_errors
from .models import BaseModel, ModelCard
from .pickled import convert_pickle
from .registering import Training, examine
from .registry import ModelRegistry
from .values import Value, checked

__all__ = ["ImportEntry", "ImportPlan", "convert_pickle", "plan_import", "run_import"]

_log = logging.getLogger(__name__)

_MAX_LABEL = 200  # characters, as a train name's label may have
_HEADER = ("directory", "action", "train name", "base", "trained", "model or reason")

Action = Literal["register", "registered", "leave", "refuse"]


@frozen(field_transformer=checked)
class ImportEntry(Value):
    """A directory of a tree, and what becomes of it.

    Attributes:
        directory: Its path in the tree; bytes of a name that are not UTF-8 are escaped.
        action: "register" what is to be; "registered" what is; "leave" a checkpoint or a copy of
            what is registered; "refuse" what cannot be.
        reason: Why it is left or refused.
        label: What the training is called: the path, without `checkpoint-N`.
        base: The base model's technical name.
        created: When the weights were written, in UTC.
        model: The name of the customized model, if it is registered.
        card: What the files say of the training.
        digest: What the customized model has, or would have; None where that is not known.
    """

    directory: str
    action: Action
    reason: str = ""
    label: str = ""
    base: str | None = None
    created: datetime | None = None
    model: str | None = None
    card: ModelCard = field(factory=ModelCard, repr=False)
    digest: str | None = field(default=None, repr=False)

    @property
    def row(self) -> tuple[str, ...]:
        """What a table shows of it."""
        day = f"{self.created:%Y-%m-%d}" if self.created else ""
        told = self.model or self.reason or str(self.card)
        return self.directory, self.action, self.label, self.base or "", day, told


@frozen(field_transformer=checked)
class ImportPlan(Value):
    """What becomes of the adapters in a directory tree. It prints as a table.

    Attributes:
        root: The directory.
        entries: The directories below it that have models, sorted.
    """

    root: str
    entries: tuple[ImportEntry, ...]

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.having(a))} to {a}" for a in ("register", "leave", "refuse"))
        return f"<{len(self.having('registered'))} adapters registered, {counts}>"

    def __str__(self) -> str:
        return f"{self!r}\n{text_table([_HEADER, *(entry.row for entry in self.entries)])}"

    def _repr_html_(self) -> str:
        return html_table(_HEADER, [entry.row for entry in self.entries])

    def having(self, action: Action) -> tuple[ImportEntry, ...]:
        """The entries of one action."""
        return tuple(entry for entry in self.entries if entry.action == action)


def plan_import(
    registry: ModelRegistry,
    directory: str | os.PathLike[str],
    *,
    base_models: Mapping[str, BaseModel | str] | None = None,
) -> ImportPlan:
    """Say what `run_import` would register of a directory tree, and register nothing.

    Every adapter is read and checked as `ModelRegistry.register` does it. Where a training has left
    an adapter beside its checkpoints, that one is its result; else the best checkpoint is, if the
    Trainer kept one, or the last one, unless the training has not come to its end.

    Args:
        registry: Where they would be registered. It needs their base models.
        directory: Its root. Links to directories and hidden directories are not followed.
        base_models: By what adapters state as their base, the base model that is meant, such as
            `{"unsloth/llama-3-8b-bnb-4bit": "llama-3-8b"}`. The empty text stands for that of
            adapters which state none.

    Raises:
        InvalidArgumentError: An argument is of another type.
        NotFoundError: There is no such base model.
        MalformedError: There is no such directory.
        DatabaseError: The database failed.
    """
    arguments.instance("registry", registry, ModelRegistry)
    root = existing_directory(arguments.path("directory", directory)).resolve()
    bases = {
        stated: registry.catalog.levels.meant(f"base_models[{stated!r}]", base, BaseModel).name
        for stated, base in arguments.mapping("base_models", base_models or {}).items()
    }
    known = _known(registry)
    found: dict[str, ImportEntry] = {}
    first: dict[str, str] = {}  # by digest, the directory that it is registered from

    def note(error: OSError) -> None:
        path = _within(Path(error.filename), root)
        found[path] = ImportEntry(path, "refuse", f"it cannot be listed: {error.strerror}")

    for place in _likeliest_first(root, note):
        path = _within(place, root)
        entry = _planned(registry, root, place, bases)
        if entry.digest in known:
            entry = evolve(entry, action="registered", model=known[entry.digest])
        elif entry.digest in first:
            reason = f"the same adapter as {first[entry.digest]}"
            entry = evolve(entry, action="leave", reason=reason)
        elif entry.digest:
            first[entry.digest] = path
        found[path] = entry
    return ImportPlan(str(root), tuple(found[path] for path in sorted(found)))


def run_import(registry: ModelRegistry, plan: ImportPlan) -> ImportPlan:
    """Register what a plan says. Doing it again, or after it was interrupted, adds nothing twice.

    Returns:
        The plan as it is then: what was to be registered is, or has the reason why not.

    Raises:
        InvalidArgumentError: An argument is of another type.
        DatabaseError: The database failed; do the same again.
    """
    arguments.instance("registry", registry, ModelRegistry)
    arguments.instance("plan", plan, ImportPlan)
    known = _known(registry)
    return evolve(plan, entries=tuple(_carried_out(registry, plan, e, known) for e in plan.entries))


def _known(registry: ModelRegistry) -> dict[str, str]:
    """The names of the customized models, by digest."""
    return {model.digest: model.name for model in registry.customized_models()}


def _carried_out(
    registry: ModelRegistry, plan: ImportPlan, entry: ImportEntry, known: dict[str, str]
) -> ImportEntry:
    if entry.action != "register":
        return entry
    if entry.digest in known:  # since the plan was made
        return evolve(entry, action="registered", model=known[entry.digest])
    try:
        model = registry.register(
            Path(plan.root, entry.directory),
            train_name=entry.label,
            base_model=entry.base,
            created=entry.created,
        )
    except DatabaseError:
        raise
    except CustomizedModelsError as error:
        _log.warning("%s is not registered: %s", entry.directory, error)
        return evolve(entry, action="refuse", reason=str(error))
    return evolve(entry, action="registered", model=model.name)


# What a tree has


def _models(root: Path, note: Callable[[OSError], None]) -> Iterator[Path]:
    """The directories with the weights or the configuration of a model, adapter or not.

    `note` is told of those that cannot be listed.
    """
    marks = {CONFIG, WEIGHTS, *PICKLED, "model.safetensors", "model.safetensors.index.json"}
    for path, directories, files in os.walk(root, onerror=note):
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        if marks.intersection(files):
            yield Path(path)


def _likeliest_first(root: Path, note: Callable[[OSError], None]) -> list[Path]:
    """Of equal adapters the first is registered: one of which most is known."""
    return sorted(_models(root, note), key=lambda place: (not _state(place), place))


def _state(place: Path) -> State:
    try:
        return trainer_state(place)
    except CustomizedModelsError:  # whoever examines the adapter says so
        return {}


def _reason_to_leave(place: Path, root: Path) -> str:
    """Why this is not what its training has resulted in; empty if it is.

    PEFT saves an adapter that is not called "default" in a directory of that name, below the
    Trainer's output directory and below each checkpoint.
    """
    for checkpoint in (place, place.parent):
        step = checkpoint_step(checkpoint.name)
        if step is not None and root in checkpoint.parents:
            break
    else:
        return ""
    output, name = checkpoint.parent, place.relative_to(checkpoint)
    if _has_adapter(output / name):
        return f"a checkpoint of {(output / name).name}"
    beside = {
        found
        for path in output.glob("checkpoint-*")
        if (found := checkpoint_step(path.name)) is not None and _has_adapter(path / name)
    }
    last = max(beside, default=step)
    state = _state(output / f"checkpoint-{last}")
    best = best_step(state)
    kept = best if best in beside else last
    if step != kept:
        return f"checkpoint-{kept} of that training is its {'best' if kept == best else 'last'} one"
    stopped = "'should_training_stop': True" in str(state.get("stateful_callbacks"))
    if is_unfinished(state, stopped=stopped):
        return (
            f"the training has not ended: it is at step {state['global_step']} of "
            f"{state['max_steps']}; ModelRegistry.register takes a checkpoint all the same"
        )
    return ""


def _has_adapter(place: Path) -> bool:
    return any(os.path.lexists(place / name) for name in (WEIGHTS, *PICKLED))


def _planned(
    registry: ModelRegistry, root: Path, place: Path, bases: Mapping[str, str]
) -> ImportEntry:
    """What becomes of a directory, were there no adapter like it."""
    path = _within(place, root)
    try:
        with disk_errors("it cannot be read"):
            if path != place.relative_to(root).as_posix():
                raise UnsafeFileError("the name is not UTF-8; rename the directory")
            if reason := _reason_to_leave(place, root):
                return ImportEntry(path, "leave", reason)
            return _examined(registry, root, place, bases)
    except DatabaseError:
        raise
    except CustomizedModelsError as error:
        return ImportEntry(path, "refuse", str(error))


def _examined(
    registry: ModelRegistry, root: Path, place: Path, bases: Mapping[str, str]
) -> ImportEntry:
    """What would be registered of an adapter; raises as `ModelRegistry.register` does."""
    created = _written(place)
    label = _label(place, root)
    base = _base_of(registry, place, bases)
    training = Training.given(label, base, None)
    with registry.shelf.storage.staging(f"import-{uuid.uuid4().hex}") as staging:
        examined = examine(registry.catalog, place, staging, training)
    return ImportEntry(
        _within(place, root),
        "register",
        label=label,
        base=base,
        created=created,
        card=examined.card,
        digest=examined.manifest.digest,
    )


def _written(place: Path) -> datetime:
    """When the weights were written, but not in the future."""
    if not _has_adapter(place):
        if (place / CONFIG).is_file():
            raise MalformedError(f"{WEIGHTS} is missing")
        raise UnsupportedAdapterError("a whole model, and not an adapter; add_base_model takes it")
    if not os.path.lexists(place / WEIGHTS):
        raise UnsupportedAdapterError(
            "the weights are a pickle, which can run code when it is read: "
            "customized_models.importing.convert_pickle writes a copy without one"
        )
    seconds = (place / WEIGHTS).lstat().st_mtime
    return min(datetime.fromtimestamp(seconds, UTC), datetime.now(UTC))


def _base_of(registry: ModelRegistry, place: Path, bases: Mapping[str, str]) -> str:
    stated = json_object(place / CONFIG).get("base_model_name_or_path")
    stated = stated if isinstance(stated, str) else ""
    if stated in bases:
        return bases[stated]
    try:
        return registry.find_base_model(stated).name
    except BaseModelMismatch as error:
        names = listed(base.name for base in registry.base_models()) or "none; add_base_model first"
        raise BaseModelMismatch(
            f"no single base model is known as {shown(stated)}; "
            f"base_models={{{shown(stated)}: ...}} says which it is, of {names}"
        ) from error


def _label(place: Path, root: Path) -> str:
    """The path without `checkpoint-N`, which says nothing of what was trained."""
    steps = place.relative_to(root).parts
    kept = *steps[:-2], *(step for step in steps[-2:] if checkpoint_step(step) is None)
    return "/".join(kept or (root.name,))[-_MAX_LABEL:]


def _within(place: Path, root: Path) -> str:
    """The path in the tree, with bytes that are not UTF-8 escaped."""
    return place.relative_to(root).as_posix().encode(errors="backslashreplace").decode()
