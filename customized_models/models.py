"""The values the library speaks in: frozen, without paths, cheap to print."""

from __future__ import annotations

import enum
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from attrs import field, frozen

from .display import Shown
from .errors import InvalidOptionError, UnsupportedQuantizationError, shown
from .naming import ENVIRONMENT_NAME, checked_name

Quantization = Literal["no_quantization", "q8_0", "q4_K_M", "q4_K_S"]
QUANTIZATIONS: tuple[Quantization, ...] = ("no_quantization", "q8_0", "q4_K_M", "q4_K_S")

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`: called often; raises `JobCancelled` when it is time to stop."""


def checked_quantization(quantization: str) -> Quantization:
    """`quantization` if it is one of the four modes; else `UnsupportedQuantizationError`."""
    for known in QUANTIZATIONS:
        if quantization == known:
            return known
    raise UnsupportedQuantizationError(
        f"unknown quantization {shown(quantization)}; choose from {', '.join(QUANTIZATIONS)}"
    )


@frozen
class TrainingConfiguration(Shown):
    """How an adapter was trained.

    `peft`: the method and its settings, from `adapter_config.json`. `arguments`: the Trainer's
    arguments that bear on the result (never paths, tokens or host names). `datasets`: names.
    """

    peft: Mapping[str, Any] = field(factory=dict)
    arguments: Mapping[str, Any] = field(factory=dict)
    datasets: tuple[str, ...] = ()


@frozen
class EvaluationSummary(Shown):
    """What training and evaluation measured.

    `metrics`: the last value of each metric. `best_metric`: of the best checkpoint, if the
    Trainer kept one. `steps`, `epochs`: how far training went. `first_loss`, `last_loss`: of the
    training log, whose number of entries is `log_entries`.
    """

    metrics: Mapping[str, float] = field(factory=dict)
    best_metric: float | None = None
    steps: int | None = None
    epochs: float | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    log_entries: int = 0


@frozen
class ModelCard(Shown):
    """What is known of a model's making: rendered beside it as `README.md`.

    `notes`: what was found in the adapter's files, or changed in the copy of them, a sentence each.
    """

    training: TrainingConfiguration = field(factory=TrainingConfiguration)
    evaluation: EvaluationSummary = field(factory=EvaluationSummary)
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for lists: method, rank, and how the loss went."""
        peft, evaluation = self.training.peft, self.evaluation
        parts = [str(peft.get("method", "unknown method"))]
        if "r" in peft:
            parts.append(f"rank {peft['r']}")
        if evaluation.steps is not None:
            parts.append(f"{evaluation.steps} steps")
        if evaluation.last_loss is not None:
            parts.append(f"loss {evaluation.last_loss:.4g}")
        return ", ".join(parts)


@frozen
class BaseModelCard(Shown):
    """What a base model's own files say of it.

    `architecture`: the class in `config.json`. `parameters`: elements over all tensors. `dtype`:
    of most of them, such as "BF16". `context_length`, `vocabulary_size`: tokens. `size`: bytes of
    the files that count as content. `license`: from the header of its `README.md`, if any.
    `generation`: `generation_config.json`. `chat_template`: whether it has one.
    """

    architecture: str
    parameters: int
    dtype: str
    size: int
    context_length: int | None = None
    vocabulary_size: int | None = None
    license: str | None = None
    generation: Mapping[str, Any] = field(factory=dict, repr=False)
    chat_template: bool = False

    def __str__(self) -> str:
        """One line for lists."""
        return f"{self.architecture}, {self.parameters:,} parameters, {self.dtype}"


def _each_text(value: str | Iterable[str]) -> tuple[str, ...]:
    """Several texts; a lone one is one of them, not its letters."""
    return (value,) if isinstance(value, str) else tuple(value)


@frozen
class DeploymentTemplate(Shown):
    """An Ollama Go template and the strings that end an answer.

    >>> DeploymentTemplate("{{ .Prompt }}", stop=("<|im_end|>",)).stop
    ('<|im_end|>',)
    """

    text: str = field(repr=lambda text: shown(text, 40))
    stop: tuple[str, ...] = field(default=(), converter=_each_text)

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], stop: str | Iterable[str] = ()
    ) -> DeploymentTemplate:
        """The template in a UTF-8 file.

        Raises:
            OSError: the file cannot be read.
        """
        return cls(Path(path).read_text(encoding="utf-8"), stop)

    @property
    def digest(self) -> str:
        """`blake3:` over the text and the stop strings."""
        from blake3 import blake3

        return "blake3:" + blake3("\0".join((self.text, *self.stop)).encode()).hexdigest()


@frozen
class BaseModel(Shown):
    """A pretrained model that adapters are trained on: referenced, never copied or deleted.

    `digest`: `blake3:` over its content files, wherever they lie. `trust_remote_code`: whether
    transformers may run code that came with it.
    """

    technical_name: str
    model_name: str
    digest: str = field(repr=False)
    created: datetime = field(repr=False)
    card: BaseModelCard = field(hash=False)
    deployment_template: DeploymentTemplate | None = field(default=None, repr=False)
    trust_remote_code: bool = field(default=False, repr=False)

    @property
    def name(self) -> str:
        """The technical name, by which the registry knows it."""
        return self.technical_name

    @property
    def key(self) -> str:
        """What a lease on it holds."""
        return f"base/{self.technical_name}"


@frozen
class CustomizedModel(Shown):
    """A trained adapter, tied to its base model and unusable without it.

    Law: `name == customized_name(base, train_name, created, training_id)`.
    """

    name: str
    base: str
    train_name: str
    training_id: uuid.UUID = field(repr=False)
    created: datetime = field(repr=False)
    digest: str = field(repr=False)
    kind: Literal["adapter"] = field(default="adapter", repr=False)
    card: ModelCard = field(factory=ModelCard, hash=False, repr=False)

    @property
    def key(self) -> str:
        """Where its bytes are stored, and what a lease on it holds."""
        return f"customized/{self.name}"


@frozen
class CompleteModel(Shown):
    """An adapter merged into its base: self-contained, opened by `from_pretrained`.

    `customized_digest` and `base_digest` name its parents by content. `recipe` has what the
    merged bits depend on: package versions, threads, CPU capability.
    """

    name: str
    customized: str
    base: str
    train_name: str
    saving_id: uuid.UUID = field(repr=False)
    created: datetime = field(repr=False)
    digest: str = field(repr=False)
    customized_digest: str = field(repr=False)
    base_digest: str = field(repr=False)
    recipe: Mapping[str, Any] = field(factory=dict, hash=False, repr=False)
    card: ModelCard = field(factory=ModelCard, hash=False, repr=False)

    @property
    def key(self) -> str:
        """Where its bytes are stored, and what a lease on it holds."""
        return f"complete/{self.name}"


class Status(enum.Enum):
    """What a deployment tool says of a live model now."""

    ABSENT = "absent"  # the tool does not know it
    LIVE = "live"  # it can be called
    LOADED = "loaded"  # it can be called, and its weights are in memory
    CHANGED = "changed"  # the name is there, but means something else than what was deployed
    UNREACHABLE = "unreachable"  # the tool does not answer


@frozen
class Served(Shown):
    """A model as its deployment tool knows it.

    `name`: what callers put into `model`. `endpoint`: base URL of the API, without a trailing
    slash. `api`: its style, such as "openai" or "ollama". `digest`: `sha256:` of the file that was
    handed over. `details`: what the backend needs to find it again, such as a process and its port.
    """

    name: str
    endpoint: str
    api: str
    digest: str = field(repr=False)
    details: Mapping[str, Any] = field(factory=dict, hash=False, repr=False)


@frozen
class LiveModel(Shown):
    """A model handed to a deployment tool.

    `source`: the complete or customized model it was made from. `state`: "live" until it is
    undeployed; what the tool says at this moment is `Deployer.status(live)`.
    """

    name: str
    source: str
    base: str
    train_name: str
    quantization: Quantization
    environment: str
    served: Served
    deploying_id: uuid.UUID = field(repr=False)
    created: datetime = field(repr=False)
    source_digest: str = field(repr=False)
    template_digest: str | None = field(default=None, repr=False)
    state: Literal["live", "undeployed"] = "live"
    card: ModelCard = field(factory=ModelCard, hash=False, repr=False)

    @property
    def digest(self) -> str:
        """`sha256:` of the file that the tool serves."""
        return self.served.digest

    @property
    def endpoint(self) -> str:
        """Base URL of the API it is called through."""
        return self.served.endpoint


@frozen
class ThirdPartyModel(Shown):
    """A live model as other services see it: where to call, in which style, under which name.

    `stale`: its live model has been undeployed, so calls fail.
    """

    name: str
    endpoint: str
    api: str
    model: str
    environment: str
    stale: bool = False


def _frozen_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    return dict(value)


@frozen
class DeploymentEnvironment(Shown):
    """Where models are deployed to: a tool and its address.

    Everything here can be stored, so a secret cannot: `token_env` names the environment variable
    that holds the bearer token. `settings` go to the backend, which refuses what it does not know.

    >>> DeploymentEnvironment("gpu-box", backend="ollama", address="10.0.0.5", port=11434).url
    'http://10.0.0.5:11434'
    """

    name: str
    backend: str
    address: str | None = None
    port: int | None = None
    scheme: Literal["http", "https"] = field(default="http", kw_only=True)
    path: str = field(default="", kw_only=True)
    token_env: str | None = field(default=None, kw_only=True)
    settings: Mapping[str, Any] = field(
        factory=dict, converter=_frozen_mapping, kw_only=True, hash=False
    )

    def __attrs_post_init__(self) -> None:
        checked_name("environment name", self.name, ENVIRONMENT_NAME)
        if self.port is not None and not (type(self.port) is int and 0 < self.port < 65536):
            raise InvalidOptionError(f"port {shown(self.port)} is not between 1 and 65535")
        if self.scheme not in ("http", "https"):
            raise InvalidOptionError(f"scheme {shown(self.scheme)} is neither http nor https")
        if self.address is not None and not re.fullmatch(
            r"[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]+\]", self.address
        ):
            raise InvalidOptionError(
                f"address {shown(self.address)} must be a bare host name or IP address; "
                f"scheme, port and path have arguments of their own"
            )
        if self.path and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", self.path):
            raise InvalidOptionError(f"path {shown(self.path)} must look like '/prefix'")

    @property
    def url(self) -> str:
        """Scheme, address, port and path; no trailing slash.

        Raises:
            InvalidOptionError: the environment has no address.
        """
        if self.address is None:
            raise InvalidOptionError(f"environment {shown(self.name)} has no address")
        port = f":{self.port}" if self.port else ""
        return f"{self.scheme}://{self.address}{port}{self.path}"
