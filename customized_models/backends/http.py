"""HTTP to servers that are not trusted: bounded time and bytes, no redirects, no secrets shown."""

from __future__ import annotations

import functools
import json
import os
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ..errors import (
    InvalidOptionError,
    MalformedError,
    ServerAnswerError,
    ServerUnreachableError,
    shown,
)
from ..files.reading import strict_json
from ..gguf import GGUFFile
from ..models import DeploymentEnvironment, Progress
from .deadline import Deadline

if TYPE_CHECKING:
    import httpx

MAX_ANSWER = 16 << 20  # bytes: a listing of ten thousand models has about four million
MAX_COMPLAINT = 64 << 10  # bytes: as much of an error's body as is read
CHUNK = 1 << 20  # bytes
LONG = 3600.0  # seconds: a proxy may hand an upload on only once it has all of it


def answer_timeout(environment: DeploymentEnvironment) -> float:
    """The setting `timeout`: seconds within which a short answer must be complete; 30 if not set.

    Raises:
        InvalidOptionError: it is no such number, or there is another setting.
    """
    for name, value in environment.settings.items():
        if name != "timeout":
            raise InvalidOptionError(f"unknown setting {shown(name)}; known is 'timeout'")
        if type(value) not in (int, float) or not 0 < value <= LONG:
            raise InvalidOptionError(
                f"timeout {shown(value)} must be more than 0 and at most {LONG:.0f} seconds"
            )
    return float(environment.settings.get("timeout", 30.0))


def bearer_token(environment: DeploymentEnvironment) -> str | None:
    """What the variable named by `token_env` holds now; None if the environment names none.

    Raises:
        InvalidOptionError: the variable is not set, or its value cannot stand in a header.
    """
    if environment.token_env is None:
        return None
    token = os.environ.get(environment.token_env, "")
    if not re.fullmatch(r"[!-~]+", token):
        raise InvalidOptionError(
            f"environment {shown(environment.name)} takes its bearer token from the environment "
            f"variable {shown(environment.token_env)}, which does not hold one"
        )
    return token


@frozen
class JSONServer:
    """A server that takes JSON and files, and answers JSON objects.

    `tool`: its name in messages. `url`: without a trailing slash. `timeout`: seconds within which
    a short answer must be complete. `client`: used instead of one made for each request, which
    takes no proxy, certificate or password from environment variables: an environment's recorded
    address is where its bytes go, whichever process sends them.

    Every method raises ServerUnreachableError if there is no complete answer in time, and
    ServerAnswerError if the answer is an error, a redirect, too large or not JSON.
    """

    tool: str
    url: str
    timeout: float
    token: str | None = field(default=None, repr=False)
    client: httpx.Client | None = field(default=None, repr=False)

    def get(self, path: str) -> dict[str, Any]:
        """The object at `path`."""
        return self._object(f"GET {path}", self._call("GET", path))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The object that answers `body`."""
        return self._object(f"POST {path}", self._call("POST", path, body))

    def post_for_lines(
        self, path: str, body: Mapping[str, Any], *, seconds: float
    ) -> list[dict[str, Any]]:
        """The objects, one a line, that answer `body` within `seconds`."""
        data = self._call("POST", path, body, seconds)
        return [self._object(f"POST {path}", line) for line in data.split(b"\n") if line.strip()]

    def delete(self, path: str, body: Mapping[str, Any]) -> None:
        """Delete what `body` names; no error if there is no such thing."""
        self._call("DELETE", path, body, absent_is_fine=True)

    def has(self, path: str) -> bool:
        """Whether there is something at `path`, as opposed to an answer of 404."""
        with self._exchange("HEAD", path, Deadline(self.timeout)) as response:
            if response.status_code != 404:
                self._refuse_errors(f"HEAD {path}", response)
            return response.status_code != 404

    def upload(self, path: str, file: GGUFFile, progress: Progress) -> None:
        """Post the file's bytes; each piece of a mebibyte must be taken within `timeout`."""
        deadline = Deadline(self.timeout)

        def pieces() -> Iterator[bytes]:
            done = 0
            progress("uploading", done, file.size)
            with file.path.open("rb") as source:
                while piece := source.read(CHUNK):
                    deadline.extend(self.timeout)
                    yield piece
                    done += len(piece)
                    progress("uploading", done, file.size)
            deadline.extend(LONG)

        headers = {"Content-Length": str(file.size), "Content-Type": "application/octet-stream"}
        with self._exchange("POST", path, deadline, pieces(), headers) as response:
            self._refuse_errors(f"POST {path}", response)
            self._read(f"POST {path}", response)

    def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float | None = None,
        *,
        absent_is_fine: bool = False,
    ) -> bytes:
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        deadline = Deadline(self.timeout if seconds is None else seconds)
        with self._exchange(method, path, deadline, content, headers) as response:
            if absent_is_fine and response.status_code == 404:
                return b""
            self._refuse_errors(f"{method} {path}", response)
            return self._read(f"{method} {path}", response)

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
        if self.token is not None:
            every["Authorization"] = f"Bearer {self.token}"
        try:
            with (
                self._own_or_given_client() as client,
                deadline.watched(),
                client.stream(
                    method,
                    self.url + path,
                    content=content,
                    headers=every,
                    follow_redirects=False,
                    timeout=httpx.Timeout(LONG, connect=self.timeout, pool=self.timeout),
                    extensions={"trace": deadline.trace},
                ) as response,
            ):
                yield response
        # UnicodeError: a host name that is no name; the resolver raises it as it is.
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:
            raise self._translated(f"{method} {path}", error, deadline) from error

    @contextmanager
    def _own_or_given_client(self) -> Iterator[httpx.Client]:
        import httpx

        if self.client is not None:
            yield self.client
            return
        with httpx.Client(trust_env=False, verify=_certificates()) as client:
            yield client

    def _translated(
        self, what: str, error: Exception, deadline: Deadline
    ) -> ServerUnreachableError | ServerAnswerError:
        import httpx

        where = f"{self.tool} at {self.url}, {what}"
        if deadline.passed:
            return ServerUnreachableError(
                f"{where}: no complete answer within {deadline.seconds:g} seconds"
            )
        reason = f"{type(error).__name__} {self.shown(error)}"
        if isinstance(error, httpx.ProtocolError | httpx.DecodingError | httpx.StreamError):
            return ServerAnswerError(f"{where}: the answer is broken off or no HTTP: {reason}")
        return ServerUnreachableError(f"{where}: {reason}")

    def _refuse_errors(self, what: str, response: httpx.Response) -> None:
        status = response.status_code
        if 200 <= status < 300:
            return
        where = f"{self.tool} at {self.url}, {what}: answered {status}"
        if 300 <= status < 400:
            raise ServerAnswerError(
                f"{where}, a redirect, which is never followed; "
                f"record the final address in the environment"
            )
        complaint = bytearray()
        for piece in response.iter_raw():
            complaint += piece[: MAX_COMPLAINT - len(complaint)]
            if len(complaint) == MAX_COMPLAINT:
                break
        raise ServerAnswerError(f"{where}: {self.shown(_reason(bytes(complaint)))}")

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

    def _object(self, what: str, data: bytes) -> dict[str, Any]:
        where = f"{self.tool} at {self.url}, {what}"
        try:
            value = strict_json(data, "the answer")
        except MalformedError as error:
            raise ServerAnswerError(f"{where}: {error}") from error
        if not isinstance(value, dict):
            raise ServerAnswerError(f"{where}: the answer is no JSON object")
        return value

    def shown(self, text: object) -> str:
        """`text` as it may stand in a message; a server may echo the token it was sent."""
        return shown(str(text).replace(self.token, "***") if self.token else text)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """The public authorities, read once: that takes longer than most requests."""
    import httpx

    return httpx.create_ssl_context(trust_env=False)


def _reason(body: bytes) -> str:
    """The text under "error" if the body is such an object, else the body as text."""
    text = body.decode("utf-8", "replace")
    with suppress(MalformedError):
        value = strict_json(body, "the answer")
        if isinstance(value, dict) and isinstance(value.get("error"), str):
            return str(value["error"])
    return text
