"""`Deployer`: a complete or customized model becomes a live one, at a deployment tool."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from attrs import evolve

from ..backends import open_backend
from ..errors import AlreadyExistsError, NoEnvironmentError, NotFoundError, listed, shown
from ..files.manifest import Manifest, digest_of, from_document, to_document
from ..files.safetensors import FileDigest, json_object
from ..gguf import GGUFFile, check_architecture
from ..gguf import plan as plan_gguf
from ..jobs.job import Job, start_job
from ..models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    DeploymentTemplate,
    LiveModel,
    Progress,
    Quantization,
    Status,
    checked_quantization,
    live_name,
)
from ..sources import model_source

if TYPE_CHECKING:
    from ..catalog.database import Lease
    from ..registry import ModelRegistry

GGUF_NAME = "model.gguf"


class RegistryArtifact:
    """A registry's model, in the forms a backend asks for (see `backends.Artifact`)."""

    def __init__(
        self,
        registry: ModelRegistry,
        model: CustomizedModel | CompleteModel,
        name: str,
        quantization: Quantization,
        owner: str,
    ) -> None:
        self.name = name
        self.quantization = quantization
        self.key: str | None = None
        self._registry = registry
        self._model = model
        self._owner = owner
        base = registry.get(BaseModel, model.base)
        self.template: DeploymentTemplate | None = base.deployment_template
        with registry._opened(model if isinstance(model, CompleteModel) else base) as directory:
            self._config = json_object(directory / "config.json")
        check_architecture(self._config)
        self.architecture: str = self._config["architectures"][0]

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        """See `backends.Artifact.gguf`: made once per recipe, kept while a live model needs it."""
        recipe = {
            "source": self._model.digest,
            "quantization": self.quantization,
            "chat_template": chat_template,
            "name": self._model.name,
        }
        key = f"gguf/{digest_of(recipe).removeprefix('sha256:')}"
        self._registry._hold(key, self._owner)
        if key not in self._registry._storage.keys(key):
            self._make(key, recipe, progress)
        self.key = key
        with self._registry._storage.checkout(key) as directory:
            manifest = Manifest.read(directory)
            file = manifest.content[GGUF_NAME]
            return GGUFFile(directory / GGUF_NAME, file.size, f"sha256:{file.sha256}")

    def _make(self, key: str, recipe: Mapping[str, Any], progress: Progress) -> None:
        storage = self._registry._storage
        with ExitStack() as stack:
            staging = stack.enter_context(storage.staging(f"gguf-{uuid.uuid4().hex}"))
            source = stack.enter_context(model_source(self._registry, self._model))
            plan = plan_gguf(
                source,
                self.quantization,
                name=self._model.name,
                chat_template=recipe["chat_template"],
            )
            file = plan.write(staging / GGUF_NAME, progress)
            content = {GGUF_NAME: FileDigest(file.size, file.digest.removeprefix("sha256:"))}
            Manifest("gguf", content, {"source": self._model.digest}, recipe, {}).write(staging)
            try:
                storage.publish(staging, key)
            except AlreadyExistsError:
                return  # another deployment has just made the same file


class Deployer:
    """Hands models of a registry to deployment tools, and takes them back.

    >>> live = Deployer(registry).deploy(complete, quantization="q8_0").result()  # doctest: +SKIP
    """

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def __repr__(self) -> str:
        return f"Deployer({self._registry!r})"

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

        A customized model needs no complete model on disk: it is merged on the way.
        `environment`: may be omitted where exactly one is configured. `served_name`: what callers
        put into `model`; derived from the live model's name if None. `options`: the backend's own
        value, such as `OllamaOptions`. What can be refused is refused here, before the job starts
        and before anything is sent.

        Raises:
            UnsupportedQuantizationError, UnsupportedArchitectureError: not one we can make.
            NoEnvironmentError: no environment to deploy to.
            NoTemplateError: the tool needs a deployment template that the base lacks.
            ServerUnreachableError: the tool does not answer.
            InvalidNameError, InvalidOptionError, AlreadyExistsError: see `backends.Backend`.
        """
        mode = checked_quantization(quantization)
        target = self._environment(environment)
        model = self._registry.get(type(model), model.name)
        backend = open_backend(target)
        options = backend.options() if options is None else options
        trial = live_name(model.name, uuid.uuid4(), mode)
        artifact = RegistryArtifact(self._registry, model, trial, mode, owner="")
        backend.preflight(artifact, served_name, options)
        kind = "customized" if isinstance(model, CustomizedModel) else "complete"
        held = (f"base/{model.base}",) if kind == "customized" else ()
        return start_job(
            self._registry,
            "deploy",
            lambda id: live_name(model.name, id, mode),
            {
                "kind": kind,
                "model": model.name,
                "environment": target.name,
                "quantization": mode,
                "served_name": served_name,
                "options": to_document(options),
            },
            holds=(f"{kind}/{model.name}", *held),
        )

    def status(self, live: LiveModel) -> Status:
        """What the deployment tool says of the model at this moment."""
        live = self._registry.get(LiveModel, live.name)
        if live.state == "undeployed":
            return Status.ABSENT
        environment = self._registry.get(DeploymentEnvironment, live.environment)
        return open_backend(environment).status(live.served)

    def undeploy(self, live: LiveModel) -> LiveModel:
        """Take the model off its deployment tool; its record stays, third parties' goes stale.

        Undeploying again is fine.

        Raises:
            ServerUnreachableError: the tool does not answer.
            DeploymentError: what is there now is not what was deployed.
        """
        live = self._registry.get(LiveModel, live.name)
        if live.state == "live":
            environment = self._registry.get(DeploymentEnvironment, live.environment)
            open_backend(environment).undeploy(live.served)
            live = evolve(live, state="undeployed")
            self._registry._record_undeployed(live)
        return live

    def _environment(self, named: str | DeploymentEnvironment | None) -> DeploymentEnvironment:
        if named is not None:
            name = named if isinstance(named, str) else named.name
            try:
                return self._registry.get(DeploymentEnvironment, name)
            except NotFoundError as error:
                raise NoEnvironmentError(
                    f"no deployment environment {shown(name)}; there is: {self._configured()}"
                ) from error
        every = list(self._registry.environments())
        if len(every) != 1:
            raise NoEnvironmentError(f"say environment=, there is: {self._configured()}")
        return every[0]

    def _configured(self) -> str:
        names = listed(environment.name for environment in self._registry.environments())
        return names or "none; ModelRegistry.add_environment(DeploymentEnvironment(...)) adds one"


def run_deploy(
    registry: ModelRegistry,
    id: str,
    arguments: Mapping[str, Any],
    progress: Progress,
    lease: Lease,
) -> None:
    """The worker's part of `Deployer.deploy`."""
    kind: type[CustomizedModel | CompleteModel] = (
        CustomizedModel if arguments["kind"] == "customized" else CompleteModel
    )
    model = registry.get(kind, arguments["model"])
    environment = registry.get(DeploymentEnvironment, arguments["environment"])
    quantization: Quantization = arguments["quantization"]
    backend = open_backend(environment)
    options = from_document(backend.options, arguments["options"])
    name = live_name(model.name, uuid.UUID(id), quantization)
    try:
        artifact = RegistryArtifact(registry, model, name, quantization, owner=id)
        plan = backend.preflight(artifact, arguments["served_name"], options)
        served = backend.push(plan, progress)
        live = LiveModel(
            name=name,
            source=model.name,
            base=model.base,
            train_name=model.train_name,
            quantization=quantization,
            environment=environment.name,
            served=served,
            deploying_id=uuid.UUID(id),
            created=datetime.now(UTC),
            source_digest=model.digest,
            template_digest=artifact.template.digest if artifact.template else None,
            card=model.card,
        )
        try:
            registry._record_live(live, artifact.key, lease)
        except BaseException:
            backend.undeploy(served)
            raise
    except BaseException:
        registry._sweep_artifacts(id)
        raise
