"""`ModelRegistry`: what models there are. A thin face over its rows and its bytes."""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import evolve

from .backends import check_environment
from .base_models import check_files, hash_base_model
from .cards.reading import read_base_card
from .catalog.listing import Listing
from .deploying.recovery import recover_deployments
from .errors import (
    BaseModelMissingError,
    CustomizedModelsError,
    InvalidNameError,
    NotFoundError,
    NotLocalError,
    shown,
)
from .files.links import hub_id
from .files.reading import existing_directory
from .files.remote_code import check_remote_code
from .files.safetensors import Checkpoint
from .jobs.job import Job
from .jobs.queue import JobQueue
from .models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    DeploymentTemplate,
    EvaluationSummary,
    LiveModel,
    ThirdPartyModel,
    TrainingConfiguration,
)
from .naming import TECHNICAL_NAME, TRAIN_NAME, checked_name
from .registering import Training, register
from .shelf import GRACE_SECONDS, Litter, Shelf
from .storage import LocalStorage, Storage, open_storage

if TYPE_CHECKING:
    from .catalog.catalog import Catalog

Value = TypeVar(
    "Value",
    bound=BaseModel
    | CustomizedModel
    | CompleteModel
    | LiveModel
    | ThirdPartyModel
    | DeploymentEnvironment,
)


class ModelRegistry:
    """Base, customized, complete and live models under one root directory.

    Safe to share between threads, to carry over a fork and to pickle; opens its database per
    call and keeps nothing open, so there is nothing to close.

    >>> registry = ModelRegistry("./models")        # doctest: +SKIP

    Args:
        root: Made when something is first written. `~` is the user's home.
        storage: Where bytes are kept, or its URL; plain directories under `root` if None.
        database: The database's URL; `sqlite:///<root>/registry.db` if None.

    Attributes:
        root: The absolute path.
        catalog: The rows.
        shelf: The bytes.
        queue: The jobs.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        storage: Storage | str | None = None,
        database: str | None = None,
    ) -> None:
        self.root = Path(root).expanduser().absolute()
        self._storage = (
            LocalStorage(self.root)
            if storage is None
            else open_storage(storage)
            if isinstance(storage, str)
            else storage
        )
        self._database = database or f"sqlite:///{self.root / 'registry.db'}"

    def __repr__(self) -> str:
        return f"ModelRegistry({str(self.root)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.root, self._storage, self._database)

    @property
    def catalog(self) -> Catalog:
        return self._opened[0]

    @property
    def shelf(self) -> Shelf:
        return self._opened[1]

    @functools.cached_property
    def queue(self) -> JobQueue:
        return JobQueue(self.catalog, self.shelf, self.root / ".jobs")

    @functools.cached_property
    def _opened(self) -> tuple[Catalog, Shelf]:
        from .catalog.catalog import Catalog

        catalog = Catalog(self._database)
        shelf = Shelf(self._storage, catalog)
        with suppress(CustomizedModelsError):  # `recover` says what cannot be done now
            shelf.recover()
        return catalog, shelf

    # Base models

    def add_base_model(
        self,
        technical_name: str,
        path: str | os.PathLike[str],
        *,
        model_name: str | None = None,
        deployment_template: DeploymentTemplate | None = None,
        trust_remote_code: bool = False,
    ) -> BaseModel:
        """Add the pretrained model in the directory `path`: referenced and hashed, never copied.

        Adding the same again gives the one that is there.

        Args:
            technical_name: Short and unique, lower-case letters, digits, `.` and `-`, at most 24.
            path: Its directory.
            model_name: Unique; a Hub id where it has one. If None, that of the Hub cache that the
                directory is in, or else the directory's name.
            deployment_template: For tools that need one; a known one stays if None.
            trust_remote_code: Let transformers run the code that came with the model, where it
                does not know the model itself; complete models have that code too.

        Raises:
            InvalidNameError: The technical name does not fit.
            AlreadyExistsError: A name is taken by another base model; it says what differs.
            BaseModelMissingError, MalformedError, UnsafeFileError: The directory is no model.
            UnsupportedBaseError: It has code of its own that is not trusted, or an adapter.
            StorageError, DatabaseError: A disk or the database failed.
        """
        checked_name("technical name", technical_name, TECHNICAL_NAME)
        directory = existing_directory(path, BaseModelMissingError).resolve()
        weights = Checkpoint.open(directory)
        files = check_files(directory, weights)
        check_remote_code(files, trusted=trust_remote_code)
        card = read_base_card(directory, weights)
        location = hash_base_model(directory, _silent)
        base = BaseModel(
            technical_name=technical_name,
            model_name=_checked_model_name(model_name or hub_id(directory) or directory.name),
            digest=location.digest,
            created=datetime.now(UTC),
            card=card,
            deployment_template=deployment_template,
            trust_remote_code=trust_remote_code,
        )
        return self.catalog.bases.add(base, location)

    def set_deployment_template(
        self, technical_name: str, deployment_template: DeploymentTemplate | None
    ) -> BaseModel:
        """Give a base model another deployment template; models that are live keep theirs.

        Raises:
            NotFoundError: There is no such base model.
        """
        known = self.get(BaseModel, technical_name)
        changed = evolve(known, deployment_template=deployment_template)
        self.catalog.bases.change(changed)
        return changed

    def relocate_base_model(self, technical_name: str, path: str | os.PathLike[str]) -> BaseModel:
        """Say where a base model lies now; its bytes must be those that were added.

        Raises:
            NotFoundError: There is no such base model.
            BaseModelMismatch: Other bytes lie there.
            MalformedError, UnsafeFileError: The directory is no model.
        """
        location = hash_base_model(existing_directory(path, BaseModelMissingError), _silent)
        return self.catalog.bases.relocate(technical_name, location)

    def find_base_model(self, stated: object) -> BaseModel:
        """The one base model that a training calls `stated`: its name, Hub id or path.

        Raises:
            BaseModelMismatch: None or several match; the message lists the candidates.
        """
        with self.catalog.database.read() as connection:
            return self.catalog.bases.find(connection, stated)

    # Customized models

    def reserve(self, *, train_name: str, training_id: uuid.UUID, base_model: str) -> str:
        """Fix, before a training, the name its customized model will have; returns that name.

        The same training id gets the same name again, whatever the date has become.

        Raises:
            InvalidNameError: The train name does not fit.
            NotFoundError: There is no such base model.
            AlreadyExistsError: Another training has that name, or this id trains something else.
        """
        checked_name("train name", train_name, TRAIN_NAME)
        reserved = self.catalog.reservations.reserve(
            train_name=train_name, base_model=base_model, training_id=training_id
        )
        return reserved.name

    def register(
        self,
        directory: str | os.PathLike[str],
        *,
        train_name: str,
        base_model: str | None = None,
        training_id: uuid.UUID | None = None,
        training: TrainingConfiguration | None = None,
        evaluation: EvaluationSummary | None = None,
    ) -> CustomizedModel:
        """Copy a trained PEFT adapter in, with its tokenizer and chat template if it has them.

        Registering the same training again, or without an id the same bytes for the same base and
        train name, returns the model that is there.

        Args:
            directory: What the training saved.
            train_name: Lower-case letters, digits, `.` and `-`, at most 48.
            base_model: A technical name; if None, exactly one base model must match what the
                adapter says of itself.
            training_id: Drawn if None.
            training: Read from the directory's own files if None.
            evaluation: Read from the directory's own files if None.

        Raises:
            InvalidNameError: The train name does not fit.
            NotFoundError: There is no such base model.
            BaseModelMismatch: The adapter's tensors do not fit the base, or no base matches.
            BaseModelMissingError: The base is gone.
            AlreadyExistsError: The training id or its name stands for something else.
            MalformedError, UnsafeFileError, UnsupportedAdapterError: Not a sound adapter.
            StorageError, DatabaseError: A disk or the database failed; the same call again finds
                out whether it was registered where `outcome_unknown` is true.
        """
        checked_name("train name", train_name, TRAIN_NAME)
        wanted = Training(train_name, base_model, training_id, training, evaluation)
        return register(self.catalog, self.shelf, existing_directory(directory), wanted)

    # What there is

    def get(self, kind: type[Value], name: str) -> Value:
        """The value of that class and name.

        Raises:
            NotFoundError: There is none.
            IntegrityError: Its row in the database is damaged.
        """
        return self.catalog.levels.get(kind, name)

    def base_models(self) -> Listing[BaseModel]:
        """All base models, newest first."""
        return self.catalog.levels.listing(BaseModel)

    def customized_models(
        self, *, base: str | None = None, train_name: str | None = None
    ) -> Listing[CustomizedModel]:
        """Customized models, newest first; of one base model, of one train name."""
        return self.catalog.levels.listing(CustomizedModel, base=base, train_name=train_name)

    def complete_models(
        self,
        *,
        base: str | None = None,
        train_name: str | None = None,
        customized: str | None = None,
    ) -> Listing[CompleteModel]:
        """Complete models, newest first; of one base, train name or customized model."""
        return self.catalog.levels.listing(
            CompleteModel, base=base, train_name=train_name, customized=customized
        )

    def live_models(
        self,
        *,
        base: str | None = None,
        train_name: str | None = None,
        source: str | None = None,
        environment: str | None = None,
        state: str | None = None,
    ) -> Listing[LiveModel]:
        """Live models, newest first; `source`: the complete or customized model's name."""
        return self.catalog.levels.listing(
            LiveModel,
            base=base,
            train_name=train_name,
            source=source,
            environment=environment,
            state=state,
        )

    def third_party_models(self) -> Listing[ThirdPartyModel]:
        """The models other services may call, newest first."""
        return self.catalog.levels.listing(ThirdPartyModel)

    def environments(self) -> Listing[DeploymentEnvironment]:
        """The deployment environments, newest first."""
        return self.catalog.levels.listing(DeploymentEnvironment)

    def jobs(self, state: str | None = None) -> Iterator[Job[Any]]:
        """Saves and deployments under way or over, newest first."""
        return self.queue.jobs(state)

    def job(self, id: uuid.UUID) -> Job[Any]:
        """The job with that id, whichever process started it; `NotFoundError` if there is none."""
        return self.queue.job(id)

    # Environments and third parties

    def add_environment(self, environment: DeploymentEnvironment) -> DeploymentEnvironment:
        """Configure where models can be deployed to; adding the same again is fine.

        Raises:
            AlreadyExistsError: Another environment has that name.
            InvalidOptionError: No such backend, or it refuses the settings.
        """
        check_environment(environment)
        return self.catalog.levels.add_once(environment)

    def add_third_party(self, live: LiveModel) -> ThirdPartyModel:
        """Offer a live model to other services: endpoint, API style and the name to call.

        Raises:
            NotFoundError: It is no longer live.
        """
        known = self.get(LiveModel, live.name)
        if known.state != "live":
            raise NotFoundError(f"{live.name} is {known.state}, not live")
        return self.catalog.levels.add_once(
            ThirdPartyModel(
                name=known.name,
                endpoint=known.served.endpoint,
                api=known.served.api,
                model=known.served.name,
                environment=known.environment,
            )
        )

    # Bytes

    def checkout(
        self, model: BaseModel | CustomizedModel | CompleteModel
    ) -> AbstractContextManager[Path]:
        """The model's directory, read-only, for as long as the block lasts; not deleted meanwhile.

        Raises:
            NotFoundError: It has been deleted.
            BaseModelMissingError, BaseModelMismatch: A base model is gone or changed.
            LeaseLostError: At the end of the block, if this process was stopped for so long that
                the model may have been deleted meanwhile.
        """
        return self.shelf.checkout(model)

    def local_path(self, model: BaseModel | CustomizedModel | CompleteModel) -> Path:
        """The model's directory on this host, for a look; `checkout` keeps it from being deleted.

        Raises:
            NotFoundError: It has been deleted.
            NotLocalError: The storage is not on this host.
        """
        with self.checkout(model) as directory:
            if not isinstance(model, BaseModel) and not isinstance(self._storage, LocalStorage):
                raise NotLocalError(f"{model.name} is in {self._storage!r}; use checkout")
            return directory

    def verify(self, model: CustomizedModel | CompleteModel) -> None:
        """Read every byte of the model and compare it with what was recorded.

        Raises:
            NotFoundError: It has been deleted.
            IntegrityError: Naming the files that differ.
        """
        self.shelf.verify(model)

    # Deleting and repairing

    def delete(
        self,
        value: BaseModel
        | CustomizedModel
        | CompleteModel
        | LiveModel
        | ThirdPartyModel
        | DeploymentEnvironment,
    ) -> None:
        """Remove one thing and nothing else.

        A base model's own files stay; a customized model's complete and live models stay; a live
        model must be undeployed first.

        Raises:
            NotFoundError: It is not there.
            InUseError: Naming what still needs it.
            StorageError: Its bytes could not be removed; deleting it again, or `recover`, does it.
        """
        if isinstance(value, CustomizedModel | CompleteModel):
            self.shelf.delete(value)
        else:
            self.catalog.levels.delete(value)

    def recover(self) -> list[str]:
        """Finish or undo what killed processes left half-way, here and at deployment tools.

        It happens by itself for stored models when a registry is first used. Nothing that a living
        process is about is touched.

        Returns:
            What was done, a sentence each.

        Raises:
            StorageError, DatabaseError, DeploymentError: It cannot be done now; the rest was.
        """
        return [*self.shelf.recover(), *recover_deployments(self.catalog, self.shelf)]

    def gc(self, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False) -> list[Litter]:
        """List stored bytes that belong to no model, and remove those known for long enough.

        Args:
            grace_seconds: How long after `gc` has first seen them they are removed.
            dry_run: Only list them.
        """
        return self.shelf.gc(grace_seconds=grace_seconds, dry_run=dry_run)

    def reindex(self) -> list[str]:
        """Make rows again for stored models that have none, or a damaged one, from manifests.

        Base models come back without a place, which `relocate_base_model` tells. What only the
        database knew is lost: live models, environments, third-party models, jobs.

        Returns:
            The names of the models whose rows were made.

        Raises:
            IntegrityError: Naming stored models whose manifests are damaged; the others are done.
        """
        return self.shelf.reindex()


def _reopened(root: Path, storage: Storage, database: str) -> ModelRegistry:
    return ModelRegistry(root, storage=storage, database=database)


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _checked_model_name(name: str) -> str:
    if not name or len(name) > 200 or not name.isprintable():
        raise InvalidNameError(f"model name {shown(name)} must be 1 to 200 printable characters")
    return name
