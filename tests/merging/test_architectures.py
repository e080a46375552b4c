"""Every architecture that people train adapters for, merged with the bits of PEFT."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from attrs import evolve
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import SplitModulelist

from customized_models.errors import (
    BaseModelMismatch,
    UnchangedTargetsError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
)
from customized_models.merging.conversion import Conversion, Conversions
from customized_models.merging.layers import AdaptedLayer
from customized_models.merging.strategies import expert_stack
from customized_models.merging.strategies.rows import LoraFactors
from tests.merging.architectures import (
    ARCHITECTURES,
    ATTENTION,
    CAUSAL,
    LATENT_ATTENTION,
    LLAMA_TARGETS,
    MIXTURE,
    Adaptation,
    Architecture,
    adaptations,
    everything_in,
    lora,
    make_adapter,
    make_base,
    make_old_adapter,
    weights_of,
)
from tests.merging.parity import (
    assert_architecture_parity,
    assert_loads_as,
    merged_by_peft,
    opened,
    same_bits,
    write_merged,
    written,
)
from tests.tiny_configs import tiny_config

pytestmark = [
    # PEFT says that it does what is right for a GPT-2 and that it knows no class of norms
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    # it looks for fused experts among the modules, where they are not
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
    # of ties it sees the configuration only
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer:UserWarning"),
]

MakeBase = Callable[..., Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> MakeBase:
    """Makes a tiny model, each kind once."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = (name, *sorted(options.items()))
        if key not in made:
            directory = tmp_path_factory.mktemp("base")
            made[key] = make_base(directory, ARCHITECTURES[name], **options)
        return made[key]

    return make


def assert_parity(
    name: str, base: Path, adaptation: Adaptation, directory: Path, **options: Any
) -> None:
    """The adaptation of a base of the architecture `name` merges as PEFT merges it."""
    architecture = ARCHITECTURES[name]
    adapter = make_adapter(directory / "adapter", base, architecture, adaptation.config())
    assert_architecture_parity(
        base,
        adapter,
        directory,
        architecture.auto_class,
        adaptation.touches,
        **architecture.options,
        **options,
    )


def loaded(name: str, base: Path) -> tuple[Any, dict[str, Any]]:
    architecture = ARCHITECTURES[name]
    model, info = architecture.auto_class.from_pretrained(
        base, dtype="auto", output_loading_info=True, **architecture.options
    )
    return model.state_dict(), info


LAYOUTS = [(name, layout) for name, row in ARCHITECTURES.items() for layout in row.layouts]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_every_layout_of_a_checkpoint_is_the_same_model(
    name: str, layout: str, sharded: bool, bases: MakeBase
) -> None:
    base = bases(name, layout=layout, sharded=sharded)
    assert (len([*base.glob("*.safetensors")]) > 1) == sharded
    tensors, info = loaded(name, base)
    same, _ = loaded(name, bases(name))
    missing = info["missing_keys"]
    assert not missing or ARCHITECTURES[name].saved_by
    assert tensors.keys() == same.keys()
    assert all(same_bits(t, same[n]) for n, t in tensors.items() if n not in missing)


ROWS = [
    (kind, name, layout)
    for name, layout in LAYOUTS
    for kind in adaptations(ARCHITECTURES[name])
    if layout == "saved" or kind in ("LoRA", "experts", "saved module")
]


@pytest.mark.parametrize(("kind", "name", "layout"), ROWS)
def test_merging_gives_the_model_of_peft(
    kind: str, name: str, layout: str, bases: MakeBase, tmp_path: Path
) -> None:
    adaptation = adaptations(ARCHITECTURES[name])[kind]
    assert_parity(name, bases(name, layout=layout), adaptation, tmp_path)


@pytest.mark.parametrize("kind", ["LoRA", "experts"])
@pytest.mark.parametrize("name", ["Mixtral", "DeepSeek-V3"])
def test_merging_into_one_file_gives_the_model_of_peft(
    kind: str, name: str, bases: MakeBase, tmp_path: Path
) -> None:
    adaptation = adaptations(ARCHITECTURES[name])[kind]
    assert_parity(name, bases(name, sharded=False), adaptation, tmp_path)


OF_OTHER_DTYPES = [
    *(("LoRA", name) for name in ["Gemma 2", "LLaVA", "Whisper", "T5", "T5 1.1", "Falcon"]),
    *(("experts", name) for name in ["Mixtral", "DeepSeek-V2", "DeepSeek-V3"]),
    ("saved module", "BERT without a head"),
    ("saved module", "DeepSeek-V3"),
    ("DoRA", "T5"),
]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(("kind", "name"), OF_OTHER_DTYPES)
def test_merging_in_another_dtype_gives_the_model_of_peft(
    kind: str, name: str, dtype: str, bases: MakeBase, tmp_path: Path
) -> None:
    adaptation = adaptations(ARCHITECTURES[name])[kind]
    assert_parity(name, bases(name, dtype=dtype), adaptation, tmp_path)


def test_what_t5_keeps_in_float32_is_written_so_where_it_changes(
    bases: MakeBase, tmp_path: Path
) -> None:
    base = bases("T5", dtype="float16")
    tensors, _ = loaded("T5", base)
    assert {n.split(".")[-2] for n, t in tensors.items() if "float32" in str(t.dtype)} == {"wo"}
    adaptation = lora(ARCHITECTURES["T5"], target_modules=["wo"])
    assert_parity("T5", base, adaptation, tmp_path)


def test_attention_of_torch_is_merged_as_peft_does(bases: MakeBase, tmp_path: Path) -> None:
    name = "LLaVA with SigLIP"
    adaptation = lora(ARCHITECTURES[name], target_modules=["head.attention"])
    touches = r"head\.attention\.(in_proj_weight|out_proj\.weight)$"
    adaptation = Adaptation(adaptation.config, touches)
    assert_parity(name, bases(name), adaptation, tmp_path)


MLP = ["gate_proj", "up_proj", "down_proj"]
FUSED = r"\.experts\.(gate_up|down)_proj$"
ROUTED = rf"{FUSED}|\.gate\.weight$"

# Under transformers 5, PEFT takes the names of a MLP's layers for the experts only
MIXTURES: list[tuple[str, str, Any, str]] = [
    ("a list", "Qwen3-MoE", MLP, FUSED),
    ("a list", "DeepSeek-V2", MLP, FUSED),
    ("a list", "DeepSeek-V3", MLP, FUSED),
    ("an expression", "DeepSeek-V3", r".*shared_experts\.(gate|up|down)_proj", FUSED),
    ("all layers", "Mixtral", "all-linear", rf"{ROUTED}|{weights_of(*ATTENTION)}"),
    ("all layers", "OLMoE", "all-linear", rf"{ROUTED}|{weights_of(*ATTENTION)}"),
    (
        "all layers",
        "DeepSeek-V3",
        "all-linear",
        rf"{ROUTED}|{weights_of('q_a_proj', 'q_b_proj', *LATENT_ATTENTION)}",
    ),
]


@pytest.mark.parametrize(("kind", "name", "targets", "touches"), MIXTURES)
def test_targets_that_peft_takes_for_experts_are_merged_as_peft_does(
    kind: str, name: str, targets: Any, touches: str, bases: MakeBase, tmp_path: Path
) -> None:
    adaptation = Adaptation(lambda: LoraConfig(r=4, target_modules=targets), touches)
    assert_parity(name, bases(name), adaptation, tmp_path)


# Adapters that were saved under transformers 4

OLD_ADAPTERS = {
    "Mixtral": ("q_proj", "v_proj", "gate", "w1", "w2", "w3"),
    "Qwen3-MoE": ("q_proj", "v_proj", "gate", *MLP),
    "OLMoE": MLP,
    "LLaVA": ("q_proj", "down_proj", "fc1"),
    "LLaVA with SigLIP": ("q_proj", "down_proj", "fc1"),
    "Gemma 3": ("q_proj", "down_proj", "fc1"),
}


@pytest.mark.parametrize("layout", ["hub", "memory"])
@pytest.mark.parametrize("name", OLD_ADAPTERS)
def test_an_adapter_of_transformers_4_is_merged_as_peft_does(
    name: str, layout: str, bases: MakeBase, tmp_path: Path
) -> None:
    targets = OLD_ADAPTERS[name]
    adapter = make_old_adapter(tmp_path / "adapter", bases(name, layout="hub"), targets)
    assert_architecture_parity(
        bases(name, layout=layout),
        adapter,
        tmp_path,
        ARCHITECTURES[name].auto_class,
        f"{weights_of(*targets)}|{FUSED}",
    )


@pytest.mark.parametrize(
    ("name", "targets", "lost"),
    [
        ("DeepSeek-V3", ("o_proj", *MLP), "shared_experts|layers.0.mlp"),
        ("Qwen2.5-VL", ("q_proj", "qkv"), "layers"),
        ("GPT-NeoX", ("query_key_value", "embed_out"), "embed_out"),
    ],
)
def test_an_adapter_of_transformers_4_that_peft_would_merge_in_part_is_refused(
    name: str, targets: tuple[str, ...], lost: str, bases: MakeBase, tmp_path: Path
) -> None:
    base = bases(name, layout="hub")
    adapter = make_old_adapter(tmp_path / "adapter", base, targets)
    with pytest.raises((UnmergedTensorsError, BaseModelMismatch), match=lost):
        opened(base, adapter, tmp_path)


@pytest.mark.skipif(not hasattr(transformers, "LagunaConfig"), reason="transformers has no Laguna")
def test_names_of_today_that_a_conversion_would_spoil_are_left_as_they_are(tmp_path: Path) -> None:
    """The pattern for what Laguna's shared experts were called fits today's name as well.

    PEFT leaves out what is spoiled when it reads the file, so here it is given the tensors.
    """
    config = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "head_dim": 8}
    laguna = Architecture(
        CAUSAL,
        lambda: transformers.LagunaConfig(**MIXTURE, **config, num_experts=4),
        LLAMA_TARGETS,
        "lm_head",
    )
    base = make_base(tmp_path / "base", laguna)
    adapter = make_adapter(tmp_path / "adapter", base, laguna, lora(laguna).config())
    trained = peft.get_peft_model(
        laguna.auto_class.from_pretrained(base, dtype="auto"), LoraConfig.from_pretrained(adapter)
    )
    file = load_file(adapter / "adapter_model.safetensors")
    of_model = {re.sub(r"(lora_[AB])", r"\1.default", name): t for name, t in file.items()}
    assert not trained.load_state_dict(of_model, strict=False).unexpected_keys

    out = written(base, adapter, tmp_path)

    assert any("shared_experts.gate_proj" in name for name in file)
    assert_loads_as(out, trained.merge_and_unload().state_dict(), laguna.auto_class)


def test_a_model_that_has_two_configurations_of_texts_merges(tmp_path: Path) -> None:
    """Musicgen's are those of its encoder and of its decoder."""
    musicgen = transformers.MusicgenForConditionalGeneration
    model = musicgen(tiny_config(transformers.MusicgenConfig)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    expected = merged_by_peft(tmp_path / "base", tmp_path / "adapter", musicgen, aligned=True)

    out = written(tmp_path / "base", tmp_path / "adapter", tmp_path)

    assert expected.changed
    assert_loads_as(out, expected.tensors, musicgen)


# The other types of adapters


def other(kind: str, touches: str, **options: Any) -> Adaptation:
    return Adaptation(lambda: getattr(peft, kind)(**options), touches)


def on(kind: str, *modules: str, **options: Any) -> Adaptation:
    """Changes the weights of `modules`."""
    return other(kind, weights_of(*modules), target_modules=[*modules], **options)


def of_norms(*modules: str) -> Adaptation:
    touches = "|".join(map(everything_in, modules))
    return other("LNTuningConfig", touches, target_modules=[*modules])


def of_tokens(module: str, *tied: str) -> Adaptation:
    touches = weights_of(module, *tied)
    return other("TrainableTokensConfig", touches, target_modules=[module], token_indices=[1, 5])


def headed(adaptation: Adaptation, head: str) -> Adaptation:
    """Of a classifier, whose head PEFT saves as well."""

    def config() -> peft.PeftConfig:
        made = adaptation.config()
        made.task_type = "SEQ_CLS"
        return made

    return Adaptation(config, f"{adaptation.touches}|{everything_in(head)}")


IA3, LOHA, OFT = "IA3Config", "LoHaConfig", "OFTConfig"
BLOCKS = {"oft_block_size": 4, "r": 0}

OTHERS: list[tuple[str, str, Adaptation]] = [
    ("IA3", "Mistral", on(IA3, "k_proj", "down_proj", feedforward_modules=["down_proj"])),
    ("LoHa", "Qwen2", on(LOHA, "q_proj", "down_proj", r=4)),
    ("tokens", "Qwen3, tied", of_tokens("embed_tokens")),
    ("norms", "Gemma 2", of_norms("post_feedforward_layernorm")),
    ("HRA", "Gemma 3 text", on("HRAConfig", "q_proj", "down_proj", r=4)),
    ("OFT", "Phi-3", on(OFT, "qkv_proj", "down_proj", **BLOCKS)),
    ("AdaLoRA", "GPT-2", on("AdaLoraConfig", "c_attn", "mlp.c_proj", init_r=4, total_step=10)),
    (
        "IA3",
        "GPT-NeoX",
        other(
            IA3,
            r"query_key_value\.(weight|bias)$|dense_4h_to_h\.weight$",
            target_modules=["query_key_value", "dense_4h_to_h"],
            feedforward_modules=["dense_4h_to_h"],
        ),
    ),
    ("MISS", "Falcon", on("MissConfig", "query_key_value", "dense_4h_to_h", r=4)),
    ("VeRA", "Mixtral", on("VeraConfig", "q_proj", r=4)),
    ("LoHa", "Qwen3-MoE", on(LOHA, "q_proj", "o_proj", r=4)),
    ("OFT", "OLMoE", on(OFT, "q_proj", "o_proj", **BLOCKS)),
    ("AdaLoRA", "DeepSeek-V2", on("AdaLoraConfig", "q_proj", "o_proj", init_r=4, total_step=10)),
    ("MISS", "DeepSeek-V3", on("MissConfig", "q_b_proj", "o_proj", r=4)),
    ("norms", "DeepSeek-V3", of_norms("kv_a_layernorm")),
    ("norms", "Qwen2.5-VL", of_norms("norm2", "q_proj")),
    ("VeRA", "Qwen2.5-VL", on("VeraConfig", "qkv", "q_proj", r=4)),
    ("LoHa", "LLaVA", on(LOHA, "patch_embedding", "q_proj", r=4)),
    ("HRA", "LLaVA", on("HRAConfig", "patch_embedding", "q_proj", r=4)),
    ("OFT", "LLaVA with SigLIP", on(OFT, "patch_embedding", "q_proj", **BLOCKS)),
    ("tokens", "Gemma 3", of_tokens("embed_tokens")),
    ("AdaLoRA", "Whisper", on("AdaLoraConfig", "q_proj", "fc2", init_r=4, total_step=10)),
    ("LoHa", "Whisper", on(LOHA, "conv2", "q_proj", r=4)),
    ("IA3", "T5", on(IA3, "k", "v", "wo", feedforward_modules=["wo"])),
    ("tokens", "T5", of_tokens("shared")),
    # PEFT takes the head for tied, from the class
    ("tokens", "T5 1.1", of_tokens("shared", "lm_head")),
    ("HRA", "T5 1.1", on("HRAConfig", "q", "wo", r=4)),
    ("VeRA", "BERT with a head", headed(on("VeraConfig", "query", r=4), "classifier")),
    ("MISS", "BERT without a head", headed(on("MissConfig", "query", r=4), "classifier")),
    ("LoHa", "BERT with more labels", headed(on(LOHA, "query", r=4), "classifier")),
    ("IA3", "Llama with a score head", headed(
        on(IA3, "k_proj", "down_proj", feedforward_modules=["down_proj"]), "score"
    )),
    ("OFT", "Llama without a score head", headed(on(OFT, "q_proj", **BLOCKS), "score")),
    ("MISS", "Llama", on("MissConfig", "q_proj", r=4)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "name", "adaptation"), OTHERS)
def test_merging_another_type_of_adapter_gives_the_model_of_peft(
    kind: str, name: str, adaptation: Adaptation, bases: MakeBase, tmp_path: Path
) -> None:
    assert_parity(name, bases(name), adaptation, tmp_path)


@pytest.mark.parametrize(("name", "module"), [("T5", "shared"), ("Falcon", "word_embeddings")])
def test_tied_tensors_that_a_checkpoint_has_all_of_stay_alike(
    name: str, module: str, bases: MakeBase, tmp_path: Path
) -> None:
    assert_parity(name, bases(name, layout="hub"), of_tokens(module), tmp_path)


def test_a_conversion_that_transformers_does_not_undo_is_refused(
    bases: MakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = SplitModulelist.convert

    def in_another_order(self: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        experts = split(self, *arguments, **options)
        return dict(zip(experts, reversed(experts.values()), strict=True))

    architecture = ARCHITECTURES["Mixtral"]
    base = bases("Mixtral")
    adaptation = adaptations(architecture)["experts"]
    adapter = make_adapter(tmp_path / "adapter", base, architecture, adaptation.config())
    merge = opened(base, adapter, tmp_path)
    monkeypatch.setattr(SplitModulelist, "convert", in_another_order)
    with pytest.raises(UnsupportedArchitectureError, match=r"does not save .*experts"):
        merge.read(next(name for name in merge.changed if "experts" in name))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("module", ["shared", "lm_head"])
def test_a_change_of_one_of_many_tied_layers_is_refused(
    module: str, bases: MakeBase, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES["T5"]
    base = bases("T5")
    config = lora(architecture, target_modules=[module]).config()
    adapter = make_adapter(tmp_path / "adapter", base, architecture, config)
    with pytest.raises(UnsupportedAdapterError, match=f"{module}.*ties to one another"):
        opened(base, adapter, tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True` and the:UserWarning")
@pytest.mark.parametrize("name", ["Qwen3, tied", "Gemma 3", "GPT-2", "Whisper"])
def test_an_embedding_that_is_changed_parts_from_the_output_layer_it_was_tied_to(
    name: str, bases: MakeBase, tmp_path: Path
) -> None:
    architecture = ARCHITECTURES[name]
    base = shutil.copytree(bases(name), tmp_path / "base")
    if name == "Gemma 3":  # which is tied by what it says outside of the language model alone
        document = json.loads((base / "config.json").read_text())
        document["text_config"]["tie_word_embeddings"] = False
        (base / "config.json").write_text(json.dumps(document | {"tie_word_embeddings": True}))
    model = architecture.auto_class.from_pretrained(base, dtype="auto")
    ((head, embedding),) = model.all_tied_weights_keys.items()
    before = model.state_dict()[head].clone()
    config = lora(architecture, target_modules=[embedding.rpartition(".")[0]]).config()
    adapter = make_adapter(tmp_path / "adapter", base, architecture, config)
    of_peft = merged_by_peft(base, adapter, architecture.auto_class).tensors
    out = write_merged(opened(base, adapter, tmp_path), base, tmp_path / "out")
    loaded = architecture.auto_class.from_pretrained(out, dtype="auto").state_dict()
    document = json.loads((out / "config.json").read_text())
    stated = [document, document.get("text_config", document)]
    assert [config["tie_word_embeddings"] for config in stated] == [False, False]
    assert same_bits(loaded[head], before)
    assert same_bits(loaded[embedding], of_peft[embedding])
    assert not same_bits(loaded[embedding], before)


def test_a_plan_names_the_tensors_of_an_adapter_that_were_saved_under_other_names(
    bases: MakeBase, tmp_path: Path
) -> None:
    base = bases("Mixtral", layout="hub")
    adapter = make_old_adapter(tmp_path / "adapter", base, ("q_proj", "w1", "w2", "w3"))
    merge = opened(base, adapter, tmp_path)
    modules = {name.removesuffix(".weight") for name in merge.changed}
    assert len(modules) == 2 * (1 + 4 * 3)
    for module in modules:
        factors = [f"base_model.model.{module}.lora_{part}.weight" for part in "AB"]
        assert [*merge.sources(f"{module}.weight")] == factors
        by = "expert_blocks" if "experts" in module else "lora_blocks"
        assert merge.strategy(f"{module}.weight").name == by


FIVE = evolve(
    ARCHITECTURES["Mixtral"],
    config=lambda: transformers.MixtralConfig(**MIXTURE, num_local_experts=5),
)


@pytest.fixture
def five_experts(tmp_path: Path) -> tuple[Path, Path]:
    """A base with five experts, and an adapter that changes each."""
    base = make_base(tmp_path / "base", FIVE)
    adaptation = adaptations(FIVE)["experts"]
    return base, make_adapter(tmp_path / "adapter", base, FIVE, adaptation.config())


@pytest.mark.parametrize("suits", ["blocks", "pairs", "nothing"])
def test_experts_are_merged_in_pieces_where_those_give_the_same_bits(
    suits: str, five_experts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_stack, "GROUP_ELEMENTS", 1)  # elements: each pair by itself
    monkeypatch.setattr(expert_stack, "COMPARED", 1)  # numbers: one draw for each shape
    delta, asked = AdaptedLayer.delta_of_experts, []

    def noted(layer: AdaptedLayer, *arguments: Any) -> torch.Tensor:
        start, end, dtype = arguments[2:]
        asked.append((start, end, dtype))
        few = delta(layer, *arguments)
        return few * (1 + 1e-6) if suits == "nothing" and end - start < 5 else few

    monkeypatch.setattr(AdaptedLayer, "delta_of_experts", noted)
    if suits == "pairs":
        monkeypatch.setattr(LoraFactors, "blocks_bit_identical", lambda *_: False)
    adaptation = adaptations(FIVE)["experts"]
    assert_architecture_parity(*five_experts, tmp_path, FIVE.auto_class, adaptation.touches)
    merged = [(start, end) for start, end, dtype in asked if dtype == torch.bfloat16]
    of_a_layer = [(0, 2), (2, 5)] if suits == "pairs" else []
    assert sorted(merged) == sorted(of_a_layer * 2 * 2)  # two parameters in each of two layers
    assert [end - start for start, end, _ in asked].count(5) == 2  # once for each shape


@pytest.mark.parametrize("suits", ["blocks", "pairs"])
def test_experts_that_were_never_called_in_training_may_stay_as_they_are(
    suits: str, five_experts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_stack, "GROUP_ELEMENTS", 1)
    if suits == "pairs":
        monkeypatch.setattr(LoraFactors, "blocks_bit_identical", lambda *_: False)
    base, adapter = five_experts
    path = adapter / "adapter_model.safetensors"
    trained = load_file(path)
    for name, factor in trained.items():
        if "experts" in name and "lora_B" in name:  # (out, rank x experts), the expert's index last
            factor.view(len(factor), -1, 5)[:, :, :2] = 0
    save_file(trained, path)
    merged = written(base, adapter, tmp_path)
    before, after = (
        {k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()}
        for d in (base, merged)
    )
    same = {name for name in after if torch.equal(after[name], before[name])}
    assert {n.partition("experts.")[2][0] for n in same if "experts." in n} == {"0", "1"}

    save_file({n: f * 0 if "experts" in n else f for n, f in trained.items()}, path)
    written(base, adapter, tmp_path / "untrained")  # a layer may be, as long as not all are

    save_file({n: f * 1e-30 if "experts" in n else f for n, f in trained.items()}, path)
    with pytest.raises(UnchangedTargetsError, match="experts"):
        written(base, adapter, tmp_path / "too-small")


def test_experts_that_are_stacked_in_another_order_are_refused(
    five_experts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where small tensors would lie elsewhere than large ones do."""
    stack_positions = Conversions.stack_positions

    def turned(self: Conversions, conversion: Conversion) -> dict[str, tuple[int, int]] | None:
        found = stack_positions(self, conversion)
        return found and dict(zip(found, reversed(found.values()), strict=True))

    monkeypatch.setattr(Conversions, "stack_positions", turned)
    with pytest.raises(UnsupportedArchitectureError, match=r"experts\..* as it loads small"):
        written(*five_experts, tmp_path)
