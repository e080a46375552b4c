"""What a llama.cpp router is asked: which models it has, and to load and unload them.

Source: `server_models_routes` in `tools/server/server-models.cpp` of llama.cpp b11434.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from typing import Any

from attrs import frozen

from ..errors import ServerAnswerError, UnsupportedError, shown
from ..models import Progress
from .http import JSONServer

LOAD_SECONDS = 600.0  # a large file on a slow disk
_STOP_SECONDS = 60.0  # the router kills a process that has not ended after ten
_POLL_SECONDS = 0.1


@frozen
class RoutedModel:
    """A model as the router lists it.

    `value`: "unloaded", "loading", "loaded" or "sleeping". `failed`: whether its process ended by
    itself the last time. `options`: the command line of its process.
    """

    value: str
    failed: bool
    options: Mapping[str, str]

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> RoutedModel:
        """The model that an entry of the listing tells of."""
        status = entry.get("status")
        status = status if isinstance(status, dict) else {}
        words = [str(word) for word in status.get("args") or []]
        return cls(str(status.get("value")), bool(status.get("failed")), dict(pairwise(words)))

    @property
    def is_running(self) -> bool:
        """Whether it has a process."""
        return self.value != "unloaded"

    @property
    def is_loaded(self) -> bool:
        """Whether its weights are in memory, or come back by themselves."""
        return self.value in ("loaded", "sleeping")


@frozen
class Router:
    """A running router."""

    server: JSONServer

    def properties(self, presets: str) -> dict[str, Any]:
        """What the router tells of itself.

        Args:
            presets: The path of the file of presets that it should read.

        Raises:
            UnsupportedError: It is no router.
        """
        told = self.server.get("/props")
        if told.get("role") != "router":
            raise UnsupportedError(
                f"the llama.cpp server at {self.server.url} serves one model of its own. Start it "
                f"without a model, and with --models-preset {presets}"
            )
        return told

    def models(self, *, reload: bool = False) -> dict[str, RoutedModel]:
        """Every model by each name that it goes by.

        Args:
            reload: Read the file of presets first. Processes of models that changed are ended.
        """
        listed = self.server.get("/models?reload=1" if reload else "/models").get("data")
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise ServerAnswerError(f"llama.cpp at {self.server.url} does not list models")
        found: dict[str, RoutedModel] = {}
        for entry in listed:
            names = [entry.get("id"), *(entry.get("aliases") or [])]
            found |= {str(name): RoutedModel.of(entry) for name in names}
        return found

    def load(self, name: str, progress: Progress) -> None:
        """Start a model's process; returns once it answers.

        Raises:
            ServerAnswerError: It does not start.
        """
        where = f"llama.cpp at {self.server.url}"
        until = time.monotonic() + LOAD_SECONDS
        self._start(name)
        while time.monotonic() < until:
            progress("loading", 0, 1)
            model = self.models().get(name)
            if model is None or model.failed:
                raise ServerAnswerError(f"{where} did not load {shown(name)}; its log says why")
            if model.is_loaded:
                progress("loading", 1, 1)
                return
            if not model.is_running:  # another took its place before it was ready
                self._start(name)
            time.sleep(_POLL_SECONDS)
        raise ServerAnswerError(f"{where} did not load {shown(name)} in {LOAD_SECONDS:g} seconds")

    def _start(self, name: str) -> None:
        try:
            self.server.post("/models/load", {"model": name})
        except ServerAnswerError:
            model = self.models().get(name)
            if model is None or not model.is_running:  # else a call has started it
                raise

    def unload(self, name: str) -> None:
        """End a model's process, if it has one."""
        until = time.monotonic() + _STOP_SECONDS
        while (model := self.models().get(name)) and model.is_running:
            if time.monotonic() > until:
                raise ServerAnswerError(
                    f"llama.cpp at {self.server.url} does not unload {shown(name)}"
                )
            with suppress(ServerAnswerError):  # it has just ended
                self.server.post("/models/unload", {"model": name})
            time.sleep(_POLL_SECONDS)
