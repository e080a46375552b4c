"""A model as one GGUF file: read back with the format's own reader, run by llama.cpp itself."""

from __future__ import annotations

import hashlib
import json
import runpy
import shutil
import struct
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import save_file

from customized_models import gguf as _gguf
from customized_models.errors import (
    IntegrityError,
    JobCancelled,
    MalformedError,
    MissingDependencyError,
    NonFiniteError,
    UnsupportedArchitectureError,
    UnsupportedError,
    UnsupportedQuantizationError,
)
from customized_models.files.safetensors import Checkpoint, ModelSource
from customized_models.gguf import writing as _write
from customized_models.gguf.family import registered
from customized_models.gguf.quantization import MODES
from customized_models.gguf.rotary import pairs_of_halves
from customized_models.models import QUANTIZATIONS, no_progress
from customized_models.testing.tiny_models import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    tiny_llama,
    tiny_tokenizer,
)

WIDE = {  # rows of 256 and 512: whole blocks of every type
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "initializer_range": 0.1,
}
ODD = {"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 8}

RMS_BOUND = {
    "F32": 0, "BF16": 0, "F16": 0,
    "Q8_0": 0.008, "Q6_K": 0.025, "Q5_0": 0.06, "Q5_1": 0.045, "Q5_K": 0.05, "Q4_K": 0.095,
}  # fmt: skip
"""Root mean square error over that of the weights, for normally distributed weights: half a step
of 2^bits levels over the range of a block, uniformly distributed, rounded up."""


def source(directory: Path) -> ModelSource:
    files = {p.name: p for p in directory.iterdir() if p.suffix != ".safetensors"}
    return ModelSource(files, Checkpoint.open(directory))


def convert(
    directory: Path, path: Path, mode: str = "no_quantization", *, chat_template: bool = True
) -> gguf.GGUFReader:
    plan = _gguf.plan(source(directory), mode, name="tiny", chat_template=chat_template)
    plan.write(path, no_progress)
    return gguf.GGUFReader(path)


def types(reader: gguf.GGUFReader) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def values(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}


def field(reader: gguf.GGUFReader, key: str) -> object:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def edit(directory: Path, file: str, **changes: object) -> None:
    """Set, or with None remove, keys of a JSON file."""
    document = json.loads((directory / file).read_text())
    document |= changes
    document = {key: value for key, value in document.items() if value is not None}
    (directory / file).write_text(json.dumps(document))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide")
    return tiny_llama(directory, dtype="bfloat16", shard_size="2MB", **WIDE)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "tiny", dtype="float32")


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_size_is_known_beforehand_and_digest_and_progress_are_those_of_the_file(
    tmp_path: Path, wide: Path, mode: str
) -> None:
    reports: list[tuple[str, int, int]] = []
    plan = _gguf.plan(source(wide), mode, name="tiny", chat_template=True)
    file = plan.write(tmp_path / "file.gguf", lambda *report: reports.append(report))
    data = file.path.read_bytes()
    assert file.path == tmp_path / "file.gguf"
    assert file.size == plan.size == len(data)
    assert file.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert {(phase, total) for phase, _, total in reports} == {("quantizing", plan.size)}
    assert reports[-1][1] == plan.size
    assert reports == sorted(reports)
    assert plan.types == types(gguf.GGUFReader(file.path))


@pytest.mark.parametrize(
    ("mode", "value", "down", "rest", "output"),
    [
        ("q8_0", {}, {}, "Q8_0", "Q8_0"),
        ("q4_K_M", dict.fromkeys((0, 3, 6, 7), "Q6_K"), dict.fromkeys((0, 3, 6, 7), "Q6_K"),
         "Q4_K", "Q6_K"),
        ("q4_K_S", dict.fromkeys((0, 1, 2, 3), "Q5_K"), {0: "Q5_K"}, "Q4_K", "Q6_K"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_types_follow_the_rules_of_llama_quantize(
    tmp_path: Path, mode: str, value: dict, down: dict, rest: str, output: str, tied: bool
) -> None:
    directory = tiny_llama(tmp_path / "model", tied=tied, shard_size="2MB", **WIDE)
    expected = {"output_norm.weight": "F32", "token_embd.weight": output if tied else rest}
    if not tied:
        expected["output.weight"] = output
    for layer in range(8):
        block = dict.fromkeys(("attn_norm", "ffn_norm"), "F32")
        block |= dict.fromkeys(("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"), rest)
        block |= {"attn_v": value.get(layer, rest), "ffn_down": down.get(layer, rest)}
        expected |= {f"blk.{layer}.{name}.weight": kind for name, kind in block.items()}
    assert _gguf.plan(source(directory), mode, name="t", chat_template=True).types == expected


@pytest.mark.parametrize(
    ("mode", "counts"),
    [
        # 8 layers: rows of 96 in all but the 8 down projections, whose rows of 80 fit no block.
        ("q8_0", {"F32": 17, "F16": 8, "Q8_0": 50}),
        ("q4_K_M", {"F32": 17, "F16": 8, "Q8_0": 4 + 1, "Q5_0": 44 + 1}),
        ("q4_K_S", {"F32": 17, "F16": 8, "Q5_1": 4, "Q8_0": 1, "Q5_0": 44 + 1}),
    ],
)
def test_rows_that_are_no_whole_blocks_fall_back_as_in_llama_quantize(
    tmp_path: Path, mode: str, counts: dict[str, int]
) -> None:
    directory = tiny_llama(tmp_path / "model", **ODD)
    reader = convert(directory, tmp_path / "file.gguf", mode)
    assert Counter(types(reader).values()) == counts
    assert types(reader)["blk.3.ffn_down.weight"] == "F16"
    assert types(reader)["output.weight"] == "Q8_0"


@pytest.mark.parametrize(("kv_heads", "kind"), [(2, "Q5_K"), (4, "Q4_K")])
def test_eighty_layers_with_grouped_attention_get_more_bits_for_values(
    tmp_path: Path, kv_heads: int, kind: str
) -> None:
    options = WIDE | {"num_hidden_layers": 80, "num_key_value_heads": kv_heads}
    directory = tiny_llama(tmp_path / "model", shard_size="90MB", **options)
    plan = _gguf.plan(source(directory), "q4_K_M", name="tiny", chat_template=True)
    assert plan.types["blk.9.attn_v.weight"] == "Q6_K"
    assert plan.types["blk.10.attn_v.weight"] == kind
    assert plan.types["blk.10.attn_k.weight"] == "Q4_K"


@pytest.mark.parametrize("mode", QUANTIZATIONS)
@pytest.mark.parametrize("options", [WIDE, ODD], ids=["wide", "odd"])
def test_values_read_back_lie_within_the_error_of_their_type(
    tmp_path: Path, mode: str, options: dict
) -> None:
    directory = tiny_llama(tmp_path / "model", dtype="float32", shard_size="9MB", **options)
    exact = values(convert(directory, tmp_path / "exact.gguf"))
    reader = convert(directory, tmp_path / "file.gguf", mode)
    kinds = types(reader)
    for name, got in values(reader).items():
        error = got - exact[name]
        bound = RMS_BOUND[kinds[name]]
        if kinds[name] == "F16":  # half a unit in the last of 11 places
            assert np.all(np.abs(error) <= np.abs(exact[name]) * 2.0**-11 + 2.0**-25)
        else:
            assert np.sqrt(np.mean(error**2)) <= bound * np.sqrt(np.mean(exact[name] ** 2)), name
        if kinds[name] == "Q8_0":  # half a step, and the step itself is rounded to float16
            blocks = np.abs(exact[name]).reshape(-1, 32).max(1, keepdims=True)
            limit = blocks * (0.5 / 127 + 2.0**-11) + 2.0**-24
            assert np.all(np.abs(error).reshape(-1, 32) <= limit), name


@pytest.mark.parametrize(
    ("dtype", "kind", "number"),
    [("bfloat16", "BF16", 32), ("float16", "F16", 1), ("float32", "F32", 0)],
)
def test_without_quantization_every_bit_of_the_checkpoint_is_kept(
    tmp_path: Path, dtype: str, kind: str, number: int
) -> None:
    directory = tiny_llama(tmp_path / "model", dtype=dtype)
    reader = convert(directory, tmp_path / "file.gguf")
    assert field(reader, "general.file_type") == number
    checkpoint = Checkpoint.open(directory)
    got = values(reader)
    names = {"token_embd": "embed_tokens", "output_norm": "norm"}
    for short, long in names.items():
        expected = checkpoint.read(f"model.{long}.weight").float().numpy()
        assert np.array_equal(got[f"{short}.weight"], expected)
    down = checkpoint.read("model.layers.1.mlp.down_proj.weight").float().numpy()
    assert np.array_equal(got["blk.1.ffn_down.weight"], down)
    assert types(reader)["blk.1.ffn_down.weight"] == kind
    assert types(reader)["blk.1.ffn_norm.weight"] == "F32"


def test_rows_of_each_query_and_key_head_change_from_halves_to_pairs(
    tmp_path: Path, tiny: Path
) -> None:
    got = values(convert(tiny, tmp_path / "file.gguf"))
    checkpoint = Checkpoint.open(tiny)
    for short, long, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        weight = checkpoint.read(f"model.layers.0.self_attn.{long}.weight").numpy()
        size = len(weight) // heads
        for head in range(heads):
            for i in range(size // 2):
                to, start = head * size + 2 * i, head * size
                assert np.array_equal(got[f"blk.0.{short}.weight"][to], weight[start + i])
                assert np.array_equal(
                    got[f"blk.0.{short}.weight"][to + 1], weight[start + size // 2 + i]
                )
    value = checkpoint.read("model.layers.0.self_attn.v_proj.weight").numpy()
    assert np.array_equal(got["blk.0.attn_v.weight"], value)


def test_the_cut_into_blocks_changes_no_bit(
    tmp_path: Path, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _gguf.plan(source(wide), "q4_K_M", name="tiny", chat_template=True)
    whole = plan.write(tmp_path / "whole.gguf", no_progress)
    monkeypatch.setattr(_write, "BLOCK", 1)  # a row, or a head, at a time
    assert plan.write(tmp_path / "rows.gguf", no_progress).digest == whole.digest


def test_the_cut_into_shards_changes_no_bit(tmp_path: Path) -> None:
    digests = set()
    for size in ("20KB", "9MB"):
        directory = tiny_llama(tmp_path / size, shard_size=size)
        plan = _gguf.plan(source(directory), "q8_0", name="tiny", chat_template=True)
        digests.add(plan.write(tmp_path / f"{size}.gguf", no_progress).digest)
    assert len(list((tmp_path / "20KB").glob("*.safetensors"))) > 1
    assert len(digests) == 1


def test_metadata_say_what_the_configuration_says(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 123456.0}
    directory = tiny_llama(tmp_path / "model", rope_parameters=rope, rms_norm_eps=3e-5)
    reader = convert(directory, tmp_path / "file.gguf", "q4_K_M")
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.sampling.temp": pytest.approx(0.7),
        "general.sampling.top_p": pytest.approx(0.9),
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(3e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 123456.0,
        "llama.rope.scaling.type": None,
        "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": None,
        "tokenizer.ggml.add_eos_token": None,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {key: field(reader, key) for key in expected} == expected
    tokens, kinds = (field(reader, f"tokenizer.ggml.{k}") for k in ("tokens", "token_type"))
    vocabulary = tiny_tokenizer().get_vocab()
    assert {token: number for number, token in enumerate(tokens)} == vocabulary
    assert kinds == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 317


def test_the_chat_template_can_be_left_out(tmp_path: Path, tiny: Path) -> None:
    with_template = convert(tiny, tmp_path / "with.gguf")
    without = convert(tiny, tmp_path / "without.gguf", chat_template=False)
    assert with_template.fields.keys() - without.fields.keys() == {"tokenizer.chat_template"}


def test_a_template_file_goes_before_the_one_in_the_tokenizer_configuration(
    tmp_path: Path, tiny: Path
) -> None:
    (tiny / "chat_template.jinja").write_text("from the file")
    edit(tiny, "tokenizer_config.json", chat_template="from the configuration")
    reader = convert(tiny, tmp_path / "file.gguf")
    assert field(reader, "tokenizer.chat_template") == "from the file"
    (tiny / "chat_template.jinja").unlink()
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    edit(tiny, "tokenizer_config.json", chat_template=named)
    reader = convert(tiny, tmp_path / "file.gguf")
    assert field(reader, "tokenizer.chat_template") == "plain"
    assert field(reader, "tokenizer.chat_template.tool_use") == "tools"
    assert field(reader, "tokenizer.chat_templates") == ["tool_use"]


@pytest.mark.parametrize("said", [True, False])
def test_whether_a_text_begins_with_bos_is_what_the_tokenizer_configuration_says(
    tmp_path: Path, tiny: Path, said: bool
) -> None:
    edit(tiny, "tokenizer_config.json", add_bos_token=said)
    reader = convert(tiny, tmp_path / "file.gguf")
    assert field(reader, "tokenizer.ggml.add_bos_token") is said


def test_a_tokenizer_that_adds_bos_by_itself_is_told_so(tmp_path: Path, tiny: Path) -> None:
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    single = [start, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    processor = {"type": "TemplateProcessing", "single": single, "pair": single}
    edit(tiny, "tokenizer.json", post_processor=processor | {"special_tokens": ids})
    reader = convert(tiny, tmp_path / "file.gguf")
    assert field(reader, "tokenizer.ggml.add_bos_token") is True


@pytest.mark.parametrize("version", [4, 5])
def test_rope_is_found_where_either_major_version_of_transformers_puts_it(
    tmp_path: Path, tiny: Path, version: int
) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    if version == 5:
        edit(tiny, "config.json", rope_parameters=scaling | {"rope_theta": 5e5})
    else:
        scaling = {"type": "linear", "factor": 4.0}
        edit(tiny, "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    reader = convert(tiny, tmp_path / "file.gguf")
    assert field(reader, "llama.rope.freq_base") == 5e5
    assert field(reader, "llama.rope.scaling.type") == "linear"
    assert field(reader, "llama.rope.scaling.factor") == 4.0


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_llama_3_rope_factors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    directory = tiny_llama(tmp_path / "model", rope_parameters=LLAMA3_ROPE)
    got = values(convert(directory, tmp_path / "file.gguf", "q8_0"))["rope_freqs.weight"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig.from_pretrained(directory), "cpu")
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain.numpy() / got, scaled.numpy(), rtol=1e-6)
    assert got.min() == 1.0
    assert got.max() == 8.0


def test_mistral_is_the_same_network_and_its_window_is_left_out(tmp_path: Path, tiny: Path) -> None:
    llama = values(convert(tiny, tmp_path / "llama.gguf"))
    edit(tiny, "config.json", architectures=["MistralForCausalLM"], model_type="mistral")
    for window in (None, 128):
        config = json.loads((tiny / "config.json").read_text()) | {"sliding_window": window}
        (tiny / "config.json").write_text(json.dumps(config))
        reader = convert(tiny, tmp_path / "mistral.gguf")
        assert values(reader).keys() == llama.keys()
        assert field(reader, "llama.attention.sliding_window") is None


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["NoSuchModel"]}, UnsupportedArchitectureError, "LlamaForCausalLM"),
        ({"architectures": None}, UnsupportedArchitectureError, "LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, UnsupportedArchitectureError, "gelu"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            UnsupportedArchitectureError,
            "'dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, MalformedError, "factor"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 1e4}},
            UnsupportedArchitectureError,
            "partial",
        ),
        ({"vocab_size": 321}, MalformedError, r"shape \(320, 64\).*\(321, 64\)"),
        ({"num_hidden_layers": 3}, MalformedError, "lacks the tensors"),
        ({"num_hidden_layers": 1}, UnsupportedArchitectureError, "no place for"),
        ({"num_hidden_layers": "2"}, MalformedError, "num_hidden_layers"),
    ],
)
def test_a_configuration_that_cannot_be_converted_exactly_is_refused(
    tiny: Path, changes: dict, error: type[Exception], message: str
) -> None:
    edit(tiny, "config.json", **changes)
    with pytest.raises(error, match=message):
        _gguf.plan(source(tiny), "q8_0", name="tiny", chat_template=True)


def test_an_unknown_pre_tokenizer_is_refused(tiny: Path) -> None:
    unknown = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}
    edit(tiny, "tokenizer.json", pre_tokenizer=unknown)
    with pytest.raises(UnsupportedError, match="Whitespace"):
        _gguf.plan(source(tiny), "no_quantization", name="tiny", chat_template=True)


def test_a_model_without_a_tokenizer_or_an_end_of_text_token_is_refused(tiny: Path) -> None:
    edit(tiny, "config.json", eos_token_id=None)
    edit(tiny, "tokenizer_config.json", eos_token=None)
    with pytest.raises(MalformedError, match="eos_token"):
        _gguf.plan(source(tiny), "no_quantization", name="tiny", chat_template=True)
    (tiny / "tokenizer.json").unlink()
    with pytest.raises(MalformedError, match=r"tokenizer\.json"):
        _gguf.plan(source(tiny), "no_quantization", name="tiny", chat_template=True)


def test_a_mode_that_does_not_exist_is_refused(tiny: Path) -> None:
    with pytest.raises(UnsupportedQuantizationError, match="q3_K"):
        _gguf.plan(source(tiny), "q3_K", name="tiny", chat_template=True)


def test_every_mode_has_one_row_in_the_table_of_modes() -> None:
    assert tuple(MODES) == QUANTIZATIONS


FAMILY_FILE = """
from customized_models.gguf.families.llama import Llama
from customized_models.gguf.family import register


@register("NewcomerForCausalLM")
class Newcomer(Llama):
    names = {**Llama.names, "model.final_norm": "output_norm"}
"""


def test_a_family_is_added_by_one_file(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = values(convert(tiny, tmp_path / "before.gguf"))
    edit(tiny, "config.json", architectures=["NewcomerForCausalLM"])
    tensors = Checkpoint.open(tiny)
    renamed = {name: tensors.read(name) for name in tensors.infos}
    renamed["model.final_norm.weight"] = renamed.pop("model.norm.weight")
    for path in tiny.glob("*.safetensors*"):
        path.unlink()
    save_file(renamed, tiny / "model.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match="LlamaForCausalLM"):
        _gguf.check_architecture({"architectures": ["NewcomerForCausalLM"]})
    (tmp_path / "newcomer.py").write_text(FAMILY_FILE)
    monkeypatch.setitem(registered(), "NewcomerForCausalLM", None)  # and gone after the test
    runpy.run_path(str(tmp_path / "newcomer.py"))
    _gguf.check_architecture({"architectures": ["NewcomerForCausalLM"]})
    after = values(convert(tiny, tmp_path / "after.gguf"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_without_the_wheel_only_quantizing_is_refused(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"customized-models\[gguf\]"):
        _gguf.plan(source(tiny), "q8_0", name="tiny", chat_template=True)
    convert(tiny, tmp_path / "file.gguf")


class Changed:
    """A source whose `name` is read as something else."""

    def __init__(self, tensors: Checkpoint, name: str, change: object) -> None:
        self.infos, self._tensors, self._name, self._change = tensors.infos, tensors, name, change

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors.read(name)
        return self._change(tensor) if name == self._name else tensor


@pytest.mark.parametrize("mode", ["no_quantization", "q4_K_M"])
@pytest.mark.parametrize("place", [(0, 0), (9, 11), (-1, -1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_and_leaves_no_file(
    tmp_path: Path, tiny: Path, mode: str, place: tuple[int, int], value: float
) -> None:
    def spoilt(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    name = "model.layers.1.self_attn.k_proj.weight"
    good = source(tiny)
    bad = ModelSource(good.files, Changed(good.tensors, name, spoilt))
    plan = _gguf.plan(bad, mode, name="tiny", chat_template=True)
    with pytest.raises(NonFiniteError, match=name):
        plan.write(tmp_path / "file.gguf", no_progress)
    assert not (tmp_path / "file.gguf").exists()


def test_a_value_too_large_for_the_fallback_type_is_refused(tmp_path: Path) -> None:
    directory = tiny_llama(tmp_path / "model", **ODD)
    good, name = source(directory), "model.layers.0.mlp.down_proj.weight"
    bad = ModelSource(good.files, Changed(good.tensors, name, lambda t: t.fill_(1e5)))
    plan = _gguf.plan(bad, "q4_K_M", name="tiny", chat_template=True)
    with pytest.raises(NonFiniteError, match="does not fit into F16"):
        plan.write(tmp_path / "file.gguf", no_progress)


def test_values_whose_scale_is_too_large_for_a_type_are_refused(tmp_path: Path, wide: Path) -> None:
    good, name = source(wide), "model.layers.0.mlp.down_proj.weight"
    for mode, kind, value in (("q8_0", "Q8_0", 1e7), ("q4_K_M", "Q6_K", 1e10)):
        bad = ModelSource(
            good.files, Changed(good.tensors, name, partial(torch.fill_, value=value))
        )
        plan = _gguf.plan(bad, mode, name="tiny", chat_template=True)
        with pytest.raises(NonFiniteError, match=f"does not fit into {kind}"):
            plan.write(tmp_path / "file.gguf", no_progress)


def test_a_tensor_that_changed_since_the_plan_is_refused(tmp_path: Path, tiny: Path) -> None:
    good, name = source(tiny), "model.norm.weight"
    bad = ModelSource(good.files, Changed(good.tensors, name, lambda t: t.half()))
    plan = _gguf.plan(bad, "no_quantization", name="tiny", chat_template=True)
    with pytest.raises(IntegrityError, match=name):
        plan.write(tmp_path / "file.gguf", no_progress)


def test_cancelling_leaves_no_file(tmp_path: Path, tiny: Path) -> None:
    def cancel(phase: str, done: int, total: int) -> None:
        if done > total // 2:
            raise JobCancelled("enough")

    plan = _gguf.plan(source(tiny), "q8_0", name="tiny", chat_template=True)
    with pytest.raises(JobCancelled):
        plan.write(tmp_path / "file.gguf", cancel)
    assert not (tmp_path / "file.gguf").exists()


def test_planning_imports_the_checker_alone() -> None:
    code = (
        "import sys; from customized_models import gguf as _gguf;"
        "_gguf.check_architecture({'architectures': ['LlamaForCausalLM']});"
        "print({'torch', 'gguf', 'numpy', 'tokenizers', 'xllamacpp'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# What llama.cpp itself makes of the files. It runs in a process of its own, one server a file.

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

results = []
for path, prompt, texts in json.load(sys.stdin):
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.warmup, params.port = 512, 1, False, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    done = ask(server, "/completion", prompt=prompt, n_predict=16, temperature=0, top_k=1,
               return_tokens=True, cache_prompt=False)
    ids = [ask(server, "/tokenize", content=t, add_special=True)["tokens"] for t in texts]
    results.append([done["tokens"], ids])
print("RESULT" + json.dumps(results))
"""

PROMPT = [1, 40, 77, 200, 31, 5, 300, 12, 90, 64, 7, 150]


def served(jobs: list[tuple[Path, list[int], list[str]]]) -> list[list]:
    """What a llama.cpp server answers for each file: greedy tokens, and texts as tokens."""
    request = json.dumps([[str(path), prompt, texts] for path, prompt, texts in jobs])
    run = subprocess.run(
        [sys.executable, "-c", SERVE], input=request, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.split("RESULT")[-1])


def greedy(model: torch.nn.Module) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
            max_new_tokens=16,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=[0, 2],  # llama.cpp also ends at <|endoftext|>, by its text
        )
    return out[0, len(PROMPT) :].tolist()


SHAPES = {
    "grouped": {},
    "tied": {"tied": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 4},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3_ROPE},
}


def test_llama_cpp_continues_a_text_exactly_as_transformers_does(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    jobs, expected, scrambled = [], [], []
    for shape, options in SHAPES.items():
        directory = tiny_llama(
            tmp_path / shape, dtype="float32", **{"initializer_range": 0.3} | options
        )
        jobs.append((tmp_path / f"{shape}.gguf", PROMPT, []))
        convert(directory, jobs[-1][0])
        model = AutoModelForCausalLM.from_pretrained(directory)
        expected.append(greedy(model))
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight"):  # as if the file's rows had kept their order
                weight.data = pairs_of_halves(weight.shape[0] // 4).apply(weight.data)
        scrambled.append(greedy(model))
    answers = served(jobs)
    assert all(len(tokens) >= 5 for tokens in expected)
    assert [tokens for tokens, _ in answers] == expected
    assert all(right != wrong for right, wrong in zip(expected, scrambled, strict=True))


WORDS = 400
TEXTS = [
    "Hello, world! It's 1234 o'clock;  we'll SEE what they'VE got.\n\n\tdef f(x):\n        pass\n",
    "na\u00efve \u65e5\u672c\u8a9e 42\u00bd \u0661\u0662 \U0001f999\u200d\u2642 ...!?\r\n  end ",
    "<|im_start|>user\nWhat is 3.14?<|im_end|>",
]


def split_by(directory: Path, entry: dict) -> None:
    """Give a model a vocabulary whose merges run across every cut, and a pre-tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([*(text[i:] for text in TEXTS for i in range(9))], trainer)
    document = json.loads((directory / "tokenizer.json").read_text())
    document["model"] = json.loads(trained.to_str())["model"]
    document["model"]["ignore_merges"] = entry["ignore_merges"]
    for key in ("pre_tokenizer", "normalizer"):
        document[key] = entry[key]
    (directory / "tokenizer.json").write_text(json.dumps(document))


def test_llama_cpp_splits_text_as_every_known_pre_tokenizer_does(tmp_path: Path) -> None:
    import tokenizers

    tiny_llama(tmp_path / "model", dtype="float32", vocab_size=WORDS)
    table = json.loads((Path(_gguf.__file__).parent / "pre_tokenizers.json").read_bytes())
    jobs, expected = [], []
    for entry in table["structures"]:
        directory = tmp_path / entry["pre"]
        shutil.copytree(tmp_path / "model", directory)
        split_by(directory, entry)
        reader = convert(directory, tmp_path / f"{entry['pre']}.gguf")
        assert field(reader, "tokenizer.ggml.pre") == entry["pre"]
        jobs.append((tmp_path / f"{entry['pre']}.gguf", PROMPT, TEXTS))
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        expected.append([backend.encode(text).ids for text in TEXTS])
    assert len({json.dumps(ids) for ids in expected}) == len(expected)
    assert [ids for _, ids in served(jobs)] == expected


def varint(number: int) -> bytes:
    low = b""
    while number > 127:
        low += bytes([number & 127 | 128])
        number >>= 7
    return low + bytes([number])


def message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def sentencepiece_model(
    pieces: list[tuple[str, float, int]], *, kind: int = 2, remove_extra_spaces: int = 0
) -> bytes:
    """A `tokenizer.model` as the SentencePiece library writes it, in its protocol buffer."""
    data = b""
    for text, score, type_ in pieces:
        body = message(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        data += message(1, body + b"\x18" + varint(type_))
    data += message(2, b"\x18" + varint(kind))  # TrainerSpec.model_type
    # NormalizerSpec: name, add_dummy_prefix, remove_extra_whitespaces
    spec = message(1, b"identity") + b"\x18\x01\x20" + varint(remove_extra_spaces)
    return data + message(3, spec)


PIECES = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("bc", -1.0, 1), ("ab", -2.0, 1), ("abc", -3.0, 1), ("\u2581ab", -4.0, 1),
    ("\u2581", -5.0, 1), ("a", -6.0, 1), ("b", -7.0, 1), ("c", -8.0, 1),
]  # fmt: skip


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    directory = tiny_llama(tmp_path / "tiny", dtype="float32", tokenizer=False)
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(PIECES))
    added = {"267": {"content": "<|im_end|>", "special": True}}
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    settings = json.dumps(names | {"added_tokens_decoder": added})
    (directory / "tokenizer_config.json").write_text(settings)
    return directory


def test_a_sentencepiece_vocabulary_keeps_its_scores_and_splits_by_them(
    tmp_path: Path, sentencepiece: Path
) -> None:
    reader = convert(sentencepiece, tmp_path / "file.gguf")
    assert field(reader, "tokenizer.ggml.model") == "llama"
    assert field(reader, "tokenizer.ggml.add_space_prefix") is None  # it is put by itself
    tokens, scores, kinds = (
        field(reader, f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")
    )
    assert tokens[:267] == [text for text, _, _ in PIECES]
    assert scores[:267] == [score for _, score, _ in PIECES]
    assert kinds[:267] == [type_ for _, _, type_ in PIECES]
    assert tokens[267:269] == ["<|im_end|>", "[PAD268]"]
    assert kinds[267:] == [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * 52
    ids = {text: number for number, text in enumerate(tokens)}
    # "bc" goes before "ab" by score; a space is put in front; "d" falls apart into its byte.
    expected = ["<s>", "\u2581", "abc", "\u2581ab", "<0x64>", "<|im_end|>"]
    ((_, answers),) = served([(tmp_path / "file.gguf", PROMPT[:1], ["abc abd<|im_end|>"])])
    assert answers == [[ids[token] for token in expected]]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (sentencepiece_model(PIECES, kind=1), UnsupportedError, "no BPE"),
        (sentencepiece_model(PIECES, remove_extra_spaces=1), UnsupportedError, "extra spaces"),
        (sentencepiece_model(PIECES)[:-1], MalformedError, "no SentencePiece model"),
        (sentencepiece_model(PIECES * 2), MalformedError, "the model has 320"),
        (b"\xff" * 32, MalformedError, "no SentencePiece model"),
    ],
)
def test_a_sentencepiece_file_that_llama_cpp_would_read_otherwise_is_refused(
    sentencepiece: Path, data: bytes, error: type[Exception], message: str
) -> None:
    (sentencepiece / "tokenizer.model").write_bytes(data)
    with pytest.raises(error, match=message):
        _gguf.plan(source(sentencepiece), "no_quantization", name="tiny", chat_template=True)


def test_a_sentencepiece_file_that_disagrees_with_tokenizer_json_is_refused(
    sentencepiece: Path,
) -> None:
    tiny_tokenizer().save_pretrained(sentencepiece)
    with pytest.raises(MalformedError, match=r"tokenizer\.json has not"):
        _gguf.plan(source(sentencepiece), "no_quantization", name="tiny", chat_template=True)
