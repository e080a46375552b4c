"""SGLang: adapters loaded into a running server, beside the base model that it serves.

The server is started by someone else, with the base model, `--enable-lora`, `--max-lora-rank` and
`--lora-target-modules`. Nothing here was tried with a server of it, which needs a GPU: it follows
SGLang's documentation.

Source: "LoRA Serving" of SGLang's documentation, and `python/sglang/srt/entrypoints/http_server.py`
(`load_lora_adapter`, `available_models`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from ..errors import ServerAnswerError, UnsupportedError, shown
from .http import JSONServer
from .lora_server import LOAD_SECONDS, LoraServer
from .protocol import Artifact, Plan

__all__ = ["SGLang", "SGLangOptions"]


@frozen
class SGLangOptions:
    """A model at SGLang has no options: how it is served was said when the server was started."""


class SGLang(LoraServer):
    """An SGLang server; on port 30000 if the environment states none. See `LoraServer`.

    Callers put `BASE:NAME` into `model`, which is the served name here: what SGLang calls its base
    model, and the name that was chosen. With the name alone, the base model would answer.

    Another adapter cannot take a name in one step: where a live model is replaced or rolled back,
    the name stands for nothing for as long as loading takes.
    """

    options = SGLangOptions
    tool = "SGLang"
    default_port = 30000
    max_rank = None  # of the adapters that it was started with; the server refuses larger ones

    def load_adapter(self, server: JSONServer, name: str, path: str, *, in_place: bool) -> None:
        """See `LoraServer.load_adapter`."""
        if in_place:
            self.unload_adapter(server, name)
        try:
            told = server.post(
                "/load_lora_adapter", {"lora_name": name, "lora_path": path}, seconds=LOAD_SECONDS
            )
        except ServerAnswerError as error:
            if error.status in (400, 404):
                error.add_note(
                    "adapters are loaded by a server that was started with --enable-lora, and "
                    "with --max-lora-rank and --lora-target-modules that the adapter fits"
                )
            raise
        if told.get("success") is False:
            raise ServerAnswerError(
                f"SGLang at {server.url} did not load {shown(name)}: "
                f"{shown(told.get('error_message'))}"
            )

    def unload_adapter(self, server: JSONServer, name: str) -> None:
        """See `LoraServer.unload_adapter`."""
        server.post("/unload_lora_adapter", {"lora_name": name})

    def called(self, name: str, base: str) -> str:
        """See `LoraServer.called`."""
        return f"{base}:{name}"

    def listed(self, called: str) -> str:
        """See `LoraServer.listed`."""
        return called.partition(":")[2] or called

    def served_base(self, server: JSONServer) -> str:
        """See `LoraServer.served_base`; the list has the name that the server gives its base."""
        return str(server.get("/get_model_info").get("model_path"))

    def preflight(self, artifact: Artifact, served_name: str | None, options: Any) -> Plan:
        """See `LoraServer.preflight`.

        Raises:
            UnsupportedError: What SGLang calls its base model has a colon, after which it would
                look for the adapter's name.
        """
        plan = super().preflight(artifact, served_name, options)
        if ":" in plan.details["beside"]:
            raise UnsupportedError(
                f"SGLang calls its base model {shown(plan.details['beside'])}, and would take what "
                f"follows the colon for an adapter: start it with another --served-model-name"
            )
        return plan

    def describe(self) -> Mapping[str, Any]:
        """See `Describing`."""
        server = self.server()
        return self.described(server, server.get("/get_server_info").get("version"))
