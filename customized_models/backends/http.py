"""HTTP to servers that are not trusted: bounded time and bytes, no redirects, no secrets shown."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ..errors import (
    DeploymentError,
    MalformedError,
    ServerAnswerError,
    ServerUnreachableError,
    shown,
)
from ..files.reading import strict_json
from ..gguf import GGUFFile
from ..models import Progress
from .connection import MAX_SECONDS, Connection
from .deadline import Deadline

if TYPE_CHECKING:
    import httpx

MAX_ANSWER = 16 << 20  # bytes: a listing of ten thousand models has about four million
MAX_COMPLAINT = 64 << 10  # bytes: as much of an error's body as is read
CHUNK = 1 << 20  # bytes sent between two looks at the deadline
AGAIN_SECONDS = 0.5  # after a lost connection: a server that restarts takes longer, a proxy less

# A server that ends in good order, and a proxy before one that is gone, close a connection where a
# killed one resets it. No class of error tells that from an answer which is no HTTP.
# Source: `_receive_event` in `_sync/http11.py` of httpcore 1.0; `ContentLengthReader` and
# `ChunkedReader` in `_readers.py` of h11 0.16.
_CLOSED = re.compile(r"^(Server disconnected|peer closed connection) without ")


@frozen
class JSONServer:
    """A server that takes JSON and files, and answers JSON objects.

    Every method raises `ServerUnreachableError` if there is no complete answer in time, and
    `ServerAnswerError` if the answer is an error, a redirect, too large or not JSON. What may be
    done twice, which is all but `post`, `post_for_lines` and `upload`, is tried once more if the
    connection is lost. No answer has the secret that was sent; see `Connection.without_secrets`.

    Attributes:
        tool: Its name in messages.
        connection: How it is reached.
        given: A client of the caller's, used instead of one made for each request.
    """

    tool: str
    connection: Connection
    given: httpx.Client | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Without a trailing slash."""
        return self.connection.url

    def get(self, path: str) -> dict[str, Any]:
        """The object at `path`."""
        return self._object(f"GET {path}", self._call("GET", path, twice=True))

    def get_text(self, path: str) -> str:
        """The text at `path`."""
        return self._text(self._call("GET", path, twice=True))

    def post(
        self, path: str, body: Mapping[str, Any], *, seconds: float | None = None
    ) -> dict[str, Any]:
        """The object that answers `body`, within `seconds` if not None."""
        return self._object(f"POST {path}", self._call("POST", path, body, seconds))

    def post_for_lines(
        self, path: str, body: Mapping[str, Any], *, seconds: float
    ) -> list[dict[str, Any]]:
        """The objects, one a line, that answer `body` within `seconds`."""
        data = self._call("POST", path, body, seconds)
        return [self._object(f"POST {path}", line) for line in data.split(b"\n") if line.strip()]

    def post_for_text(
        self, path: str, body: Mapping[str, Any], *, seconds: float | None = None
    ) -> str:
        """The text that answers `body`."""
        return self._text(self._call("POST", path, body, seconds))

    def send(self, path: str, body: Mapping[str, Any]) -> None:
        """Post `body`, where doing so twice is as good as once, to what answers nothing."""
        self._call("POST", path, body, twice=True)

    def delete(self, path: str, body: Mapping[str, Any]) -> None:
        """Delete what `body` names; no error if there is no such thing."""
        self._call("DELETE", path, body, twice=True, absent=b"")

    def has(self, path: str) -> bool:
        """Whether there is something at `path`, as opposed to an answer of 404."""
        return self._call("HEAD", path, twice=True, absent=b"absent") != b"absent"

    def upload(self, path: str, file: GGUFFile, progress: Progress) -> None:
        """Post the file's bytes; each piece of a mebibyte must be taken within `timeout`."""
        timeout = self.connection.timeout
        deadline = Deadline(timeout)

        def pieces() -> Iterator[bytes]:
            done = 0
            progress("uploading", done, file.size)
            with file.path.open("rb") as source:
                while piece := source.read(CHUNK):
                    deadline.extend(timeout)
                    yield piece
                    done += len(piece)
                    progress("uploading", done, file.size)
            deadline.extend(MAX_SECONDS)

        headers = {"Content-Length": str(file.size), "Content-Type": "application/octet-stream"}
        with self._exchange("POST", path, deadline, pieces(), headers) as response:
            self._refuse_errors(f"POST {path}", response)
            self._read(f"POST {path}", response)

    def shown(self, text: object) -> str:
        """`text` as it may stand in a message; a server may repeat the secret it was sent."""
        return shown(self.connection.masked(text))

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        *,
        twice: bool = False,
        absent: bytes | None = None,
    ) -> bytes:
        """The body of an answer.

        Args:
            method: Such as "GET".
            path: Below the server's URL.
            body: What is sent, as JSON.
            seconds: Within which it must be complete; the connection's own if None.
            twice: Whether it may be asked again if the connection is lost.
            absent: What an answer of 404 is to be taken for, if it is no error.
        """
        deadline = Deadline(self.connection.timeout if seconds is None else seconds)
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        try:
            with self._exchange(method, path, deadline, content, headers) as response:
                if response.status_code == 404 and absent is not None:
                    return absent
                self._refuse_errors(f"{method} {path}", response)
                return self._read(f"{method} {path}", response)
        except ServerUnreachableError:
            if not twice or deadline.passed:
                raise
        time.sleep(AGAIN_SECONDS)
        return self._call(method, path, body, seconds, absent=absent)

    @contextmanager
    def _exchange(
        self,
        method: str,
        path: str,
        deadline: Deadline,
        content: bytes | Iterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        """The response, its body still to be read; httpx's errors in the block become ours."""
        import httpx

        every = {"Accept-Encoding": "identity", "Connection": "close", **(headers or {})}
        if self.connection.authorization is not None:
            every["Authorization"] = self.connection.authorization
        timeout = httpx.Timeout(
            MAX_SECONDS, connect=self.connection.timeout, pool=self.connection.timeout
        )
        try:
            with (
                self._client() as client,
                deadline.watched(),
                client.stream(
                    method,
                    self.url + path,
                    content=content,
                    headers=every,
                    follow_redirects=False,
                    timeout=timeout,
                    extensions={"trace": deadline.trace},
                ) as response,
            ):
                yield response
        # UnicodeError: a host name that is no name; the resolver raises it as it is.
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:
            raise self._translated(f"{method} {path}", error, deadline) from self._cause(error)

    def _client(self) -> AbstractContextManager[httpx.Client]:
        return self.connection.client() if self.given is None else nullcontext(self.given)

    def _cause(self, error: Exception) -> Exception | None:
        """The error as the cause of ours, unless it or its own causes show a secret."""
        link: BaseException | None = error
        while link is not None:
            if self.connection.masked(link) != str(link):
                return None
            link = link.__cause__ or link.__context__
        return error

    def _translated(self, what: str, error: Exception, deadline: Deadline) -> DeploymentError:
        import httpx

        where = f"{self.tool} at {self.url}, {what}"
        if deadline.passed:
            return ServerUnreachableError(
                f"{where}: no complete answer within {deadline.seconds:g} seconds"
            )
        reason = f"{type(error).__name__} {self.shown(error)}"
        if isinstance(error, httpx.RemoteProtocolError) and _CLOSED.search(str(error)):
            return ServerUnreachableError(f"{where}: the connection was closed: {reason}")
        if isinstance(error, httpx.ProtocolError | httpx.DecodingError | httpx.StreamError):
            return ServerAnswerError(f"{where}: the answer is no HTTP: {reason}")
        return ServerUnreachableError(f"{where}: {reason}")

    def _refuse_errors(self, what: str, response: httpx.Response) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        where = f"{self.tool} at {self.url}, {what}: answered {status}"
        if 300 <= status < 400:
            raise ServerAnswerError(
                f"{where}, a redirect, which is never followed; "
                f"record the final address in the environment",
                status,
            )
        complaint = bytearray()
        for piece in response.iter_raw():
            complaint += piece[: MAX_COMPLAINT - len(complaint)]
            if len(complaint) == MAX_COMPLAINT:
                break
        reason = self.shown(_reason(bytes(complaint)))
        raise ServerAnswerError(f"{where}: {reason}{_hint(status)}", status)

    def _read(self, what: str, response: httpx.Response) -> bytes:
        where = f"{self.tool} at {self.url}, {what}"
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ServerAnswerError(f"{where}: the answer is compressed, though not asked to be")
        data = bytearray()
        for piece in response.iter_raw():
            data += piece
            if len(data) > MAX_ANSWER:
                raise ServerAnswerError(f"{where}: the answer has more than {MAX_ANSWER} bytes")
        return bytes(data)

    def _text(self, data: bytes) -> str:
        return str(self.connection.without_secrets(data.decode("utf-8", "replace")))

    def _object(self, what: str, data: bytes) -> dict[str, Any]:
        where = f"{self.tool} at {self.url}, {what}"
        try:
            value = strict_json(data, "the answer")
        except MalformedError as error:
            raise ServerAnswerError(f"{where}: {self.connection.masked(error)}") from None
        if not isinstance(value, dict):
            raise ServerAnswerError(f"{where}: the answer is no JSON object")
        answer: dict[str, Any] = self.connection.without_secrets(value)
        return answer


def _hint(status: int) -> str:
    """The way out of the answers that proxies in front of a server give most."""
    return {
        401: "; token_env or the setting basic_auth_env names where the password is",
        413: "; the proxy in front of the server takes no files of this size",
    }.get(status, "")


def _reason(body: bytes) -> str:
    """The text under "error", or under "message" in that, or else the body as text."""
    text = body.decode("utf-8", "replace")
    with suppress(MalformedError):
        value = strict_json(body, "the answer")
        error = value.get("error") if isinstance(value, dict) else None
        if isinstance(error, dict):  # as OpenAI's API has it
            error = error.get("message")
        if isinstance(error, str):
            return error
    return text
