"""`Deployer`: a complete or customized model becomes a live one, at a deployment tool."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from attrs import evolve, frozen

from .. import arguments
from ..backends import (
    Backend,
    BackendFactory,
    Describing,
    Plan,
    Promoting,
    Secrets,
    Tools,
    Unloading,
    checked_options,
    environment_variable,
    moved_endpoint,
    open_backend,
    served_there,
)
from ..errors import (
    AlreadyExistsError,
    CustomizedModelsError,
    DeploymentError,
    NoEnvironmentError,
    NoTemplateError,
    NotFoundError,
    UnsupportedError,
    listed,
    shown,
)
from ..evicting import rebuild
from ..files.documents import to_document
from ..jobs.isolated import run_isolated
from ..jobs.job import Job
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    DeploymentTemplate,
    LiveModel,
    Status,
    checked_quantization,
)
from ..naming import live_name
from ..sources import small_files
from .artifacts import RegistryArtifact
from .exporting import ExportRequest
from .proving import checked_proofs
from .recovery import recover_deployments
from .request import DeployRequest
from .templates.fitness import check_fitness
from .templates.proposing import ProposedTemplate, propose_deployment_template

if TYPE_CHECKING:
    from ..registry import ModelRegistry

Stored: TypeAlias = "CustomizedModel | CompleteModel"

_RENDER_SECONDS = 120.0  # a chat template is somebody's program, and may not come to an end
UNLOAD_SECONDS = 10.0  # an answer of ordinary length is finished by then
_UNKNOWN = "answers under way were not waited for: the tool does not tell of them"


@frozen
class EnvironmentReport:
    """A deployment environment, and what its server says of itself.

    Attributes:
        environment: As it is recorded.
        reachable: Whether the server answers; None where the backend needs none.
        told: Its version, and what it can do.
        error: Why it cannot be reached or used, in words.
    """

    environment: DeploymentEnvironment
    reachable: bool | None
    told: Mapping[str, Any]
    error: str = ""


class Deployer:
    """Hands models of a registry to deployment tools, and takes them back.

    A model may be given by its name, or by an alias such as "champion@support".

    >>> live = Deployer(registry).deploy(complete, quantization="q8_0").result()  # doctest: +SKIP

    Args:
        registry: Where the models are.
        backends: Tools besides the built-in and the installed ones: a name, which an environment
            has as its `backend`, to what makes a `Backend` of an environment. It is built again in
            the job's process, so it lies in a module that can be imported there.
        secrets: Gives the secret of a name that an environment states, such as its `token_env`;
            environment variables if not given. It is asked in the job's process as well.
        executor: Runs the jobs, as that of `Merger` does: its hosts see the deployment tools as
            well. What can be refused is refused in this process, before. A deployment whose worker
            is killed is lost, and `recover` takes it back; it is not begun again.
    """

    def __init__(
        self,
        registry: ModelRegistry,
        *,
        backends: Mapping[str, BackendFactory] | None = None,
        secrets: Secrets = environment_variable,
        executor: Executor | None = None,
    ) -> None:
        self._catalog = registry.catalog
        self._shelf = registry.shelf
        self._queue = registry.queue.run_by(executor)
        self._tools = Tools(dict(backends or {}), secrets)

    def __repr__(self) -> str:
        return f"Deployer({self._shelf!r})"

    def deploy(
        self,
        model: CustomizedModel | CompleteModel | str,
        *,
        environment: str | DeploymentEnvironment | None = None,
        quantization: str = "no_quantization",
        served_name: str | None = None,
        options: Any = None,
        template: DeploymentTemplate | Literal["infer"] | None = None,
        replace: bool = False,
        gguf: str | os.PathLike[str] | None = None,
        proofs: str | Collection[str] = ("content", "template"),
        accept_failed: str | Collection[str] = (),
    ) -> Job[LiveModel]:
        """Make the model callable at a deployment tool, in the background; returns at once.

        A customized model needs no complete model on disk: it is merged on the way. What can be
        refused is refused here, before the job starts and before anything is sent. The model takes
        the served name once it is proven; if a proof fails, whatever had the name keeps it. A
        complete model that was evicted is rebuilt before this returns.

        Args:
            model: What to deploy.
            environment: May be omitted where exactly one is configured.
            quantization: `no_quantization`, `q8_0`, `q4_K_M` or `q4_K_S`.
            served_name: What callers put into `model`; derived from the live model's name if None.
            options: The backend's own value, such as `OllamaOptions`.
            template: In place of the base model's deployment template; "infer" makes one from the
                model's chat template. A tool that renders with that itself needs none, and one
                that is given is refused.
            replace: Take over a served name that stands for something already; what had it is kept
                for `rollback`. Not at tools that keep no versions, such as llama.cpp on this host:
                undeploy what has the name first, or choose another.
            gguf: A finished file of this model, to be served as it is by a tool that reads such;
                `quantization` then only names the live model. Its values are compared with nothing
                but by the proof "greedy".
            proofs: Which proofs are made: "content", "template" and "greedy", which loads the
                complete model into memory.
            accept_failed: Proofs whose failure does not matter.

        Raises:
            NotFoundError: The model has been deleted.
            NotReproducible, BaseModelMissingError, BaseModelMismatch: It was evicted, and cannot be
                rebuilt.
            UnsupportedError: Not an architecture or mode we can make; or nothing is replaced there,
                or no deployment template taken.
            NoEnvironmentError: No environment to deploy to.
            NoTemplateError: The tool needs a deployment template; the message has one that fits,
                if there is.
            TemplateMismatchError, InvalidTemplateError: The deployment template does not write
                what the model was trained with.
            MissingDependencyError: An optional package is not installed.
            MalformedError: `gguf` is no GGUF file.
            ServerUnreachableError, ServerAnswerError: The tool does not answer, or with an error.
            InvalidNameError, InvalidOptionError, AlreadyExistsError: See `backends.Backend`.
        """
        target = self._environment(environment)
        known = self._stored(model)
        if isinstance(known, CompleteModel) and known.evicted:
            known = rebuild(self._catalog, self._queue, known).result(progress=False)
        base = self._catalog.levels.get(BaseModel, known.base)
        recover_deployments(self._catalog, self._shelf, self._tools, environment=target.name)
        backend = open_backend(target, self._tools)
        options = backend.options() if options is None else options
        request = DeployRequest(
            kind="customized" if isinstance(known, CustomizedModel) else "complete",
            model=known.name,
            environment=target.name,
            quantization=checked_quantization(quantization),
            served_name=_text_or_none("served_name", served_name),
            options=to_document(checked_options(options, backend.options)),
            template=_template(template),
            gguf=None if gguf is None else str(arguments.path("gguf", gguf).absolute()),
            replace=arguments.truth("replace", replace),
            proofs=checked_proofs(proofs, "proofs"),
            accept_failed=checked_proofs(accept_failed, "accept_failed"),
        )
        if request.replace and not isinstance(backend, Promoting):
            raise UnsupportedError(
                f"the backend of {target.name} gives no name to a second model: undeploy what has "
                f"it first, or choose another served_name"
            )
        if template == "infer":
            request = evolve(request, template=self.propose_template(known).template)
        plan = self._preflight(backend, target, known, request, options)
        if isinstance(template, DeploymentTemplate) and plan.template is None:
            raise UnsupportedError(
                f"{target.name} renders with the chat template that the model has: deploy there "
                f"without a deployment template"
            )
        return self._queue.submit(
            "deploy",
            lambda id: live_name(known.name, id, request.quantization),
            to_document(request),
            (known.key, base.key) if isinstance(known, CustomizedModel) else (known.key,),
            self._tools,
        )

    def export_gguf(
        self,
        model: CustomizedModel | CompleteModel | str,
        path: str | os.PathLike[str],
        *,
        quantization: str = "no_quantization",
    ) -> Job[Path]:
        """Write the model to one GGUF file, in the background, for a tool that is given files.

        It is the file that llama.cpp is deployed, with the model's chat template in it.

        Args:
            model: What to export.
            path: Of the file, which must not be there yet.
            quantization: As for `deploy`.

        Returns:
            A job whose result is the absolute path.

        Raises:
            NotFoundError: The model has been deleted, or the path's directory is not there.
            UnsupportedError: Not an architecture or mode we can make.
            AlreadyExistsError: Something is at the path.
        """
        target, mode = arguments.path("path", path).absolute(), checked_quantization(quantization)
        if not target.parent.is_dir():
            raise NotFoundError(f"there is no directory {shown(str(target.parent))}")
        if os.path.lexists(target):
            raise AlreadyExistsError(f"{shown(str(target))} already exists")
        model = self._stored(model)
        base = self._catalog.levels.get(BaseModel, model.base)
        customized = isinstance(model, CustomizedModel)
        with RegistryArtifact(
            self._catalog, self._shelf, model, model.name, mode, _hold_nothing
        ) as artifact:
            artifact.check_gguf()
        kind: Literal["customized", "complete"] = "customized" if customized else "complete"
        return self._queue.submit(
            "export",
            lambda id: f"{live_name(model.name, id, mode)}.gguf",
            to_document(ExportRequest(kind, model.name, str(target), mode)),
            (model.key, base.key) if customized else (model.key,),
        )

    def _preflight(
        self,
        backend: Backend,
        target: DeploymentEnvironment,
        model: Stored,
        request: DeployRequest,
        options: Any,
    ) -> Plan:
        trial = live_name(model.name, uuid.uuid4(), request.quantization)
        with self._artifact(model, request, target, trial) as artifact:
            try:
                plan = backend.preflight(artifact, request.served_name, options)
            except NoTemplateError as error:
                raise self._with_proposal(error, model) from None
            if isinstance(backend, Promoting):
                backend.refuse_taken(plan.served_name, None if request.replace else [])
            if plan.template is not None and "template" not in request.accept_failed:
                with artifact.small_files() as (_, files):
                    run_isolated(check_fitness, plan.template, files, seconds=_RENDER_SECONDS)
        return plan

    def _artifact(
        self, model: Stored, request: DeployRequest, target: DeploymentEnvironment, name: str
    ) -> RegistryArtifact:
        return RegistryArtifact(
            self._catalog,
            self._shelf,
            model,
            name,
            request.quantization,
            _hold_nothing,
            template=request.template,
            ready=None if request.gguf is None else Path(request.gguf),
            llama_cpp=target.settings.get("llama_cpp"),
        )

    def _with_proposal(self, error: NoTemplateError, model: Stored) -> NoTemplateError:
        try:
            proposed = self.propose_template(model)
        except DeploymentError:
            return error
        except UnsupportedError as why:
            return NoTemplateError(f"{error} (which cannot be done here: {why})")
        return NoTemplateError(f"{error}. It would be:\n{proposed.template.text}")

    def propose_template(self, model: BaseModel | Stored | str) -> ProposedTemplate:
        """A deployment template made from a model's chat template, and shown to write the same.

        Raises:
            NotFoundError: The model has been deleted.
            UnsupportedError: It has no chat template, or one that a Go template cannot say.
        """
        kinds = (BaseModel, CustomizedModel, CompleteModel)
        known: BaseModel | Stored = self._catalog.levels.meant("model", model, *kinds)
        of = known.name if isinstance(known, BaseModel) else known.base
        base = self._catalog.levels.get(BaseModel, of)
        with small_files(self._shelf, base, known) as (_, files):
            return run_isolated(propose_deployment_template, files, seconds=_RENDER_SECONDS)

    def status(self, live: LiveModel | str) -> Status:
        """What the deployment tool says of the model at this moment.

        Of a superseded one: what it says of the version that `rollback` would give its name back.

        Raises:
            NotFoundError: It has been deleted.
        """
        live = self._catalog.levels.meant("live", live, LiveModel)
        if live.state == "undeployed":
            return Status.ABSENT
        backend = self._backend_of(live)
        return backend.status(served_there(live, backend))

    def undeploy(
        self, live: LiveModel | str, *, wait: float = UNLOAD_SECONDS, forget: bool = False
    ) -> LiveModel:
        """Take the model off its deployment tool; its record stays, third parties' goes stale.

        Only what the recorded digest says is ours is removed. Undeploying again is fine. A
        protected alias keeps the record from being deleted, not the model from being undeployed.

        Args:
            live: The model.
            wait: Seconds for which answers under way may still be finished. After them the name is
                taken away all the same, and the memory is freed as soon as the tool lets it: the
                result's `note` says so; also that nothing was waited for, where the tool does not
                tell what is under way.
            forget: Only mark it as undeployed, because its server is gone for good.

        Raises:
            NotFoundError: It has been deleted.
            InUseError: Another process is replacing, rolling back or undeploying it.
            ServerUnreachableError, ServerAnswerError: The tool does not answer, or with an error;
                `forget=True` is the way out where it never will again.
            InvalidOptionError: The backend is not installed any more, or a secret is not there.
            ServedModelChangedError: What is there now is not what was deployed; it is left alone.
        """
        known = self._catalog.levels.meant("live", live, LiveModel)
        wait, forget = arguments.seconds("wait", wait), arguments.truth("forget", forget)
        with self._held(known, doing="the undeployment") as (live,):
            if live.state == "undeployed":
                return live
            note = "forgotten; what is left at its server was not looked at"
            if not forget:
                try:
                    note = self._take_off(live, wait)
                except CustomizedModelsError as error:
                    error.add_note(
                        "undeploy(live, forget=True) marks it as undeployed without asking, for a "
                        "server that is gone for good; ModelRegistry.update_environment is for "
                        "one that has moved"
                    )
                    raise
            live = evolve(live, state="undeployed", note=note)
            self._catalog.levels.mark_undeployed(live)
        self._shelf.trim("gguf/")
        return live

    def _take_off(self, live: LiveModel, wait: float) -> str:
        backend = self._backend_of(live)
        served = served_there(live, backend)
        note = _UNKNOWN if wait else ""
        if isinstance(backend, Unloading):
            note = backend.unload(served, wait)
        backend.undeploy(served)
        return note

    def rollback(self, live: LiveModel | str) -> LiveModel:
        """Give the served name back to the live model that had it before.

        Returns:
            That model; `live` stays at the tool as "superseded", and can be given the name again.

        Raises:
            NotFoundError: There was none before, or it has been deleted.
            InUseError: Another process is replacing, rolling back or undeploying one of the two.
            AlreadyExistsError: The name stands for something else meanwhile.
            UnsupportedError: The backend does not keep versions.
            ServerUnreachableError, ServerAnswerError: The tool does not answer, or with an error.
        """
        levels = self._catalog.levels
        live = levels.meant("live", live, LiveModel)
        if live.replaces is None:
            raise NotFoundError(f"{live.name} took its name from no other live model")
        before = levels.get(LiveModel, live.replaces)
        with self._held(live, before, doing="the rollback") as (live, before):
            if before.state != "superseded":
                raise NotFoundError(f"{before.name}, which had the name before, is {before.state}")
            backend = self._backend_of(live)
            if not isinstance(backend, Promoting):
                raise UnsupportedError(f"the backend of {live.environment} does not keep versions")
            # Its own as well: of a rollback that was killed before it was recorded.
            replaced = [backend.identity(live.served), backend.identity(before.served)]
            served = backend.promote(before.served, live.served.name, replaced)
            before = evolve(before, served=served, replaces=live.name, state="live")
            with self._catalog.database.write() as connection:
                levels.supersede(connection, live.name)
                levels.put(connection, before, state="live")
        return before

    def relocate(
        self, live: LiveModel | str, environment: str | DeploymentEnvironment
    ) -> LiveModel:
        """Say that a live model is at another environment now, because its server has moved.

        Raises:
            NotFoundError: It has been deleted.
            InUseError: Another process is replacing, rolling back or undeploying it.
            DeploymentError: It is not there, or the other environment is another tool's.
        """
        target = self._environment(environment)
        known = self._catalog.levels.meant("live", live, LiveModel)
        with self._held(known, doing="the relocation") as (live,):
            old = self._catalog.levels.get(DeploymentEnvironment, live.environment)
            if target.backend != old.backend:
                raise DeploymentError(
                    f"{live.name} is at {old.backend}, and {target.name} is {target.backend}: "
                    f"deploy {live.source} there instead"
                )
            endpoint = moved_endpoint(live.served.endpoint, old, target, self._tools)
            served = evolve(live.served, endpoint=endpoint)
            moved = evolve(live, environment=target.name, served=served)
            backend = open_backend(target, self._tools)
            status = backend.status(served_there(moved, backend))
            if status not in (Status.LIVE, Status.LOADED):
                raise DeploymentError(f"{live.name} is {status.value} at {target.name}")
            with self._catalog.database.write() as connection:
                self._catalog.levels.put(connection, moved, environment=target.name)
                self._catalog.levels.follow(connection, moved)
        return moved

    def environments(self) -> list[EnvironmentReport]:
        """Every environment: whether its server answers, its version, and what it can do."""
        return [self._report(e) for e in self._catalog.levels.listing(DeploymentEnvironment)]

    def _report(self, environment: DeploymentEnvironment) -> EnvironmentReport:
        try:
            backend = open_backend(environment, self._tools)
            if not isinstance(backend, Describing):
                return EnvironmentReport(environment, None, {})
            return EnvironmentReport(environment, True, backend.describe())
        except CustomizedModelsError as error:
            return EnvironmentReport(environment, False, {}, str(error))

    def recover(self, *, forget: str | DeploymentEnvironment | None = None) -> list[str]:
        """Finish or undo what killed deployments left, with the backends that this deployer has.

        Args:
            forget: An environment whose server is gone for good: what was on its way there is
                only given up.

        Returns:
            What was done, a sentence each.

        Raises:
            NoEnvironmentError: There is no such environment to forget.
            CustomizedModelsError: One cannot be finished or undone now; the rest was done.
        """
        gone = None if forget is None else self._environment(forget).name
        return recover_deployments(self._catalog, self._shelf, self._tools, forget=gone)

    async def deploy_async(
        self, model: CustomizedModel | CompleteModel | str, **arguments: Any
    ) -> Job[LiveModel]:
        """As `deploy`, without keeping the event loop from other work meanwhile."""
        return await asyncio.to_thread(self.deploy, model, **arguments)

    async def status_async(self, live: LiveModel | str) -> Status:
        """As `status`, without keeping the event loop from other work meanwhile."""
        return await asyncio.to_thread(self.status, live)

    async def undeploy_async(
        self, live: LiveModel | str, *, wait: float = UNLOAD_SECONDS, forget: bool = False
    ) -> LiveModel:
        """As `undeploy`, without keeping the event loop from other work meanwhile."""
        return await asyncio.to_thread(self.undeploy, live, wait=wait, forget=forget)

    @contextmanager
    def _held(self, *models: LiveModel, doing: str) -> Iterator[list[LiveModel]]:
        """The models as they are recorded; nobody else changes them while the block lasts."""
        with self._catalog.lease() as lease:
            with self._catalog.database.write() as connection:
                found = [
                    self._catalog.levels.in_transaction(connection, LiveModel, model.name)
                    for model in models
                ]
                for model in found:
                    self._catalog.leases.refuse_if_held(connection, model.key)
                lease.take(
                    connection, [model.key for model in found], f"{doing} of {models[0].name}"
                )
            yield found

    def _stored(self, model: object) -> Stored:
        kinds = (CustomizedModel, CompleteModel)
        stored: Stored = self._catalog.levels.meant("model", model, *kinds)
        return stored

    def _backend_of(self, live: LiveModel) -> Backend:
        environment = self._catalog.levels.get(DeploymentEnvironment, live.environment)
        return open_backend(environment, self._tools)

    def _environment(self, named: str | DeploymentEnvironment | None) -> DeploymentEnvironment:
        if named is not None:
            name = arguments.name_of("environment", named, DeploymentEnvironment)
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


def _text_or_none(argument: str, value: object) -> str | None:
    return None if value is None else arguments.text(argument, value)


def _template(value: object) -> DeploymentTemplate | None:
    if value is None or (isinstance(value, str) and value == "infer"):
        return None
    meant = "a DeploymentTemplate, 'infer' or None"
    return arguments.instance("template", value, DeploymentTemplate, meant)


def _hold_nothing(key: str) -> None:
    """For an artifact that is only asked what it could give."""
