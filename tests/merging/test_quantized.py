"""Quantized bases: dequantized as transformers does it, or refused by name with the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from customized_models.adapters.intake import WEIGHTS
from customized_models.errors import MalformedError, UnsupportedBaseError
from customized_models.files.reading import json_object
from customized_models.files.safetensors import SINGLE, Checkpoint
from customized_models.merging.base_formats import (
    HINT,
    QUANTIZATION_METHODS,
    dequantized_from,
    refuse_base,
    refuse_unreadable_codes,
)
from customized_models.testing import tiny_llama, tiny_lora
from customized_models.testing.tiny_models import tiny_adapter
from tests.merging.parity import assert_parity, opened, written
from tests.merging.quantized import (
    DEEPSEEK,
    FP4,
    GPT_OSS,
    dequantized_reference,
    fp8,
    fp8_tensors,
    loaded,
    mxfp4,
    quantized,
    state_quantization,
    tiny_deepseek,
    tiny_gpt_oss,
    tiny_qwen3_moe,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# The unquantized model by size of its shards, and what is quantized of it.
KINDS: dict[str, tuple[Callable[[Path, str], Path], Callable[[Path, Path], Path]]] = {
    "fp8": (lambda d, size: tiny_llama(d, tokenizer=False, shard_size=size), fp8),
    "fp8, tied": (
        lambda d, size: tiny_llama(d, tokenizer=False, shard_size=size, tied=True),
        fp8,
    ),
    "fp8, scales in bfloat16": (
        lambda d, size: tiny_llama(d, tokenizer=False, shard_size=size),
        lambda base, d: fp8(base, d, scales=torch.bfloat16),
    ),
    "fp8, float16": (
        lambda d, size: tiny_llama(d, tokenizer=False, shard_size=size, dtype="float16"),
        fp8,
    ),
    "fp8, blocks larger than some weights": (
        lambda d, size: tiny_llama(d, tokenizer=False, shard_size=size, intermediate_size=128),
        lambda base, d: fp8(base, d, block=(128, 64)),
    ),
    "fp8, one scale a weight": (
        lambda d, size: tiny_llama(d, tokenizer=False, shard_size=size),
        lambda base, d: fp8(base, d, block=None, activation_scheme="static"),
    ),
    "fp8, some modules not": (
        lambda d, size: tiny_llama(d, tokenizer=False, shard_size=size),
        lambda base, d: fp8(
            base,
            d,
            skip=("v_proj",),
            modules_to_not_convert=["lm_head", "model.layers.0.self_attn.v_proj"],
        ),
    ),
    "fp8 mixture": (tiny_qwen3_moe, fp8),
    "fp8 DeepSeek": (tiny_deepseek, fp8),
    "mxfp4": (tiny_gpt_oss, mxfp4),
}
SHARDED, WHOLE = "40KB", "1GB"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """Makes an unquantized and a quantized model of a kind, each once: read them only."""
    made: dict[tuple[str, str], tuple[Path, Path]] = {}

    def make(kind: str, size: str = SHARDED) -> tuple[Path, Path]:
        if (kind, size) not in made:
            directory = tmp_path_factory.mktemp("models")
            build, quantize = KINDS[kind]
            base = build(directory / "base", size)
            made[kind, size] = base, quantize(base, directory / "quantized")
        return made[kind, size]

    return make


# What transformers does, which the merge is compared with


@pytest.mark.parametrize("size", [SHARDED, WHOLE])
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_dequantizes_it_to_nearly_what_it_was(
    kind: str, size: str, models: Callable[..., tuple[Path, Path]]
) -> None:
    base, directory = models(kind, size)
    assert (directory / SINGLE).exists() == (size == WHOLE)
    before, after = loaded(base), loaded(directory)
    assert [*before] == [*after]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    step = 1 / 3 if kind == "mxfp4" else 1 / 25  # half of the largest one, of the largest value
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        far = (after[name].float() - tensor.float()).abs().max()
        assert far <= tensor.float().abs().max() * step, name


def test_a_weight_in_fp8_is_its_codes_times_the_scales_of_their_blocks(
    models: Callable[..., tuple[Path, Path]],
) -> None:
    _, directory = models("fp8")
    checkpoint, weights = Checkpoint.open(directory), loaded(directory)
    names = [name for name, info in checkpoint.infos.items() if info.dtype == "F8_E4M3"]
    assert len(names) == 14
    for name in names:
        scales = checkpoint.read(f"{name}_scale_inv")
        factors = scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
        product = checkpoint.read(name).float() * factors
        assert torch.equal(weights[name], product.bfloat16())


def test_an_expert_in_mxfp4_is_its_codes_times_a_power_of_two(
    models: Callable[..., tuple[Path, Path]],
) -> None:
    _, directory = models("mxfp4")
    checkpoint, weights = Checkpoint.open(directory), loaded(directory)
    names = [name for name in checkpoint.infos if name.endswith("_blocks")]
    assert len(names) == 4
    for name in names:
        packed = checkpoint.read(name).long()
        codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
        values = torch.cat([FP4, -FP4])[codes]
        exponents = checkpoint.read(name.replace("_blocks", "_scales")).float() - 127
        product = (values * torch.exp2(exponents)[..., None]).flatten(-2).transpose(1, 2)
        assert torch.equal(weights[name.removesuffix("_blocks")], product.bfloat16())


@pytest.mark.parametrize("kind", ["fp8", "fp8 mixture", "mxfp4"])
def test_a_quantized_checkpoint_is_the_same_on_every_run(
    kind: str, models: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    base, directory = models(kind)
    again = KINDS[kind][1](base, tmp_path / "again")
    for path in directory.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_transformers_misplaces_blocks_where_a_weight_is_not_whole_blocks(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False, intermediate_size=48)
    directory = fp8(base, tmp_path / "quantized")
    name = "model.layers.0.mlp.up_proj.weight"  # 48 rows, of which transformers makes 24 and 24
    checkpoint = Checkpoint.open(directory)
    factors = checkpoint.read(f"{name}_scale_inv").repeat_interleave(32, 0)[:48]
    product = checkpoint.read(name).float() * factors.repeat_interleave(32, 1)
    assert not torch.equal(loaded(directory)[name], product.bfloat16())


# The merge

LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention and MLP": ("fp8", {"target_modules": ["q_proj", "down_proj"]}),
    "all linear layers": ("fp8", {"target_modules": "all-linear"}),
    "DoRA": ("fp8", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "a tied model": ("fp8, tied", {"target_modules": ["q_proj", "down_proj"]}),
    "a head": ("fp8", {"target_modules": ["q_proj", "lm_head"]}),
    "a saved head": ("fp8", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "scales in bfloat16": ("fp8, scales in bfloat16", {"target_modules": ["q_proj"]}),
    "float16": ("fp8, float16", {"target_modules": ["q_proj"]}),
    "large blocks": ("fp8, blocks larger than some weights", {"target_modules": ["q_proj"]}),
    "one scale a weight": ("fp8, one scale a weight", {"target_modules": ["q_proj"]}),
    "of modules that are not quantized": ("fp8, some modules not", {"target_modules": ["v_proj"]}),
    "attention of a mixture": ("fp8 mixture", {"target_modules": ["q_proj", "o_proj"]}),
    "experts of a mixture": (
        "fp8 mixture",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "attention of DeepSeek": ("fp8 DeepSeek", {"target_modules": ["q_b_proj", "o_proj"]}),
    "experts of DeepSeek": (
        "fp8 DeepSeek",
        {"target_modules": ["q_b_proj"], "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "attention of gpt-oss": ("mxfp4", {"target_modules": ["q_proj", "o_proj"]}),
    "experts of gpt-oss": (
        "mxfp4",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


@pytest.mark.parametrize("size", [SHARDED, WHOLE])
@pytest.mark.parametrize("kind", LORAS)
def test_merging_into_a_quantized_base_gives_a_16_bit_model_with_the_bits_of_peft(
    kind: str, size: str, models: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    model, options = LORAS[kind]
    _, base = models(model, size)
    adapter = tiny_adapter(tmp_path / "adapter", base, LoraConfig(r=4, **options))
    out = written(base, adapter, tmp_path)
    assert "quantization_config" not in json_object(out / "config.json")
    infos = Checkpoint.open(out).infos
    assert {info.dtype for info in infos.values()} <= {"BF16", "F16", "F32"}
    assert not [name for name in infos if name.endswith(("_scale_inv", "_scales", "_blocks"))]
    expected, merged = dequantized_reference(base, adapter), loaded(out)
    assert [*merged] == [*expected]
    for name, tensor in expected.items():
        assert merged[name].dtype == tensor.dtype
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("kind", ["fp8", "fp8 mixture", "mxfp4"])
def test_the_recipe_says_what_the_base_was_dequantized_from(
    kind: str, models: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    original, base = models(kind)
    adapter = tiny_lora(tmp_path / "adapter", original, target_modules=["q_proj"])
    method = json_object(base / "config.json")["quantization_config"]["quant_method"]
    assert opened(base, adapter, tmp_path / "1").recipe["base"] == f"dequantized from {method}"
    assert opened(original, adapter, tmp_path / "2").recipe["base"] == "as stored"


def test_quantized_tensors_that_the_model_class_ignores_do_not_stay_quantized(
    models: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    _, model = models("fp8", WHOLE)
    base = shutil.copytree(model, tmp_path / "base")
    tensors = load_file(base / SINGLE)
    for suffix in ("weight", "weight_scale_inv"):
        of = tensors[f"model.layers.0.self_attn.q_proj.{suffix}"]
        tensors[f"mtp.q_proj.{suffix}"] = of.clone()
    save_file(tensors, base / SINGLE, metadata={"format": "pt"})
    adapter = tiny_lora(tmp_path / "adapter", model, target_modules=["o_proj"])
    out = Checkpoint.open(written(base, adapter, tmp_path))
    assert "mtp.q_proj.weight_scale_inv" not in out.infos
    if "mtp.q_proj.weight" in out.infos:
        expected = out.read("model.layers.0.self_attn.q_proj.weight")
        assert torch.equal(out.read("mtp.q_proj.weight"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_qlora_adapter_merges_onto_the_16_bit_base_with_the_bits_of_peft(
    dtype: torch.dtype, models: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Trained on quantized weights, it is like any other: PEFT notes nothing about them."""
    original, base = models("fp8")
    options = {"target_modules": "all-linear", "lora_alpha": 16}
    adapter = tiny_lora(tmp_path / "adapter", base, **options)
    plain = tiny_lora(tmp_path / "plain", original, **options)
    config = json_object(adapter / "adapter_config.json")
    assert config.keys() == json_object(plain / "adapter_config.json").keys()
    assert not [key for key in config if "quant" in key and key != "use_qalora" and config[key]]
    tensors = {name: t.to(dtype) for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    assert_parity(original, adapter, tmp_path, 14)


# Refusals by name

BNB_4BIT = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes, 4 bits": (BNB_4BIT, "bitsandbytes in 4 bits"),
    "bitsandbytes, 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
        "bitsandbytes in 8 bits",
    ),
    "bitsandbytes without its name": ({"load_in_8bit": True}, "bitsandbytes in 8 bits"),
    "GPTQ": ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, "GPTQ"),
    "AWQ": ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, "AWQ"),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}},
        "compressed-tensors",
    ),
    "ModelOpt": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
        "ModelOpt",
    ),
    "no name": ({"quant_algo": "NVFP4"}, "names no method"),
    "a later one": ({"quant_method": "fp2"}, "does not know the method"),
    "a list": ({"quant_method": ["fp8"]}, "does not know the method"),
    "packed experts": (DEEPSEEK | {"expert_dtype": "fp4"}, "expert_dtype"),
    "quantized embeddings": (DEEPSEEK | {"modules_to_convert": ["embed_tokens"]}, "modules_to_con"),
    "an unknown switch": (GPT_OSS | {"rotated": True}, "rotated"),
    "an unknown scheme": (DEEPSEEK | {"activation_scheme": "random"}, "activation_scheme"),
} | {
    method: ({"quant_method": method}, row.label)
    for method, row in QUANTIZATION_METHODS.items()
    if row.refused and not method.startswith("bitsandbytes")
}  # fmt: skip


def named(directory: Path, value: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    state_quantization(directory, value)
    return directory


@pytest.mark.parametrize("case", REFUSED)
def test_a_base_that_is_not_dequantized_is_refused_by_its_method(case: str, tmp_path: Path) -> None:
    stated, name = REFUSED[case]
    with pytest.raises(UnsupportedBaseError) as caught:
        refuse_base(named(tmp_path, stated))
    assert name in str(caught.value)
    assert "quantization_config" in str(caught.value)
    assert case == "an unknown scheme" or HINT in str(caught.value)
    assert ("QLoRA adapters fit it unchanged" in str(caught.value)) == ("bitsandbytes" in name)


@pytest.mark.upstream
def test_every_method_of_transformers_is_dequantized_here_or_refused_with_its_reason() -> None:
    assert AUTO_QUANTIZATION_CONFIG_MAPPING.keys() <= QUANTIZATION_METHODS.keys()


@pytest.mark.parametrize("value", ["fp8", ["fp8"], 4])
def test_a_quantization_that_is_no_object_is_malformed(value: object, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="quantization_config"):
        refuse_base(named(tmp_path, value))


@pytest.mark.parametrize("block", [[128], [0, 128], ["128", 128], [128.0, 128], 128, [True, 1]])
def test_blocks_that_are_not_two_sizes_are_malformed(block: object, tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="weight_block_size"):
        refuse_base(named(tmp_path, DEEPSEEK | {"weight_block_size": block}))


def test_a_quantization_of_the_text_model_alone_is_refused(tmp_path: Path) -> None:
    directory = named(tmp_path, None)
    document = {"model_type": "gemma3", "text_config": {"quantization_config": DEEPSEEK}}
    (directory / "config.json").write_text(json.dumps(document))
    with pytest.raises(UnsupportedBaseError, match="text_config"):
        refuse_base(directory)


def test_a_quantization_that_only_modelopt_speaks_of_is_refused(tmp_path: Path) -> None:
    directory = named(tmp_path, None)
    refuse_base(directory)
    (directory / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UnsupportedBaseError, match=r"hf_quant_config.*ModelOpt"):
        refuse_base(directory)


@pytest.mark.parametrize(
    ("stated", "method"),
    [
        (None, None),
        ({}, None),
        (DEEPSEEK | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}, "fp8"),
        (DEEPSEEK | {"weight_block_size": None, "activation_scheme": "static"}, "fp8"),
        (DEEPSEEK | {"modules_to_not_convert": ["lm_head"], "expert_dtype": None}, "fp8"),
        (GPT_OSS, "mxfp4"),
    ],
)
def test_the_method_of_a_base_that_is_dequantized_is_told(
    stated: object, method: str | None
) -> None:
    assert dequantized_from({"model_type": "llama", "quantization_config": stated}) == method


def check(directory: Path) -> None:
    refuse_unreadable_codes(
        json_object(directory / "config.json"), Checkpoint.open(directory).infos
    )


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_transformers_reads_right_are_not_refused(
    kind: str, models: Callable[..., tuple[Path, Path]]
) -> None:
    original, directory = models(kind)
    check(directory)
    check(original)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SCALES = f"{Q_PROJ}_scale_inv"
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def without(name: str) -> Change:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def renamed(name: str, to: str) -> Change:
    return lambda tensors: {to if n == name else n: t for n, t in tensors.items()}


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


ODD: dict[str, tuple[str, Change, str]] = {
    "no scales": ("fp8", without(SCALES), "no weight_scale_inv"),
    "scales of another name": (
        "fp8",
        renamed(SCALES, SCALES.removesuffix("_inv")),
        "no weight_scale_inv",
    ),
    "scales of two names": (
        "fp8",
        lambda t: t | {SCALES.replace("weight_scale_inv", "scale"): t[SCALES].clone()},
        "no weight_scale_inv",
    ),
    "codes of another name": ("fp8", renamed(Q_PROJ, Q_PROJ + "s"), "no weight_scale_inv"),
    "scales in codes": ("fp8", replaced(SCALES, lambda t: t.to(torch.int32)), "scales are I32"),
    "fewer scales": ("fp8", replaced(SCALES, lambda t: t[:1]), "scales for"),
    "a list of scales": ("fp8", replaced(SCALES, lambda t: t.reshape(-1)), "scales for"),
    "packed codes": ("fp8", replaced(Q_PROJ, lambda t: t.view(torch.int8)), "packed"),
    "a scale for each column": (
        "fp8, one scale a weight",
        replaced(SCALES, lambda t: t.expand(1, 64)),
        "neither one nor one a row",
    ),
    "blocks without scales": ("mxfp4", without(f"{EXPERTS}_scales"), "pair"),
    "scales without blocks": ("mxfp4", without(f"{EXPERTS}_blocks"), "pair"),
    "fewer scales than blocks": (
        "mxfp4",
        replaced(f"{EXPERTS}_scales", lambda t: t[..., :1]),
        "32 values",
    ),
    "attention in eight bits": (
        "mxfp4",
        replaced(Q_PROJ, lambda t: t.to(torch.float8_e4m3fn)),
        "no expert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_codes_that_transformers_reads_wrong_are_refused_by_name(
    case: str, models: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    kind, change, reason = ODD[case]
    _, model = models(kind, WHOLE)
    directory = shutil.copytree(model, tmp_path / "odd")
    save_file(change(load_file(model / SINGLE)), directory / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UnsupportedBaseError) as caught:
        check(directory)
    assert reason in str(caught.value)
    assert "model.layers.0." in str(caught.value)
    assert HINT in str(caught.value)


@pytest.mark.parametrize("intermediate_size", [48, 80])
def test_a_weight_that_is_not_whole_blocks_is_refused(
    intermediate_size: int, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False, intermediate_size=intermediate_size)
    with pytest.raises(UnsupportedBaseError, match=r"mlp.*not whole blocks of \(32, 32\)"):
        check(fp8(base, tmp_path / "quantized"))


def test_a_scale_for_each_row_is_not_refused(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False)

    def quantize(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith("proj.weight"):
            return {name: tensor}
        return fp8_tensors(name, tensor, (1, tensor.shape[1]), torch.float32)

    stated = DEEPSEEK | {"weight_block_size": None}
    directory = quantized(base, tmp_path / "quantized", stated, quantize)
    check(directory)
    before, after = loaded(base), loaded(directory)
    assert all(torch.allclose(after[name], before[name], rtol=0.07, atol=1e-4) for name in before)
