"""Backends: the contract against real servers, and how an environment becomes one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from customized_models.backends import Describing, open_backend
from customized_models.backends.llama_cpp import LlamaCpp
from customized_models.backends.ollama import Ollama
from customized_models.errors import InvalidOptionError, MissingDependencyError
from customized_models.models import (
    DeploymentEnvironment,
    Served,
)
from customized_models.testing import (
    AddressedContract,
    DescribingContract,
    ProbingContract,
    PromotingContract,
    UnloadingContract,
)
from tests.servers import stand_in as faults
from tests.servers.artifact import at
from tests.servers.ollama_server import OllamaServer
from tests.servers.process import free_port
from tests.servers.stand_in import stand_in


class OfOllama(
    PromotingContract, ProbingContract, UnloadingContract, DescribingContract, AddressedContract
):
    """All that Ollama can do."""

    def inventory(self, environment: DeploymentEnvironment) -> object:
        told = httpx.get(f"{environment.url}/api/tags").json()["models"]
        return {model["name"]: model["digest"] for model in told}


class TestOllama(OfOllama):
    @pytest.fixture
    def environment(self, each_ollama: OllamaServer) -> DeploymentEnvironment:
        self.server = each_ollama
        return at(each_ollama, timeout=5)

    def not_answering(self, served: Served) -> AbstractContextManager[object]:
        return self.server.stopped()


class TestStandIn(OfOllama):
    """The stand-in is fit to stand in: the contract does not tell it from the real one."""

    @pytest.fixture
    def environment(self) -> Iterator[DeploymentEnvironment]:
        with stand_in() as self.server:
            yield at(self.server, timeout=0.5)

    @contextmanager
    def not_answering(self, served: Served) -> Iterator[None]:
        self.server.faults["*", "/"] = faults.silence
        yield
        self.server.faults.clear()


class TestLlamaCpp(ProbingContract, UnloadingContract, DescribingContract):
    @pytest.fixture
    def environment(self) -> DeploymentEnvironment:
        return DeploymentEnvironment("here", "llama_cpp", port=free_port(), settings={"timeout": 3})

    @contextmanager
    def not_answering(self, served: Served) -> Iterator[None]:
        os.kill(served.details["process"]["pid"], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(served.details["process"]["pid"], signal.SIGCONT)

    def inventory(self, environment: DeploymentEnvironment) -> object:
        """The servers of this host that were started for that port."""
        commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        return sorted(c for c in commands if "--mark" in c and str(environment.port) in c)


def test_a_backend_is_built_from_its_environment_and_sends_nothing() -> None:
    nowhere = DeploymentEnvironment("a", "ollama", "nowhere.invalid", 1)
    assert isinstance(open_backend(nowhere), Ollama)
    assert isinstance(open_backend(DeploymentEnvironment("a", "llama_cpp")), LlamaCpp)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    known = "known are llama_cpp, llama_server, ollama, sglang, vllm"
    with pytest.raises(InvalidOptionError, match=known):
        open_backend(DeploymentEnvironment("a", "olama"))


def test_an_installed_package_adds_a_backend_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = tmp_path / "added-1.dist-info"
    added.mkdir()
    (added / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1\n")
    (added / "entry_points.txt").write_text("[customized_models.backends]\nmine = added:Mine\n")
    (tmp_path / "added.py").write_text(
        "class Mine:\n    def __init__(self, environment):\n        self.seen = environment\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    environment = DeploymentEnvironment("a", "mine")

    assert vars(open_backend(environment)) == {"seen": environment}
    with pytest.raises(InvalidOptionError, match="known are llama_cpp, llama_server, mine, ollama"):
        open_backend(DeploymentEnvironment("a", "yours"))


@pytest.mark.parametrize("timeout", [0, -1, True, "3", float("nan"), float("inf"), 3601])
def test_a_timeout_that_is_no_time_is_refused(timeout: object) -> None:
    with pytest.raises(InvalidOptionError, match="timeout"):
        open_backend(DeploymentEnvironment("a", "llama_cpp", settings={"timeout": timeout}))


def test_a_proxy_of_socks_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)  # as if it were not installed
    settings = {"proxy": "socks5://127.0.0.1:9"}
    backend = open_backend(DeploymentEnvironment("a", "ollama", "127.0.0.1", 9, settings=settings))
    assert isinstance(backend, Describing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'httpx\[socks\]'"):
        backend.describe()
