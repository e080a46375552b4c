"""Deployment tools: what the library asks of one, and how an environment becomes one."""

from __future__ import annotations

import hashlib
from importlib.metadata import entry_points
from typing import Any, Protocol, TypeVar

from attrs import frozen

from ..errors import InvalidOptionError, shown
from ..gguf import GGUFFile
from ..models import (
    SERVED_NAME,
    DeploymentEnvironment,
    DeploymentTemplate,
    Progress,
    Quantization,
    Served,
    Status,
    checked_name,
)

__all__ = [
    "Artifact",
    "Backend",
    "Plan",
    "checked_options",
    "chosen_served_name",
    "open_backend",
]

ENTRY_POINTS = "customized_models.backends"
"""The entry point group of further backends: name to a callable that takes the environment."""

_BUILT_IN = ("llama_cpp", "ollama")
_Options = TypeVar("_Options")


class Artifact(Protocol):
    """The model to deploy, in the forms a backend may ask for. Nothing is made before it asks."""

    @property
    def name(self) -> str:
        """The live model's name."""

    @property
    def architecture(self) -> str:
        """The class in `config.json`, such as "LlamaForCausalLM"."""

    @property
    def quantization(self) -> Quantization:
        """The mode of the file it will give."""

    @property
    def template(self) -> DeploymentTemplate | None:
        """The base model's deployment template."""

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        """The model as one GGUF file, with or without `tokenizer.chat_template` in it.

        Made on the first call. The file stays where it is until the live model is undeployed.
        """


@frozen
class Plan:
    """What `preflight` found possible, and `push` will do."""

    artifact: Artifact
    served_name: str
    options: Any


class Backend(Protocol):
    """A tool that serves models; the library only talks to it.

    Built from a `DeploymentEnvironment` alone, so that any process can build the same one.
    """

    @property
    def options(self) -> type[Any]:
        """The frozen attrs class of its options; called without arguments it gives the defaults."""

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """Refuse what cannot work before a byte is sent or a file is made.

        `served_name`: what callers will put into `model`; derived from the artifact's name if None.

        Raises:
            InvalidNameError: the tool cannot use that served name.
            InvalidOptionError: `options` is not an instance of `self.options`.
            UnsupportedError: the tool or its version cannot serve this.
            NoTemplateError: the tool needs a deployment template.
            ServerUnreachableError: the tool does not answer.
            AlreadyExistsError: the tool already serves something under that name.
        """

    def push(self, plan: Plan, progress: Progress) -> Served:
        """Hand the model over; returns once it can be called.

        Raises:
            DeploymentError: it could not be done; nothing new is left at the tool.
        """

    def status(self, served: Served) -> Status:
        """What the tool says now; `Status.UNREACHABLE` rather than an error without an answer."""

    def undeploy(self, served: Served) -> None:
        """Free its memory and remove it; no error if absent.

        Raises:
            InUseError: the name now means something that was not deployed here; nothing is removed.
            ServerUnreachableError: the tool does not answer.
        """


def open_backend(environment: DeploymentEnvironment) -> Backend:
    """The backend that serves `environment`; nothing is sent yet.

    Raises:
        InvalidOptionError: no backend goes by that name, or it does not know a setting.
    """
    if environment.backend == "ollama":
        from .ollama import Ollama

        return Ollama(environment)
    if environment.backend == "llama_cpp":
        from .llama_cpp import LlamaCpp

        return LlamaCpp(environment)
    further = entry_points(group=ENTRY_POINTS)
    for point in further.select(name=environment.backend):
        backend: Backend = point.load()(environment)
        return backend
    known = ", ".join(sorted({*_BUILT_IN, *further.names}))
    raise InvalidOptionError(
        f"environment {shown(environment.name)} names the backend {shown(environment.backend)}; "
        f"known are {known}, and what installed packages add to {ENTRY_POINTS}"
    )


def checked_options(options: object, expected: type[_Options]) -> _Options:
    """`options` if it is of the backend's own class; else `InvalidOptionError`."""
    if not isinstance(options, expected):
        raise InvalidOptionError(
            f"options must be {expected.__name__}(...), not {shown(type(options).__name__)}"
        )
    return options


def chosen_served_name(artifact: Artifact, served_name: str | None) -> str:
    """`served_name` checked, or one derived from the artifact's name.

    Derived: in lower case; of more than 80 characters the first 71, `-`, and 8 of its sha256.

    Raises:
        InvalidNameError: it does not fit `SERVED_NAME`.
    """
    if served_name is None:
        served_name = artifact.name.lower()
        if len(served_name) > 80:
            digest = hashlib.sha256(artifact.name.encode()).hexdigest()
            served_name = f"{served_name[:71]}-{digest[:8]}"
    return checked_name("served name", served_name, SERVED_NAME)
