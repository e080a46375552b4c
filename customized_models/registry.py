"""`ModelRegistry`: what models there are. A thin face over its rows and its bytes."""

from __future__ import annotations

import functools
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast, get_args, overload

from attrs import evolve

from . import arguments, hub
from .backends import check_environment, moved_endpoint
from .base_models import Location, check_files, hash_base_model
from .cards.reading import read_base_card
from .catalog.listing import Listing
from .catalog.model_listing import ModelListing
from .deploying.recovery import recover_deployments
from .errors import (
    BaseModelMissingError,
    CustomizedModelsError,
    InUseError,
    InvalidArgumentError,
    InvalidNameError,
    NotFoundError,
    NotLocalError,
    listed,
    shown,
)
from .evicting import evict, rebuild
from .files.links import hub_id
from .files.reading import existing_directory
from .files.remote_code import check_remote_code
from .files.safetensors import Checkpoint
from .history import ACTIONS, Action, Event, Subscription
from .hub import HubCommit
from .jobs.bar import Bar
from .jobs.job import Job
from .jobs.queue import JobQueue
from .labels import Labels, Reference, checked_alias, checked_description, checked_tags
from .leavings import DOWNLOADS, sweep
from .lineage import Lineage, lineage_of
from .models import (
    JOB_STATES,
    LIVE_STATES,
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    DeploymentTemplate,
    EvaluationSummary,
    JobState,
    LiveModel,
    LiveState,
    ModelCard,
    ThirdPartyModel,
    TrainingConfiguration,
)
from .moving import copy_registry
from .naming import TECHNICAL_NAME, checked_name, train_name_of
from .outbox import Outbox
from .processes import cores, refuse_windows
from .registering import Training, register
from .search import Moment, is_pattern, since_and_until
from .shelf import GRACE_SECONDS, Litter, Shelf, Stored
from .storage import LocalStorage, Storage, open_storage
from .usage import DeletionPlan, Usage
from .values import value_of

if TYPE_CHECKING:
    from .catalog.catalog import Catalog

_log = logging.getLogger(__name__)

Model = TypeVar(
    "Model",
    bound=BaseModel
    | CustomizedModel
    | CompleteModel
    | LiveModel
    | ThirdPartyModel
    | DeploymentEnvironment,
)

Evaluated = TypeVar("Evaluated", CustomizedModel, CompleteModel)
Labelled: TypeAlias = CustomizedModel | CompleteModel | LiveModel
WithBytes: TypeAlias = BaseModel | CustomizedModel | CompleteModel

KINDS = (
    BaseModel,
    CustomizedModel,
    CompleteModel,
    LiveModel,
    ThirdPartyModel,
    DeploymentEnvironment,
)
"""The classes of what a registry has."""


class ModelRegistry:
    """Base, customized, complete and live models under one root directory.

    Safe to share between threads, to carry over a fork and to pickle; opens its database per
    call and keeps nothing open, so there is nothing to close.

    >>> registry = ModelRegistry("./models")        # doctest: +SKIP

    What is given by a value may be given by its name as well, and a name is the derived or the
    typed one where a training has both.

    Args:
        root: Made when something is first written. `~` is the user's home.
        storage: Where bytes are kept, or its URL; plain directories under `root` if None.
        database: The URL of an SQLite file, or of a database of PostgreSQL's that machines share,
            `postgresql+psycopg://<user>@<host>/<database>`; `sqlite:///<root>/registry.db` if None.
        max_running: How many jobs of the registry may run at once, those of other processes
            counted; the rest wait in the order in which they were submitted. The number of cores
            that this process may use if None. Those that an executor runs do not count.

    Raises:
        InvalidArgumentError: An argument is of another type, or `root` is a URL.
        InvalidOptionError: `storage` is no URL of a storage that is installed.
        UnsupportedError: This is Windows. When something is first asked for: `database` is of
            another kind.
        MissingDependencyError: When something is first asked for: psycopg is not installed.

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
        max_running: int | None = None,
    ) -> None:
        refuse_windows()
        self.root = _root(root)
        self._storage = _storage(self.root, storage)
        self._database = (
            f"sqlite:///{self.root / 'registry.db'}"
            if database is None
            else arguments.text("database", database)
        )
        self._max_running = cores() if max_running is None else _at_least_one(max_running)

    def __repr__(self) -> str:
        return f"ModelRegistry({str(self.root)!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.root, self._storage, self._database, self._max_running)

    @property
    def catalog(self) -> Catalog:
        return self._opened[0]

    @property
    def shelf(self) -> Shelf:
        return self._opened[1]

    @functools.cached_property
    def queue(self) -> JobQueue:
        return JobQueue(self.catalog, self.shelf, self.root / ".jobs", self._max_running)

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
        path: str | os.PathLike[str] | None = None,
        *,
        model_name: str | None = None,
        deployment_template: DeploymentTemplate | None = None,
        trust_remote_code: bool = False,
        download: bool = False,
        revision: str | None = None,
        progress: bool = True,
    ) -> BaseModel:
        """Add the pretrained model in the directory `path`: referenced and hashed, never copied.

        Adding the same again gives the one that is there. `path` may be a Hub id, of which the
        cache of huggingface_hub has the files; with `download`, they are fetched into it. A Hub id
        alone, as `technical_name`, is given a technical name made of it.

        Args:
            technical_name: Short and unique, lower-case letters, digits, `.` and `-`, at most 24.
            path: Its directory, or its Hub id.
            model_name: Unique; a Hub id where it has one. If None, that of the Hub cache that the
                directory is in, or else the directory's name.
            deployment_template: For tools that need one; a known one stays if None.
            trust_remote_code: Let transformers run the code that came with the model, where it
                does not know the model itself; complete models have that code too.
            download: Whether the network may be used.
            revision: A commit, branch or tag of the Hub's; None for the newest.
            progress: Whether to show a bar while it is hashed.

        Raises:
            InvalidNameError: The technical name does not fit.
            AlreadyExistsError: A name is taken by another base model; it says what differs.
            BaseModelMissingError, MalformedError, UnsafeFileError: The directory is no model, or
                the cache does not have it and it may not be fetched.
            HubError: The Hub failed.
            UnsupportedBaseError: It has code of its own that is not trusted, or an adapter.
            StorageError, DatabaseError: A disk or the database failed.
        """
        if path is None:
            path = arguments.text("technical_name", technical_name)
            technical_name = hub.technical_name_of(path)
        checked_name("technical name", technical_name, TECHNICAL_NAME)
        if model_name is not None:
            _checked_model_name(model_name)
        template = _template(deployment_template)
        arguments.instance("trust_remote_code", trust_remote_code, bool)
        fetched = hub.base_directory(path, revision, download=arguments.truth("download", download))
        directory = fetched or existing_directory(
            arguments.path("path", path), BaseModelMissingError
        )
        directory = directory.resolve()
        weights = Checkpoint.open(directory)
        check_remote_code(check_files(directory, weights), trusted=trust_remote_code)
        card = read_base_card(directory, weights)
        location = _hashed(directory, technical_name, progress)
        name = (hub_id(directory) or directory.name) if model_name is None else model_name
        base = BaseModel(
            technical_name=technical_name,
            model_name=_checked_model_name(name),
            digest=location.digest,
            created=datetime.now(UTC),
            card=card,
            deployment_template=template,
            trust_remote_code=trust_remote_code,
        )
        added = self.catalog.bases.add(base, location)
        _log.info("base model %s: %s, %s", added.name, added.digest, location.path)
        return added

    def set_deployment_template(
        self, base_model: BaseModel | str, deployment_template: DeploymentTemplate | None
    ) -> BaseModel:
        """Give a base model another deployment template; models that are live keep theirs.

        Raises:
            NotFoundError: There is no such base model.
        """
        known = self.catalog.levels.meant("base_model", base_model, BaseModel)
        changed = evolve(known, deployment_template=_template(deployment_template))
        self.catalog.bases.change(changed)
        _log.info("base model %s has another deployment template", changed.name)
        return changed

    def relocate_base_model(
        self, base_model: BaseModel | str, path: str | os.PathLike[str], *, progress: bool = True
    ) -> BaseModel:
        """Say where a base model lies now; its bytes must be those that were added.

        Args:
            base_model: It, or its name.
            path: Its directory.
            progress: Whether to show a bar while it is hashed.

        Raises:
            NotFoundError: There is no such base model.
            BaseModelMissingError: There is no such directory.
            BaseModelMismatch: Other bytes lie there.
            MalformedError, UnsafeFileError: The directory is no model.
        """
        known = self.catalog.levels.meant("base_model", base_model, BaseModel)
        directory = existing_directory(arguments.path("path", path), BaseModelMissingError)
        relocated = self.catalog.bases.relocate(
            known.name, _hashed(directory, known.name, progress)
        )
        _log.info("base model %s lies elsewhere now: %s", known.name, path)
        return relocated

    def find_base_model(self, stated: object) -> BaseModel:
        """The one base model that a training calls `stated`: its name, Hub id or path.

        Raises:
            BaseModelMismatch: None or several match; the message lists the candidates.
        """
        with self.catalog.database.read() as connection:
            return self.catalog.bases.find(connection, stated)

    # Customized models

    def reserve(
        self, *, train_name: str, training_id: uuid.UUID | str, base_model: BaseModel | str
    ) -> str:
        """Fix, before a training, the name its customized model will have; returns that name.

        The same training id gets the same name again, whatever the date has become. The arguments
        are those of `register`.

        Raises:
            InvalidNameError: The train name has nothing to make a name of.
            NotFoundError: There is no such base model.
            AlreadyExistsError: Another training has that name, or this id trains something else.
        """
        return self.catalog.reservations.reserve(
            train_name=train_name_of(train_name),
            base_model=arguments.name_of("base_model", base_model, BaseModel),
            training_id=arguments.identifier("training_id", training_id),
        ).name

    def register(
        self,
        directory: str | os.PathLike[str],
        *,
        train_name: str,
        base_model: BaseModel | str | None = None,
        training_id: uuid.UUID | str | None = None,
        training: TrainingConfiguration | Mapping[str, Any] | None = None,
        evaluation: EvaluationSummary | Mapping[str, Any] | None = None,
        created: datetime | None = None,
    ) -> CustomizedModel:
        """Copy what a training saved in, with its tokenizer and chat template if it has them.

        That is a PEFT adapter or, with a `config.json` and whole weights, a full model; what only
        the training needs is left out.

        Registering the same training again, or without an id the same bytes for the same base and
        train name, returns the model that is there.

        Args:
            directory: What the training saved.
            train_name: What you call the training. It is kept as the model's `label`; its
                `train_name` is derived from it by `naming.train_name_of`: "My run_2" is `my-run-2`.
            base_model: If None, exactly one base model must match what the adapter says of itself,
                or have the architecture, shapes and tokenizer of the full model.
            training_id: Drawn if None.
            training: Also as a dict of its fields. Read from the directory's own files if None.
            evaluation: Also as a dict of its fields, or of metrics and their values. Read from the
                directory's own files if None.
            created: When it was trained, for the date in its name; now if None. A name that is
                reserved keeps its date.

        Raises:
            InvalidArgumentError: An argument is of another type, or has unknown fields.
            InvalidNameError: The train name has nothing to make a name of.
            NotFoundError: There is no such base model.
            BaseModelMismatch: The tensors do not fit the base, the base has changed since the
                training began, or no base matches.
            BaseModelMissingError: The base is gone.
            AlreadyExistsError: The training id or its name stands for something else.
            MalformedError, UnsafeFileError, UnsupportedError: Not a sound adapter or model.
            NonFiniteError: It has NaN or infinity.
            StorageError, DatabaseError: A disk or the database failed; the same call again finds
                out whether it was registered where `outcome_unknown` is true.
        """
        wanted = Training.given(train_name, base_model, training_id, training, evaluation, created)
        source = existing_directory(arguments.path("directory", directory))
        return register(self.catalog, self.shelf, source, wanted)

    @overload
    def add_evaluation(self, model: Evaluated, metrics: Mapping[str, float]) -> Evaluated: ...
    @overload
    def add_evaluation(
        self, model: str, metrics: Mapping[str, float]
    ) -> CustomizedModel | CompleteModel: ...
    def add_evaluation(
        self, model: CustomizedModel | CompleteModel | str, metrics: Mapping[str, float]
    ) -> CustomizedModel | CompleteModel:
        """Add what was measured of a model to its card; returns the model with its new card.

        Its bytes, its digest and its name stay. Models that were made from it keep their cards.

        Args:
            model: What was measured.
            metrics: Finite numbers by name, such as `{"eval_accuracy": 0.9}`. Those of names that
                the card has already take their place.

        Raises:
            InvalidArgumentError: An argument is of another type.
            NotFoundError: The model has been deleted.
            EvictedError: Its bytes, which the card lies beside, were dropped; `rebuild` it first.
        """
        new = {
            name: arguments.finite(f"metrics[{name!r}]", value)
            for name, value in arguments.mapping("metrics", metrics).items()
        }
        known = self.catalog.levels.meant("model", model, CustomizedModel, CompleteModel)
        changed = self.shelf.change_card(known, lambda card: _with_metrics(card, new))
        _log.info("%s: measured %s", changed.name, ", ".join(new))
        return changed

    # The Hub

    def push_to_hub(
        self,
        model: CustomizedModel | CompleteModel | str,
        repository: str,
        *,
        private: bool = True,
        revision: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> HubCommit:
        """Push a model to the Hub, with its card and its record, in one commit.

        Every byte is compared with what was recorded before. Its card goes without values that are
        paths, and a file in which a path below your home directory or a token of the Hub stands
        is refused. The same call again uploads what an interrupted one has not, and nothing if
        all is there. Files of the model that was there before are removed. A model that was
        evicted is rebuilt.

        Args:
            model: By itself or by its name.
            repository: Its id on the Hub, `owner/name`; made if it is not there.
            private: Whether a new repository is private.
            revision: The branch; None for the main one.
            token: None for the one that huggingface_hub knows.
            endpoint: The Hub's address; None for that of huggingface_hub (`HF_ENDPOINT`).

        Raises:
            NotFoundError: It has been deleted.
            IntegrityError: It is damaged here.
            UnsafeFileError: A file states what should not be published.
            NotReproducible, BaseModelMissingError, BaseModelMismatch: It was evicted, and cannot be
                rebuilt.
            InvalidNameError: `repository` is no Hub id.
            HubError: The Hub does not answer or refuses.
        """
        known = self.catalog.levels.meant("model", model, CustomizedModel, CompleteModel)
        where, name = _hub(endpoint, token), arguments.text("repository", repository)
        stored = cast("Stored", self._whole(known))
        pushed = hub.push(
            self.catalog, self.shelf, where, stored, name, private=private, revision=revision
        )
        _log.info("%s is at %s", stored.name, pushed.url)
        return pushed

    def from_hub(
        self,
        repository: str,
        *,
        revision: str | None = None,
        train_name: str | None = None,
        base_model: BaseModel | str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
    ) -> CustomizedModel | CompleteModel:
        """Bring a model from the Hub into the registry. An interrupted download is resumed.

        What `push_to_hub` has pushed comes back as the same model: under its name, with its digest,
        ids and card, every file compared with the record. If its base model is not here, it is
        recorded without a directory, which `add_base_model` or `relocate_base_model` gives.
        Anything else is registered as by `register`: an adapter, or a full model.

        Args:
            repository: Its id on the Hub.
            revision: A commit, branch or tag; None for the newest.
            train_name: For what was not pushed by this library; the repository's name if None.
            base_model: As for `register`, likewise.
            token: None for the one that huggingface_hub knows.
            endpoint: The Hub's address; None for that of huggingface_hub (`HF_ENDPOINT`).

        Raises:
            HubError: The Hub does not answer, does not have it, or refuses.
            IntegrityError: It is not as it was pushed.
            AlreadyExistsError: Its name stands for another model here.
            BaseModelMismatch: Its base's name stands for another base model here, or its base has
                another name here.
            InvalidNameError: `repository` is no Hub id.
            MalformedError, UnsafeFileError, NonFiniteError, UnsupportedAdapterError,
                UnsupportedError: What was not pushed by this library cannot be registered; see
                `register`.
        """
        name = arguments.text("repository", repository)
        with hub.fetched(_hub(endpoint, token), name, revision, self.root / DOWNLOADS) as directory:
            if hub.was_pushed(directory):
                return hub.take_back(self.catalog, self.shelf, directory)
            return self.register(
                directory, train_name=train_name or name.rpartition("/")[2], base_model=base_model
            )

    # What there is

    def get(self, kind: type[Model], name: str) -> Model:
        """The value of that class and name.

        Raises:
            NotFoundError: There is none.
            IntegrityError: Its row in the database is damaged.
        """
        if kind not in KINDS:
            classes = ", ".join(known.__name__ for known in KINDS)
            raise InvalidArgumentError(f"kind takes one of the classes {classes}")
        return self.catalog.levels.get(kind, arguments.text("name", name))

    def base_models(self) -> ModelListing[BaseModel]:
        """All base models, newest first."""
        return self.catalog.levels.listing(BaseModel)

    def customized_models(
        self,
        *,
        base: BaseModel | str | None = None,
        train_name: str | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
    ) -> ModelListing[CustomizedModel]:
        """Customized models, newest first. What is found is narrowed and ordered further.

        >>> good = registry.customized_models(train_name="sweep-*").where(  # doctest: +SKIP
        ...     metric("eval_loss") < 1.2
        ... )
        >>> good.order_by(metric("eval_loss"))[:10]                         # doctest: +SKIP

        Args:
            base: Of this base model.
            train_name: Of this training; a pattern if it has `*` for any text or `?` for any
                character.
            since: Made then or later; a date begins at midnight in UTC, and a time has a time zone.
            until: Made before that.

        Raises:
            NotFoundError: What a filter names is not there, and was not when anything listed was
                made. Other lists with filters raise the same.
            InvalidArgumentError: A filter is of another type, or there is no such state.
        """
        return self.catalog.levels.listing(
            CustomizedModel,
            since_and_until(since, until),
            base=base,
            train_name=_filter(train_name),
        )

    def complete_models(
        self,
        *,
        base: BaseModel | str | None = None,
        train_name: str | None = None,
        customized: CustomizedModel | str | None = None,
        evicted: bool | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
    ) -> ModelListing[CompleteModel]:
        """Complete models, newest first; filtered as `customized_models`, or by what they are.

        Args:
            base: Of this base model.
            train_name: Of this training, or a pattern.
            customized: Made of this one.
            evicted: Whether their bytes were dropped.
            since: Made then or later.
            until: Made before that.
        """
        dropped = None if evicted is None else int(arguments.truth("evicted", evicted))
        return self.catalog.levels.listing(
            CompleteModel,
            since_and_until(since, until),
            base=base,
            train_name=_filter(train_name),
            customized=customized,
            evicted=dropped,
        )

    def live_models(
        self,
        *,
        base: BaseModel | str | None = None,
        train_name: str | None = None,
        source: CustomizedModel | CompleteModel | str | None = None,
        environment: DeploymentEnvironment | str | None = None,
        state: LiveState | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
    ) -> ModelListing[LiveModel]:
        """Live models, newest first; filtered as `customized_models`, or by what they are.

        Args:
            base: Of this base model.
            train_name: Of this training, or a pattern.
            source: Of this complete or customized model.
            environment: Deployed there.
            state: "live", "superseded" or "undeployed".
            since: Deployed then or later.
            until: Deployed before that.
        """
        if state is not None:
            arguments.choice("state", state, LIVE_STATES)
        return self.catalog.levels.listing(
            LiveModel,
            since_and_until(since, until),
            base=base,
            train_name=_filter(train_name),
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

    def jobs(self, state: JobState | None = None) -> Listing[Job[Any]]:
        """Saves and deployments that wait, are under way or over, newest first."""
        if state is not None:
            arguments.choice("state", state, JOB_STATES)
        return self.queue.jobs(state)

    def job(self, id: uuid.UUID | str) -> Job[Any]:
        """The job with that id, whichever process started it; `NotFoundError` if there is none."""
        return self.queue.job(arguments.identifier("id", id))

    # What people say of models, and what has happened

    def labels(self, model: Labelled | str) -> Labels:
        """The tags, aliases and description of a model.

        Raises:
            NotFoundError: It is not there.
        """
        return self.catalog.labels.of(self._labelled(model))

    def tag(self, model: Labelled | str, *tags: str) -> None:
        """Give a model tags, besides those that it has; `customized_models.tag` searches by them.

        Raises:
            NotFoundError: It is not there.
            InvalidNameError: A tag is empty, longer than 100 characters, or has `*` or `?`.
        """
        self.catalog.labels.tag(self._labelled(model), checked_tags(tags))

    def untag(self, model: Labelled | str, *tags: str) -> None:
        """Take tags from a model; those that it does not have are no error."""
        self.catalog.labels.untag(self._labelled(model), checked_tags(tags))

    def set_description(self, model: Labelled | str, description: str) -> None:
        """Give a model another description, of up to 10,000 characters; an empty one removes it.

        Raises:
            NotFoundError: It is not there.
        """
        self.catalog.labels.describe(self._labelled(model), checked_description(description))

    def set_alias(
        self, model: Labelled | str, alias: str, *, protected: bool | None = None
    ) -> None:
        """Let `alias` mean this model from now on, and no longer the one that had it.

        Wherever a model's name is taken, so is `alias@train-name`. An alias belongs to one level:
        customized, complete and live models of a training may each have a champion.

        >>> registry.set_alias(best, "champion", protected=True)     # doctest: +SKIP
        >>> registry.get(CustomizedModel, "champion@support")        # doctest: +SKIP

        Args:
            model: The model.
            alias: Lower-case letters, digits, `.` and `-`.
            protected: Whether what has the alias cannot be deleted. As before if None, and at first
                it can.

        Raises:
            NotFoundError: The model is not there.
            InvalidNameError: The alias has a character that is not allowed.
        """
        if protected is not None:
            arguments.truth("protected", protected)
        self.catalog.labels.set_alias(self._labelled(model), checked_alias(alias), protected)

    def remove_alias(self, model: Labelled | str, alias: str) -> None:
        """Let an alias of a model mean nothing any more, protected or not.

        Raises:
            NotFoundError: The model does not have it.
        """
        self.catalog.labels.remove_alias(self._labelled(model), checked_alias(alias))

    def _labelled(self, model: object) -> Labelled:
        known = self.catalog.levels.meant("model", model, *get_args(Labelled))
        return cast(Labelled, known)

    def events(
        self,
        about: Any = None,
        *,
        action: Action | None = None,
        since: Moment | None = None,
        until: Moment | None = None,
    ) -> Listing[Event]:
        """What has happened, newest first.

        The log is only added to. Each event is written in the transaction of the change itself.

        Args:
            about: A value or a name, also of what was deleted, or an alias such as
                "champion@support", which was given to one model after the other.
            action: Only these.
            since: Then or later.
            until: Before that.

        Raises:
            InvalidNameError: An alias has a character that is not allowed.
        """
        name = None if about is None else arguments.name_of("about", about, *KINDS)
        if name is not None and (reference := Reference.parse(name)):
            name = str(reference)
        kind = None if about is None or isinstance(about, str) else type(about)
        if action is not None:
            arguments.choice("action", action, ACTIONS)
        return self.catalog.events.listing(name, kind, action, since_and_until(since, until))

    def subscribe(
        self, call: Callable[[Event], object], *, after: int | None = None
    ) -> Subscription:
        """Call a function with every event from now on, whichever process makes the change.

        It is called in a thread, within a second of the change. Close what is returned to end it.

        >>> with registry.subscribe(print):                          # doctest: +SKIP
        ...     registry.tag(model, "keep")

        Args:
            call: What is called.
            after: The number of an event: all later ones are told as well, so that nothing is
                missed between two runs of a program. 0 for all.

        Raises:
            InvalidArgumentError: No event has the number yet, as in a database that was made again.
        """
        if not callable(call):
            raise arguments.refused("call", call, "a function that takes an event")
        newest = self.catalog.events.newest()
        last = newest if after is None else arguments.whole("after", after)
        if not 0 <= last <= newest:
            raise InvalidArgumentError(f"after takes the number of an event, 0 to {newest}")
        return Subscription(self.catalog.database, self.catalog.events.newer, call, last)

    def lineage(
        self, model: BaseModel | CustomizedModel | CompleteModel | LiveModel | str
    ) -> Lineage:
        """Where a model comes from, and what was made of it: a tree, and a picture in a notebook.

        >>> print(registry.lineage(live).verify())                   # doctest: +SKIP

        What was deleted is told by the event log.

        Raises:
            NotFoundError: It is not there.
        """
        kinds = (BaseModel, CustomizedModel, CompleteModel, LiveModel)
        known: Any = self.catalog.levels.meant("model", model, *kinds)
        return lineage_of(self.catalog, self.shelf, known)

    # Environments and third parties

    def add_environment(self, environment: DeploymentEnvironment) -> DeploymentEnvironment:
        """Configure where models can be deployed to; adding the same again is fine.

        Raises:
            AlreadyExistsError: Another environment has that name; it says what differs.
            InvalidOptionError: No such backend, or it refuses the settings.
        """
        given: DeploymentEnvironment = value_of("environment", environment, DeploymentEnvironment)
        check_environment(given)
        added = self.catalog.levels.add_once(given)
        _log.info("environment %s: %s", added.name, added.backend)
        return added

    def update_environment(self, environment: DeploymentEnvironment) -> DeploymentEnvironment:
        """Change what is recorded of an environment, such as the address of a server that moved.

        The endpoints of the models that are live there, and of what third parties see of them,
        follow. Nothing is asked of the server: `Deployer.status` does that.

        Args:
            environment: As it is to be; the one of its name is replaced.

        Raises:
            NotFoundError: No environment has that name.
            InUseError: It has another backend, and models are still deployed there or on their way.
            InvalidOptionError: No such backend, or it refuses the settings.
        """
        given: DeploymentEnvironment = value_of("environment", environment, DeploymentEnvironment)
        check_environment(given)
        levels = self.catalog.levels
        with self.catalog.database.write() as connection:
            old = levels.in_transaction(connection, DeploymentEnvironment, given.name)
            deployed = levels.deployed_at(connection, given.name)
            if old.backend != given.backend:
                levels.refuse_while_used(connection, given.name)
            levels.put(connection, given)
            for live in deployed:
                endpoint = moved_endpoint(live.served.endpoint, old, given)
                followed = evolve(live, served=evolve(live.served, endpoint=endpoint))
                levels.put(connection, followed)
                levels.follow(connection, followed)
        _log.info("environment %s changed", given.name)
        return given

    def add_third_party(self, live: LiveModel | str) -> ThirdPartyModel:
        """Offer a live model to other services: endpoint, API style and the name to call.

        Raises:
            NotFoundError: It is no longer live.
        """
        known = self.catalog.levels.meant("live", live, LiveModel)
        if known.state != "live":
            raise NotFoundError(f"{known.name} is {known.state}, not live")
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
        self, model: BaseModel | CustomizedModel | CompleteModel | str
    ) -> AbstractContextManager[Path]:
        """The model's directory, read-only, for as long as the block lasts; not deleted meanwhile.

        A model that was evicted is rebuilt first, which takes as long as a save.

        Raises:
            NotFoundError: It has been deleted.
            NotReproducible: It was evicted, and other bytes come out here.
            BaseModelMissingError, BaseModelMismatch: A base model is gone or changed.
            LeaseLostError: At the end of the block, if this process was stopped for so long that
                the model may have been deleted meanwhile.
        """
        return self.shelf.checkout(self._whole(model))

    def local_path(self, model: BaseModel | CustomizedModel | CompleteModel | str) -> Path:
        """The model's directory on this host, for a look; `checkout` keeps it from being deleted.

        A model that was evicted is rebuilt first, which takes as long as a save.

        Raises:
            NotFoundError: It has been deleted.
            NotReproducible, BaseModelMissingError, BaseModelMismatch: As `checkout`.
            NotLocalError: The storage is not on this host.
        """
        known: WithBytes = self.catalog.levels.meant("model", model, *get_args(WithBytes))
        if not isinstance(known, BaseModel) and not isinstance(self._storage, LocalStorage):
            raise NotLocalError(f"{known.name} is in {self._storage!r}; use checkout")
        with self.shelf.checkout(self._whole(known)) as directory:
            return directory

    def _whole(self, model: object) -> WithBytes:
        """A model with its bytes, which are made again if they were evicted."""
        known: WithBytes = self.catalog.levels.meant("model", model, *get_args(WithBytes))
        if isinstance(known, CompleteModel) and known.evicted:
            return self.rebuild(known).result(progress=False)
        return known

    def evict(self, complete: CompleteModel | str) -> CompleteModel:
        """Drop the bytes of a complete model and keep its recipe, from which they can be rebuilt.

        It stays in every list, with its name, digest and card. `checkout` and `Deployer.deploy`
        rebuild it; so does `rebuild`. What it was made of cannot be deleted meanwhile, and must lie
        here: else these bytes may be the last. Aliases, protected ones as well, stay and do not
        hinder it. Evicting again is fine.

        Raises:
            NotFoundError: It has been deleted, or what it was made of.
            BaseModelMissingError, BaseModelMismatch: Its base model is gone, or another one now.
            InUseError: Naming who reads it, or is served from its directory; or its card was
                changed meanwhile.
            IntegrityError: What it was made of is damaged.
            StorageError: A disk failed; if it is evicted all the same, `gc` removes its bytes.
        """
        known = self.catalog.levels.meant("complete", complete, CompleteModel)
        evicted = evict(self.catalog, self.shelf, known)
        _log.info("evicted %s", evicted.name)
        return evicted

    def rebuild(self, complete: CompleteModel | str) -> Job[CompleteModel]:
        """Make the bytes of an evicted model again, under its name, in the background.

        The job ends with `NotReproducible` if they do not have its digest. A model that was not
        evicted is left as it is. `Merger.rebuild` makes a second model instead.

        Raises:
            NotFoundError: It has been deleted, or what it was made of.
            BaseModelMismatch: Its base model is another one now.
        """
        known = self.catalog.levels.meant("complete", complete, CompleteModel)
        return rebuild(self.catalog, self.queue, known)

    def verify(self, model: CustomizedModel | CompleteModel | str) -> None:
        """Read every byte of the model and compare it with what was recorded.

        Raises:
            NotFoundError: It has been deleted.
            EvictedError: Its bytes were dropped; `rebuild` makes them again, and compares them.
            IntegrityError: Naming the files that differ.
        """
        stored = self.catalog.levels.meant("model", model, CustomizedModel, CompleteModel)
        self.shelf.verify(stored)
        _log.info("%s is as it was recorded", stored.name)

    # Deleting and repairing

    def delete(
        self,
        value: BaseModel
        | CustomizedModel
        | CompleteModel
        | LiveModel
        | ThirdPartyModel
        | DeploymentEnvironment
        | str,
    ) -> None:
        """Remove one thing and nothing else, given by itself or by its name.

        A base model's own files stay; a customized model's complete and live models stay; a live
        model must be undeployed first. A protected alias keeps a model from being deleted, and from
        nothing else: it can be undeployed and evicted.

        Raises:
            NotFoundError: It is not there.
            InvalidArgumentError: Several have that name, as a live model and what third parties
                see of it do; the message says of which classes.
            InUseError: Naming what still needs it.
            StorageError: Its bytes could not be removed; deleting it again, or `recover`, does it.
        """
        known: Any = value  # `meant` does not find what a deletion that failed has left
        if isinstance(value, str) or not isinstance(value, KINDS):
            known = self.catalog.levels.meant("value", value, *KINDS)
        if isinstance(known, CustomizedModel | CompleteModel):
            self.shelf.delete(known)
        else:
            self.catalog.levels.delete(known)
        _log.info("deleted %s %s", type(known).__name__, known.name)

    def plan_deletion(
        self,
        value: BaseModel
        | CustomizedModel
        | CompleteModel
        | LiveModel
        | ThirdPartyModel
        | DeploymentEnvironment
        | str,
    ) -> DeletionPlan:
        """What `delete` would do: whether it is refused, what was made of it, the bytes freed.

        Raises:
            NotFoundError: It is not there.
            InvalidArgumentError: Several have that name.
        """
        known = self.catalog.levels.meant("value", value, *KINDS)
        return self.catalog.usage.plan_deletion(known)

    def usage(self) -> Usage:
        """What the registry's bytes are spent on, and how many could be reclaimed."""
        return self.catalog.usage.sizes(self.shelf.bytes_of("gguf/"))

    def recover(self) -> list[str]:
        """Finish or undo what killed processes left half-way, here and at deployment tools.

        What trainings have left because it could not be registered is registered now.

        It happens by itself for stored models when a registry is first used. Nothing that a living
        process is about is touched.

        Returns:
            What was done, a sentence each.

        Raises:
            CustomizedModelsError: Something cannot be done now; the rest was.
        """
        done, failed = list[str](), list[CustomizedModelsError]()
        for recover in (
            self.shelf.recover,
            lambda: recover_deployments(self.catalog, self.shelf),
            lambda: Outbox(self.root).recover(self.catalog, self.shelf),
        ):
            try:
                done += recover()
            except CustomizedModelsError as error:
                failed.append(error)
        for one in done:
            _log.info("recovery: %s", one)
        if failed:
            for other in failed[1:]:
                failed[0].add_note(str(other))
            raise failed[0]
        return done

    def gc(self, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False) -> list[Litter]:
        """List stored bytes that belong to no model, and remove those known for long enough.

        Logs of jobs that were last written to that long ago are removed as well, and so is what
        interrupted downloads have left. What trainings have left that `recover` cannot register
        stays for a week at least.

        Args:
            grace_seconds: How long after `gc` has first seen them they are removed.
            dry_run: Only list them.

        Raises:
            InUseError: Another registry is just copied into this one.
            StorageError: A disk or the storage failed; what was listed before is not removed.
        """
        grace = arguments.seconds("grace_seconds", grace_seconds)
        if not arguments.truth("dry_run", dry_run):
            self.queue.drop_logs(grace)
        found = self.shelf.gc(grace_seconds=grace, dry_run=dry_run)
        return found + sweep(self.root, grace_seconds=grace, dry_run=dry_run)

    def copy_to(self, other: ModelRegistry, *, progress: bool = True) -> None:
        """Copy everything to an empty registry: into another database, another storage, or both.

        All rows are copied, with ids, labels, events, ended jobs and the recorded places of base
        models, and all bytes of models. Each byte is compared with what was recorded. The other
        registry shows nothing before all is there. Calling it again goes on where a copy was
        interrupted; once all is there, it changes nothing. This registry stays as it is.

        Where both have the same storage, its bytes are left where they are, and not read.

        Args:
            other: Where to copy to.
            progress: Whether to show a bar.

        Raises:
            InUseError: A job is under way here, something is being made or deleted, a training
                waits to be registered, or another process copies to `other`.
            AlreadyExistsError: `other` has something else.
            IntegrityError: Naming what is damaged here. Nothing of the copy is visible.
            InvalidArgumentError: `other` has the same database.
        """
        to = arguments.instance("other", other, ModelRegistry)
        if to.catalog.database.url == self.catalog.database.url:
            raise InvalidArgumentError("other takes a registry with another database")
        if kept := Outbox(self.root).kept():
            raise InUseError(
                f"trainings wait to be registered: {listed(str(path) for path in kept)}; "
                f"ModelRegistry.recover() registers them"
            )
        with Bar("copy", shown=arguments.truth("progress", progress)) as bar:
            copy_registry((self.catalog, self.shelf), (to.catalog, to.shelf), bar.update)
        _log.info("copied %r to %r", self, to)

    def reindex(self) -> list[str]:
        """Make rows again for stored models that have none, or a damaged one, from manifests.

        Base models come back without a directory, which `relocate_base_model` gives. What only
        the database knew is lost: tags, descriptions, aliases and what they protected, the log of
        events, live models, environments, third-party models, jobs.

        Returns:
            The names of the models whose rows were made.

        Raises:
            IntegrityError: Naming stored models whose manifests are damaged; the others are done.
        """
        return self.shelf.reindex()


def _reopened(root: Path, storage: Storage, database: str, max_running: int) -> ModelRegistry:
    return ModelRegistry(root, storage=storage, database=database, max_running=max_running)


def _root(given: object) -> Path:
    root = arguments.path("root", given)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(root)):  # pathlib has made one of two slashes
        raise InvalidArgumentError(
            "root takes a directory, not a URL: storage= takes the URL of a place for bytes, "
            "database= that of a database, and root a directory for what belongs to this host"
        )
    if "?" in str(root):  # which begins the options in a database's URL
        raise InvalidArgumentError("root takes a directory without '?' in its path")
    return root.absolute()


def _storage(root: Path, given: object) -> Storage:
    if given is None:
        return LocalStorage(root)
    if isinstance(given, str):
        return open_storage(given)
    methods = [name for name in vars(Storage) if not name.startswith("_")]
    if isinstance(given, type) or not all(callable(getattr(given, m, None)) for m in methods):
        raise arguments.refused("storage", given, f"an object with {', '.join(methods)}, or a URL")
    return cast(Storage, given)


def _hub(endpoint: object, token: object) -> hub.Hub:
    return hub.Hub(
        None if endpoint is None else arguments.text("endpoint", endpoint),
        None if token is None else arguments.text("token", token),
    )


def _at_least_one(max_running: object) -> int:
    count = arguments.whole("max_running", max_running)
    if count < 1:
        raise InvalidArgumentError("max_running takes 1 or more")
    return count


def _template(given: object) -> DeploymentTemplate | None:
    if given is None:
        return None
    return cast(DeploymentTemplate, value_of("deployment_template", given, DeploymentTemplate))


def _with_metrics(card: ModelCard, new: Mapping[str, float]) -> ModelCard:
    metrics = {**card.evaluation.metrics, **new}
    return evolve(card, evaluation=evolve(card.evaluation, metrics=metrics))


def _filter(label: object) -> str | None:
    """A train name, or a pattern of some, which are in lower case."""
    if isinstance(label, str) and is_pattern(label):
        return arguments.text("train_name", label).lower()
    return None if label is None else train_name_of(label)


def _hashed(directory: Path, title: str, progress: object) -> Location:
    with Bar(title, shown=arguments.truth("progress", progress)) as bar:
        return hash_base_model(directory, bar.update)


def _checked_model_name(given: object) -> str:
    name = arguments.text("model_name", given)
    if not name or len(name) > 200 or not name.isprintable():
        raise InvalidNameError(f"model name {shown(name)} must be 1 to 200 printable characters")
    return name
