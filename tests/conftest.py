"""Real servers, started once for all the tests that need them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.servers import build_llama_cpp, build_ollama
from tests.servers.artifact import FileArtifact, tiny_artifact
from tests.servers.counting_proxy import CountingProxy, counting_proxy
from tests.servers.llama_cpp_oracle import Oracle, oracle
from tests.servers.ollama_server import OllamaServer, ollama_server

pytest_plugins = ["tests.models"]
pytest.register_assert_rewrite("tests.merging.parity")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In CI a skipped test is a failure: everything a test needs has been installed."""
    skipped = terminalreporter.stats.get("skipped", [])
    if os.environ.get("CI") and skipped:
        terminalreporter.write_line(f"{len(skipped)} tests were skipped, which CI does not accept")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


def missing(reason: str) -> None:
    """Skip what needs something that is not there; in CI it must be."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def ollama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OllamaServer]:
    """A real Ollama, shared: tests remove what they create."""
    binary = build_ollama.binary()
    if not build_ollama.runs(binary):
        missing(f"no Ollama at {binary}; tests/servers/build_ollama.py builds it")
    with ollama_server(binary, tmp_path_factory.mktemp("ollama")) as server:
        yield server


@pytest.fixture(scope="session")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """Upstream's converter and quantizer, whose bytes ours are compared with."""
    directory = build_llama_cpp.directory()
    if not build_llama_cpp.runs(directory):
        missing(f"no llama.cpp in {directory}; tests/servers/build_llama_cpp.py builds it")
    with oracle(directory, tmp_path_factory.mktemp("oracle") / "log") as running:
        yield running


@pytest.fixture(name="counting_proxy")
def counting_proxy_fixture(ollama: OllamaServer) -> Iterator[CountingProxy]:
    """A proxy in front of the real Ollama."""
    with counting_proxy(ollama.address, ollama.port) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> FileArtifact:
    """A tiny model to deploy, its files written once."""
    return tiny_artifact(tmp_path_factory.mktemp("artifact"))
