"""llama.cpp: what the backend promises besides the contract, seen at real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import httpx
import pytest

from customized_models.backends import Backend, open_backend
from customized_models.backends.llama_cpp import LlamaCppOptions
from customized_models.errors import (
    AlreadyExistsError,
    InvalidOptionError,
    MissingDependencyError,
    ServerAnswerError,
)
from customized_models.models import (
    DeploymentEnvironment,
    Served,
    Status,
)
from tests.servers.artifact import FileArtifact, no_gguf, pushed

TOKEN = "s3cr3t-t0k3n"


@pytest.mark.parametrize(
    "refused", [{"address": "10.0.0.5"}, {"scheme": "https"}, {"path": "/api"}]
)
def test_llama_cpp_serves_on_this_host_only(refused: dict[str, str]) -> None:
    with pytest.raises(InvalidOptionError):
        open_backend(DeploymentEnvironment("a", "llama_cpp", **refused))


@pytest.mark.parametrize("value", [0, -1, "512", 1.5, True])
def test_llama_cpp_counts_in_positive_numbers(value: object) -> None:
    with pytest.raises(InvalidOptionError):
        LlamaCppOptions(context=value)  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError):
        LlamaCppOptions(threads=value)  # type: ignore[arg-type]


@pytest.fixture
def here() -> Backend:
    """A llama.cpp backend that takes any free port."""
    return open_backend(DeploymentEnvironment("here", "llama_cpp", settings={"timeout": 20}))


@contextmanager
def serving(backend: Backend, artifact: FileArtifact, name: str) -> Iterator[Served]:
    served = pushed(backend, artifact, name, context=256, threads=1)
    try:
        yield served
    finally:
        backend.undeploy(served)


def test_without_a_port_every_model_gets_one_of_its_own(
    here: Backend, artifact: FileArtifact
) -> None:
    with serving(here, artifact, "one") as one, serving(here, artifact, "two") as two:
        assert one.endpoint != two.endpoint
        here.undeploy(one)
        assert (here.status(one), here.status(two)) == (Status.ABSENT, Status.LOADED)


def test_the_files_own_chat_template_is_used(here: Backend, artifact: FileArtifact) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": " U\n"}]
    with serving(here, artifact, "chat") as served:
        url = served.endpoint.removesuffix("/v1") + "/apply-template"
        prompt = httpx.post(url, json={"messages": messages}).json()["prompt"]
    assert prompt == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n U\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_model_outlives_the_process_that_deployed_it(
    artifact: FileArtifact, tmp_path: Path
) -> None:
    script = """
import json, sys
from pathlib import Path
import attrs
from customized_models.gguf import GGUFFile
from customized_models.models import DeploymentEnvironment
from customized_models.backends import open_backend

class Artifact:
    name, template = "outliving", None
    def check_gguf(self):
        pass
    def gguf(self, progress, *, chat_template):
        return GGUFFile(Path(sys.argv[1]), 1, "sha256:0")

backend = open_backend(DeploymentEnvironment("here", "llama_cpp"))
plan = backend.preflight(Artifact(), None, backend.options(context=256, threads=1))
print(json.dumps(attrs.asdict(backend.push(plan, lambda *progress: None))))
"""
    command = [sys.executable, "-c", script, str(artifact.files[1].path)]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120).stdout
    served = Served(**json.loads(output))

    backend = open_backend(DeploymentEnvironment("here", "llama_cpp"))
    assert backend.status(served) is Status.LOADED
    backend.undeploy(served)
    assert backend.status(served) is Status.ABSENT


def test_a_model_whose_process_was_killed_is_absent_and_no_zombie_of_ours(
    here: Backend, artifact: FileArtifact
) -> None:
    with serving(here, artifact, "killed") as served:
        with pytest.raises(ChildProcessError):  # not ours to wait for
            os.waitpid(served.details["process"]["pid"], os.WNOHANG)
        os.kill(served.details["process"]["pid"], signal.SIGKILL)
        while here.status(served) is not Status.ABSENT:
            pass


def test_a_process_that_got_the_number_later_is_not_touched(
    here: Backend, artifact: FileArtifact
) -> None:
    with (
        serving(here, artifact, "numbered") as served,
        subprocess.Popen(["sleep", "60"]) as another,
    ):
        process = {**served.details["process"], "pid": another.pid}
        reused = attrs.evolve(served, details={**served.details, "process": process})
        assert here.status(reused) is Status.ABSENT
        here.undeploy(reused)
        assert another.poll() is None
        another.kill()


def test_a_server_that_does_not_end_when_asked_is_killed(
    here: Backend, artifact: FileArtifact
) -> None:
    with serving(here, artifact, "stopped") as served:
        os.kill(served.details["process"]["pid"], signal.SIGSTOP)
        here.undeploy(served)
        assert here.status(served) is Status.ABSENT


def test_a_server_of_another_name_is_not_the_one_deployed(
    here: Backend, artifact: FileArtifact
) -> None:
    with serving(here, artifact, "right") as served:
        assert here.status(attrs.evolve(served, name="wrong")) is Status.CHANGED


def test_a_file_that_llama_cpp_cannot_load_is_refused_in_its_words(
    here: Backend, artifact: FileArtifact, tmp_path: Path
) -> None:
    wrong = attrs.evolve(artifact, files=(no_gguf(tmp_path),) * 2)
    with pytest.raises(ServerAnswerError, match="failed to load model"):
        pushed(here, wrong, "wrong")


def test_a_port_that_something_listens_on_is_refused(artifact: FileArtifact) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        backend = open_backend(DeploymentEnvironment("here", "llama_cpp", port=port))
        with pytest.raises(AlreadyExistsError, match=str(port)):
            backend.preflight(artifact, "new", LlamaCppOptions())


def test_a_token_is_asked_of_callers(
    artifact: FileArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = DeploymentEnvironment("here", "llama_cpp", token_env="SERVED_TOKEN")
    backend = open_backend(environment)
    with pytest.raises(InvalidOptionError, match="SERVED_TOKEN"):
        backend.preflight(artifact, "new", LlamaCppOptions())
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    with serving(backend, artifact, "guarded") as served:
        url, body = f"{served.endpoint}/completions", {"prompt": "a", "max_tokens": 1}
        assert httpx.post(url, json=body).status_code == 401
        known = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx.post(url, json=body, headers=known).status_code == 200
        assert backend.status(served) is Status.LOADED
        assert TOKEN not in json.dumps(attrs.asdict(served))


def test_web_pages_of_other_origins_get_no_leave_to_read(
    here: Backend, artifact: FileArtifact
) -> None:
    with serving(here, artifact, "private") as served:
        answer = httpx.get(f"{served.endpoint}/models", headers={"Origin": "http://evil.example"})
    assert answer.headers.get("Access-Control-Allow-Origin", "") == ""


def test_a_missing_wheel_is_named_with_the_extra_that_brings_it(
    here: Backend, artifact: FileArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingDependencyError, match=r"customized-models\[llama-cpp\]"):
        here.preflight(artifact, "new", LlamaCppOptions())
