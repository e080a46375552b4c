"""Deployment templates proven on real servers: two Ollamas and llama.cpp."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from attrs import field, frozen

from customized_models import DeploymentTemplate
from customized_models import gguf as _gguf
from customized_models.deploying.templates import (
    BEGINNING,
    CONVERSATIONS,
    REQUIRED,
    ChatTemplate,
    EndTokens,
    propose,
    propose_deployment_template,
    prove_on_llama_cpp,
    prove_on_ollama,
)
from customized_models.errors import ServerAnswerError, TemplateMismatchError
from customized_models.files.safetensors import Checkpoint, ModelSource
from customized_models.models import Quantization
from customized_models.testing import tiny_llama
from tests.conftest import skip_without
from tests.servers import build_ollama
from tests.servers.artifact import ignore
from tests.servers.llama_server import llama_server
from tests.servers.ollama_server import OllamaServer, ollama_server

pytestmark = pytest.mark.slow

FEW = tuple({c.kind: c for c in reversed(CONVERSATIONS)}.values())[::-1]
"""One conversation of each kind."""

WITH_BEGINNING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nBe kind, it is ' + "
    "strftime_now('%d %b %Y') + '.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@frozen
class Asked:
    """A server over HTTP."""

    url: str

    def post(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        response = httpx.post(self.url + path, json=dict(body), timeout=300)
        if response.is_error:
            raise ServerAnswerError(response.text)
        answer: Mapping[str, Any] = response.json()
        return answer

    def delete(self, path: str, body: Mapping[str, Any]) -> None:
        httpx.request("DELETE", self.url + path, json=dict(body), timeout=60).raise_for_status()


@frozen
class Model:
    """A model directory, its tokenizer, and files made of it, without and with chat template."""

    directory: Path
    tokenizer: Any = field(repr=False)
    file: Path
    with_chat_template: Path

    @classmethod
    def made_of(cls, directory: Path, quantization: Quantization = "no_quantization") -> Model:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        small = {
            p.name: p for p in directory.iterdir() if p.suffix not in (".safetensors", ".gguf")
        }
        written = []
        for chat_template in (False, True):
            source = ModelSource(small, Checkpoint.open(directory))
            plan = _gguf.plan(source, quantization, name="m", chat_template=chat_template)
            written.append(directory / f"{chat_template}.gguf")
            plan.write(written[-1], ignore)
        return cls(directory, tokenizer, *written)

    @property
    def files(self) -> dict[str, Path]:
        return {path.name: path for path in self.directory.iterdir()}

    @property
    def chat(self) -> ChatTemplate:
        return ChatTemplate.read(self.files)

    def encode(self, text: str) -> Sequence[int]:
        ids: Sequence[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """ChatML, without a beginning of text."""
    return Model.made_of(tiny_llama(tmp_path_factory.mktemp("plain"), max_position_embeddings=2048))


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A beginning of text, a default system message with a date, and trimmed contents."""
    directory = tmp_path_factory.mktemp("beginning")
    tiny_llama(directory, max_position_embeddings=2048)
    (directory / "chat_template.jinja").write_text(WITH_BEGINNING)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "bos_token": "<|endoftext|>", "add_bos_token": True}))
    return Model.made_of(directory)


@pytest.fixture(params=["plain", "beginning"])
def model(request: pytest.FixtureRequest) -> Model:
    found: Model = request.getfixturevalue(request.param)
    return found


def at(server: OllamaServer) -> Asked:
    return Asked(f"http://127.0.0.1:{server.port}")


@contextmanager
def deployed(
    server: Asked, file: Path, template: DeploymentTemplate | None, name: str = "proven"
) -> Iterator[str]:
    """The name of a model that Ollama makes of a file, while the block lasts."""
    data = file.read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    httpx.post(f"{server.url}/api/blobs/{digest}", content=data, timeout=300).raise_for_status()
    body: dict[str, Any] = {"model": name, "files": {"model.gguf": digest}, "stream": False}
    if template is not None:
        body |= {"template": template.text, "parameters": {"stop": list(template.stop)}}
    assert server.post("/api/create", body)["status"] == "success"
    try:
        yield name
    finally:
        server.delete("/api/delete", {"model": name})


def test_a_proposed_template_is_proven_on_the_live_server(
    each_ollama: OllamaServer, model: Model
) -> None:
    server, proposed = at(each_ollama), propose_deployment_template(model.files)
    with deployed(server, model.file, proposed.template) as name:
        before = each_ollama.names
        proof = prove_on_ollama(server, name, model.chat, model)
        assert each_ollama.names == before
    proof.require()
    ways = {c.kind: c.by for c in proof.comparisons}
    assert set(ways) >= {*REQUIRED, BEGINNING}
    shows_renderings = each_ollama.version != "0.11.4"
    assert ways["several turns"] == ("characters" if shows_renderings else "token ids")
    assert proof.limits == ()
    assert proof.compared >= (39 if shows_renderings else 14)


def test_a_server_that_renders_another_prompt_is_found_out(
    each_ollama: OllamaServer, plain: Model
) -> None:
    server = at(each_ollama)
    text = propose_deployment_template(plain.files).template.text
    wrong = DeploymentTemplate(text.replace("assistant\n", "assistant \n"))
    with deployed(server, plain.file, wrong) as name:
        proof = prove_on_ollama(server, name, plain.chat, plain, conversations=FEW)
    with pytest.raises(TemplateMismatchError, match=r"the deployment '.*assistant "):
        proof.require()
    assert set(proof.failed) == {*REQUIRED, BEGINNING}


def test_a_second_beginning_of_text_is_found_out(
    each_ollama: OllamaServer, beginning: Model
) -> None:
    server = at(each_ollama)
    text = propose_deployment_template(beginning.files).template.text
    with deployed(server, beginning.file, DeploymentTemplate("<|endoftext|>" + text)) as name:
        proof = prove_on_ollama(server, name, beginning.chat, beginning, conversations=FEW)
    assert set(proof.failed) == {*REQUIRED, BEGINNING}


def test_a_file_that_adds_no_beginning_is_found_out(
    each_ollama: OllamaServer, beginning: Model, tmp_path: Path
) -> None:
    server = at(each_ollama)
    template = propose_deployment_template(beginning.files).template
    file = with_keys(beginning.file, tmp_path / "model.gguf", {}, add_bos_token=False)
    with deployed(server, file, template) as name:
        proof = prove_on_ollama(server, name, beginning.chat, beginning, conversations=FEW)
    assert BEGINNING in proof.failed


@pytest.mark.parametrize("go_template", ["0", "1"])
def test_a_server_is_proven_whichever_template_it_is_told_to_use(
    built_ollama: None, model: Model, tmp_path: Path, go_template: str
) -> None:
    version = build_ollama.VERSIONS[-1]
    skip_without(build_ollama.missing(version))
    template = propose_deployment_template(model.files).template
    with ollama_server(version, tmp_path, OLLAMA_GO_TEMPLATE=go_template) as running:
        server = at(running)
        with deployed(server, model.with_chat_template, template) as name:
            prove_on_ollama(server, name, model.chat, model, conversations=FEW).require()


def test_a_server_that_is_told_to_ignore_the_template_is_found_out(
    beginning: Model, tmp_path: Path
) -> None:
    version = build_ollama.VERSIONS[-1]
    skip_without(build_ollama.missing(version))
    template = propose_deployment_template(beginning.files).template
    with ollama_server(version, tmp_path, OLLAMA_GO_TEMPLATE="0") as running:
        server = at(running)
        with deployed(server, beginning.file, template) as name:
            proof = prove_on_ollama(server, name, beginning.chat, beginning, conversations=FEW)
    assert {"no system", "several turns"} <= set(proof.failed)


def test_llama_cpp_is_proven_with_the_chat_template_in_its_file(
    built_llama_cpp: Path, model: Model, tmp_path: Path
) -> None:
    with llama_server(model.with_chat_template, tmp_path / "log") as url:
        proof = prove_on_llama_cpp(Asked(url), model.chat, model)
        proof.require()
        other = ChatTemplate("{{ 'x' }}" + model.chat.text, model.chat.special_tokens)
        assert set(prove_on_llama_cpp(Asked(url), other, model).failed) == {*REQUIRED, BEGINNING}
    assert {c.by for c in proof.comparisons} == {"characters", "token ids"}


def with_keys(
    source: Path, target: Path, keys: Mapping[str, int], *, add_bos_token: bool | None = None
) -> Path:
    """A copy of a GGUF file with further key-values of tokens."""
    import gguf

    reader = gguf.GGUFReader(source)
    values = {key: f for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    architecture = str(values.pop("general.architecture").contents())
    writer = gguf.GGUFWriter(target, architecture)
    for key, value in values.items():
        kind = value.types[0]
        contents = value.contents()
        if key == "tokenizer.ggml.add_bos_token" and add_bos_token is not None:
            contents = add_bos_token
        sub_type = value.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, contents, kind, sub_type=sub_type)
    for key, number in keys.items():
        writer.add_uint32(key, number)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_further_end_token_ends_an_answer(
    each_ollama: OllamaServer, plain: Model, tmp_path: Path
) -> None:
    server, template = at(each_ollama), propose_deployment_template(plain.files).template
    question = [{"role": "user", "content": "Hello"}]
    options = {"temperature": 0, "num_predict": 5, "repeat_penalty": 1.0}
    body = {"messages": question, "stream": False, "options": options}
    with deployed(server, plain.file, template) as name:
        whole = server.post("/api/chat", {"model": name, **body})
    assert whole["done_reason"] == "length"

    first = likeliest_token(plain, question)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, first]}))
    generation = {"generation_config.json": tmp_path / "generation_config.json"}
    ends = EndTokens.read({**plain.files, **generation})
    file = with_keys(plain.file, tmp_path / "model.gguf", ends.file_keys)
    with deployed(server, file, template) as name:
        ended = server.post("/api/chat", {"model": name, **body})
    assert ended["done_reason"] == "stop"
    assert len(ended["message"]["content"]) < len(whole["message"]["content"])


def likeliest_token(model: Model, messages: list[dict[str, str]]) -> int:
    """The first token of an answer, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    inputs = model.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt"
    )
    whole = AutoModelForCausalLM.from_pretrained(model.directory, dtype=torch.float32)
    with torch.no_grad():
        return int(whole(**inputs).logits[0, -1].argmax())


def test_templates_are_proposed_alike_from_files_and_values(plain: Model) -> None:
    proposed = propose(plain.chat, EndTokens.read(plain.files))
    assert proposed == propose_deployment_template(plain.files)
