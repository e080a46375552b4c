"""Architectures without a family here, by the converter of a checkout: the same bytes, one pass."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from customized_models import gguf as _gguf
from customized_models.errors import MalformedError, UnsupportedArchitectureError
from tests.gguf.models import HEADS, SHAPE, Tiny, bpe, gpt2_vocabulary, tiny_model
from tests.gguf.test_families import differences, no_progress, source
from tests.servers.llama_cpp_oracle import Oracle, OracleError

pytestmark = pytest.mark.slow

WORDS = {"vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}
LAYERS = ["conv", "full_attention", "conv", "full_attention"]
OTHERS = {
    "apertus": Tiny("ApertusConfig", WORDS, gpt2_vocabulary),
    "lfm2": Tiny("Lfm2Config", WORDS | {"layer_types": LAYERS}, gpt2_vocabulary),
    "falcon_h1": Tiny("FalconH1Config", WORDS | HEADS, gpt2_vocabulary),
}


@pytest.mark.parametrize("name", OTHERS)
def test_its_classes_convert_what_has_no_family_here(
    tmp_path: Path, llama_cpp: Oracle, name: str
) -> None:
    directory = tiny_model(tmp_path / "tiny model", OTHERS[name], "bfloat16", shard_size="20MB")
    with pytest.raises(UnsupportedArchitectureError, match="llama_cpp="):
        _gguf.plan(source(directory), "q8_0", name="tiny", chat_template=True)
    plain = llama_cpp.convert(directory, tmp_path / "upstream.gguf", "bf16", name="tiny")
    for mode in ("no_quantization", "q8_0", "q4_K_M") if name == "apertus" else ("q4_K_S",):
        theirs = plain
        if mode != "no_quantization":
            theirs = llama_cpp.quantize(plain, tmp_path / "quantized.gguf", mode)
        plan = _gguf.plan(
            source(directory), mode, name="tiny", chat_template=True, llama_cpp=llama_cpp.directory
        )
        file = plan.write(tmp_path / "ours.gguf", no_progress)
        assert file.size == plan.size
        if file.path.read_bytes() != theirs.read_bytes():
            pytest.fail(f"{mode}: " + "\n".join(differences(file.path, theirs)[:20]))


def test_what_is_no_checkout_and_what_it_does_not_know_is_refused(
    tmp_path: Path, llama_cpp: Oracle
) -> None:
    directory = tiny_model(tmp_path / "tiny", OTHERS["apertus"], "bfloat16")
    options = {"name": "tiny", "chat_template": True}
    with pytest.raises(MalformedError, match="no converter"):
        _gguf.plan(source(directory), "q8_0", llama_cpp=tmp_path, **options)
    config = (directory / "config.json").read_text().replace("ApertusForCausalLM", "NoSuchModel")
    (directory / "config.json").write_text(config)
    with pytest.raises(UnsupportedArchitectureError, match="NoSuchModel"):
        _gguf.plan(source(directory), "q8_0", llama_cpp=llama_cpp.directory, **options)


VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
TEXT = {key: value for key, value in SHAPE.items() if not key.endswith("token_id")}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
SEEING = {
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": TEXT | HEADS | {"sliding_window": 64, "query_pre_attn_scalar": 32},
            "vision_config": VISION
            | {"num_attention_heads": 4, "image_size": 64, "patch_size": 16},
            "mm_tokens_per_image": 4,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": TEXT | {"rope_parameters": MROPE},
            "vision_config": {
                "hidden_size": 64, "intermediate_size": 128, "depth": 4, "num_heads": 4,
                "out_hidden_size": 256, "fullatt_block_indexes": [1, 3], "patch_size": 14,
            },
        },
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": TEXT | HEADS | {"rope_parameters": MROPE},
            "vision_config": {
                "hidden_size": 64, "intermediate_size": 128, "depth": 4, "num_heads": 4,
                "out_hidden_size": 256, "deepstack_visual_indexes": [1, 2], "patch_size": 16,
                "num_position_embeddings": 64,
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_what_sees_becomes_a_file_for_the_text_model_and_one_for_the_eyes(
    tmp_path: Path, llama_cpp: Oracle, name: str
) -> None:
    import transformers

    directory = tmp_path / "tiny model"
    config, options = SEEING[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        getattr(transformers, config)(**options)
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    bpe(directory)
    seen = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 4}
    (directory / "preprocessor_config.json").write_text(json.dumps(seen))
    text = llama_cpp.convert(
        directory, tmp_path / "upstream.gguf", "bf16", name="tiny", pre="smollm"
    )
    for mode in ("no_quantization", "q4_K_M"):
        theirs = text
        if mode != "no_quantization":
            theirs = llama_cpp.quantize(text, tmp_path / "quantized.gguf", mode)
        plan = _gguf.plan(source(directory), mode, name="tiny", chat_template=True)
        plan.write(tmp_path / "ours.gguf", no_progress)
        assert differences(tmp_path / "ours.gguf", theirs) == []
        assert (tmp_path / "ours.gguf").read_bytes() == theirs.read_bytes()
    with pytest.raises(UnsupportedArchitectureError, match="mmproj"):
        _gguf.plan_projector(source(directory), name="tiny", llama_cpp=None)
    asked = {"name": "tiny", "llama_cpp": llama_cpp.directory}
    try:
        eyes = llama_cpp.convert(
            directory, tmp_path / "mmproj.gguf", "bf16", "--mmproj", name="tiny", pre="smollm"
        )
    except OracleError:  # it does not know what transformers 5 calls Gemma's tensors
        with pytest.raises(MalformedError, match="vision_tower"):
            _gguf.plan_projector(source(directory), **asked)
        return
    plan = _gguf.plan_projector(source(directory), **asked)
    plan.write(tmp_path / "ours.gguf", no_progress)
    assert (tmp_path / "ours.gguf").read_bytes() == eyes.read_bytes()
