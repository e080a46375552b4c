"""`Deployer`: a complete or customized model becomes a live one, at a deployment tool."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import evolve

from ..backends import Backend, BackendFactory, Plan, open_backend
from ..errors import DatabaseError, NoEnvironmentError, NotFoundError, listed, shown
from ..files.documents import from_document, to_document
from ..jobs.job import Job
from ..jobs.work import Work
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    LiveModel,
    Quantization,
    Served,
    Status,
    checked_quantization,
)
from ..naming import live_name
from .artifacts import RegistryArtifact
from .recovery import recover_deployments

if TYPE_CHECKING:
    from ..registry import ModelRegistry

Stored: TypeAlias = "CustomizedModel | CompleteModel"


class Deployer:
    """Hands models of a registry to deployment tools, and takes them back.

    >>> live = Deployer(registry).deploy(complete, quantization="q8_0").result()  # doctest: +SKIP

    Args:
        registry: Where the models are.
        backends: Tools besides the built-in and the installed ones: a name, which an environment
            has as its `backend`, to what makes a `Backend` of an environment. It is built again in
            the job's process, so it lies in a module that can be imported there.
    """

    def __init__(
        self, registry: ModelRegistry, *, backends: Mapping[str, BackendFactory] | None = None
    ) -> None:
        self._catalog = registry.catalog
        self._shelf = registry.shelf
        self._queue = registry.queue
        self._backends = dict(backends or {})

    def __repr__(self) -> str:
        return f"Deployer({self._shelf!r})"

    def deploy(
        self,
        model: CustomizedModel | CompleteModel,
        *,
        environment: str | DeploymentEnvironment | None = None,
        quantization: str = "no_quantization",
        served_name: str | None = None,
        options: Any = None,
    ) -> Job[LiveModel]:
        """Make the model callable at a deployment tool, in the background; returns at once.

        A customized model needs no complete model on disk: it is merged on the way. What can be
        refused is refused here, before the job starts and before anything is sent.

        Args:
            model: What to deploy.
            environment: May be omitted where exactly one is configured.
            quantization: `no_quantization`, `q8_0`, `q4_K_M` or `q4_K_S`.
            served_name: What callers put into `model`; derived from the live model's name if None.
            options: The backend's own value, such as `OllamaOptions`.

        Raises:
            NotFoundError: The model has been deleted.
            UnsupportedError: Not an architecture or mode we can make.
            NoEnvironmentError: No environment to deploy to.
            NoTemplateError: The tool needs a deployment template that the base lacks.
            MissingDependencyError: An optional package is not installed.
            ServerUnreachableError, ServerAnswerError: The tool does not answer, or with an error.
            InvalidNameError, InvalidOptionError, AlreadyExistsError: See `backends.Backend`.
        """
        mode = checked_quantization(quantization)
        target = self._environment(environment)
        model = self._catalog.levels.get(type(model), model.name)
        base = self._catalog.levels.get(BaseModel, model.base)
        recover_deployments(self._catalog, self._shelf, self._backends, environment=target.name)
        backend = open_backend(target, self._backends)
        options = backend.options() if options is None else options
        trial = live_name(model.name, uuid.uuid4(), mode)
        with RegistryArtifact(
            self._catalog, self._shelf, model, trial, mode, _hold_nothing
        ) as artifact:
            backend.preflight(artifact, served_name, options)
        return self._queue.submit(
            "deploy",
            lambda id: live_name(model.name, id, mode),
            {
                "kind": _KINDS[type(model)],
                "model": model.name,
                "environment": target.name,
                "quantization": mode,
                "served_name": served_name,
                "options": to_document(options),
            },
            (model.key, base.key) if isinstance(model, CustomizedModel) else (model.key,),
            self._backends,
        )

    def status(self, live: LiveModel) -> Status:
        """What the deployment tool says of the model at this moment.

        Raises:
            NotFoundError: It has been deleted.
        """
        live = self._catalog.levels.get(LiveModel, live.name)
        if live.state == "undeployed":
            return Status.ABSENT
        return self._backend_of(live).status(live.served)

    def undeploy(self, live: LiveModel) -> LiveModel:
        """Take the model off its deployment tool; its record stays, third parties' goes stale.

        Undeploying again is fine.

        Raises:
            NotFoundError: It has been deleted.
            ServerUnreachableError, ServerAnswerError: The tool does not answer, or with an error.
            ServedModelChangedError: What is there now is not what was deployed; it is left alone.
        """
        live = self._catalog.levels.get(LiveModel, live.name)
        if live.state == "live":
            self._backend_of(live).undeploy(live.served)
            live = evolve(live, state="undeployed")
            self._catalog.levels.mark_undeployed(live)
            self._shelf.drop_unused("gguf/")
        return live

    def recover(self) -> list[str]:
        """As `ModelRegistry.recover`, and with the backends that this deployer was given.

        Raises:
            DeploymentError: A tool cannot be asked now; the rest was done.
        """
        return recover_deployments(self._catalog, self._shelf, self._backends)

    def _backend_of(self, live: LiveModel) -> Backend:
        environment = self._catalog.levels.get(DeploymentEnvironment, live.environment)
        return open_backend(environment, self._backends)

    def _environment(self, named: str | DeploymentEnvironment | None) -> DeploymentEnvironment:
        if named is not None:
            name = named if isinstance(named, str) else named.name
            try:
                return self._catalog.levels.get(DeploymentEnvironment, name)
            except NotFoundError as error:
                raise NoEnvironmentError(
                    f"no deployment environment {shown(name)}; there is: {self._configured()}"
                ) from error
        every = list(self._catalog.levels.listing(DeploymentEnvironment))
        if len(every) != 1:
            raise NoEnvironmentError(f"say environment=, there is: {self._configured()}")
        return every[0]

    def _configured(self) -> str:
        every = self._catalog.levels.listing(DeploymentEnvironment)
        names = listed(environment.name for environment in every)
        return names or "none; ModelRegistry.add_environment(DeploymentEnvironment(...)) adds one"


_KINDS: Mapping[type[Any], str] = {CustomizedModel: "customized", CompleteModel: "complete"}


def _hold_nothing(key: str) -> None:
    """For an artifact that is only asked what it could give."""


def run_deploy(work: Work, backends: Mapping[str, BackendFactory]) -> None:
    """The worker's part of `Deployer.deploy`.

    What it is about to create at the tool is recorded before: if it is killed, `recover` takes it
    back.
    """
    levels = work.catalog.levels
    kind = next(kind for kind, name in _KINDS.items() if name == work.arguments["kind"])
    model: Stored = levels.get(kind, work.arguments["model"])
    environment = levels.get(DeploymentEnvironment, work.arguments["environment"])
    mode: Quantization = work.arguments["quantization"]
    backend = open_backend(environment, backends)
    options = from_document(backend.options, work.arguments["options"])
    intent: LiveModel | None = None

    def hold(key: str) -> None:
        with work.catalog.database.write() as connection:
            work.lease.take(connection, [key], f"the deployment of {work.name}")
            if intent is not None:
                levels.note_artifact(connection, intent, key)

    try:
        with RegistryArtifact(work.catalog, work.shelf, model, work.name, mode, hold) as artifact:
            plan = backend.preflight(artifact, work.arguments["served_name"], options)
            intent = _intended(work, model, environment, mode, artifact, plan)
            with work.catalog.database.write() as connection:
                work.lease.check(connection)
                levels.insert_pending(connection, intent, work.lease.owner, artifact=None)
            served = backend.push(plan, work.progress)
            _record(work, backend, evolve(intent, served=served), artifact.key)
    except BaseException:
        if intent is not None:
            with work.catalog.database.write() as connection:
                levels.drop(connection, intent, work.lease.owner)
        work.shelf.drop_unused("gguf/", even_held_by=work.lease.owner)
        raise


def _intended(
    work: Work,
    model: Stored,
    environment: DeploymentEnvironment,
    mode: Quantization,
    artifact: RegistryArtifact,
    plan: Plan,
) -> LiveModel:
    endpoint = environment.url if environment.address is not None else ""
    return LiveModel(
        name=work.name,
        source=model.name,
        base=model.base,
        train_name=model.train_name,
        quantization=mode,
        environment=environment.name,
        served=Served(plan.served_name, endpoint, "", "", details=plan.details),
        deploying_id=work.id,
        created=datetime.now(UTC),
        source_digest=model.digest,
        template_digest=artifact.template.digest if artifact.template else None,
        card=model.card,
    )


def _record(work: Work, backend: Backend, live: LiveModel, artifact: str | None) -> None:
    levels = work.catalog.levels
    try:
        with work.catalog.database.write() as connection:
            work.lease.check(connection)
            levels.make_visible(connection, live, work.lease.owner, artifact=artifact)
            work.end(connection, "succeeded")
    except BaseException as error:
        if isinstance(error, DatabaseError) and error.outcome_unknown and levels.is_visible(live):
            return
        backend.undeploy(live.served)
        raise
