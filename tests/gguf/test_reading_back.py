"""Every family's files as llama.cpp's own loader runs them, against transformers on the model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import gguf
import pytest
import torch

from customized_models import gguf as _gguf
from customized_models.models import QUANTIZATIONS
from tests.gguf.models import MODELS, tiny_model
from tests.gguf.test_families import no_progress, source

SERVE = """
import json, sys, urllib.request
import xllamacpp

def ask(server, path, **body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)

prompt, count, *paths = json.load(sys.stdin)
results = []
for path, *adapters in paths:
    params = xllamacpp.CommonParams()
    params.model.path = path
    loras = [xllamacpp.CommonAdapterLoraInfo() for _ in adapters]
    for lora, adapter in zip(loras, adapters):
        lora.path, lora.scale = adapter, 1.0
    params.lora_adapters = loras
    params.n_ctx, params.n_parallel, params.warmup, params.port = 256, 1, False, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    usual = {"prompt": prompt, "top_k": 1, "cache_prompt": False, "ignore_eos": True}
    done = ask(server, "/completion", n_predict=8, return_tokens=True, **usual)
    # It leaves out what belongs to tokens that are no whole characters, so it is given another.
    told = ask(server, "/completion", n_predict=1, n_probs=count, logit_bias=[[40, 1e4]], **usual)
    first = told["completion_probabilities"][0]["top_logprobs"]
    results.append([done["tokens"], {entry["id"]: entry["logprob"] for entry in first}])
print("RESULT" + json.dumps(results))
"""

PROMPT = [1, 40, 77, 200, 31, 5, 300, 12, 90, 64, 7, 150]

AGREEMENT = {"no_quantization": 0.99999, "q8_0": 0.98, "q4_K_M": 0.6, "q4_K_S": 0.6}
"""Least correlation of the logits with those of transformers, by mode."""


def served(files: Sequence[Sequence[Path]], count: int) -> list[tuple[list[int], dict[str, float]]]:
    """Of each file, what llama.cpp continues with, and the first token's log-probabilities.

    `files`: a model's, and those of adapters that are applied to it.
    """
    request = json.dumps([PROMPT, count, *([*map(str, each)] for each in files)])
    run = subprocess.run(
        [sys.executable, "-c", SERVE], input=request, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.split("RESULT")[-1])


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_makes_of_a_file_what_transformers_makes_of_the_model(
    tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    directory = tiny_model(tmp_path / "model", MODELS[name], "float32")
    paths = []
    for mode in QUANTIZATIONS:
        paths.append(tmp_path / f"{mode}.gguf")
        plan = _gguf.plan(source(directory), mode, name="tiny", chat_template=True)
        plan.write(paths[-1], no_progress)
    answers = served([[path] for path in paths], model_size(directory))
    ending = endings(paths[0])
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    expected, tokens = [], list(PROMPT)
    with torch.no_grad():
        for _ in range(8):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            logits[ending] = -torch.inf
            expected.append(logits.log_softmax(0))
            tokens.append(int(logits.argmax()))
    assert answers[0][0] == tokens[len(PROMPT) :]
    for mode, (_, logprobs) in zip(QUANTIZATIONS, answers, strict=True):
        ids = [number for number in map(int, logprobs) if number not in ending]
        ours = torch.tensor([logprobs[str(number)] for number in ids])
        agreement = torch.corrcoef(torch.stack([ours, expected[0][ids]]))[0, 1]
        assert agreement >= AGREEMENT[mode], f"{mode}: {agreement}"


def endings(path: Path) -> list[int]:
    """Tokens that llama.cpp lets no text go on after, and which it was told not to choose."""
    reader = gguf.GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    named = (reader.get_field(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom"))
    known = [tokens.index(text) for text in ("<|im_end|>", "<|endoftext|>") if text in tokens]
    return [*known, *(int(field.contents()) for field in named if field is not None)]


def model_size(directory: Path) -> int:
    """Tokens of the vocabulary."""
    return int(json.loads((directory / "config.json").read_text())["vocab_size"])
