"""`ModelRegistry`: what models there are. The only writer of the database."""

from __future__ import annotations

import functools
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from attrs import evolve

from .adapters.intake import Adapter, check_fits, copy_adapter
from .base_models import Location, locate, same_path, unchanged
from .cards.reading import read_base_card, training_facts
from .cards.readme import render_customized, storable_card
from .catalog.listing import Listing
from .errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    IntegrityError,
    InUseError,
    InvalidNameError,
    NotFoundError,
    NotLocalError,
    listed,
    shown,
)
from .files.manifest import README, Manifest, hash_file, to_document, write_file
from .files.safetensors import Checkpoint, json_object
from .jobs.job import RUNNING, Job, end_job
from .models import (
    TECHNICAL_NAME,
    TRAIN_NAME,
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    DeploymentTemplate,
    EvaluationSummary,
    LiveModel,
    ModelCard,
    ThirdPartyModel,
    TrainingConfiguration,
    checked_name,
    customized_name,
)
from .storage.local import LocalStorage, Storage

if TYPE_CHECKING:
    from .catalog.database import Database, Lease

Value = TypeVar(
    "Value",
    bound=BaseModel
    | CustomizedModel
    | CompleteModel
    | LiveModel
    | ThirdPartyModel
    | DeploymentEnvironment,
)


def storage_key(model: CustomizedModel | CompleteModel) -> str:
    """Where a model's bytes lie in the storage."""
    return f"{'customized' if isinstance(model, CustomizedModel) else 'complete'}/{model.name}"


class ModelRegistry:
    """Base, customized, complete and live models under one root directory.

    Safe to share between threads, to carry over a fork and to pickle; opens its database per
    call and keeps nothing open, so there is nothing to close.

    `storage`: where bytes are kept, if not in plain directories under `root`.

    >>> registry = ModelRegistry("./models")        # doctest: +SKIP
    """

    def __init__(self, root: str | os.PathLike[str], *, storage: Storage | None = None) -> None:
        self.root = Path(root).absolute()
        self._storage: Storage = storage if storage is not None else LocalStorage(self.root)

    def __repr__(self) -> str:
        return f"ModelRegistry({str(self.root)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.root, self._storage)

    @functools.cached_property
    def _database(self) -> Database:
        from .catalog.database import Database

        return Database(self.root / "registry.db")

    # Base models

    def add_base_model(
        self,
        technical_name: str,
        path: str | os.PathLike[str],
        *,
        model_name: str | None = None,
        deployment_template: DeploymentTemplate | None = None,
    ) -> BaseModel:
        """Add the pretrained model in the directory `path`: referenced and hashed, never copied.

        `technical_name`: short and unique, lower-case letters, digits, `.` and `-`, at most 24.
        `model_name`: unique; a Hub id where it has one; the directory's name if None.

        Raises:
            InvalidNameError: the technical name does not fit.
            AlreadyExistsError: a name is taken by another base model.
            BaseModelMissingError, MalformedError, UnsafeFileError: the directory is no model.
        """
        from .catalog import database as db
        from .catalog import rows as records

        checked_name("technical name", technical_name, TECHNICAL_NAME)
        location = locate(Path(path), _silent)
        directory = Path(location.path)
        base = BaseModel(
            technical_name=technical_name,
            model_name=_checked_model_name(model_name or Path(path).resolve().name),
            digest=location.digest,
            created=datetime.now(UTC),
            card=read_base_card(directory, Checkpoint.open(directory)),
            deployment_template=deployment_template,
        )
        with self._database.write() as connection:
            known = db.find(connection, db.base_models, name=technical_name)
            if known is not None:
                return self._added_again(base, records.value_of(BaseModel, known))
            if db.find(connection, db.base_models, model_name=base.model_name) is not None:
                raise AlreadyExistsError(f"a base model is named {shown(base.model_name)} already")
            records.insert(connection, base, **records.location_columns(location))
        return base

    @staticmethod
    def _added_again(new: BaseModel, known: BaseModel) -> BaseModel:
        if evolve(new, created=known.created, card=known.card) == known:
            return known
        raise AlreadyExistsError(
            f"base model {shown(known.name)} exists, with other content, name or template"
        )

    def set_deployment_template(
        self, technical_name: str, deployment_template: DeploymentTemplate | None
    ) -> BaseModel:
        """Give a base model another deployment template; models that are live keep theirs."""
        from .catalog import rows as records

        with self._database.write() as connection:
            row = records.required(connection, BaseModel, technical_name)
            known = records.value_of(BaseModel, row)
            changed = evolve(known, deployment_template=deployment_template)
            records.update(connection, changed)
        return changed

    def relocate_base_model(self, technical_name: str, path: str | os.PathLike[str]) -> BaseModel:
        """Say where a base model lies now; its bytes must be those that were added.

        Raises:
            BaseModelMismatch: other bytes lie there.
        """
        from .catalog import database as db
        from .catalog import rows as records

        location = locate(Path(path), _silent)
        with self._database.write() as connection:
            row = records.required(connection, BaseModel, technical_name)
            known = records.value_of(BaseModel, row)
            if location.digest != known.digest:
                raise BaseModelMismatch(
                    f"{shown(path)} holds {location.digest}, "
                    f"but base model {known.name} is {known.digest}"
                )
            db.change(connection, db.base_models, known.name, **records.location_columns(location))
        return known

    # Customized models

    def reserve(self, *, train_name: str, training_id: uuid.UUID, base_model: str) -> str:
        """Fix, before a training, the name its customized model will have; returns that name.

        The same training id gets the same name again, whatever the date has become.

        Raises:
            AlreadyExistsError: another training has that name, or this id trains something else.
        """
        from .catalog import database as db
        from .catalog import rows as records

        checked_name("train name", train_name, TRAIN_NAME)
        created = datetime.now(UTC)
        with self._database.write() as connection:
            records.required(connection, BaseModel, base_model)
            known = db.find(connection, db.reservations, training_id=str(training_id))
            if known is not None:
                if (known["base"], known["train_name"]) != (base_model, train_name):
                    raise AlreadyExistsError(f"training {training_id} is {shown(known['name'])}")
                return str(known["name"])
            name = customized_name(base_model, train_name, created, training_id)
            for table in (db.reservations, db.customized_models):
                if db.find(connection, table, name=name) is not None:
                    raise AlreadyExistsError(_name_clash(name, training_id))
            db.add(
                connection,
                db.reservations,
                training_id=str(training_id),
                name=name,
                base=base_model,
                train_name=train_name,
                created=created.isoformat(),
            )
        return name

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

        `base_model`: a technical name; if None, exactly one base model must match what the
        adapter says of itself. `training`, `evaluation`: read from the directory's own files if
        None. Registering the same training again returns the model that is there.

        Raises:
            BaseModelMismatch: the adapter's tensors do not fit the base, or no base matches.
            AlreadyExistsError: the training id or its name stands for something else.
            MalformedError, UnsafeFileError, UnsupportedAdapterError: not a sound adapter.
        """
        checked_name("train name", train_name, TRAIN_NAME)
        source = Path(directory)
        with self._storage.staging(f"register-{uuid.uuid4().hex}") as staging:
            copy_adapter(source, staging)
            adapter = Adapter.open(staging)
            base = self._base_of(source, base_model)
            with self.checkout(base) as location:
                check_fits(adapter, Checkpoint.open(location))
            facts = training_facts(source, adapter.config)
            card = storable_card(
                ModelCard(training or facts.training, evaluation or facts.evaluation)
            )
            training_id = training_id or self._drawn_id(train_name, base.name)
            return self._publish_customized(staging, base, train_name, training_id, card)

    def _drawn_id(self, train_name: str, base_model: str) -> uuid.UUID:
        """A training id of ours: where its four characters are taken, another is drawn."""
        for _ in range(1000):
            drawn = uuid.uuid4()
            with suppress(AlreadyExistsError):
                self.reserve(train_name=train_name, training_id=drawn, base_model=base_model)
                return drawn
        raise AlreadyExistsError(f"no free name for {shown(train_name)} today; use another")

    def _publish_customized(
        self,
        staging: Path,
        base: BaseModel,
        train_name: str,
        training_id: uuid.UUID,
        card: ModelCard,
    ) -> CustomizedModel:
        from .catalog import database as db
        from .catalog import rows as records

        content = {path.name: hash_file(path) for path in sorted(staging.iterdir())}
        manifest = Manifest("customized", content, {"base": base.digest}, {}, {})
        name = self.reserve(train_name=train_name, training_id=training_id, base_model=base.name)
        with self._database.read() as connection:
            reserved = db.find(connection, db.reservations, training_id=str(training_id))
        assert reserved is not None
        model = CustomizedModel(
            name=name,
            base=base.name,
            train_name=train_name,
            training_id=training_id,
            created=datetime.fromisoformat(reserved["created"]),
            digest=manifest.digest,
            card=card,
        )
        evolve(manifest, record=to_document(model)).write(staging)
        write_file(staging / README, render_customized(model, base).encode())
        with self._database.write() as connection:
            row = db.find(connection, db.customized_models, name=name)
            if row is not None:
                known = records.value_of(CustomizedModel, row)
                if row["deleting"] or known.digest != model.digest:
                    raise AlreadyExistsError(f"training {training_id} is registered as {name}")
                return known
            records.required(connection, BaseModel, base.name)
            records.insert(connection, model)
            self._publish(staging, storage_key(model))
        return model

    def _base_of(self, source: Path, named: str | None) -> BaseModel:
        if named is not None:
            return self.get(BaseModel, named)
        stated = json_object(source / "adapter_config.json").get("base_model_name_or_path")
        return self.find_base_model(stated)

    def find_base_model(self, stated: object) -> BaseModel:
        """The one base model that a training calls `stated`: its name, Hub id or path.

        Raises:
            BaseModelMismatch: none or several match; the message lists the candidates.
        """
        from sqlalchemy import select

        from .catalog import database as db
        from .catalog import rows as records

        rows = self._database.rows(select(db.base_models))
        matching = [
            records.value_of(BaseModel, row)
            for row in rows
            if stated in (row["name"], row["model_name"]) or same_path(stated, row["path"])
        ]
        if len(matching) != 1:
            candidates = listed(row["name"] for row in rows) or "none; add_base_model adds one"
            raise BaseModelMismatch(
                f"{len(matching)} base models match {shown(stated)}; "
                f"say base_model=, one of: {candidates}"
            )
        return matching[0]

    # What there is

    def get(self, kind: type[Value], name: str) -> Value:
        """The value of that class and name.

        Raises:
            NotFoundError: there is none.
        """
        from .catalog import rows as records

        with self._database.read() as connection:
            value: Value = records.value_of(kind, records.required(connection, kind, name))
        return value

    def base_models(self) -> Listing[BaseModel]:
        """All base models, newest first."""
        return self._listing(BaseModel)

    def customized_models(
        self, *, base: str | None = None, train_name: str | None = None
    ) -> Listing[CustomizedModel]:
        """Customized models, newest first; of one base model, of one train name."""
        return self._listing(CustomizedModel, base=base, train_name=train_name, deleting=0)

    def complete_models(
        self,
        *,
        base: str | None = None,
        train_name: str | None = None,
        customized: str | None = None,
    ) -> Listing[CompleteModel]:
        """Complete models, newest first; of one base, train name or customized model."""
        return self._listing(
            CompleteModel, base=base, train_name=train_name, customized=customized, deleting=0
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
        return self._listing(
            LiveModel,
            base=base,
            train_name=train_name,
            source=source,
            environment=environment,
            state=state,
        )

    def third_party_models(self) -> Listing[ThirdPartyModel]:
        """The models other services may call, newest first."""
        return self._listing(ThirdPartyModel)

    def environments(self) -> Listing[DeploymentEnvironment]:
        """The deployment environments, newest first."""
        return self._listing(DeploymentEnvironment)

    def jobs(self, state: str | None = None) -> Iterator[Job[Any]]:
        """Saves and deployments under way or over, newest first."""
        from sqlalchemy import select

        from .catalog import database as db

        rows = self._database.rows(select(db.jobs.c.id).order_by(db.jobs.c.seq.desc()))
        every = (self.job(uuid.UUID(row["id"])) for row in rows)
        return (job for job in every if state is None or job.state == state)

    def job(self, id: uuid.UUID) -> Job[Any]:
        """The job with that id, whichever process started it; `NotFoundError` if there is none."""
        return Job(self, id)

    # Environments and third parties

    def add_environment(self, environment: DeploymentEnvironment) -> DeploymentEnvironment:
        """Configure where models can be deployed to.

        Raises:
            AlreadyExistsError: another environment has that name.
            InvalidOptionError: no such backend, or it refuses the settings.
        """
        from .backends import open_backend
        from .catalog import database as db
        from .catalog import rows as records

        open_backend(environment)
        with self._database.write() as connection:
            known = db.find(connection, db.environments, name=environment.name)
            if known is None:
                records.insert(connection, environment)
            elif records.value_of(DeploymentEnvironment, known) != environment:
                raise AlreadyExistsError(
                    f"environment {shown(environment.name)} exists, with other settings"
                )
        return environment

    def add_third_party(self, live: LiveModel) -> ThirdPartyModel:
        """Offer a live model to other services: endpoint, API style and the name to call.

        Raises:
            NotFoundError: it is no longer live.
        """
        from .catalog import database as db
        from .catalog import rows as records

        model = ThirdPartyModel(
            name=live.name,
            endpoint=live.served.endpoint,
            api=live.served.api,
            model=live.served.name,
            environment=live.environment,
        )
        with self._database.write() as connection:
            row = records.required(connection, LiveModel, live.name)
            if row["state"] != "live":
                raise NotFoundError(f"{live.name} is {row['state']}, not live")
            if db.find(connection, db.third_party_models, name=model.name) is None:
                records.insert(connection, model)
        return model

    # Bytes

    @contextmanager
    def checkout(self, model: BaseModel | CustomizedModel | CompleteModel) -> Iterator[Path]:
        """The model's directory, read-only, for as long as the block lasts; not deleted meanwhile.

        Raises:
            NotFoundError: it has been deleted.
            BaseModelMissingError, BaseModelMismatch: a base model is gone or changed.
        """
        from .catalog import database as db
        from .catalog import rows as records

        lease = db.Lease(self._database)
        with self._database.write() as connection:
            records.required(connection, type(model), model.name)
            purpose = f"a checkout in process {os.getpid()}"
            db.take_lease(connection, lease.owner, [lease_key(model)], purpose)
        with lease, self._opened(model) as directory:
            yield directory

    @contextmanager
    def _opened(self, model: BaseModel | CustomizedModel | CompleteModel) -> Iterator[Path]:
        """`checkout` for those who hold the model already, such as a job."""
        if isinstance(model, BaseModel):
            yield unchanged(self._location(model))
        else:
            with self._storage.checkout(storage_key(model)) as directory:
                yield directory

    def _location(self, base: BaseModel) -> Location:
        from .catalog import rows as records

        with self._database.read() as connection:
            return records.location_of(records.required(connection, BaseModel, base.name))

    def local_path(self, model: BaseModel | CustomizedModel | CompleteModel) -> Path:
        """The model's directory on this host, for a look; `checkout` keeps it from being deleted.

        Raises:
            NotLocalError: the storage is not on this host.
        """
        with self.checkout(model) as directory:
            if not isinstance(model, BaseModel) and not isinstance(self._storage, LocalStorage):
                raise NotLocalError(f"{model.name} is in {self._storage!r}; use checkout")
            return directory

    def verify(self, model: CustomizedModel | CompleteModel) -> None:
        """Read every byte of the model and compare it with what was recorded.

        Raises:
            IntegrityError: naming the files that differ.
        """
        with self.checkout(model) as directory:
            manifest = Manifest.read(directory)
            if manifest.digest != model.digest:
                raise IntegrityError(
                    f"{model.name} is stored as {manifest.digest}, not as recorded"
                )
            manifest.verify(directory)

    # Deleting

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
            NotFoundError: it is not there.
            InUseError: naming what still needs it.
        """
        from .catalog import database as db
        from .catalog import rows as records

        table = records.TABLES[type(value)]
        stored = isinstance(value, CustomizedModel | CompleteModel)
        with self._database.write() as connection:
            row = records.required(connection, type(value), value.name, deleting=True)
            self._refuse_while_needed(connection, value, row)
            if stored:
                db.change(connection, table, value.name, deleting=1)
            else:
                db.remove(connection, table, value.name)
        if isinstance(value, CustomizedModel | CompleteModel):
            with self._database.write() as connection:  # nobody can take the name meanwhile
                self._storage.delete(storage_key(value))
                db.remove(connection, table, value.name)

    @staticmethod
    def _refuse_while_needed(connection: Any, value: Any, row: Any) -> None:
        from .catalog import database as db

        if isinstance(value, BaseModel | CustomizedModel | CompleteModel):
            db.refuse_if_leased(connection, lease_key(value))
        if isinstance(value, BaseModel):
            dependents = db.names(connection, db.customized_models, base=value.name)
            if dependents:
                raise InUseError(f"{value.name} is the base of {listed(dependents)}")
        if isinstance(value, DeploymentEnvironment):
            dependents = db.names(connection, db.live_models, environment=value.name, state="live")
            if dependents:
                raise InUseError(f"{value.name} still serves {listed(dependents)}")
        if isinstance(value, LiveModel) and row["state"] == "live":
            raise InUseError(f"{value.name} is deployed; Deployer.undeploy it first")

    def _listing(self, kind: type[Value], **equals: Any) -> Listing[Value]:
        from .catalog import rows as records

        return records.listing(self._database, kind, **equals)

    def _publish(self, staging: Path, key: str) -> None:
        """Publish inside the transaction that has inserted the row of `key`.

        Whoever holds the row owns the key: bytes without a row are what a killed process left.
        """
        try:
            self._storage.publish(staging, key)
        except AlreadyExistsError:
            self._storage.delete(key)
            self._storage.publish(staging, key)

    # For the worker

    def _publish_complete(self, complete: CompleteModel, staging: Path, lease: Lease) -> None:
        """Publish a save's result and end its job, in one transaction."""
        from .catalog import rows as records

        with self._database.write() as connection:
            lease.check(connection)
            records.insert(connection, complete)
            self._publish(staging, storage_key(complete))
            end_job(self, connection, lease, complete.name, "succeeded")

    def _claim_lost_saves(self, customized: str) -> list[str]:
        """The ids of saves of that customized model whose workers have gone without a word.

        Each is given out once, and cannot publish any more: what it left is the claimant's.
        """
        from sqlalchemy import select

        from .catalog import database as db

        under_way = select(db.jobs).where(db.jobs.c.kind == "save", db.jobs.c.state.in_(RUNNING))
        with self._database.write() as connection:
            lost = [
                row
                for row in connection.execute(under_way).mappings().all()
                if json.loads(row["arguments"])["customized"] == customized
                and not db.lease_holds(connection, row["id"])
            ]
            for row in lost:
                db.change(connection, db.jobs, row["name"], state="lost")
        return [row["id"] for row in lost]

    def _record_live(self, live: LiveModel, artifact: str | None, lease: Lease) -> None:
        """Record a deployment's result and end its job, in one transaction."""
        from .catalog import rows as records

        with self._database.write() as connection:
            lease.check(connection)
            records.insert(connection, live, artifact=artifact)
            end_job(self, connection, lease, live.name, "succeeded")

    def _record_undeployed(self, live: LiveModel) -> None:
        """Mark a live model as undeployed and what third parties see of it as stale."""
        from .catalog import database as db
        from .catalog import rows as records

        with self._database.write() as connection:
            records.update(connection, live, state=live.state)
            row = db.find(connection, db.third_party_models, name=live.name)
            if row is not None:
                offered = records.value_of(ThirdPartyModel, row)
                records.update(connection, evolve(offered, stale=True))
        self._sweep_artifacts()

    def _hold(self, key: str, job: str) -> None:
        """Keep a deployable file from being swept while the job runs."""
        from .catalog import database as db

        with self._database.write() as connection:
            db.take_lease(connection, job, [key], "a deployment")

    def _sweep_artifacts(self, job: str | None = None) -> None:
        """Remove the deployable files that no live model and no job but `job` needs."""
        from .catalog import database as db

        with self._database.write() as connection:
            for key in self._storage.keys("gguf/"):
                if db.names(connection, db.live_models, artifact=key, state="live"):
                    continue
                if job is not None:
                    db.end_lease(connection, job, key)
                with suppress(InUseError):
                    db.refuse_if_leased(connection, key)
                    self._storage.delete(key)


def lease_key(model: BaseModel | CustomizedModel | CompleteModel) -> str:
    """What a lease on the model holds."""
    return f"base/{model.name}" if isinstance(model, BaseModel) else storage_key(model)


def _reopened(root: Path, storage: Storage) -> ModelRegistry:
    return ModelRegistry(root, storage=storage)


def _silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


def _checked_model_name(name: str) -> str:
    if not name or len(name) > 200 or not name.isprintable():
        raise InvalidNameError(f"model name {shown(name)} must be 1 to 200 printable characters")
    return name


def _name_clash(name: str, training_id: uuid.UUID) -> str:
    return (
        f"{name} is taken by another training of that day whose id also begins with "
        f"{training_id.hex[:4]}; draw another training id"
    )
