"""What a training saved, an adapter or a full model, becomes a customized model.

In three transactions: what is known is looked up; the name is taken and the model announced; it is
made visible. The directory is read once, into a private copy, before anything is believed of it.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, fields, frozen

from . import checkpoints
from .adapters import intake
from .adapters.finite import refuse_non_finite
from .adapters.fitting import check_fits
from .arguments import identifier, name_of, past
from .base_models import Location, verified_path
from .cards.reading import training_facts
from .cards.readme import render, storable_card
from .errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    BaseModelMissingError,
    InUseError,
    UnsupportedError,
    listed,
    shown,
)
from .files.digests import FileDigest
from .files.documents import to_document
from .files.manifest import README, Manifest
from .files.model_directory import CARRIED, files_of
from .files.remote_code import check_remote_code
from .files.safetensors import Checkpoint
from .files.writing import disk_errors, write_file
from .models import BaseModel, CustomizedModel, EvaluationSummary, ModelCard, TrainingConfiguration
from .naming import train_name_of
from .shelf import Shelf
from .values import value_of

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .catalog.catalog import Catalog
    from .catalog.leases import Lease

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 0.1  # between two looks at another process that registers the same


@frozen
class Training:
    """What is to be registered, besides the adapter.

    Attributes:
        label: What a person calls it.
        train_name: Derived from the label.
        base_model: A technical name; None for the one that the adapter names.
        id: Of the training; None for the one that has registered the same, or else a new one.
        configuration: Read from the adapter's directory if None.
        evaluation: Read from the adapter's directory if None.
        created: When it was trained, in UTC; None for now.
    """

    label: str
    train_name: str
    base_model: str | None
    id: uuid.UUID | None
    configuration: TrainingConfiguration | None
    evaluation: EvaluationSummary | None
    created: datetime | None

    @classmethod
    def given(
        cls,
        label: object,
        base_model: object,
        training_id: object,
        training: object = None,
        evaluation: object = None,
        created: object = None,
    ) -> Training:
        """As a caller means it.

        Raises:
            InvalidArgumentError: It cannot be meant; the message says what can.
            InvalidNameError: The label has nothing to make a name of.
        """
        name = train_name_of(label)
        if isinstance(evaluation, Mapping) and not evaluation.keys() <= _MEASURED:
            evaluation = {"metrics": evaluation}
        return cls(
            str(label),
            name,
            None if base_model is None else name_of("base_model", base_model, BaseModel),
            None if training_id is None else identifier("training_id", training_id),
            None if training is None else value_of("training", training, TrainingConfiguration),
            None if evaluation is None else value_of("evaluation", evaluation, EvaluationSummary),
            None if created is None else past("created", created),
        )


_MEASURED = {field.name for field in fields(EvaluationSummary)}
"""A dict with other keys than these is one of metrics."""


@frozen
class Taken:
    """What a training saved, as a checked copy.

    Attributes:
        kind: Of the customized model.
        content: Size and digest of each of its files, by name.
        stated_base: What it says that it was trained on.
        facts: What the training's own files say.
        check_base: Raises `BaseModelMismatch` unless it fits the base in a directory.
        is_of: Whether the tokenizer is that of the base in a directory; None where a base is
            only found by what is stated.
        notes: What was found odd, for the card.
    """

    kind: Literal["adapter", "checkpoint"]
    content: Mapping[str, FileDigest]
    stated_base: object
    facts: ModelCard
    check_base: Callable[[Path], None]
    is_of: Callable[[Path], bool] | None = None
    notes: tuple[str, ...] = ()


def take_in(source: Path, staging: Path) -> Taken:
    """Copy what a training saved into the empty directory `staging`, and check it.

    Raises:
        MalformedError, UnsafeFileError, UnsupportedError, NonFiniteError: It is not sound.
    """
    if checkpoints.is_checkpoint(source):
        trained = checkpoints.take_in(source, staging)
        facts = training_facts(source, None)

        def fits(base: Path) -> None:
            checkpoints.refuse_unless_fits(trained, Checkpoint.open(base))

        def is_of(base: Path) -> bool:
            return checkpoints.has_tokenizer_of(base, staging)

        return Taken("checkpoint", trained.content, trained.stated_base, facts, fits, is_of)
    taken = intake.take_in(source, staging)
    facts = training_facts(source, taken.adapter.config)

    def fits_adapter(base: Path) -> None:
        check_fits(taken.adapter, Checkpoint.open(base))

    refuse_non_finite(taken.adapter)
    return Taken(
        "adapter", taken.content, taken.stated_base, facts, fits_adapter, notes=taken.notes
    )


@frozen
class Examined:
    """A checked copy of what a training saved, and what it would be registered with.

    Attributes:
        taken: The copy.
        base: Its base model.
        card: What is known of its training.
    """

    taken: Taken
    base: BaseModel
    card: ModelCard

    @property
    def manifest(self) -> Manifest:
        """Its manifest, as yet without a record. Its digest is the model's."""
        return Manifest("customized", self.taken.content, {"base": self.base.digest}, {}, {})


def register(catalog: Catalog, shelf: Shelf, source: Path, training: Training) -> CustomizedModel:
    """See `ModelRegistry.register`."""
    with shelf.storage.staging(f"register-{uuid.uuid4().hex}") as staging:
        examined = examine(catalog, source, staging, training)
        return _publish(catalog, shelf, staging, examined, training)


def examine(catalog: Catalog, source: Path, staging: Path, training: Training) -> Examined:
    """Copy a model into the empty directory `staging`, and make every check of `register`.

    Nothing is written elsewhere. Raises what `ModelRegistry.register` raises.
    """
    taken = take_in(source, staging)
    facts = taken.facts
    base = _base_of(catalog, training.base_model, taken)
    _log.debug("%s: %s for base model %s", source, taken.kind, base.name)
    _refuse_changed_base(training.configuration, base)
    check_remote_code(files_of(staging, *CARRIED), trusted=base.trust_remote_code)
    card = storable_card(
        ModelCard(
            training.configuration or facts.training,
            training.evaluation or facts.evaluation,
            taken.notes,
        )
    )
    return Examined(taken, base, card)


def _base_of(catalog: Catalog, named: str | None, taken: Taken) -> BaseModel:
    """The base model that is named or stated, and that what was trained fits."""
    try:
        with catalog.database.read() as connection:
            if named is None:
                base = catalog.bases.find(connection, taken.stated_base)
            else:
                base = catalog.levels.in_transaction(connection, BaseModel, named)
            location = catalog.bases.location(connection, base.name)
    except BaseModelMismatch:
        if taken.is_of is None:
            raise
        return _found_by_content(catalog, taken, taken.is_of)
    taken.check_base(verified_path(location))
    _refuse_base_itself(taken, location)
    return base


def _refuse_base_itself(taken: Taken, location: Location) -> None:
    """A full model that nobody has trained is a mistake of whoever names the directory."""
    weights = {name: d for name, d in taken.content.items() if name.endswith(".safetensors")}
    if taken.kind == "checkpoint" and weights.items() <= location.digests.items():
        raise UnsupportedError(
            "the checkpoint has the very weights of its base model: it was not trained, or the "
            "directory is the base model's; say the directory that the training saved"
        )


def _refuse_changed_base(configuration: TrainingConfiguration | None, base: BaseModel) -> None:
    began_with = configuration.base_digest if configuration else None
    if began_with not in (None, base.digest):
        raise BaseModelMismatch(
            f"the training began with a base model of {began_with}, but {base.name} is "
            f"{base.digest} now; register it with the base model that it was trained on"
        )


def _found_by_content(catalog: Catalog, taken: Taken, is_of: Callable[[Path], bool]) -> BaseModel:
    """The one base model whose architecture, shapes and tokenizer a full model has."""
    fitting = []
    for base in catalog.levels.listing(BaseModel):
        try:
            with catalog.database.read() as connection:
                location = catalog.bases.location(connection, base.name)
            directory = verified_path(location)
            taken.check_base(directory)
        except (BaseModelMismatch, BaseModelMissingError):
            continue
        if is_of(directory):
            _refuse_base_itself(taken, location)
            fitting.append(base)
    if len(fitting) != 1:
        candidates = listed(base.name for base in fitting) or "none"
        raise BaseModelMismatch(
            f"{len(fitting)} base models have the architecture, shapes and tokenizer of the "
            f"checkpoint, which states {shown(taken.stated_base)}: {candidates}; say base_model="
        )
    return fitting[0]


def _publish(
    catalog: Catalog,
    shelf: Shelf,
    staging: Path,
    examined: Examined,
    training: Training,
) -> CustomizedModel:
    base, manifest = examined.base, examined.manifest
    while True:
        with catalog.lease() as lease:
            try:
                with catalog.database.write() as connection:
                    model, is_new = _announce(connection, catalog, shelf, lease, examined, training)
            except InUseError:  # by a process that registers or deletes the same, or has done so
                if not shelf.recover():
                    time.sleep(_WAIT_SECONDS)
                continue
            if not is_new:
                _log.info("%s is registered already: the same bytes", model.name)
            else:
                record = {"model": to_document(model), "base": to_document(base)}
                with disk_errors(f"{model.name} cannot be written"):
                    evolve(manifest, record=record).write(staging)
                    write_file(staging / README, render(model, base).encode())
                shelf.publish(model, staging, lease)
                _log.info("registered %s: %s", model.name, model.digest)
            return model


def _announce(
    connection: Connection,
    catalog: Catalog,
    shelf: Shelf,
    lease: Lease,
    examined: Examined,
    training: Training,
) -> tuple[CustomizedModel, bool]:
    """The model of this training, and whether it is new: then it is announced.

    Raises:
        AlreadyExistsError: The training id or its name stands for something else.
        InUseError: Another process is about the same.
    """
    base, digest = examined.base, examined.manifest.digest
    known = _registered(connection, catalog, base, training, digest)
    if known is not None:
        return known, False
    reserved = catalog.reservations.in_transaction(
        connection,
        train_name=training.train_name,
        base_model=base.name,
        training_id=training.id,
        created=training.created,
    )
    model = CustomizedModel(
        name=reserved.name,
        base=base.name,
        train_name=training.train_name,
        training_id=reserved.training_id,
        created=reserved.created,
        digest=digest,
        kind=examined.taken.kind,
        card=examined.card,
        label=training.label,
    )
    shelf.announce(connection, model, lease)
    return model, True


def _registered(
    connection: Connection, catalog: Catalog, base: BaseModel, training: Training, digest: str
) -> CustomizedModel | None:
    """What this training, or without an id any with the same bytes, was registered as."""
    wanted: dict[str, Any] = {"base": base.name, "train_name": training.train_name}
    if training.id is not None:
        wanted = {"training_id": str(training.id)}
    for known in catalog.levels.settled(connection, CustomizedModel, **wanted):
        if known.digest == digest and (known.base, known.train_name) == (
            base.name,
            training.train_name,
        ):
            return known
        if training.id is not None:
            raise AlreadyExistsError(f"training {training.id} is registered as {known.name}")
    return None
