"""What the library asks of a deployment tool, and what it gives it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from attrs import Attribute, field, frozen

from ..errors import InvalidOptionError, shown
from ..gguf import GGUFFile
from ..models import DeploymentTemplate, Progress, Quantization, Served, Status
from ..naming import SERVED_NAME, checked_name

if TYPE_CHECKING:
    from ..deploying.templates.chat_template import ChatTemplate
    from ..deploying.templates.conversations import Conversation
    from ..deploying.templates.live import Tokenizer
    from ..deploying.templates.proofs import TemplateProof

_Options = TypeVar("_Options")


@frozen
class AdapterBesideBase:
    """An adapter as PEFT saved it, and the base model that it goes with.

    `adapter`, `base`: their directories. `base_digest`: the base's, as the registry has it.
    """

    adapter: Path
    base: Path
    base_digest: str = ""


class Artifact(Protocol):
    """The model to deploy, in the forms that a backend may ask for.

    Nothing is made before a form is asked for. What a form gives is a context manager, and is
    there until its block or the push ends, whichever is first; a file that a running server reads
    may be gone then if the registry's storage is on another host. Every byte is compared with what
    was recorded before it is given.
    """

    @property
    def name(self) -> str:
        """The live model's name."""

    @property
    def architecture(self) -> str:
        """The class in `config.json`, such as "LlamaForCausalLM"."""

    @property
    def base(self) -> str:
        """The base model's technical name."""

    @property
    def adapter_config(self) -> Mapping[str, Any] | None:
        """`adapter_config.json` of a customized model; None for a complete one."""

    @property
    def quantization(self) -> Quantization:
        """The mode of the file that `gguf` gives."""

    @property
    def template(self) -> DeploymentTemplate | None:
        """The base model's deployment template."""

    @property
    def finished(self) -> bool:
        """Whether `gguf` gives a finished file of the caller's; nothing else is given then."""

    def check_gguf(self) -> None:
        """Whether `gguf` can give a file, as far as the configuration or a file's head tells.

        Raises:
            UnsupportedArchitectureError: The architecture has no GGUF form.
            MalformedError: The caller's finished file is not there, or no GGUF file.
        """

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        """The model as one GGUF file, made once and kept while a live model needs it.

        Args:
            progress: Called often; raises when it is time to stop.
            chat_template: Whether `tokenizer.chat_template` goes into the file.

        Raises:
            UnsupportedError: It cannot be converted exactly, or not in this mode.
            IntegrityError, BaseModelMismatch: The model's bytes are not what was recorded.
            StorageError: A disk or the storage failed.
        """

    def directory(self) -> AbstractContextManager[Path]:
        """The complete model as a directory that transformers opens.

        Raises:
            UnsupportedQuantizationError: A quantization was asked for.
            UnsupportedError: It is a customized model, which is none before it is saved.
            IntegrityError: The model's bytes are not what was recorded.
        """

    def base_gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        """The base model as one GGUF file, to which adapters are applied; as `gguf`."""

    def adapter(self) -> AbstractContextManager[AdapterBesideBase]:
        """The adapter as PEFT saved it, beside its base.

        Raises:
            UnsupportedError: It is a complete model.
            IntegrityError, BaseModelMismatch: The bytes are not what was recorded.
        """


@runtime_checkable
class Promoting(Protocol):
    """A backend whose `push` makes a version of a model, which then takes the name others call.

    `push` returns the version under a name of its own; it is proven before it takes the served
    name, and the one that had it before is kept beside it.
    """

    def identity(self, served: Served) -> str:
        """What tells this version from others under the same name, such as a digest."""

    def version(self, served: Served) -> Served:
        """The same by the name of its own, which `push` gave it: whatever the served name means.

        Law: `version(promote(served, name, None)) == served` for what `push` returned.
        """

    def refuse_taken(self, name: str, replaced: Collection[str] | None) -> None:
        """Refuse a name that stands for something already, before anything is sent.

        Args:
            name: The served name.
            replaced: The identities that may be replaced; None for anything.

        Raises:
            AlreadyExistsError: It stands for something else.
        """

    def promote(self, served: Served, name: str, replaced: Collection[str] | None) -> Served:
        """Let `name` stand for this version, unless someone else takes it at the same time.

        Args:
            served: The version, or another that had the name before.
            name: The served name.
            replaced: As for `refuse_taken`.

        Returns:
            What is called by the served name now.

        Raises:
            AlreadyExistsError: It stands for something else; nothing was changed.
        """


@runtime_checkable
class Probing(Protocol):
    """A backend that can be asked what it serves, so that a deployment can be proven."""

    def probe(self, served: Served) -> Probe:
        """What to ask of the model."""


class Probe(Protocol):
    """What is asked of a live model for its proofs; errors are `DeploymentError`."""

    def template(
        self, chat: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Conversation]
    ) -> TemplateProof | None:
        """What the server makes of conversations, compared; None if it cannot tell."""

    def tensor_types(self) -> Mapping[str, str] | None:
        """The type of each tensor by its name, as the server has it; None if it does not tell."""

    def greedy(self, prompt: str, count: int) -> str:
        """The text of `count` tokens, the likeliest each time, after a prompt taken as it is."""


@runtime_checkable
class Unloading(Protocol):
    """A backend whose answers under way can be finished before the model is undeployed."""

    def unload(self, served: Served, seconds: float) -> str:
        """Let nobody begin another answer, if the tool can, and wait for those under way.

        Then free the memory. `undeploy` is called after it, whatever came of it.

        Args:
            served: As for `undeploy`.
            seconds: For how long to wait; less if it is not necessary.

        Returns:
            What is still under way, and what becomes of it, in words; "" if nothing is.
        """


@runtime_checkable
class Addressed(Protocol):
    """A backend whose models are called at the address that the environment states."""

    @property
    def url(self) -> str:
        """What endpoints begin with: the environment's URL, with the tool's own port if none."""


@runtime_checkable
class Describing(Protocol):
    """A backend whose server tells of itself."""

    def describe(self) -> Mapping[str, Any]:
        """The version, and what it can do; raises `ServerUnreachableError` if it is not there."""


@frozen
class Plan:
    """What `preflight` found possible, and `push` will do.

    Attributes:
        artifact: The model.
        served_name: What callers will put into `model`.
        options: The backend's own.
        template: The deployment template that the tool will render with, if it does; whether it
            fits the model's chat template is checked before anything is sent.
        details: What `undeploy` needs to find and remove what a killed `push` has left, as JSON
            can hold it. It is recorded before `push` is called.
    """

    artifact: Artifact
    served_name: str
    options: Any
    details: Mapping[str, Any] = field(factory=dict)
    template: DeploymentTemplate | None = None


class Backend(Protocol):
    """A tool that serves models; the library only talks to it.

    Built from a `DeploymentEnvironment` alone, so that any process can build the same one.
    """

    @property
    def options(self) -> type[Any]:
        """The frozen attrs class of its options; called without arguments it gives the defaults."""

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """Refuse what cannot work before a byte is sent or a file is made.

        Args:
            artifact: The model.
            served_name: What callers will put into `model`; derived from the artifact's name if
                None.
            options: An instance of `self.options`.

        Raises:
            InvalidNameError: The tool cannot use that served name.
            InvalidOptionError: `options` is not an instance of `self.options`.
            UnsupportedError: The tool or its version cannot serve this.
            MissingDependencyError: An optional package is not installed.
            NoTemplateError: The tool needs a deployment template.
            ServerUnreachableError: The tool does not answer.
            AlreadyExistsError: The tool already serves something under that name, and the backend
                is not `Promoting`.
        """

    def push(self, plan: Plan, progress: Progress) -> Served:
        """Hand the model over; returns once it can be called.

        Raises:
            DeploymentError: It could not be done; nothing new is left at the tool.
        """

    def status(self, served: Served) -> Status:
        """What the tool says now; `Status.UNREACHABLE` rather than an error without an answer."""

    def undeploy(self, served: Served) -> None:
        """Free its memory and remove it; no error if absent.

        What the name means now, and was not deployed here, stays.

        Args:
            served: What `push` or `promote` returned; or, where that was killed, the plan's served
                name and details, with the digest of the file that it had asked for, or "" if none.

        Raises:
            ServedModelChangedError: It cannot be removed without what was not deployed here;
                nothing is removed.
            ServerUnreachableError: The tool does not answer.
        """


def checked_options(options: object, expected: type[_Options]) -> _Options:
    """`options` if it is of the backend's own class; else `InvalidOptionError`."""
    if not isinstance(options, expected):
        raise InvalidOptionError(
            f"options must be {expected.__name__}(...), not {shown(type(options).__name__)}"
        )
    return options


def positive_or_none(_: object, attribute: Attribute[Any], value: object) -> None:
    """Validator of an option that is a positive int, or None; else `InvalidOptionError`."""
    if value is not None and not (type(value) is int and 0 < value < 1 << 31):
        raise InvalidOptionError(f"{attribute.name} must be a positive int, not {shown(value)}")


def chosen_served_name(artifact: Artifact, served_name: str | None) -> str:
    """`served_name` checked, or one derived from the artifact's name.

    Derived: in lower case; of more than 80 characters the first 71, `-`, and 8 of its sha256.

    Raises:
        InvalidNameError: It does not fit `SERVED_NAME`.
    """
    if served_name is None:
        served_name = artifact.name.lower()
        if len(served_name) > 80:
            digest = hashlib.sha256(artifact.name.encode()).hexdigest()
            served_name = f"{served_name[:71]}-{digest[:8]}"
    return checked_name("served name", served_name, SERVED_NAME)
