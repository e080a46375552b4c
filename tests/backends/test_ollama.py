"""Ollama: what the backend promises besides the contract, seen at a real server."""

from __future__ import annotations

from pathlib import Path

import attrs
import httpx
import pytest

from customized_models.backends import open_backend
from customized_models.backends.ollama import Ollama, OllamaOptions, environment_from_host
from customized_models.errors import (
    AlreadyExistsError,
    InvalidOptionError,
    NoTemplateError,
    ServerAnswerError,
)
from customized_models.models import (
    DeploymentTemplate,
    Served,
    Status,
)
from tests.servers.artifact import TEMPLATE, FileArtifact, at, no_gguf, pushed
from tests.servers.counting_proxy import CountingProxy
from tests.servers.ollama_server import OllamaServer
from tests.waiting import until


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


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("", "http://127.0.0.1:11434"), ("box", "http://box:11434"), (":8200", "http://127.0.0.1:8200"),
        ("http://box", "http://box:80"), ("https://box", "https://box:443"),
        ("https://box:8443/ollama/", "https://box:8443/ollama"), ("[::1]:11434", "http://[::1]:11434"),
        ("::1", "http://[::1]:11434"), ("http://[::1]:1", "http://[::1]:1"),
        ("0.0.0.0", "http://127.0.0.1:11434"), ("[::]", "http://[::1]:11434"),
        ("box:99999", "http://box:11434"), (' "box:1" ', "http://box:1"),
        ("ollama.com", "https://ollama.com:443"),
    ],
)  # fmt: skip
def test_the_servers_variable_is_read_as_ollamas_own_client_reads_it(
    monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    assert environment_from_host(host).url == url
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert environment_from_host().url == url


@pytest.mark.parametrize("host", ["https://me:hunter2@box", "me:hunter2@box:1", "me@box", "@box"])
def test_a_user_in_the_servers_variable_is_no_host_and_is_not_shown(host: str) -> None:
    with pytest.raises(InvalidOptionError, match="basic_auth_env") as raised:
        environment_from_host(host)
    assert "hunter2" not in str(raised.value)


def test_what_is_refused_is_refused_before_anything_is_sent_that_changes_the_server(
    counting_proxy: CountingProxy, artifact: FileArtifact
) -> None:
    backend = open_backend(at(counting_proxy))
    served = pushed(backend, artifact, "taken")
    counting_proxy.requests.clear()
    with pytest.raises(NoTemplateError, match="set_deployment_template"):
        backend.preflight(attrs.evolve(artifact, template=None), "new", OllamaOptions())
    with pytest.raises(AlreadyExistsError, match="taken"):
        backend.refuse_taken("taken", [])
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
        backend.refuse_taken("mixed-copy", [])
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
    assert "broken" not in ollama.names


def test_a_file_that_is_no_gguf_leaves_no_model(
    ollama: OllamaServer, artifact: FileArtifact, tmp_path: Path
) -> None:
    wrong = attrs.evolve(artifact, files=(no_gguf(tmp_path),) * 2)
    with pytest.raises(ServerAnswerError, match="wrong"):
        pushed(open_backend(at(ollama)), wrong, "wrong")
    assert "wrong" not in ollama.names


def test_a_file_that_changed_since_it_was_made_leaves_no_model(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    file = attrs.evolve(artifact.files[0], digest="sha256:" + "0" * 64)
    with pytest.raises(ServerAnswerError, match="digest mismatch"):
        pushed(open_backend(at(ollama)), attrs.evolve(artifact, files=(file, file)), "changed")
    assert "changed" not in ollama.names


def test_a_name_that_someone_else_gave_another_meaning_is_seen_and_kept(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    backend = open_backend(at(ollama))
    served = pushed(backend, artifact, "shared")
    body = {"model": "shared", "from": "shared", "system": "Other.", "stream": False}
    httpx.post(f"{served.endpoint}/api/create", json=body).raise_for_status()

    assert backend.status(served) is Status.CHANGED
    assert backend.status(backend.version(served)) is Status.LIVE
    backend.undeploy(served)
    assert backend.status(backend.version(served)) is Status.ABSENT
    assert "shared" in ollama.names
    httpx.request("DELETE", f"{served.endpoint}/api/delete", json={"model": "shared"})


def test_undeploying_takes_a_loaded_model_out_of_memory(
    ollama: OllamaServer, artifact: FileArtifact
) -> None:
    backend = open_backend(at(ollama))
    served = pushed(backend, artifact, "loaded")
    body = {"model": "loaded", "prompt": "a", "stream": False, "options": {"num_predict": 1}}
    httpx.post(f"{served.endpoint}/api/generate", json=body, timeout=60).raise_for_status()
    assert "loaded:latest" in loaded(served)

    backend.undeploy(served)
    assert "loaded" not in ollama.names
    until(lambda: "loaded:latest" not in loaded(served))


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


def loaded(served: Served) -> list[str]:
    """The names of what the server has in memory."""
    models = httpx.get(f"{served.endpoint}/api/ps").json()["models"]
    return [model["name"] for model in models]
