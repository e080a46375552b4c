"""What Ollama's HTTP API is asked for, and how its versions differ."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from attrs import frozen

from ..errors import (
    AlreadyExistsError,
    DeploymentError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedVersionError,
    shown,
)
from ..gguf import GGUFFile
from ..models import Progress
from .http import JSONServer

CREATE_SECONDS = 900.0  # the server reads the file, and some versions copy it
_AGAIN_SECONDS = 30.0  # for how long a creation is looked for whose answer was lost
_CLAIM_SECONDS = 60.0  # a claim that is older was left by a process that is gone
_POLL_SECONDS = 0.1


@frozen
class Version:
    """A version of Ollama, and what it does that others do not.

    Attributes:
        number: Its parts.
        renders: Whether `_debug_render_only` shows what a template makes of a conversation.
        uses_file_template: Whether it may use the chat template in a file instead of a Go one.
        keeps_blobs: Seconds for which an uploaded file that no model uses outlives a restart.
    """

    number: tuple[int, int, int]
    renders: bool = False
    uses_file_template: bool = False
    keeps_blobs: float = 0.0

    @classmethod
    def of(cls, text: object) -> Version:
        """The version that a server states.

        Raises:
            ServerAnswerError: It is no version.
            UnsupportedVersionError: It cannot make a model from an uploaded file.
        """
        match = re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", str(text), re.ASCII)
        if match is None:
            raise ServerAnswerError(f"Ollama calls its version {shown(text)}, which is none")
        number = (int(match[1]), int(match[2]), int(match[3]))
        if number == (0, 0, 0):  # what a build without a version says
            number = (9999, 0, 0)
        if number < _FIRST:
            raise UnsupportedVersionError(
                f"Ollama {shown(text)} cannot make a model from an uploaded file; 0.5.5 can"
            )
        facts: dict[str, Any] = {}
        for since, more in _SINCE:
            if number >= since:
                facts |= more
        return cls(number, **facts)


_FIRST = (0, 5, 5)
_SINCE: tuple[tuple[tuple[int, int, int], Mapping[str, Any]], ...] = (
    ((0, 11, 5), {"renders": True}),  # server/routes.go, ChatHandler
    ((0, 21, 0), {"keeps_blobs": 3600.0}),  # server/images.go, layerPruneGracePeriod
    ((0, 30, 0), {"uses_file_template": True}),  # server/images.go, PreferChatTemplate
)
"""What each version changed for us; a row counts from its version on."""


@frozen
class Name:
    """A model's name at Ollama: `[namespace/]model[:tag]`, in lower case.

    Law: `Name.of(str(name)) == name`.
    """

    model: str
    tag: str = "latest"

    @classmethod
    def of(cls, text: str) -> Name:
        """The name that callers put into `model`; the tag is "latest" if none is stated."""
        head, separator, tail = text.rpartition(":")
        if separator and "/" not in tail:
            return cls(head.lower(), tail.lower())
        return cls(text.lower())

    def __str__(self) -> str:
        return f"{self.model}:{self.tag}"

    def with_tag(self, tag: str) -> Name:
        """Another tag of the same model."""
        return Name(self.model, tag)


def server_version(server: JSONServer) -> Version:
    """The server's version."""
    return Version.of(server.connection.masked(server.get("/api/version").get("version")))


def listed_models(server: JSONServer, path: str = "/api/tags") -> dict[str, dict[str, Any]]:
    """What a listing has, by name in lower case: Ollama's names ignore case."""
    models = server.get(path).get("models") or []
    if not isinstance(models, list) or not all(isinstance(model, dict) for model in models):
        raise ServerAnswerError(f"Ollama at {server.url}: {path} does not list models")
    return {str(Name.of(str(model.get("name")))): model for model in models}


def digest_of(server: JSONServer, name: Name) -> str | None:
    """The digest of the manifest that a name stands for; None if it stands for nothing."""
    entry = listed_models(server).get(str(name))
    if entry is None:
        return None
    digest = str(entry.get("digest"))
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ServerAnswerError(f"Ollama at {server.url} lists {shown(name)} without a digest")
    return digest


def show_model(server: JSONServer, name: Name) -> dict[str, Any]:
    """What the server tells of a model."""
    return server.post("/api/show", {"model": str(name)})


def is_made_of(told: Mapping[str, Any], digest: str) -> bool:
    """Whether what `show` gives says that the weights are the blob of that digest.

    That is the Modelfile's first instruction; further on, it quotes text of ours. Servers from
    0.30.0 to 0.34.0 serve llama-quantize's copy of the file, which has the same bytes if it was
    written in llama.cpp's own order.
    """
    weights = re.search(r"^FROM .*", str(told.get("modelfile")), re.MULTILINE)
    return weights is not None and weights[0].rstrip().endswith(digest.replace(":", "-"))


def upload_file(server: JSONServer, file: GGUFFile, progress: Progress) -> None:
    """Send a file, unless the server has it: a server that does would not read it."""
    blob = f"/api/blobs/{file.digest}"
    if not server.has(blob):
        server.upload(blob, file, progress)


def create_model(
    server: JSONServer, name: Name, file: GGUFFile, body: Mapping[str, Any], progress: Progress
) -> None:
    """Make a model of an uploaded file; `body`: template, parameters and system message.

    Raises:
        ServerAnswerError: It was refused, or not done; the answer's last line must say "success".
        ServerUnreachableError: Nothing was heard of it, and it was not made.
    """
    try:
        _create(server, name, file, body)
    except ServerUnreachableError:
        # Without a listener some versions go on, and others never finish.
        if not _appears(server, name, file):
            _create(server, name, file, {**body, "stream": False})
    except ServerAnswerError:
        # A server that restarts drops what no model uses yet.
        if server.has(f"/api/blobs/{file.digest}"):
            raise
        upload_file(server, file, progress)
        _create(server, name, file, body)


def _create(server: JSONServer, name: Name, file: GGUFFile, body: Mapping[str, Any]) -> None:
    request = {"model": str(name), "files": {"model.gguf": file.digest}, "stream": True, **body}
    lines = server.post_for_lines("/api/create", request, seconds=CREATE_SECONDS)
    for line in lines:
        if "error" in line:
            raise ServerAnswerError(
                f"Ollama at {server.url} did not create {shown(name)}: "
                f"{server.shown(line['error'])}"
            )
    if not lines or lines[-1].get("status") != "success":
        raise ServerAnswerError(
            f"Ollama at {server.url} stopped creating {shown(name)} without success"
        )


def _appears(server: JSONServer, name: Name, file: GGUFFile) -> bool:
    until = time.monotonic() + _AGAIN_SECONDS
    while time.monotonic() < until:
        with suppress(DeploymentError):
            if digest_of(server, name) is not None:
                return is_made_of(show_model(server, name), file.digest)
        time.sleep(_POLL_SECONDS)
    return False


def copy_model(server: JSONServer, source: Name, target: Name) -> None:
    """Let a name stand for what another stands for; whatever it stood for before is replaced."""
    server.send("/api/copy", {"source": str(source), "destination": str(target)})


def remove_model(server: JSONServer, name: Name, digest: str | None) -> bool:
    """Take a name away if it stands for that digest (for anything, if None); False if not."""
    found = digest_of(server, name)
    if found is None or (digest is not None and found != digest):
        return False
    server.delete("/api/delete", {"model": str(name)})
    return True


def unload_model(server: JSONServer, name: Name, seconds: float) -> bool:
    """Take a model out of memory; False if it is still used after `seconds`.

    Then it goes as soon as the last answer is finished.
    """
    if str(name) not in listed_models(server, "/api/ps"):
        return True
    server.post("/api/generate", {"model": str(name), "keep_alive": 0, "stream": False})
    until = time.monotonic() + seconds
    while str(name) in listed_models(server, "/api/ps"):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    return True


@contextmanager
def claimed(
    server: JSONServer, name: Name, version: Name, free: Callable[[str | None], bool]
) -> Iterator[None]:
    """Be the only one who gives `name` a meaning, while the block lasts.

    Ollama has no request that fails where a name is taken, so who wants one says so first, by a
    tag beside it, and goes on only if nobody else says so at that time. Of two who come at once
    both step back, and try again a little later.

    Args:
        server: Where.
        name: The name.
        version: What it is to stand for.
        free: Whether the name may be taken, given the digest that it stands for now.

    Raises:
        AlreadyExistsError: It may not.
    """
    claim = name.with_tag(f"{CLAIM}{uuid.uuid4().hex}")
    while True:
        refuse_taken_name(server, name, free)
        copy_model(server, version, claim)
        try:
            listed = listed_models(server)
            if not _others(listed, claim):
                refuse_taken_name(server, name, free)
                yield
                return
        finally:
            server.delete("/api/delete", {"model": str(claim)})
        time.sleep(_POLL_SECONDS * (1 + uuid.uuid4().int % 20))


CLAIM = "cm-claim-"
"""How the tags of claims begin."""


def refuse_taken_name(server: JSONServer, name: Name, free: Callable[[str | None], bool]) -> None:
    """Raise `AlreadyExistsError` unless `free` says that the name may be taken."""
    if not free(digest_of(server, name)):
        raise AlreadyExistsError(
            f"Ollama at {server.url} already serves something under {shown(name)}; choose another "
            f"served_name, or say replace=True"
        )


def _others(listed: Mapping[str, Mapping[str, Any]], claim: Name) -> Collection[str]:
    """The claims on the same name that are not forgotten ones, by the server's own clock."""
    now = _modified(listed.get(str(claim), {}))
    begin = str(claim.with_tag(CLAIM))
    return [
        name
        for name, entry in listed.items()
        if name.startswith(begin) and name != str(claim) and now - _modified(entry) < _CLAIM_SECONDS
    ]


def _modified(entry: Mapping[str, Any]) -> float:
    """When a manifest was written, in seconds; 0 if the server does not say."""
    # Go writes nine digits of a second, and Python reads six.
    text = re.sub(r"(\.\d{6})\d+", r"\1", str(entry.get("modified_at")))
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0
