"""vLLM: adapters loaded into a running server, beside the base model that it serves.

The server is started by someone else, with the base model and
`--enable-lora`, and with `VLLM_ALLOW_RUNTIME_LORA_UPDATING=1` in its environment.

Source: `vllm/entrypoints/serve/lora/` and `vllm/lora/peft_helper.py` of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from ..base_models import hash_base_model
from ..deploying.templates.chat_template import ChatTemplate
from ..deploying.templates.conversations import Conversation
from ..deploying.templates.live import Tokenizer, prove_on_vllm
from ..deploying.templates.proofs import TemplateProof
from ..errors import (
    BaseModelMismatch,
    ServerAnswerError,
    UnsupportedError,
    shown,
)
from ..models import Progress, Served
from .http import JSONServer
from .lora_server import LOAD_SECONDS, LoraServer
from .openai_api import ANSWER_SECONDS, cards
from .protocol import Artifact, Plan

__all__ = ["VLLM", "VLLMOptions"]


@frozen
class VLLMOptions:
    """A model at vLLM has no options: how it is served was said when the server was started."""


class VLLM(LoraServer):
    """A vLLM server; on port 8000 if the environment states none. See `LoraServer`.

    A complete model is loaded when the server starts. The error says with which command; once it
    is served, it is compared with the registered one, byte for byte, and recorded.
    """

    options = VLLMOptions
    tool = "vLLM"
    default_port = 8000
    max_rank = 16  # what --max-lora-rank is if nothing is said

    def load_adapter(self, server: JSONServer, name: str, path: str, *, in_place: bool) -> None:
        """See `LoraServer.load_adapter`."""
        body = {"lora_name": name, "lora_path": path, "load_inplace": in_place}
        try:
            server.post_for_text("/v1/load_lora_adapter", body, seconds=LOAD_SECONDS)
        except ServerAnswerError as error:
            if error.status == 404 and path not in str(error):
                error.add_note(
                    "adapters are loaded by a server that was started with --enable-lora, and "
                    "with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
                )
            raise

    def unload_adapter(self, server: JSONServer, name: str) -> None:
        """See `LoraServer.unload_adapter`."""
        server.post_for_text("/v1/unload_lora_adapter", {"lora_name": name})

    def probe(self, served: Served) -> VLLMProbe:
        """See `Probing`."""
        return VLLMProbe(self.server(), served.name)

    def describe(self) -> Mapping[str, Any]:
        """See `Describing`."""
        server = self.server()
        return self.described(server, server.get("/version").get("version"))

    # Complete models, which have no version

    def plan_of_complete(self, artifact: Artifact, name: str, options: Any) -> Plan:
        """What is served already; the error says how to start the server if nothing is."""
        server = self.server()
        card = cards(server).get(name)
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

    def push(self, plan: Plan, progress: Progress) -> Served:
        """See `LoraServer.push`. Details of a complete model: `complete`, its directory."""
        if plan.artifact.adapter_config is not None:
            return super().push(plan, progress)
        root = plan.details["complete"]
        with plan.artifact.directory() as directory:
            ours = hash_base_model(directory, progress)
            if Path(root).resolve() != directory.resolve():
                theirs = hash_base_model(Path(root), progress)
                if theirs.digest != ours.digest:
                    raise BaseModelMismatch(
                        f"what vLLM serves from {shown(root)} is not the complete model"
                    )
        url = f"{self.server().url}/v1"
        return Served(plan.served_name, url, "openai", ours.digest, plan.details)

    def identity(self, served: Served) -> str:
        """See `Promoting.identity`: the version; of a complete model, its directory."""
        return str(served.details.get("complete") or super().identity(served))

    def version(self, served: Served) -> Served:
        """See `Promoting.version`."""
        if "complete" not in served.details:
            return super().version(served)
        return evolve(served, details={"complete": served.details["complete"]})

    def promote(self, served: Served, name: str, replaced: Any) -> Served:
        """See `Promoting.promote`. Details of a complete model: `proven` as well from now on."""
        if "complete" not in served.details:
            return super().promote(served, name, replaced)
        server, proven = self.server(), {**served.details, "proven": True}
        if cards(server).get(name, {}).get("root") != served.details["complete"]:
            raise ServerAnswerError(
                f"vLLM at {server.url} does not serve {shown(served.details['complete'])} as "
                f"{shown(name)} any more: start it with that, and try again"
            )
        return evolve(served, name=name, details=proven)

    def is_what_was_served(self, card: Mapping[str, Any], served: Served) -> bool:
        """See `LoraServer.is_what_was_served`; a complete model is there before it is deployed."""
        if "complete" not in served.details:
            return super().is_what_was_served(card, served)
        return "proven" in served.details and card.get("root") == served.details["complete"]

    def undeploy(self, served: Served) -> None:
        """See `LoraServer.undeploy`; a complete model is served for as long as the server runs.

        One that was not proven was served before, and goes on being so.
        """
        if "complete" not in served.details:
            super().undeploy(served)
            return
        card = cards(self.server()).get(served.name)
        if card is not None and self.is_what_was_served(card, served):
            raise UnsupportedError(
                f"vLLM serves {shown(served.name)} for as long as it runs: stop the server, then "
                f"undeploy"
            )


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
        answer = self.server.post("/v1/completions", body, seconds=ANSWER_SECONDS)
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            raise ServerAnswerError(f"vLLM at {self.server.url} gives no choices")
        return str(choices[0].get("text"))
