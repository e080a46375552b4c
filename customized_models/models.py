"""The values that the public API takes and returns: frozen, and without paths."""

from __future__ import annotations

import enum
import ipaddress
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
"""`progress(phase, done, total)`: called often, with bytes; raises `JobCancelled` to stop."""


def checked_quantization(quantization: str) -> Quantization:
    """`quantization` if it is one of `QUANTIZATIONS`.

    Raises:
        UnsupportedQuantizationError: It is not.
    """
    for known in QUANTIZATIONS:
        if quantization == known:
            return known
    raise UnsupportedQuantizationError(
        f"unknown quantization {shown(quantization)}; choose from {', '.join(QUANTIZATIONS)}"
    )


@frozen
class TrainingConfiguration(Shown):
    """How an adapter was trained.

    Attributes:
        peft: The method and its settings, from `adapter_config.json`.
        arguments: The Trainer's arguments that affect the result; never paths, tokens or host
            names.
        datasets: Names.
    """

    peft: Mapping[str, Any] = field(factory=dict)
    arguments: Mapping[str, Any] = field(factory=dict)
    datasets: tuple[str, ...] = ()


@frozen
class EvaluationSummary(Shown):
    """What training and evaluation measured.

    Attributes:
        metrics: The last value of each metric.
        best_metric: That of the best training checkpoint, if the Trainer kept one.
        steps: Optimizer steps.
        epochs: Passes over the training data.
        first_loss: The first training loss in the log.
        last_loss: The last training loss in the log.
        log_entries: How many training losses the log has.
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
    """How a model was made. Its `README.md` is rendered from this.

    Attributes:
        training: How the adapter was trained.
        evaluation: What was measured.
    """

    training: TrainingConfiguration = field(factory=TrainingConfiguration)
    evaluation: EvaluationSummary = field(factory=EvaluationSummary)

    def __str__(self) -> str:
        """One line: method, rank, steps and last loss."""
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
    """What a base model's files say about it.

    Attributes:
        architecture: The class in `config.json`, such as "LlamaForCausalLM".
        parameters: Elements of all tensors together.
        dtype: That of most elements, such as "BF16".
        size: Bytes of all content files.
        context_length: In tokens.
        vocabulary_size: In tokens.
        license: From the header of its `README.md`.
        generation: The contents of `generation_config.json`.
        chat_template: Whether it has one.
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
        """One line: architecture, parameters and dtype."""
        return f"{self.architecture}, {self.parameters:,} parameters, {self.dtype}"


def _each_text(value: str | Iterable[str]) -> tuple[str, ...]:
    """Several strings; a single string is one of them, not its letters."""
    return (value,) if isinstance(value, str) else tuple(value)


@frozen
class DeploymentTemplate(Shown):
    """An Ollama template and the strings that end an answer.

    Attributes:
        text: The template, in Go's template language.
        stop: Strings at which the server stops generating.

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
            OSError: The file cannot be read.
        """
        return cls(Path(path).read_text(encoding="utf-8"), stop)

    @property
    def digest(self) -> str:
        """BLAKE3 of the text and the stop strings, after the algorithm and a colon."""
        from blake3 import blake3

        return "blake3:" + blake3("\0".join((self.text, *self.stop)).encode()).hexdigest()


@frozen
class BaseModel(Shown):
    """A pretrained model that adapters are trained on. It is referenced, never copied or deleted.

    Attributes:
        technical_name: Short and unique.
        model_name: Unique; its Hub id where it has one.
        digest: BLAKE3 of its content files, as `blake3:...`; it does not depend on where they are.
        created: When it was added, in UTC.
        card: What its files say about it.
        deployment_template: For tools that need one, such as Ollama.
    """

    technical_name: str
    model_name: str
    digest: str = field(repr=False)
    created: datetime = field(repr=False)
    card: BaseModelCard = field(hash=False)
    deployment_template: DeploymentTemplate | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The technical name."""
        return self.technical_name

    @property
    def key(self) -> str:
        """The key that a lease on it holds."""
        return f"base/{self.technical_name}"


@frozen
class CustomizedModel(Shown):
    """A registered adapter. It belongs to its base model and cannot be used without it.

    Law: `name == customized_name(base, train_name, created, training_id)`.

    Attributes:
        name: Unique.
        base: The base model's technical name.
        train_name: What the training was called.
        training_id: The training's id.
        created: When the name was reserved, in UTC.
        digest: BLAKE3 of its content files and its base, as `blake3:...`.
        kind: Always "adapter".
        card: How it was trained.
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
        """The key under which it is stored, and that a lease on it holds."""
        return f"customized/{self.name}"


@frozen
class CompleteModel(Shown):
    """An adapter merged into its base: a model directory that `from_pretrained` opens.

    Attributes:
        name: Unique.
        customized: Name of the customized model it was made from.
        base: The base model's technical name.
        train_name: What the training was called.
        saving_id: The id of the job that made it.
        created: When it was saved, in UTC.
        digest: BLAKE3 of its content files, parents and recipe, as `blake3:...`.
        customized_digest: The customized model's digest.
        base_digest: The base model's digest.
        recipe: What the merged bits depend on: package versions, threads, CPU capability.
        card: How the adapter was trained.
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
        """The key under which it is stored, and that a lease on it holds."""
        return f"complete/{self.name}"


class Status(enum.Enum):
    """What a deployment tool answers about a live model."""

    ABSENT = "absent"  # the tool does not know it
    LIVE = "live"  # it can be called
    LOADED = "loaded"  # it can be called, and its weights are in memory
    CHANGED = "changed"  # the name is there, but means something else than what was deployed
    UNREACHABLE = "unreachable"  # the tool does not answer


@frozen
class Served(Shown):
    """A model as its deployment tool serves it.

    Attributes:
        name: The served name, which callers put into `model`.
        endpoint: Base URL of the API, without a trailing slash.
        api: The API's style, such as "openai" or "ollama".
        digest: SHA-256 of the file that the tool was given, as `sha256:...`.
        details: What the backend needs to find it again, such as a process and its port.
    """

    name: str
    endpoint: str
    api: str
    digest: str = field(repr=False)
    details: Mapping[str, Any] = field(factory=dict, hash=False, repr=False)


@frozen
class Proof(Shown):
    """A comparison that was made before a live model got its served name.

    Attributes:
        name: "content", "template" or "greedy".
        passed: None where something was only measured, or could not be compared.
        compared: What was compared with what.
        found: The result.
    """

    name: str
    passed: bool | None
    compared: str
    found: str


@frozen
class LiveModel(Shown):
    """A model that was deployed.

    Attributes:
        name: Unique.
        source: Name of the complete or customized model it was made from.
        base: The base model's technical name.
        train_name: What the training was called.
        quantization: The mode of its file.
        environment: Name of the environment it was deployed to.
        served: How it is called.
        deploying_id: The id of the job that deployed it.
        created: When it was deployed, in UTC.
        source_digest: The source's digest.
        template_digest: The deployment template's digest, if it had one.
        state: "live" while it has its served name; "superseded" once another model took it, until
            `Deployer.rollback` gives it back; "undeployed" at the end. `Deployer.status` asks the
            tool.
        replaces: Name of the live model that had the served name before.
        proofs: What was compared before it got the name.
        note: What its undeployment left at the tool.
        card: How the adapter was trained.
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
    state: Literal["live", "superseded", "undeployed"] = "live"
    card: ModelCard = field(factory=ModelCard, hash=False, repr=False)
    replaces: str | None = field(default=None, repr=False)
    proofs: tuple[Proof, ...] = field(default=(), repr=False)
    note: str = field(default="", repr=False)

    @property
    def digest(self) -> str:
        """That of the file that the tool serves; see `Served.digest`."""
        return self.served.digest

    @property
    def endpoint(self) -> str:
        """Base URL of its API, without a trailing slash."""
        return self.served.endpoint


@frozen
class ThirdPartyModel(Shown):
    """A live model as other services see it.

    Attributes:
        name: The live model's name.
        endpoint: Base URL of the API, without a trailing slash.
        api: The API's style, such as "openai" or "ollama".
        model: What to put into `model`.
        environment: Name of the environment.
        stale: Whether the live model has been undeployed, so that calls fail.
    """

    name: str
    endpoint: str
    api: str
    model: str
    environment: str
    stale: bool = False


def _frozen_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
    return dict(value)


def _host(value: str | None) -> str | None:
    """A host's name or IP address, as it stands in a URL but without brackets.

    What is refused is not shown: it may hold a password.
    """
    if value is None:
        return None
    bare = value[1:-1] if value[:1] == "[" and value[-1:] == "]" else value
    with suppress(ValueError):
        return str(ipaddress.ip_address(bare))
    with suppress(UnicodeError):
        name = value.encode("idna").decode().lower() if not value.isascii() else value
        # Names of services, as in a compose file, may have an underscore.
        if re.fullmatch(r"(?!-)[A-Za-z0-9_.-]{1,253}", name):
            return name
    raise InvalidOptionError(
        "address must be a bare host name or IP address; scheme, port, path and secrets have "
        "arguments of their own"
    )


def _scheme(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _prefix(value: str) -> str:
    """A path before that of the tool's API: with a slash before it, and none after it."""
    path = value.rstrip("/")
    path = f"/{path}" if path and not path.startswith("/") else path
    if not re.fullmatch(r"(/(?:[A-Za-z0-9._~:@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)*", path):
        raise InvalidOptionError("path must look like '/prefix', without a query")
    return path


@frozen
class DeploymentEnvironment(Shown):
    """A deployment tool, its address and its settings. It is stored, so it holds no secrets.

    Attributes:
        name: Unique; lower-case letters, digits, `.` and `-`.
        backend: "ollama", "llama_cpp", or the name of one that is installed or given.
        address: A host name or an IP address; None if the backend needs none.
        port: None for the tool's own.
        scheme: "http" or "https".
        path: A prefix that a proxy removes, such as "/ollama".
        token_env: Name of the environment variable with the bearer token.
        settings: For the backend, which refuses those that it does not know.

    Raises:
        InvalidNameError: The name has a character that is not allowed.
        InvalidOptionError: Another value does not fit.

    >>> DeploymentEnvironment("gpu-box", backend="ollama", address="10.0.0.5", port=11434).url
    'http://10.0.0.5:11434'
    """

    name: str
    backend: str
    address: str | None = field(default=None, converter=_host)
    port: int | None = None
    scheme: Literal["http", "https"] = field(default="http", converter=_scheme, kw_only=True)
    path: str = field(default="", converter=_prefix, kw_only=True)
    token_env: str | None = field(default=None, kw_only=True)
    settings: Mapping[str, Any] = field(
        factory=dict, converter=_frozen_mapping, kw_only=True, hash=False
    )

    def __attrs_post_init__(self) -> None:
        checked_name("environment name", self.name, ENVIRONMENT_NAME)
        if self.port is not None and not (type(self.port) is int and 0 < self.port < 65536):
            raise InvalidOptionError(f"port {shown(self.port)} is not between 1 and 65535")
        if self.scheme not in ("http", "https"):
            raise InvalidOptionError("scheme must be http or https")

    @property
    def url(self) -> str:
        """Scheme, address, port if there is one, and path, without a trailing slash.

        Raises:
            InvalidOptionError: The environment has no address.
        """
        return self.url_with(None)

    def url_with(self, default_port: int | None) -> str:
        """As `url`, with the port that the backend's tool listens on where none is stated."""
        if self.address is None:
            raise InvalidOptionError(f"environment {shown(self.name)} has no address")
        host = f"[{self.address}]" if ":" in self.address else self.address
        port = self.port or default_port
        return f"{self.scheme}://{host}{f':{port}' if port else ''}{self.path}"
