"""The values that the public API takes and returns: frozen, and without paths."""

from __future__ import annotations

import enum
import html
import ipaddress
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from difflib import get_close_matches
from typing import Any, Literal, TypeGuard, get_args

from attrs import Factory, field, frozen

from . import arguments
from .display import html_table, text_table
from .errors import InvalidOptionError, MalformedError, UnsupportedQuantizationError, shown
from .files.reading import content
from .naming import ENVIRONMENT_NAME, checked_name
from .values import Value, checked

Quantization = Literal["no_quantization", "q8_0", "q4_K_M", "q4_K_S"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)

Progress = Callable[[str, int, int], None]
"""`progress(phase, done, total)`: called often, with bytes; raises `JobCancelled` to stop."""


def no_progress(phase: str, done: int, total: int) -> None:
    """A `Progress` that nobody watches."""


def checked_quantization(quantization: object) -> Quantization:
    """One of `QUANTIZATIONS`. Upper and lower case are the same: llama.cpp says `Q4_K_M`.

    Raises:
        InvalidArgumentError: It is not text.
        UnsupportedQuantizationError: There is no such mode.
    """
    modes: dict[str, Quantization] = {mode.lower(): mode for mode in QUANTIZATIONS}
    given = arguments.instance("quantization", quantization, str, " or ".join(QUANTIZATIONS))
    if given.lower() in modes:
        return modes[given.lower()]
    near = get_close_matches(given.lower(), modes, 1)
    hint = f"; did you mean {modes[near[0]]!r}?" if near else ""
    raise UnsupportedQuantizationError(
        f"unknown quantization {shown(given)}; choose from {', '.join(QUANTIZATIONS)}{hint}"
    )


def _datasets(value: str | Iterable[str]) -> tuple[str, ...]:
    return arguments.texts("TrainingConfiguration.datasets", value)


@frozen(field_transformer=checked)
class TrainingConfiguration(Value):
    """How an adapter was trained.

    Attributes:
        peft: The method and its settings, from `adapter_config.json`.
        arguments: The Trainer's arguments that affect the result; never paths, tokens or host
            names.
        datasets: Names.
        base_digest: The base model's when the training began, if it was known then.
        base_commit: The commit that the base was loaded from, if that was from the Hub.
    """

    peft: Mapping[str, Any] = field(factory=dict)
    arguments: Mapping[str, Any] = field(factory=dict)
    datasets: tuple[str, ...] = field(default=(), converter=_datasets)
    base_digest: str | None = None
    base_commit: str | None = None


@frozen(field_transformer=checked)
class EvaluationSummary(Value):
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


@frozen(field_transformer=checked)
class ModelCard(Value):
    """How a model was made. Its `README.md` is rendered from this.

    Attributes:
        training: How the adapter was trained.
        evaluation: What was measured.
        notes: What was found in the adapter's files, or changed in the copy of them: a sentence
            each.
    """

    training: TrainingConfiguration = field(factory=TrainingConfiguration)
    evaluation: EvaluationSummary = field(factory=EvaluationSummary)
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The whole card in several lines."""
        return "\n\n".join((str(self), *(f"{t}\n{text_table(rows)}" for t, rows in self._tables())))

    def _repr_html_(self) -> str:
        tables = (html_table((title, ""), rows) for title, rows in self._tables())
        return f"<p>{html.escape(str(self))}</p>{''.join(tables)}"

    def _tables(self) -> Iterator[tuple[str, list[tuple[object, ...]]]]:
        """Titles and rows of the tables that have rows."""
        training, evaluation = self.training, self.evaluation.to_dict()
        metrics = evaluation.pop("metrics")
        tables = {
            "Method": training.peft,
            "Training arguments": training.arguments,
            "Datasets": dict.fromkeys(training.datasets, ""),
            "Evaluation": metrics | {k: v for k, v in evaluation.items() if v},
        }
        return ((title, [*table.items()]) for title, table in tables.items() if table)

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


@frozen(field_transformer=checked)
class BaseModelCard(Value):
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


MAX_TEMPLATE = 1 << 20  # bytes: the longest known templates have some ten thousand


def _stop(value: str | Iterable[str]) -> tuple[str, ...]:
    return arguments.texts("DeploymentTemplate.stop", value)


@frozen(field_transformer=checked)
class DeploymentTemplate(Value):
    """An Ollama template and the strings that end an answer.

    Attributes:
        text: The template, in Go's template language.
        stop: Strings at which the server stops generating.

    Raises:
        InvalidOptionError: One of them is empty, at which every answer would end.

    >>> DeploymentTemplate("{{ .Prompt }}", stop=("<|im_end|>",)).stop
    ('<|im_end|>',)
    """

    text: str = field(repr=lambda text: shown(text, 40))
    stop: tuple[str, ...] = field(default=(), converter=_stop)

    def __attrs_post_init__(self) -> None:
        if "" in self.stop:
            raise InvalidOptionError("a stop string of a DeploymentTemplate is empty")

    @classmethod
    def from_file(
        cls, path: str | os.PathLike[str], stop: str | Iterable[str] = ()
    ) -> DeploymentTemplate:
        """The template in a UTF-8 file.

        Raises:
            MalformedError: There is no such file, or it is not UTF-8.
            UnsafeFileError: It has more than a megabyte.
            StorageError: It cannot be read.
        """
        file = arguments.path("path", path)
        try:
            return cls(content(file, MAX_TEMPLATE).decode("utf-8-sig"), stop)
        except UnicodeDecodeError as error:
            raise MalformedError(f"{shown(file.name)} is not UTF-8") from error

    @property
    def digest(self) -> str:
        """BLAKE3 of the text and the stop strings, after the algorithm and a colon."""
        from blake3 import blake3

        return "blake3:" + blake3("\0".join((self.text, *self.stop)).encode()).hexdigest()


@frozen(field_transformer=checked)
class BaseModel(Value):
    """A pretrained model that adapters are trained on. It is referenced, never copied or deleted.

    Attributes:
        technical_name: Short and unique.
        model_name: Unique; its Hub id where it has one.
        digest: BLAKE3 of its content files, as `blake3:...`; it does not depend on where they are.
        created: When it was added, in UTC.
        card: What its files say about it.
        deployment_template: For tools that need one, such as Ollama.
        trust_remote_code: Whether transformers may run code that came with it.
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
        """The technical name."""
        return self.technical_name

    @property
    def key(self) -> str:
        """The key that a lease on it holds."""
        return f"base/{self.technical_name}"


@frozen(field_transformer=checked)
class CustomizedModel(Value):
    """A registered training: an adapter, or a full model that began from a base.

    An adapter cannot be used without its base model; a full model takes from it what it lacks.

    Law: `name == customized_name(base, train_name, created, training_id)`.

    Attributes:
        name: Unique.
        base: The base model's technical name.
        train_name: Derived from the label by `naming.train_name_of`.
        training_id: The training's id.
        created: When the name was reserved, in UTC.
        digest: BLAKE3 of its content files and its base, as `blake3:...`.
        kind: "adapter", or "checkpoint" for a full model.
        card: How it was trained.
        label: What the training was called.
    """

    name: str
    base: str
    train_name: str
    training_id: uuid.UUID = field(repr=False)
    created: datetime = field(repr=False)
    digest: str = field(repr=False)
    kind: Literal["adapter", "checkpoint"] = field(default="adapter", repr=False)
    card: ModelCard = field(factory=ModelCard, hash=False, repr=False)
    label: str = field(default=Factory(lambda self: self.train_name, takes_self=True), repr=False)

    @property
    def key(self) -> str:
        """The key under which it is stored, and that a lease on it holds."""
        return f"customized/{self.name}"


def is_adapter(model: object) -> TypeGuard[CustomizedModel]:
    """Whether a model is an adapter, whose weights are a change of its base's."""
    return isinstance(model, CustomizedModel) and model.kind == "adapter"


def is_trained_checkpoint(model: object) -> TypeGuard[CustomizedModel]:
    """Whether a model is a full one that a training saved."""
    return isinstance(model, CustomizedModel) and model.kind == "checkpoint"


@frozen(field_transformer=checked)
class CompleteModel(Value):
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
        evicted: Whether its bytes were dropped, to be rebuilt when they are needed.
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
    evicted: bool = field(default=False, eq=False, repr=False)

    @property
    def key(self) -> str:
        """The key under which it is stored, and that a lease on it holds."""
        return f"complete/{self.name}"

    @property
    def recipe_key(self) -> str:
        """The key under which its manifest and card are stored while it is evicted."""
        return f"evicted/{self.name}"


class Status(enum.Enum):
    """What a deployment tool answers about a live model."""

    ABSENT = "absent"  # the tool does not know it
    LIVE = "live"  # it can be called
    LOADED = "loaded"  # it can be called, and its weights are in memory
    CHANGED = "changed"  # the name is there, but means something else than what was deployed
    UNREACHABLE = "unreachable"  # the tool does not answer


@frozen(field_transformer=checked)
class Served(Value):
    """A model as its deployment tool serves it.

    Attributes:
        name: The served name, which callers put into `model`.
        endpoint: Base URL of the API, without a trailing slash.
        api: The API's style, such as "openai" or "ollama".
        digest: SHA-256 of the file that the tool was given, as `sha256:...`.
        details: What the backend needs to find it again, such as a process and its port.
        copied: Whether the tool has a copy of its own, so that the file here need not stay for it.
    """

    name: str
    endpoint: str
    api: str
    digest: str = field(repr=False)
    details: Mapping[str, Any] = field(factory=dict, hash=False, repr=False)
    copied: bool = field(default=False, repr=False)


@frozen(field_transformer=checked)
class Proof(Value):
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


LiveState = Literal["live", "superseded", "undeployed"]
LIVE_STATES: tuple[LiveState, ...] = get_args(LiveState)


@frozen(field_transformer=checked)
class LiveModel(Value):
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
    state: LiveState = "live"
    card: ModelCard = field(factory=ModelCard, hash=False, repr=False)
    replaces: str | None = field(default=None, repr=False)
    proofs: tuple[Proof, ...] = field(default=(), repr=False)
    note: str = field(default="", repr=False)

    @property
    def key(self) -> str:
        """What a lease on it holds."""
        return f"live/{self.name}"

    @property
    def digest(self) -> str:
        """That of the file that the tool serves; see `Served.digest`."""
        return self.served.digest

    @property
    def endpoint(self) -> str:
        """Base URL of its API, without a trailing slash."""
        return self.served.endpoint


@frozen(field_transformer=checked)
class JobProgress(Value):
    """The progress of a job. It unpacks as `phase, done, total`.

    Attributes:
        phase: What the job is doing; "done" once it has succeeded.
        done: Bytes.
        total: Bytes; 0 in a phase that is not measured.
    """

    phase: str
    done: int
    total: int

    @property
    def percent(self) -> int | None:
        """How much of the phase is done; None if that is not measured."""
        return 100 * self.done // self.total if self.total else None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.phase, self.done, self.total))

    def __str__(self) -> str:
        return self.phase if self.percent is None else f"{self.phase}, {self.percent} %"


JobState = Literal["queued", "running", "succeeded", "failed", "cancelled", "lost"]
JOB_STATES: tuple[JobState, ...] = get_args(JobState)


@frozen(field_transformer=checked)
class JobRecord(Value):
    """What is known of a job at one moment.

    Attributes:
        id: Its id.
        kind: "save", "rebuild", "deploy" or "export".
        name: Of the model or file that it makes.
        state: "lost" if its worker ended without recording how.
        progress: How far it has come.
        created: When it was submitted, in UTC.
        started: When its work began, in UTC; None while it is queued.
        ended: When it ended, in UTC.
        error: The class and message of the error that ended it.
    """

    id: uuid.UUID
    kind: str
    name: str
    state: JobState
    progress: JobProgress
    created: datetime
    started: datetime | None = None
    ended: datetime | None = None
    error: str | None = None


@frozen(field_transformer=checked)
class ThirdPartyModel(Value):
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


def _host(value: str | None) -> str | None:
    """A host's name or IP address, as it stands in a URL but without brackets.

    What is refused is not shown: it may hold a password.
    """
    if not isinstance(value, str):
        return value
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
    if not isinstance(value, str):
        return value
    path = value.rstrip("/")
    path = f"/{path}" if path and not path.startswith("/") else path
    if not re.fullmatch(r"(/(?:[A-Za-z0-9._~:@!$&'()*+,;=-]|%[0-9A-Fa-f]{2})+)*", path):
        raise InvalidOptionError("path must look like '/prefix', without a query")
    return path


_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,127}")  # as POSIX has it; tokens have small letters
_SECRET_NAME = re.compile(
    r"(^|[_.-])(token|secret|password|passwd|passphrase|credentials?|authorization|bearer"
    r"|(api|access|private)[_-]?key)$",
    re.IGNORECASE,
)
_SECRET = re.compile(
    r"Bearer |Basic |\w+://[^/\s]*@|(hf_|sk-|ghp_|github_pat_|AKIA)\w", re.IGNORECASE
)


@frozen(field_transformer=checked)
class DeploymentEnvironment(Value):
    """A deployment tool, its address and its settings. It is stored, so it holds no secrets.

    Attributes:
        name: Unique; lower-case letters, digits, `.` and `-`.
        backend: "ollama", "llama_cpp", or the name of one that is installed or given.
        address: A host name or an IP address; None if the backend needs none.
        port: None for the tool's own.
        scheme: "http" or "https".
        path: A prefix that a proxy removes, such as "/ollama".
        token_env: Name of the environment variable with the bearer token, in capital letters.
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
    settings: Mapping[str, Any] = field(factory=dict, kw_only=True, hash=False)

    def __attrs_post_init__(self) -> None:
        checked_name("environment name", self.name, ENVIRONMENT_NAME)
        if self.port is not None and not 0 < self.port < 65536:
            raise InvalidOptionError(f"port {self.port} is not between 1 and 65535")
        if self.token_env is not None and not _VARIABLE.fullmatch(self.token_env):
            raise InvalidOptionError(
                "token_env must be the name of the environment variable that holds the token, "
                "such as 'OLLAMA_TOKEN': A to Z, 0 to 9 and '_'"
            )
        for key, value in self.settings.items():
            if isinstance(value, str) and (_SECRET_NAME.search(key) or _SECRET.match(value)):
                raise InvalidOptionError(
                    f"the setting {shown(key, 40)} looks like a secret, and settings are stored; "
                    f"token_env names the environment variable that holds a token"
                )

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
