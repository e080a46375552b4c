"""Ollama: what becomes of it when the server, or who pretends to be one, misbehaves."""

from __future__ import annotations

import json
import logging
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest

from customized_models.backends import Backend, Promoting, open_backend
from customized_models.backends.ollama import OllamaOptions
from customized_models.errors import (
    DeploymentError,
    InvalidOptionError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedVersionError,
)
from customized_models.gguf import GGUFFile
from customized_models.models import (
    DeploymentEnvironment,
    Status,
)
from tests.servers import stand_in as faults
from tests.servers.artifact import TEMPLATE, FileArtifact, at, pushed
from tests.servers.stand_in import StandIn, stand_in

TOKEN = "s3cr3t-t0k3n"
Fault = Callable[[faults.Handler], None]


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as state:
        yield state


@pytest.fixture
def failing(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend of a stand-in whose answers must be complete within half a second."""
    monkeypatch.setenv("FAILING_TOKEN", TOKEN)
    return open_backend(at(server, timeout=0.5, token_env="FAILING_TOKEN"))


SHORT_FAULTS = [
    (faults.silence, ServerUnreachableError),
    (faults.cut, ServerUnreachableError),
    (faults.hang_up, ServerUnreachableError),
    (faults.slow_headers, ServerUnreachableError),
    (faults.slow_body, ServerUnreachableError),
    (faults.endless_continue, ServerUnreachableError),
    (faults.endless_body, ServerAnswerError),
    (faults.truncated, ServerUnreachableError),
    (faults.no_http, ServerAnswerError),
    (faults.html, ServerAnswerError),
    (faults.angry, ServerAnswerError),
    (faults.redirect, ServerAnswerError),
    (faults.bomb, ServerAnswerError),
    (faults.deep, ServerAnswerError),
    (faults.not_an_object, ServerAnswerError),
    (faults.other_shape, ServerAnswerError),
]


@pytest.mark.timeout(20, func_only=True)
@pytest.mark.parametrize(("fault", "expected"), SHORT_FAULTS)
@pytest.mark.parametrize("path", ["/api/version", "/api/tags"])
def test_whatever_a_server_answers_becomes_our_error_in_time(
    server: StandIn,
    failing: Backend,
    artifact: FileArtifact,
    path: str,
    fault: Fault,
    expected: type[DeploymentError],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.faults["GET", path] = fault
    with pytest.raises(expected) as caught:
        refused_if_taken(failing, artifact, "new")

    assert_fit_to_print(caught.value)
    assert TOKEN not in caplog.text
    assert not [path for _, path, _ in server.seen if "stolen" in path]


@pytest.mark.timeout(20, func_only=True)
@pytest.mark.parametrize("fault", [fault for fault, _ in SHORT_FAULTS])
def test_status_is_unreachable_whatever_the_server_answers(
    server: StandIn, failing: Backend, artifact: FileArtifact, fault: Fault
) -> None:
    served = pushed(failing, artifact, "there")
    server.faults["GET", "/api/tags"] = fault
    assert failing.status(served) is Status.UNREACHABLE


@pytest.mark.timeout(20, func_only=True)
@pytest.mark.parametrize(
    "fault",
    [faults.silence, faults.cut, faults.too_large, faults.angry, faults.redirect, faults.no_http],
)
def test_an_upload_that_fails_leaves_nothing(
    server: StandIn, failing: Backend, artifact: FileArtifact, fault: Fault, tmp_path: Path
) -> None:
    large = tmp_path / "large.gguf"
    large.write_bytes(b"GGUF" + bytes(32 << 20))
    file = GGUFFile(large, large.stat().st_size, "sha256:" + "0" * 64)
    server.faults["POST", "/api/blobs"] = fault
    with pytest.raises((ServerUnreachableError, ServerAnswerError)) as caught:
        pushed(failing, attrs.evolve(artifact, files=(file, file)), "new")

    assert_fit_to_print(caught.value)
    assert server.models == {}
    assert "/api/create" not in [path for _, path, _ in server.seen]


@pytest.mark.timeout(20, func_only=True)
@pytest.mark.parametrize("created", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        faults.cut, faults.hang_up, faults.truncated, faults.endless_body, faults.error_line,
        faults.no_success, faults.nothing_created, faults.html, faults.angry, faults.redirect,
        faults.not_an_object,
    ],
)  # fmt: skip
def test_a_creation_that_fails_leaves_nothing(
    server: StandIn, failing: Backend, artifact: FileArtifact, fault: Fault, created: bool
) -> None:
    def creating_first(handler: faults.Handler) -> None:
        # The fault may read the body; what is asked for is at its beginning.
        (name,) = re.findall(rb'"model": "(new:[^"]+)"', handler.rfile.peek())
        server.put(name.decode(), {"files": {"model.gguf": "sha256:" + "0" * 64}})
        fault(handler)

    server.faults["POST", "/api/create"] = creating_first if created else fault
    with pytest.raises((ServerUnreachableError, ServerAnswerError)) as caught:
        pushed(failing, artifact, "new")

    assert_fit_to_print(caught.value)
    assert server.models == {}


@pytest.mark.timeout(30, func_only=True)
@pytest.mark.parametrize("lost", [faults.cut, faults.hang_up, faults.truncated])
@pytest.mark.parametrize("path", ["/api/blobs", "/api/create"])
def test_a_server_that_restarts_meanwhile_is_waited_for(
    server: StandIn, artifact: FileArtifact, path: str, lost: Fault
) -> None:
    def restarting(handler: faults.Handler) -> None:
        server.faults = {("*", "/"): faults.hang_up}
        server.blobs.clear()  # as versions before 0.21.0 do with what no model uses
        threading.Timer(1.5, server.faults.clear).start()
        lost(handler)

    server.faults["POST", path] = restarting
    backend = open_backend(at(server, timeout=5.0))
    served = pushed(backend, artifact, "new")
    assert backend.status(served) is Status.LIVE
    assert server.blobs.keys() == {artifact.files[0].digest}


@pytest.mark.parametrize(
    "other",
    [
        {"files": {"model.gguf": "sha256:" + "0" * 64}},
        {"template": TEMPLATE.text.rstrip()},
        {"system": "Other."},
    ],
)
def test_a_server_that_shows_something_else_than_it_was_given_is_not_believed(
    server: StandIn, failing: Backend, artifact: FileArtifact, other: dict[str, object]
) -> None:
    def creating(handler: faults.Handler) -> None:
        asked = json.loads(handler.body())
        server.put(asked["model"], {**asked, **other})
        handler.lines({"status": "success"})

    server.faults["POST", "/api/create"] = creating
    with pytest.raises(ServerAnswerError, match="given"):
        pushed(failing, artifact, "new")
    assert server.models == {}


def test_what_could_not_be_withdrawn_is_named(
    server: StandIn, failing: Backend, artifact: FileArtifact
) -> None:
    server.faults["POST", "/api/show"] = faults.angry
    server.faults["DELETE", "/api/delete"] = faults.angry
    with pytest.raises(ServerAnswerError) as caught:
        pushed(failing, artifact, "new")
    assert re.match("'new:cm-[0-9a-f]+' may be left", caught.value.__notes__[0])
    assert_fit_to_print(caught.value)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.5.4", UnsupportedVersionError), ("0.0.1", UnsupportedVersionError),
     ("new", ServerAnswerError), ("", ServerAnswerError)],
)  # fmt: skip
def test_a_server_that_is_too_old_or_of_no_version_is_refused(
    server: StandIn,
    failing: Backend,
    artifact: FileArtifact,
    version: str,
    expected: type[Exception],
) -> None:
    server.version = version
    with pytest.raises(expected):
        failing.preflight(artifact, "new", OllamaOptions())


@pytest.mark.parametrize("version", ["0.5.5", "0.11.4-rc1", "0.34.1", "1.0.0", "0.0.0"])
def test_every_version_since_uploaded_files_is_served(
    server: StandIn, failing: Backend, artifact: FileArtifact, version: str
) -> None:
    server.version = version
    assert pushed(failing, artifact, "new").name == "new"


def test_the_token_is_read_when_it_is_needed_and_sent_in_one_header_only(
    server: StandIn, failing: Backend, artifact: FileArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing.undeploy(pushed(failing, artifact, "new"))
    for _, path, headers in server.seen:
        assert TOKEN not in path
        assert [k for k, v in headers.items() if TOKEN in v] == ["Authorization"]
    for value in ("", "two words", "line\nbreak"):
        monkeypatch.setenv("FAILING_TOKEN", value)
        with pytest.raises(InvalidOptionError, match="FAILING_TOKEN"):
            failing.preflight(artifact, "new", OllamaOptions())


def test_a_host_name_that_is_none_is_unreachable(artifact: FileArtifact) -> None:
    for address in ("a..b", "x" * 70, "nowhere.invalid"):
        backend = open_backend(DeploymentEnvironment("a", "ollama", address, 1))
        with pytest.raises(ServerUnreachableError):
            backend.preflight(artifact, "new", OllamaOptions())


def refused_if_taken(backend: Backend, artifact: FileArtifact, name: str) -> None:
    """All that is asked of a server before anything is sent."""
    backend.preflight(artifact, name, OllamaOptions())
    assert isinstance(backend, Promoting)
    backend.refuse_taken(name, [])


def assert_fit_to_print(error: BaseException) -> None:
    """Nothing that reaches a log has the token, a control character or a page of someone's text."""
    everything = "".join(traceback.format_exception(error))
    assert TOKEN not in everything
    assert "\x1b" not in everything
    assert "stolen" not in str(error)
    assert len(str(error)) < 600
