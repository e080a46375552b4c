"""A limit for a whole request, however its bytes trickle."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any


class Deadline:
    """Cuts a request's connection when its time is up.

    The client's own limits hold for one read or write each; a server that sends a byte now and
    then would outlast them.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.passed = False
        self._until = time.monotonic() + seconds
        self._sockets: list[socket.socket] = []
        self._over = threading.Event()

    def extend(self, seconds: float) -> None:
        """Count `seconds` from now."""
        self.seconds, self._until = seconds, time.monotonic() + seconds

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Take the connection's socket from httpx's trace extension as soon as there is one."""
        stream: Any = info.get("return_value")
        if hasattr(stream, "get_extra_info"):
            self._sockets.append(stream.get_extra_info("socket"))
            if self.passed:
                self._cut()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the time while the block lasts."""
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        try:
            yield
        finally:
            self._over.set()
            watch.join()

    def _watch(self) -> None:
        while (left := self._until - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        self.passed = True
        self._cut()

    def _cut(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):
                # The plain socket's method: TLS's own would change what the reader is using.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
