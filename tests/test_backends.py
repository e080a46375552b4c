"""Backends: the contract against real servers, then what each of them promises besides."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import attrs
import httpx
import pytest
from attrs import field, frozen
from servers import stand_in as faults
from servers.counting_proxy import CountingProxy
from servers.ollama_server import OllamaServer, free_port
from servers.stand_in import StandIn, stand_in

from customized_models import _gguf
from customized_models._checkpoints import Checkpoint, ModelSource
from customized_models._errors import (
    AlreadyExistsError,
    DeploymentError,
    InUseError,
    InvalidOptionError,
    NoTemplateError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedVersionError,
)
from customized_models._gguf import GGUFFile
from customized_models._models import (
    DeploymentEnvironment,
    DeploymentTemplate,
    Progress,
    Quantization,
    Served,
    Status,
)
from customized_models.backends import Backend, open_backend
from customized_models.backends.llama_cpp import LlamaCpp, LlamaCppOptions
from customized_models.backends.ollama import Ollama, OllamaOptions
from customized_models.testing import BackendContract, tiny_llama

TEMPLATE = DeploymentTemplate(
    "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n \n",
    stop=("<|im_end|>", "<|im_start|>"),
)
TOKEN = "s3cr3t-t0k3n"


@frozen
class FileArtifact:
    """An artifact whose two files, without and with a chat template, are there already."""

    files: tuple[GGUFFile, GGUFFile]
    name: str = "tiny_support_20260101_0123_d_abcd_no_quantization"
    architecture: str = "LlamaForCausalLM"
    quantization: Quantization = "no_quantization"
    template: DeploymentTemplate | None = field(default=TEMPLATE)

    def gguf(self, progress: Progress, *, chat_template: bool) -> GGUFFile:
        return self.files[chat_template]


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> FileArtifact:
    directory = tmp_path_factory.mktemp("gguf")
    model = tiny_llama(directory / "model")
    small = {path.name: path for path in model.iterdir() if path.suffix != ".safetensors"}
    source = ModelSource(small, Checkpoint.open(model))

    def written(chat_template: bool) -> GGUFFile:
        plan = _gguf.plan(source, "no_quantization", name="tiny", chat_template=chat_template)
        return plan.write(directory / f"{chat_template}.gguf", ignore)

    return FileArtifact((written(False), written(True)))


def ignore(phase: str, done: int, total: int) -> None:
    pass


def pushed(backend: Backend, artifact: FileArtifact, name: str, **options: object) -> Served:
    plan = backend.preflight(artifact, name, backend.options(**options))
    return backend.push(plan, ignore)


def at(server: OllamaServer | CountingProxy | StandIn, **more: object) -> DeploymentEnvironment:
    settings = {"timeout": 20}
    return DeploymentEnvironment(
        "here", "ollama", "127.0.0.1", server.port, **({"settings": settings} | more)
    )


# Contracts


class TestOllama(BackendContract):
    @pytest.fixture
    def environment(self, ollama: OllamaServer) -> DeploymentEnvironment:
        self.server = ollama
        return at(ollama, settings={"timeout": 3})

    def not_answering(self, served: Served) -> AbstractContextManager[object]:
        return self.server.stopped()


class TestLlamaCpp(BackendContract):
    @pytest.fixture
    def environment(self) -> DeploymentEnvironment:
        return DeploymentEnvironment("here", "llama_cpp", port=free_port(), settings={"timeout": 3})

    @contextmanager
    def not_answering(self, served: Served) -> Iterator[None]:
        os.kill(served.details["pid"], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(served.details["pid"], signal.SIGCONT)


class TestStandIn(BackendContract):
    """The stand-in is fit to stand in: the contract does not tell it from the real one."""

    @pytest.fixture
    def environment(self) -> Iterator[DeploymentEnvironment]:
        with stand_in() as self.server:
            yield at(self.server, settings={"timeout": 0.5})

    @contextmanager
    def not_answering(self, served: Served) -> Iterator[None]:
        self.server.faults["*", "/"] = faults.silence
        yield
        self.server.faults.clear()


# From an environment to a backend


def test_a_backend_is_built_from_its_environment_and_sends_nothing() -> None:
    nowhere = DeploymentEnvironment("a", "ollama", "nowhere.invalid", 1)
    assert isinstance(open_backend(nowhere), Ollama)
    assert isinstance(open_backend(DeploymentEnvironment("a", "llama_cpp")), LlamaCpp)


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidOptionError, match="known are llama_cpp, ollama"):
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
    with pytest.raises(InvalidOptionError, match="known are llama_cpp, mine, ollama"):
        open_backend(DeploymentEnvironment("a", "yours"))


@pytest.mark.parametrize("timeout", [0, -1, True, "3", float("nan"), float("inf"), 3601])
def test_a_timeout_that_is_no_time_is_refused(timeout: object) -> None:
    with pytest.raises(InvalidOptionError, match="timeout"):
        open_backend(DeploymentEnvironment("a", "llama_cpp", settings={"timeout": timeout}))


@pytest.mark.parametrize(
    "refused", [{"address": "10.0.0.5"}, {"scheme": "https"}, {"path": "/api"}]
)
def test_llama_cpp_serves_on_this_host_only(refused: dict[str, str]) -> None:
    with pytest.raises(InvalidOptionError):
        open_backend(DeploymentEnvironment("a", "llama_cpp", **refused))


@pytest.mark.parametrize(
    "parameters",
    [
        {"num_ctxt": 4096}, {"num_ctx": "4096"}, {"num_ctx": 4096.0}, {"num_ctx": True},
        {"seed": 1 << 40}, {"temperature": "0"}, {"temperature": float("nan")}, {"top_p": True},
        {"use_mmap": 1}, {"stop": "</s>"}, {"stop": [""]}, {"stop": [1]}, {"": 1},
    ],
)  # fmt: skip
def test_a_parameter_that_ollama_would_ignore_or_choke_on_is_refused(
    parameters: dict[str, object],
) -> None:
    with pytest.raises(InvalidOptionError):
        OllamaOptions(parameters=parameters)


@pytest.mark.parametrize("system", ["", 1, ["a"]])
def test_a_system_message_is_text_or_none(system: object) -> None:
    with pytest.raises(InvalidOptionError):
        OllamaOptions(system)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, "512", 1.5, True])
def test_llama_cpp_counts_in_positive_numbers(value: object) -> None:
    with pytest.raises(InvalidOptionError):
        LlamaCppOptions(context=value)  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError):
        LlamaCppOptions(threads=value)  # type: ignore[arg-type]


# A real Ollama


def test_what_is_refused_is_refused_before_anything_is_sent_that_changes_the_server(
    counting_proxy: CountingProxy, artifact: FileArtifact
) -> None:
    backend = open_backend(at(counting_proxy))
    served = pushed(backend, artifact, "taken")
    counting_proxy.requests.clear()
    for template in (None, DeploymentTemplate("")):
        with pytest.raises(NoTemplateError, match="set_deployment_template"):
            backend.preflight(attrs.evolve(artifact, template=template), "new", OllamaOptions())
    with pytest.raises(AlreadyExistsError, match="taken"):
        backend.preflight(artifact, "taken", OllamaOptions())
    with pytest.raises(InvalidOptionError):
        backend.preflight(artifact, "new", {"num_ctx": 4096})
    backend.preflight(artifact, "new", OllamaOptions())
    backend.status(served)

    assert {method for method, _ in counting_proxy.requests} == {"GET"}
    backend.undeploy(served)


def test_a_name_of_another_case_counts_as_taken(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    backend = open_backend(at(ollama))
    served = pushed(backend, artifact, "mixed")
    url = f"http://127.0.0.1:{ollama.port}/api"
    httpx.post(f"{url}/copy", json={"source": "mixed", "destination": "MiXed-Copy"})

    with pytest.raises(AlreadyExistsError):
        backend.preflight(artifact, "mixed-copy", OllamaOptions())
    httpx.request("DELETE", f"{url}/delete", json={"model": "MiXed-Copy"})
    backend.undeploy(served)


def test_a_file_that_the_server_has_is_not_sent_again(
    counting_proxy: CountingProxy, artifact: FileArtifact
) -> None:
    backend = open_backend(at(counting_proxy))
    first, second = pushed(backend, artifact, "first"), pushed(backend, artifact, "second")

    blob = f"/api/blobs/{artifact.files[0].digest}"
    assert counting_proxy.requests.count(("POST", blob)) == 1
    assert first.digest == second.digest == artifact.files[0].digest
    backend.undeploy(first)
    assert backend.status(second) is Status.LIVE
    backend.undeploy(second)


def test_a_file_that_the_server_drops_before_it_is_used_is_sent_again(
    counting_proxy: CountingProxy, ollama: OllamaServer, artifact: FileArtifact
) -> None:
    backend = open_backend(at(counting_proxy))
    blob = artifact.files[0].digest

    def dropping(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("creating", 0):
            (ollama.models / "blobs" / blob.replace(":", "-")).unlink()

    served = backend.push(backend.preflight(artifact, "dropped", OllamaOptions()), dropping)

    assert counting_proxy.requests.count(("POST", f"/api/blobs/{blob}")) == 2
    assert backend.status(served) is Status.LIVE
    backend.undeploy(served)


def test_template_system_and_parameters_arrive_as_they_are(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    backend = open_backend(at(ollama))
    system = 'Say """no".\nFROM nothing\n\tü'
    parameters = {"num_ctx": 128, "temperature": 0, "top_p": 0.5, "stop": ["zz", "<|im_end|>"]}
    served = pushed(backend, artifact, "exact", system=system, parameters=parameters)

    answer = httpx.post(f"{served.endpoint}/api/show", json={"model": "exact"}).json()
    assert (answer["template"], answer["system"]) == (TEMPLATE.text, system)
    assert sorted(line.split(maxsplit=1) for line in answer["parameters"].splitlines()) == [
        ["num_ctx", "128"], ["stop", '"<|im_end|>"'], ["stop", '"<|im_start|>"'],
        ["stop", '"zz"'], ["temperature", "0"], ["top_p", "0.5"],
    ]  # fmt: skip
    backend.undeploy(served)


def test_a_template_that_ollama_cannot_parse_leaves_no_model(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    broken = attrs.evolve(artifact, template=DeploymentTemplate("{{ if"))
    with pytest.raises(ServerAnswerError, match="template"):
        pushed(open_backend(at(ollama)), broken, "broken")
    assert ollama.manifests == []


def test_a_file_that_is_no_gguf_leaves_no_model(
    ollama: OllamaServer, artifact: FileArtifact, tmp_path: Path
) -> None:
    wrong = attrs.evolve(artifact, files=(no_gguf(tmp_path),) * 2)
    with pytest.raises(ServerAnswerError, match="wrong"):
        pushed(open_backend(at(ollama)), wrong, "wrong")
    assert ollama.manifests == []


def test_a_file_that_changed_since_it_was_made_leaves_no_model(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    file = attrs.evolve(artifact.files[0], digest="sha256:" + "0" * 64)
    with pytest.raises(ServerAnswerError, match="digest mismatch"):
        pushed(open_backend(at(ollama)), attrs.evolve(artifact, files=(file, file)), "changed")
    assert ollama.manifests == []


def test_a_model_that_someone_else_changed_is_seen_and_not_removed(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    backend = open_backend(at(ollama))
    served = pushed(backend, artifact, "shared")
    body = {"model": "shared", "from": "shared", "system": "Other.", "stream": False}
    httpx.post(f"{served.endpoint}/api/create", json=body).raise_for_status()

    assert backend.status(served) is Status.CHANGED
    with pytest.raises(InUseError, match="someone else"):
        backend.undeploy(served)
    assert len(ollama.manifests) == 1
    httpx.request("DELETE", f"{served.endpoint}/api/delete", json={"model": "shared"})
    backend.undeploy(served)


def test_undeploying_takes_a_loaded_model_out_of_memory(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    backend = open_backend(at(ollama))
    served = pushed(backend, artifact, "loaded")
    body = {"model": "loaded", "prompt": "a", "stream": False, "options": {"num_predict": 1}}
    httpx.post(f"{served.endpoint}/api/generate", json=body, timeout=60).raise_for_status()
    assert len(httpx.get(f"{served.endpoint}/api/ps").json()["models"]) == 1

    backend.undeploy(served)
    assert httpx.get(f"{served.endpoint}/api/ps").json() == {"models": []}
    assert ollama.manifests == []


def test_proxies_of_the_environment_are_not_asked(
    ollama: OllamaServer, artifact: FileArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    open_backend(at(ollama)).preflight(artifact, "new", OllamaOptions())


def test_a_client_of_the_callers_own_is_used(ollama: OllamaServer, artifact: FileArtifact) -> None:
    with httpx.Client(headers={"X-Mine": "1"}) as client:
        backend = Ollama(at(ollama), client=client)
        served = pushed(backend, artifact, "mine")
        backend.undeploy(served)
        assert not client.is_closed


# An Ollama that fails


@pytest.fixture
def server() -> Iterator[StandIn]:
    with stand_in() as state:
        yield state


@pytest.fixture
def failing(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """The backend of a stand-in whose answers must be complete within half a second."""
    monkeypatch.setenv("FAILING_TOKEN", TOKEN)
    return open_backend(at(server, settings={"timeout": 0.5}, token_env="FAILING_TOKEN"))


SHORT_FAULTS = [
    (faults.silence, ServerUnreachableError),
    (faults.cut, ServerUnreachableError),
    (faults.slow_headers, ServerUnreachableError),
    (faults.slow_body, ServerUnreachableError),
    (faults.endless_continue, ServerUnreachableError),
    (faults.endless_body, ServerAnswerError),
    (faults.truncated, ServerAnswerError),
    (faults.no_http, ServerAnswerError),
    (faults.html, ServerAnswerError),
    (faults.angry, ServerAnswerError),
    (faults.redirect, ServerAnswerError),
    (faults.bomb, ServerAnswerError),
    (faults.deep, ServerAnswerError),
    (faults.not_an_object, ServerAnswerError),
    (faults.other_shape, ServerAnswerError),
]
Fault = Callable[[faults.Handler], None]


@pytest.mark.timeout(20)
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
        failing.preflight(artifact, "new", OllamaOptions())

    assert_fit_to_print(caught.value)
    assert TOKEN not in caplog.text
    assert not [path for _, path, _ in server.seen if "stolen" in path]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("fault", [fault for fault, _ in SHORT_FAULTS])
def test_status_is_unreachable_whatever_the_server_answers(
    server: StandIn, failing: Backend, artifact: FileArtifact, fault: Fault
) -> None:
    served = pushed(failing, artifact, "there")
    server.faults["GET", "/api/tags"] = fault
    assert failing.status(served) is Status.UNREACHABLE


@pytest.mark.timeout(20)
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


@pytest.mark.timeout(20)
@pytest.mark.parametrize("created", [False, True])
@pytest.mark.parametrize(
    "fault",
    [
        faults.cut, faults.truncated, faults.endless_body, faults.error_line, faults.no_success,
        faults.nothing_created, faults.html, faults.angry, faults.redirect, faults.not_an_object,
    ],
)  # fmt: skip
def test_a_creation_that_fails_leaves_nothing(
    server: StandIn, failing: Backend, artifact: FileArtifact, fault: Fault, created: bool
) -> None:
    def creating_first(handler: faults.Handler) -> None:
        server.models["new"] = {"files": {"model.gguf": "sha256:" + "0" * 64}}
        fault(handler)

    server.faults["POST", "/api/create"] = creating_first if created else fault
    with pytest.raises((ServerUnreachableError, ServerAnswerError)) as caught:
        pushed(failing, artifact, "new")

    assert_fit_to_print(caught.value)
    assert server.models == {}


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
        server.models[asked["model"]] = {**asked, **other}
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
    assert "'new' may be left" in caught.value.__notes__[0]
    assert_fit_to_print(caught.value)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.5.4", UnsupportedVersionError), ("0.0.0", UnsupportedVersionError),
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


@pytest.mark.parametrize("version", ["0.5.5", "0.11.4-rc1", "0.34.1", "1.0.0"])
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


def assert_fit_to_print(error: BaseException) -> None:
    """Nothing that reaches a log has the token, a control character or a page of someone's text."""
    everything = "".join(traceback.format_exception(error))
    assert TOKEN not in everything
    assert "\x1b" not in everything
    assert "stolen" not in str(error)
    assert len(str(error)) < 600


def no_gguf(directory: Path) -> GGUFFile:
    path = directory / "no.gguf"
    path.write_bytes(b"no GGUF" * 100)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return GGUFFile(path, path.stat().st_size, f"sha256:{digest}")


# llama.cpp


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
from customized_models._gguf import GGUFFile
from customized_models._models import DeploymentEnvironment
from customized_models.backends import open_backend

class Artifact:
    name, template = "outliving", None
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
            os.waitpid(served.details["pid"], os.WNOHANG)
        os.kill(served.details["pid"], signal.SIGKILL)
        while here.status(served) is not Status.ABSENT:
            pass


def test_a_process_that_got_the_number_later_is_not_touched(
    here: Backend, artifact: FileArtifact
) -> None:
    with (
        serving(here, artifact, "numbered") as served,
        subprocess.Popen(["sleep", "60"]) as another,
    ):
        reused = attrs.evolve(served, details={**served.details, "pid": another.pid})
        assert here.status(reused) is Status.ABSENT
        here.undeploy(reused)
        assert another.poll() is None
        another.kill()


def test_a_server_that_does_not_end_when_asked_is_killed(
    here: Backend, artifact: FileArtifact
) -> None:
    with serving(here, artifact, "stopped") as served:
        os.kill(served.details["pid"], signal.SIGSTOP)
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
    with pytest.raises(UnsupportedVersionError, match=r"customized-models\[llama-cpp\]"):
        here.preflight(artifact, "new", LlamaCppOptions())
