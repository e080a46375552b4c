"""Real servers, started once for all the tests that need them."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.servers import (
    build_llama_cpp,
    build_ollama,
    build_versitygw,
    build_vllm,
    install_postgresql,
)
from tests.servers.artifact import FileArtifact, tiny_artifact
from tests.servers.counting_proxy import CountingProxy, counting_proxy
from tests.servers.llama_cpp_oracle import Oracle, oracle
from tests.servers.ollama_server import OllamaServer, ollama_server
from tests.servers.postgresql_server import PostgreSQLServer, postgresql_server
from tests.servers.s3_server import S3Server, s3_server

pytest_plugins = ["tests.models"]
pytest.register_assert_rewrite("tests.merging.parity")


BUILDERS = {
    "built_llama_cpp": (build_llama_cpp.build,),
    "built_ollama": (build_llama_cpp.build, build_ollama.build),  # a current one serves with both
    "built_versitygw": (build_versitygw.build,),
    "built_vllm": (build_vllm.build,),
    "databases": (install_postgresql.build,),
    "postgresql": (install_postgresql.build,),
}
"""What builds the servers that a fixture stands for."""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build the servers that the chosen tests need, once, where the tools for it are there.

    Here and not in the fixtures, because that takes minutes, which no single test has.
    """
    asked = {name for item in session.items for name in getattr(item, "fixturenames", ())}
    builders = dict.fromkeys(
        build for name in BUILDERS if name in asked for build in BUILDERS[name]
    )
    if session.config.option.collectonly:
        return
    capturing = session.config.pluginmanager.getplugin("capturemanager")
    for build in builders:
        with capturing.global_and_fixture_disabled():
            try:
                build()
            except (OSError, subprocess.CalledProcessError) as error:
                print(f"{error}; tests that need what it builds are skipped", flush=True)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Let jobs of all tests have one fork server: pytest's name of a test would make it another."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """In CI a skipped test is a failure: everything a test needs has been installed."""
    skipped = terminalreporter.stats.get("skipped", [])
    if os.environ.get("CI") and skipped:
        terminalreporter.write_line(f"{len(skipped)} tests were skipped, which CI does not accept")
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def built_ollama() -> None:
    """For what needs Ollama's programs: `pytest_collection_finish` has built those it could."""


@pytest.fixture(scope="session")
def built_vllm() -> None:
    """For what needs vLLM, which `pytest_collection_finish` has installed if it could."""
    skip_without(build_vllm.missing())


@pytest.fixture(scope="session")
def built_versitygw() -> None:
    """For what needs the S3 server, which `pytest_collection_finish` has built if it could."""
    skip_without(build_versitygw.missing())


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory, built_versitygw: None) -> Iterator[S3Server]:
    """A real S3 server, shared: tests have prefixes of their own."""
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def built_llama_cpp() -> Path:
    """The directory with llama.cpp's programs, converter and models' templates."""
    skip_without(build_llama_cpp.missing())
    return build_llama_cpp.directory()


@pytest.fixture(scope="session")
def start_ollama(
    tmp_path_factory: pytest.TempPathFactory, built_ollama: None
) -> Iterator[Callable[[str], OllamaServer]]:
    """Starts a version of Ollama, once; all are ended with the tests."""
    with ExitStack() as running:

        @functools.cache
        def start(version: str) -> OllamaServer:
            skip_without(build_ollama.missing(version))
            directory = tmp_path_factory.mktemp(f"ollama-{version}")
            return running.enter_context(ollama_server(version, directory))

        yield start


def skip_without(reason: str | None) -> None:
    """Skip a test for that reason, or fail in CI, which has all that a test needs."""
    if reason is not None and os.environ.get("CI"):
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def ollama(start_ollama: Callable[[str], OllamaServer]) -> OllamaServer:
    """A real Ollama of the version that has all its parts in one program, shared by tests."""
    return start_ollama(build_ollama.VERSIONS[0])


@pytest.fixture(scope="session", params=build_ollama.VERSIONS)
def each_ollama(
    request: pytest.FixtureRequest, start_ollama: Callable[[str], OllamaServer]
) -> OllamaServer:
    """Every real Ollama in turn, shared: tests remove what they create."""
    return start_ollama(request.param)


@pytest.fixture(scope="session")
def llama_cpp(built_llama_cpp: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """Upstream's converter and quantizer, whose bytes ours are compared with."""
    with oracle(built_llama_cpp, tmp_path_factory.mktemp("oracle") / "log") as running:
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


@pytest.fixture(scope="session")
def other_artifact(tmp_path_factory: pytest.TempPathFactory) -> FileArtifact:
    """A tiny model of other content."""
    return tiny_artifact(tmp_path_factory.mktemp("other-artifact"), num_hidden_layers=1)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQLServer]:
    """A real PostgreSQL, shared: each test has a schema of its own."""
    skip_without(install_postgresql.missing())
    with postgresql_server() as server:
        yield server


@pytest.fixture(scope="session")
def databases(request: pytest.FixtureRequest) -> Callable[[str, Path], str]:
    """Gives the URL of a new database, "sqlite" or "postgresql", for a registry in a directory."""

    def fresh(kind: str, directory: Path) -> str:
        if kind == "sqlite":
            return f"sqlite:///{directory / 'registry.db'}"
        server: PostgreSQLServer = request.getfixturevalue("postgresql")
        return server.database()

    return fresh


@pytest.fixture(params=["sqlite", "postgresql"])
def database(
    request: pytest.FixtureRequest, databases: Callable[[str, Path], str], tmp_path: Path
) -> str:
    """The URL of an empty database of each kind, for a registry in `tmp_path / "models"`."""
    return databases(request.param, tmp_path / "models")
