"""Deployment tools: what the library asks of one, and how an environment becomes one."""

from __future__ import annotations

from typing import Any, Protocol

from attrs import frozen

from .._gguf import GGUFFile
from .._models import DeploymentTemplate, Progress, Quantization, Served, Status


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
        """What the tool says now; `Status.UNREACHABLE` instead of an error if it does not answer."""

    def undeploy(self, served: Served) -> None:
        """Free its memory and remove it; no error if absent.

        Raises:
            ServerUnreachableError: the tool does not answer.
        """
