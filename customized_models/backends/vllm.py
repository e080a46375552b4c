"""vLLM: adapters loaded into a running server, beside the base model that it serves.

The server is started by someone else, with the base model and
`--enable-lora`, and with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` in its environment.

Source: `vllm/entrypoints/serve/lora/` and `vllm/lora/peft_helper.py` of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from ..adapters.intake import WEIGHTS
from ..adapters.plain_lora import largest_rank, refuse_unless_plain
from ..adapters.settings import CONFIG
from ..base_models import hash_base_model
from ..deploying.templates.chat_template import ChatTemplate
from ..deploying.templates.conversations import Conversation
from ..deploying.templates.live import Tokenizer, prove_on_vllm
from ..deploying.templates.proofs import TemplateProof
from ..errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    InvalidOptionError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedAdapterError,
    UnsupportedError,
    UnsupportedQuantizationError,
    shown,
)
from ..files.digests import SHA256, hash_file
from ..models import DeploymentEnvironment, Progress, Served, Status
from .connection import Connection, Secrets, checked_settings, environment_variable
from .http import JSONServer
from .protocol import AdapterBesideBase, Artifact, Plan, checked_options, chosen_served_name
from .shared_directory import SETTINGS, SharedDirectory, version_name

__all__ = ["VLLM", "VLLMOptions"]

DEFAULT_PORT = 8000
_SETTINGS = (*SETTINGS, "base", "max_lora_rank")
_MAX_LORA_RANK = 16  # what --max-lora-rank is if nothing is said
_LOAD_SECONDS = 600.0  # a large adapter on a slow shared disk
_ANSWER_SECONDS = 600.0  # a few tokens of a large model on a slow processor


@frozen
class VLLMOptions:
    """A model at vLLM has no options: how it is served was said when the server was started."""


class VLLM:
    """A vLLM server; on port 8000 if the environment states none.

    A customized model is served beside its base: its adapter is copied into a directory that the
    server reads, a new one for each version, and loaded. Callers put the served name into `model`.
    The server forgets what was loaded when it ends, and `Deployer.deploy` brings it back.

    A complete model is loaded when the server starts. The error says with which command; once it
    is served, it is compared with the registered one, byte for byte, and recorded.

    Settings, besides `models_directory` and `server_directory` (see `shared_directory`):
    `max_lora_rank`, what the server was started with if not 16; `base`, the technical name of the
    base model that it serves. The server takes an adapter of a narrower or shallower model without
    a word, so without `base` the directory that it serves is compared with the registered base,
    which must then be visible from this host under the path that the server tells.
    """

    options = VLLMOptions

    def __init__(
        self, environment: DeploymentEnvironment, *, secrets: Secrets = environment_variable
    ) -> None:
        self._environment = environment
        self._secrets = secrets
        settings = checked_settings(environment, _SETTINGS)
        _ = self.url  # raises where there is no address
        self._directory = SharedDirectory.of(environment)
        self._base = settings.get("base")
        self._max_rank = settings.get("max_lora_rank", _MAX_LORA_RANK)
        if self._base is not None and not isinstance(self._base, str):
            raise InvalidOptionError("the setting 'base' must be a base model's technical name")
        if type(self._max_rank) is not int or self._max_rank < 1:
            raise InvalidOptionError("the setting 'max_lora_rank' must be a positive number")

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """See `Backend.preflight`; sends GET requests only.

        Raises:
            UnsupportedAdapterError: vLLM does not apply such an adapter, or not of that rank.
            BaseModelMismatch: The setting `base` names another one than the adapter's.
            UnsupportedError: It is not known which base model the server serves; or it is a
                complete model that the server does not serve yet.
        """
        checked_options(options, VLLMOptions)
        name = chosen_served_name(artifact, served_name)
        if artifact.quantization != "no_quantization":
            raise UnsupportedQuantizationError(
                f"vLLM serves models as they are (asked for {artifact.quantization}); it has a "
                f"setting of its own, --quantization"
            )
        if artifact.adapter_config is None:
            return self._plan_of_complete(artifact, name, options)
        refuse_unless_plain(artifact.adapter_config)
        self._refuse_rank(largest_rank(artifact.adapter_config))
        self._directory.check()
        server = self._server()
        self._refuse_other_base(artifact.base, _served_base(server))
        if _cards(server).get(name, {"parent": ""}).get("parent") is None:
            raise AlreadyExistsError(
                f"vLLM at {server.url} serves its base model as {shown(name)}; choose another "
                f"served_name"
            )
        version = version_name(name, uuid.uuid4().hex[:12])
        return Plan(artifact, name, options, {"version": version})

    def _refuse_rank(self, rank: int) -> None:
        if rank > self._max_rank:
            raise UnsupportedAdapterError(
                f"the adapter has rank {rank}, and the server takes {self._max_rank}: start it "
                f"with --max-lora-rank and say so in the setting 'max_lora_rank'"
            )

    def _refuse_other_base(self, name: str, root: str) -> None:
        if self._base not in (None, name):
            raise BaseModelMismatch(
                f"the adapter's base is {shown(name)}, and environment "
                f"{shown(self._environment.name)} says that it serves {shown(self._base)}"
            )
        if self._base is None and not Path(root).is_dir():
            raise UnsupportedError(
                f"the server serves {shown(root)}, which is no directory of this host, so it "
                f"cannot be compared with the adapter's base; give the environment the setting "
                f"'base', the technical name of what is served"
            )

    def push(self, plan: Plan, progress: Progress) -> Served:
        """See `Backend.push`. Details: `version`, also the name of its directory."""
        if plan.artifact.adapter_config is None:
            return self._adopted(plan, progress)
        server, version = self._server(), plan.details["version"]
        with plan.artifact.adapter() as beside:
            if self._base is None:
                _compare_bases(beside, Path(_served_base(server)), progress)
            files = {name: beside.adapter / name for name in (CONFIG, WEIGHTS)}
            digest = hash_file(files[WEIGHTS], SHA256).digest
            self._directory.put_directory(version, files, progress)
        try:
            progress("loading", 0, 1)
            self._load(server, version, version, in_place=False)
            progress("loading", 1, 1)
        except BaseException:
            self._unload(server, version, version)
            self._directory.remove(version, "")
            raise
        return Served(version, f"{server.url}/v1", "openai", digest, dict(plan.details))

    def _load(self, server: JSONServer, name: str, version: str, *, in_place: bool) -> None:
        path = self._directory.seen_by_server(version)
        body = {"lora_name": name, "lora_path": path, "load_inplace": in_place}
        try:
            server.post_for_text("/v1/load_lora_adapter", body, seconds=_LOAD_SECONDS)
        except ServerAnswerError as error:
            if "answered 404" in str(error) and version not in str(error):
                error.add_note(
                    "adapters are loaded by a server that was started with --enable-lora, and "
                    "with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
                )
            raise

    def _unload(self, server: JSONServer, name: str, version: str) -> None:
        """Take a name away, if it stands for that version."""
        if self._version_of(_cards(server).get(name)) == version:
            server.post_for_text("/v1/unload_lora_adapter", {"lora_name": name})

    def _version_of(self, card: Mapping[str, Any] | None) -> str | None:
        """Which version of ours a listed model is; None for another model, or none."""
        root = "" if card is None else str(card.get("root"))
        directory, _, version = root.rpartition("/")
        return version if directory == str(self._directory.there) else None

    @property
    def url(self) -> str:
        """See `Addressed`."""
        return self._environment.url_with(DEFAULT_PORT)

    def probe(self, served: Served) -> VLLMProbe:
        """See `Probing`."""
        return VLLMProbe(self._server(), served.name)

    def identity(self, served: Served) -> str:
        """See `Promoting.identity`: the version; of a complete model, its directory."""
        return str(served.details.get("version") or served.details["complete"])

    def version(self, served: Served) -> Served:
        """See `Promoting.version`."""
        return evolve(served, name=served.details.get("version", served.name))

    def refuse_taken(self, name: str, replaced: Collection[str] | None) -> None:
        """See `Promoting.refuse_taken`."""
        server = self._server()
        card = _cards(server).get(name)
        base = card is not None and card.get("parent") is None  # see `preflight`
        if card is None or base or replaced is None or self._version_of(card) in replaced:
            return
        raise AlreadyExistsError(
            f"vLLM at {server.url} already serves something under {shown(name)}; choose another "
            f"served_name, or say replace=True"
        )

    def promote(self, served: Served, name: str, replaced: Collection[str] | None) -> Served:
        """See `Promoting.promote`: the version is loaded once more, under the served name."""
        if "version" not in served.details:
            return served
        server, version = self._server(), served.details["version"]
        with self._directory.locked():
            card = _cards(server).get(name)
            if self._version_of(card) != version:
                self.refuse_taken(name, replaced)
                self._load(server, name, version, in_place=card is not None)
                if self._version_of(_cards(server).get(name)) != version:
                    raise ServerAnswerError(
                        f"vLLM at {server.url} does not serve {shown(name)} as it was told to"
                    )
        return evolve(served, name=name)

    def status(self, served: Served) -> Status:
        """See `Backend.status`."""
        try:
            card = _cards(self._server()).get(served.name)
        except (ServerUnreachableError, ServerAnswerError):
            return Status.UNREACHABLE
        if card is None:
            return Status.ABSENT
        expected = served.details.get("complete")
        ours = card["root"] == expected if expected else self._is_version(card, served)
        return Status.LOADED if ours else Status.CHANGED

    def _is_version(self, card: Mapping[str, Any], served: Served) -> bool:
        return bool(self._version_of(card) == served.details["version"])

    def undeploy(self, served: Served) -> None:
        """See `Backend.undeploy`. The server frees the memory when it needs it for another."""
        if "version" not in served.details:
            self._refuse_to_stop(served)
            return
        server, version = self._server(), served.details["version"]
        for name in dict.fromkeys((served.name, version)):
            self._unload(server, name, version)
        self._directory.remove(version, served.digest, file=WEIGHTS)

    def describe(self) -> Mapping[str, Any]:
        """See `Describing`: the version, and the base model that it serves."""
        server = self._server()
        return {
            "version": str(server.get("/version").get("version")),
            "base": self._base or _served_base(server),
            "largest rank of adapters": self._max_rank,
        }

    # Complete models

    def _plan_of_complete(self, artifact: Artifact, name: str, options: VLLMOptions) -> Plan:
        server = self._server()
        card = _cards(server).get(name)
        if card is None:
            raise UnsupportedError(
                f"vLLM loads a complete model when it starts, and serves nothing as "
                f"{shown(name)} at {server.url}. Start it there with\n"
                f"    vllm serve DIRECTORY --served-model-name {name}\n"
                f"where DIRECTORY is what registry.local_path(model) gives, or a copy of it, and "
                f"deploy again"
            )
        root = str(card.get("root"))
        if card.get("parent") is not None or not Path(root).is_dir():
            raise UnsupportedError(
                f"vLLM at {server.url} serves {shown(root)} as {shown(name)}, which is no "
                f"directory of this host, so it cannot be compared with the complete model"
            )
        return Plan(artifact, name, options, {"complete": root})

    def _adopted(self, plan: Plan, progress: Progress) -> Served:
        """What the server serves already, once every byte of it is seen to be the model's."""
        root = plan.details["complete"]
        with plan.artifact.directory() as directory:
            ours = hash_base_model(directory, progress)
            if Path(root).resolve() != directory.resolve():
                theirs = hash_base_model(Path(root), progress)
                if theirs.digest != ours.digest:
                    raise BaseModelMismatch(
                        f"what vLLM serves from {shown(root)} is not the complete model"
                    )
        server = self._server()
        return Served(plan.served_name, f"{server.url}/v1", "openai", ours.digest, plan.details)

    def _refuse_to_stop(self, served: Served) -> None:
        if served.name in _cards(self._server()):
            raise UnsupportedError(
                f"vLLM serves {shown(served.name)} for as long as it runs: stop the server, then "
                f"undeploy"
            )

    def _server(self) -> JSONServer:
        connection = Connection.of(
            self._environment, self._secrets, default_port=DEFAULT_PORT, own=_SETTINGS
        )
        return JSONServer("vLLM", connection)


@frozen
class VLLMProbe:
    """What a model at vLLM is asked for its proofs; see `Probe`."""

    server: JSONServer
    name: str

    def template(
        self, chat: ChatTemplate, tokenizer: Tokenizer, conversations: Sequence[Conversation]
    ) -> TemplateProof:
        """See `Probe.template`: of the chat template beside the base model that it serves."""
        return prove_on_vllm(self.server, self.name, chat, tokenizer, conversations=conversations)

    def tensor_types(self) -> None:
        """See `Probe.tensor_types`: vLLM does not tell."""

    def greedy(self, prompt: str, count: int) -> str:
        """See `Probe.greedy`."""
        body = {"model": self.name, "prompt": prompt, "max_tokens": count, "temperature": 0}
        answer = self.server.post("/v1/completions", body, seconds=_ANSWER_SECONDS)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise ServerAnswerError(f"vLLM at {self.server.url} gives no choices")
        return str(choices[0].get("text"))


def _cards(server: JSONServer) -> dict[str, dict[str, Any]]:
    """What the server lists, by the name that callers put into `model`."""
    models = server.get("/v1/models").get("data")
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise ServerAnswerError(f"vLLM at {server.url} does not list models")
    return {str(model.get("id")): model for model in models}


def _served_base(server: JSONServer) -> str:
    """The directory, or the Hub id, of the base model that the server was started with."""
    for card in _cards(server).values():
        if card.get("parent") is None:
            return str(card.get("root"))
    raise ServerAnswerError(f"vLLM at {server.url} lists no base model")


def _compare_bases(beside: AdapterBesideBase, served: Path, progress: Progress) -> None:
    """Raise `BaseModelMismatch` unless the served directory holds the adapter's base."""
    if served.resolve() == beside.base.resolve():
        return  # its bytes have just been compared with what was recorded
    if hash_base_model(served, progress).digest != beside.base_digest:
        raise BaseModelMismatch(
            f"vLLM serves {shown(served)}, which is not the base model of the adapter"
        )
