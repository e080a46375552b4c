"""A proxy before PostgreSQL that cuts the connection when a transaction is committed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

_COMMIT = b"COMMIT\0"  # as it stands in the message that libpq sends


class CommitProxy:
    """Cuts connections at COMMIT.

    `cut`: "before" the server has it, "after" it has answered, or "" for never; `then_refuse`: take
    no further connection once one was cut. `cuts`: how often it has cut.
    """

    def __init__(self, port: int) -> None:
        self._server = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.cut = ""
        self.then_refuse = False
        self.cuts = 0

    def serve(self) -> None:
        """Take connections until it is closed."""
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _pass_on(self, client: socket.socket) -> None:
        with closing(client), suppress(OSError):
            if self.then_refuse and self.cuts:
                return
            with socket.create_connection(("127.0.0.1", self._server)) as server:
                cutting = threading.Event()
                back = threading.Thread(target=_copy, args=(server, client, cutting), daemon=True)
                back.start()
                while data := client.recv(1 << 16):
                    if self.cut and _COMMIT in data:
                        self.cuts += 1
                        cutting.set()
                        if self.cut == "after":
                            server.sendall(data)
                            back.join()
                        server.shutdown(socket.SHUT_RDWR)
                        return
                    server.sendall(data)


def _copy(source: socket.socket, target: socket.socket, cutting: threading.Event) -> None:
    """Pass on what comes; the first that comes once the connection is to be cut is the last."""
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if cutting.is_set():
                return
            target.sendall(data)


@contextmanager
def commit_proxy(port: int) -> Iterator[CommitProxy]:
    """A proxy before the server at a port of this host."""
    proxy = CommitProxy(port)
    thread = threading.Thread(target=proxy.serve, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.close()
        thread.join()
