"""What Ollama's HTTP API is asked for, and how its versions differ."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from attrs import frozen

from ..errors import (
    DeploymentError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedVersionError,
    shown,
)
from ..gguf import GGUFFile
from ..models import Progress
from .http import JSONServer

T = TypeVar("T")

CREATE_SECONDS = 900.0  # the server reads the file, and some versions copy it
_POLL_SECONDS = 0.1
_TRIES = 5  # of what may fail while other processes are at work


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


_OWN_NAMESPACE = "library/"  # listings leave it out, so that a name with it is never found


@frozen
class Name:
    """A model's name as Ollama's listings have it, in lower case.

    Ollama takes names in any case for the same, and lists each as it was first written.

    Law: `Name.of(str(name)) == name`.

    >>> Name.of("Support"), str(Name.of("team/support:v2"))
    (Name(model='support', tag='latest'), 'team/support:v2')

    Attributes:
        model: What stands before the tag, with its namespace if it has one: `team/support`.
        tag: "latest" where none is stated.
    """

    model: str
    tag: str = "latest"

    @classmethod
    def of(cls, text: str) -> Name:
        """The name that `text`, which callers put into `model`, means."""
        head, separator, tail = text.lower().removeprefix(_OWN_NAMESPACE).rpartition(":")
        if separator and "/" not in tail:
            return cls(head, tail)
        return cls(text.lower().removeprefix(_OWN_NAMESPACE))

    def __str__(self) -> str:
        return f"{self.model}:{self.tag}"

    @property
    def short(self) -> str:
        """Without its tag if that is "latest", as people write it."""
        return self.model if self.tag == "latest" else str(self)

    def with_tag(self, tag: str) -> Name:
        """Another tag of the same model."""
        return Name(self.model, tag)


def server_version(server: JSONServer) -> Version:
    """The server's version."""
    return Version.of(server.get("/api/version").get("version"))


def again(ask: Callable[[], T]) -> T:
    """What `ask` gives, asked again while another process deletes models.

    Ollama looks at every model to find one, and fails if it is gone by then, with any status.

    Source: `Manifests` in `manifest/manifest.go` of Ollama v0.34.1.
    """
    for _ in range(_TRIES):
        try:
            return ask()
        except ServerAnswerError as error:
            if error.status not in (400, 404, 500):
                raise
        time.sleep(_POLL_SECONDS)
    return ask()


def listed_models(server: JSONServer, path: str = "/api/tags") -> dict[str, dict[str, Any]]:
    """What a listing has, by name in lower case: Ollama's names ignore case."""
    models = again(lambda: server.get(path)).get("models") or []
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
    return again(lambda: server.post("/api/show", {"model": str(name)}))


def is_made_of(told: Mapping[str, Any], digest: str) -> bool:
    """Whether what `show` gives says that the weights are the blob of that digest.

    That is the Modelfile's first instruction; further on, it quotes text of ours. Servers from
    0.30.0 to 0.34.0 serve llama-quantize's copy of the file, which has the same bytes if it was
    written in llama.cpp's own order.
    """
    weights = re.search(r"^FROM .*", str(told.get("modelfile")), re.MULTILINE)
    return weights is not None and weights[0].rstrip().endswith(digest.replace(":", "-"))


def upload_file(server: JSONServer, file: GGUFFile, progress: Progress) -> None:
    """Send a file, unless the server has it: a server that does would not read it.

    If the connection is lost, the server is asked until it answers, for as long as the environment
    has patience, and the file is sent once more.
    """
    blob = f"/api/blobs/{file.digest}"
    if server.has(blob):
        return
    try:
        server.upload(blob, file, progress)
    except ServerUnreachableError:
        if not _comes_back(server, lambda: server.has(blob)):
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
    except (ServerUnreachableError, ServerAnswerError) as error:
        # Without a listener some versions go on, and others never finish.
        lost = isinstance(error, ServerUnreachableError)
        if not (lost and _appears(server, name, file)):
            # A server that restarts drops what no model uses yet; for other reasons, see `again`.
            upload_file(server, file, progress)
            _create(server, name, file, {**body, "stream": not lost})
    # Whoever deleted another model of the same file meanwhile has deleted the file.
    upload_file(server, file, progress)


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
    """Whether a model turns up whose creation was not heard of."""

    def made() -> bool | None:
        if digest_of(server, name) is None:
            return None
        return is_made_of(show_model(server, name), file.digest)

    return bool(_comes_back(server, made))


def _comes_back(server: JSONServer, ask: Callable[[], bool | None]) -> bool | None:
    """The first answer that is not None, of a server that may be restarting; None if none comes."""
    until = time.monotonic() + server.connection.timeout
    while time.monotonic() < until:
        with suppress(DeploymentError):
            if (answer := ask()) is not None:
                return answer
        time.sleep(_POLL_SECONDS)
    return None


def remove_versions(server: JSONServer, version: Name) -> None:
    """Remove a version, and what was made under names that go on after its own."""
    for name in listed_models(server):
        if name == str(version) or name.startswith(f"{version}-"):
            delete_model(server, Name.of(name))


def delete_model(server: JSONServer, name: Name, digest: str | None = None) -> None:
    """Let a name stand for nothing, if it stands for the manifest with that digest or for any."""
    # Not found may mean what `again` is for, so the listing has the last word.
    for _ in range(_TRIES):
        found = digest_of(server, name)
        if found is None or found != (digest or found):
            return
        again(lambda: server.delete("/api/delete", {"model": str(name)}))
    raise ServerAnswerError(f"Ollama at {server.url} does not delete {shown(name)}")


def unload_model(server: JSONServer, names: Collection[Name], digest: str, seconds: float) -> bool:
    """Take a model out of memory; False if it is still used after `seconds`.

    Then it goes as soon as the last answer is finished, unless someone begins another.

    Args:
        server: Where.
        names: Those under which it may have been loaded; the first must still be there.
        digest: Of the manifest that they stand for.
        seconds: How long to wait.
    """
    until = time.monotonic() + seconds
    body = {"model": str(next(iter(names))), "keep_alive": 0, "stream": False}
    while _is_loaded(server, names, digest):
        # Each time: whoever called meanwhile has asked for it to stay.
        again(lambda: server.post("/api/generate", body))
        if time.monotonic() > until:
            return not _is_loaded(server, names, digest)
        time.sleep(_POLL_SECONDS)
    return True


def _is_loaded(server: JSONServer, names: Collection[Name], digest: str) -> bool:
    loaded = listed_models(server, "/api/ps")
    entries = [loaded[str(name)] for name in names if str(name) in loaded]
    return any(entry.get("digest") == digest for entry in entries)
