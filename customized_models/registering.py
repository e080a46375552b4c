"""An adapter directory becomes a customized model.

In three transactions: what is known is looked up; the name is taken and the model announced; it is
made visible. The directory is read once, into a private copy, before anything is believed of it.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen

from .adapters.fitting import check_fits
from .adapters.intake import Intake, take_in
from .base_models import verified_path
from .cards.reading import training_facts
from .cards.readme import render_customized, storable_card
from .errors import AlreadyExistsError, InUseError
from .files.documents import to_document
from .files.manifest import README, Manifest
from .files.model_directory import CARRIED, files_of
from .files.remote_code import check_remote_code
from .files.safetensors import Checkpoint
from .files.writing import disk_errors, write_file
from .models import BaseModel, CustomizedModel, EvaluationSummary, ModelCard, TrainingConfiguration
from .shelf import Shelf

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from .base_models import Location
    from .catalog.catalog import Catalog
    from .catalog.leases import Lease

_WAIT_SECONDS = 0.1  # between two looks at another process that registers the same


@frozen
class Training:
    """What is to be registered, besides the adapter.

    Attributes:
        train_name: Checked.
        base_model: A technical name; None for the one that the adapter names.
        id: Of the training; None for the one that has registered the same, or else a new one.
        configuration: Read from the adapter's directory if None.
        evaluation: Read from the adapter's directory if None.
    """

    train_name: str
    base_model: str | None = None
    id: uuid.UUID | None = None
    configuration: TrainingConfiguration | None = None
    evaluation: EvaluationSummary | None = None


def register(catalog: Catalog, shelf: Shelf, source: Path, training: Training) -> CustomizedModel:
    """See `ModelRegistry.register`."""
    with shelf.storage.staging(f"register-{uuid.uuid4().hex}") as staging:
        taken = take_in(source, staging)
        facts = training_facts(source, taken.adapter.config)
        base, location = _base_of(catalog, training.base_model, taken.stated_base)
        check_fits(taken.adapter, Checkpoint.open(verified_path(location)))
        check_remote_code(files_of(staging, *CARRIED), trusted=base.trust_remote_code)
        card = storable_card(
            ModelCard(
                training.configuration or facts.training,
                training.evaluation or facts.evaluation,
                taken.notes,
            )
        )
        return _publish(catalog, shelf, staging, taken, base, training, card)


def _base_of(catalog: Catalog, named: str | None, stated: object) -> tuple[BaseModel, Location]:
    with catalog.database.read() as connection:
        if named is None:
            base = catalog.bases.find(connection, stated)
        else:
            base = catalog.levels.in_transaction(connection, BaseModel, named)
        return base, catalog.bases.location(connection, base.name)


def _publish(
    catalog: Catalog,
    shelf: Shelf,
    staging: Path,
    taken: Intake,
    base: BaseModel,
    training: Training,
    card: ModelCard,
) -> CustomizedModel:
    manifest = Manifest("customized", taken.content, {"base": base.digest}, {}, {})
    while True:
        with catalog.lease() as lease:
            try:
                with catalog.database.write() as connection:
                    model, is_new = _announce(
                        connection, catalog, shelf, lease, base, training, manifest.digest, card
                    )
            except InUseError:  # by a process that registers or deletes the same, or has done so
                if not shelf.recover():
                    time.sleep(_WAIT_SECONDS)
                continue
            if is_new:
                record = {"model": to_document(model), "base": to_document(base)}
                with disk_errors(f"{model.name} cannot be written"):
                    evolve(manifest, record=record).write(staging)
                    write_file(staging / README, render_customized(model, base).encode())
                shelf.publish(model, staging, lease)
            return model


def _announce(
    connection: Connection,
    catalog: Catalog,
    shelf: Shelf,
    lease: Lease,
    base: BaseModel,
    training: Training,
    digest: str,
    card: ModelCard,
) -> tuple[CustomizedModel, bool]:
    """The model of this training, and whether it is new: then it is announced.

    Raises:
        AlreadyExistsError: The training id or its name stands for something else.
        InUseError: Another process is about the same.
    """
    known = _registered(connection, catalog, base, training, digest)
    if known is not None:
        return known, False
    reserved = catalog.reservations.in_transaction(
        connection,
        train_name=training.train_name,
        base_model=base.name,
        training_id=training.id,
    )
    model = CustomizedModel(
        name=reserved.name,
        base=base.name,
        train_name=training.train_name,
        training_id=reserved.training_id,
        created=reserved.created,
        digest=digest,
        card=card,
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
