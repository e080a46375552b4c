"""Every type of adapter that PEFT has: merged with PEFT's bits, or refused with the reason."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import customized_models
from customized_models.adapters.intake import CONFIG, WEIGHTS
from customized_models.adapters.peft_types import PEFT_TYPES
from customized_models.cards.reading import peft_settings
from customized_models.errors import (
    BaseModelMismatch,
    MalformedError,
    MergeError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
)
from customized_models.files.safetensors import Checkpoint
from customized_models.testing import tiny_llama, tiny_lora
from customized_models.testing.tiny_models import tiny_adapter
from tests.merging.parity import assert_parity, opened, tiny_model, written

pytestmark = [  # PEFT warns of much that it does as it was told
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft"),
]

TARGETS = ["q_proj", "down_proj"]


def lora(**options: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(**({"r": 4, "target_modules": TARGETS} | options))


def other(kind: str, **options: Any) -> Callable[[], PeftConfig]:
    return lambda: getattr(peft, kind)(**({"target_modules": TARGETS} | options))


# On a Llama with two layers and biases: the type, how many tensors change, and the configuration.
LLAMA: dict[str, tuple[str, int, Callable[[], PeftConfig]]] = {
    "LoRA": ("LORA", 4, lora()),
    "LoRA with all biases": ("LORA", 18, lora(bias="all")),
    "LoRA with its targets' biases": ("LORA", 8, lora(bias="lora_only")),
    "LoRA with biases of its own": ("LORA", 8, lora(lora_bias=True)),
    "LoRA on a layer": ("LORA", 2, lora(layers_to_transform=[1], layers_pattern="layers")),
    "LoRA on embedding and head": ("LORA", 2, lora(target_modules=["embed_tokens", "lm_head"])),
    "LoRA and tokens": ("LORA", 5, lora(trainable_token_indices=[1, 5, 9])),
    "LoRA on tokens of the head": ("LORA", 5, lora(trainable_token_indices={"lm_head": [1, 5]})),
    "LoRA on parameters": (
        "LORA", 2, lora(target_modules=[], target_parameters=["mlp.down_proj.weight"])
    ),
    "LoRA and saved modules": ("LORA", 6, lora(modules_to_save=["lm_head", "embed_tokens"])),
    "PiSSA": ("LORA", 4, lora(init_lora_weights="pissa")),
    "OLoRA": ("LORA", 4, lora(init_lora_weights="olora")),
    "MiCA": ("LORA", 4, lora(init_lora_weights="mica")),
    "orthogonal": ("LORA", 4, lora(init_lora_weights="orthogonal")),
    "KaSA": ("LORA", 4, lambda: lora(kasa_config=peft.KasaConfig())()),
    "BD-LoRA": (
        "LORA", 4, lambda: lora(use_bdlora=peft.BdLoraConfig(
            target_modules_bd_a=["q_proj"], target_modules_bd_b=["down_proj"], nblocks=2))()
    ),
    "VeLoRA": ("LORA", 4, lambda: lora(velora_config=peft.VeloraConfig())()),
    "MonteCLoRA": ("LORA", 4, lambda: lora(monteclora_config=peft.MontecloraConfig())()),
    "DoRA with patterns": (
        "LORA", 4, lora(use_dora=True, rank_pattern={"down_proj": 6},
                        alpha_pattern={r"layers\.0\.mlp\.down_proj": 3})
    ),
    "DoRA on the embedding": ("LORA", 1, lora(use_dora=True, target_modules=["embed_tokens"])),
    "AdaLoRA": ("ADALORA", 4, other("AdaLoraConfig", total_step=10)),
    "AdaMSS": ("ADAMSS", 8, other("AdamssConfig", r=16, num_subspaces=2)),
    "BEFT": ("BEFT", 2, other("BeftConfig", target_modules=["v_proj"])),
    "BOFT": ("BOFT", 4, other("BOFTConfig", boft_block_size=4)),
    "C3A": ("C3A", 4, other("C3AConfig", block_size=4)),
    "DEFT": ("DEFT", 4, other("DeftConfig")),
    "DeLoRA": ("DELORA", 4, other("DeloraConfig", r=4)),
    "FourierFT": ("FOURIERFT", 4, other("FourierFTConfig", n_frequency=50)),
    "FRoD": ("FROD", 4, other("FrodConfig", progressbar=False)),
    "FRoD unsaved": ("FROD", 4, other("FrodConfig", save_projection=False, progressbar=False)),
    "GLoRA": ("GLORA", 8, other("GloraConfig", r=4)),
    "GraLoRA": ("GRALORA", 4, other("GraloraConfig", r=4, gralora_k=2)),
    "HiRA": ("HIRA", 4, other("HiraConfig", r=4)),
    "HRA": ("HRA", 4, other("HRAConfig", r=4)),
    "IA3": ("IA3", 6, other("IA3Config", feedforward_modules=["down_proj"])),
    "norms": ("LN_TUNING", 2, other("LNTuningConfig", target_modules=["input_layernorm"])),
    "LoHa": ("LOHA", 4, other("LoHaConfig", r=4)),
    "LoKr": ("LOKR", 4, other("LoKrConfig", r=4)),
    "MiSS": ("MISS", 4, other("MissConfig", r=4)),
    "MiSS bat": ("MISS", 4, other("MissConfig", r=4, init_weights="bat")),
    "OFT": ("OFT", 4, other("OFTConfig", oft_block_size=4, r=0)),
    "OSF": ("OSF", 4, other("OSFConfig", effective_rank=4)),
    "PEANuT": ("PEANUT", 4, other("PeanutConfig")),
    "PSOFT": ("PSOFT", 4, other("PsoftConfig", r=4, task_type="CAUSAL_LM")),
    "PVeRA": ("PVERA", 2, other("PveraConfig", r=4, target_modules=["q_proj"])),
    "RandLoRA": ("RANDLORA", 4, other("RandLoraConfig", r=4)),
    "RandLoRA unsaved": ("RANDLORA", 4, other("RandLoraConfig", r=4, save_projection=False)),
    "RoAd": ("ROAD", 8, other("RoadConfig", group_size=4)),
    "SHiRA": ("SHIRA", 4, other("ShiraConfig", r=4)),
    "Supertuning": ("SUPERTUNING", 4, other("SupertuningConfig")),
    "TinyLoRA": ("TINYLORA", 4, other("TinyLoraConfig")),
    "TinyLoRA unsaved": ("TINYLORA", 4, other("TinyLoraConfig", save_projection=False)),
    "tokens": (
        "TRAINABLE_TOKENS", 1,
        other("TrainableTokensConfig", token_indices=[1, 2], target_modules=["embed_tokens"]),
    ),
    "UniLoRA": ("UNILORA", 4, other("UniLoraConfig")),
    "VB-LoRA": ("VBLORA", 4, other("VBLoRAConfig", r=4, num_vectors=20, vector_length=4)),
    "VeRA": ("VERA", 2, other("VeraConfig", r=4, target_modules=["q_proj"])),
    "VeRA unsaved": (
        "VERA", 2, other("VeraConfig", r=4, target_modules=["q_proj"], save_projection=False)
    ),
    "WaveFT": ("WAVEFT", 4, other("WaveFTConfig", n_frequency=50)),
}  # fmt: skip

OF_GPT2 = ["c_attn", "mlp.c_proj"]

# On a GPT-2, whose layers are transposed: those that PEFT can put on them.
GPT2: dict[str, tuple[int, Callable[[], PeftConfig]]] = {
    "LoRA": (4, lora(target_modules=OF_GPT2)),
    "LoRA with all biases": (17, lora(target_modules=OF_GPT2, bias="all")),
    "LoRA with its targets' biases": (8, lora(target_modules=OF_GPT2, bias="lora_only")),
    "LoRA with biases of its own": (8, lora(target_modules=OF_GPT2, lora_bias=True)),
    "LoRA and tokens": (5, lora(target_modules=OF_GPT2, trainable_token_indices=[1, 5])),
    "LoRA and saved norms": (8, lora(target_modules=OF_GPT2, modules_to_save=["ln_1"])),
    "DoRA": (4, lora(target_modules=OF_GPT2, use_dora=True)),
    "PiSSA": (4, lora(target_modules=OF_GPT2, init_lora_weights="pissa")),
    "MiCA": (4, lora(target_modules=OF_GPT2, init_lora_weights="mica")),
    "orthogonal": (4, lora(target_modules=OF_GPT2, init_lora_weights="orthogonal")),
    "AdaLoRA": (4, other("AdaLoraConfig", target_modules=OF_GPT2, total_step=10)),
    "DEFT": (4, other("DeftConfig", target_modules=OF_GPT2)),
    "FourierFT": (4, other("FourierFTConfig", target_modules=OF_GPT2, n_frequency=50)),
    "FRoD": (4, other("FrodConfig", target_modules=OF_GPT2, progressbar=False)),
    "GraLoRA": (4, other("GraloraConfig", target_modules=OF_GPT2, r=4, gralora_k=2)),
    "HiRA": (4, other("HiraConfig", target_modules=OF_GPT2, r=4)),
    "IA3": (6, other("IA3Config", target_modules=OF_GPT2, feedforward_modules=["mlp.c_proj"])),
    "norms": (4, other("LNTuningConfig", target_modules=["ln_1"])),
    "PVeRA": (2, other("PveraConfig", target_modules=["c_attn"], r=4)),
    "RandLoRA": (4, other("RandLoraConfig", target_modules=OF_GPT2, r=4)),
    "TinyLoRA": (4, other("TinyLoraConfig", target_modules=OF_GPT2)),
    "tokens": (1, other("TrainableTokensConfig", token_indices=[1], target_modules=["wte"])),
    "UniLoRA": (4, other("UniLoraConfig", target_modules=OF_GPT2)),
    "VB-LoRA": (
        4, other("VBLoRAConfig", target_modules=OF_GPT2, r=4, num_vectors=20, vector_length=4)
    ),
    "VeRA": (2, other("VeraConfig", target_modules=["c_attn"], r=4)),
    "WaveFT": (4, other("WaveFTConfig", target_modules=OF_GPT2, n_frequency=50)),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Makes a tiny model with biases, each kind once."""
    from transformers import GPT2Config, LlamaConfig

    configs = {
        "llama": LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, attention_bias=True, mlp_bias=True,
        ),
        "gpt2": GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
            eos_token_id=2, tie_word_embeddings=False,
        ),
    }  # fmt: skip
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, dtype: str) -> Path:
        if (kind, dtype) not in made:
            directory = tmp_path_factory.mktemp("base")
            made[kind, dtype] = tiny_model(directory, configs[kind], dtype)
        return made[kind, dtype]

    return make


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", LLAMA)
def test_merging_into_a_llama_gives_the_bits_of_peft(
    kind: str, dtype: str, bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    peft_type, changed, config = LLAMA[kind]
    base = bases("llama", dtype)
    adapter = tiny_adapter(tmp_path / "adapter", base, config())
    assert json.loads((adapter / CONFIG).read_text())["peft_type"] == peft_type
    merge = assert_parity(base, adapter, tmp_path, changed, aligned=kind == "GLoRA")
    again = Checkpoint.open(tmp_path / "out")
    assert all(torch.equal(merge.read(name), again.read(name)) for name in merge.changed)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", GPT2)
def test_merging_into_transposed_layers_gives_the_bits_of_peft(
    kind: str, dtype: str, bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    changed, config = GPT2[kind]
    base = bases("gpt2", dtype)
    adapter = tiny_adapter(tmp_path / "adapter", base, config())
    assert_parity(base, adapter, tmp_path, changed)


def of_gpt2(kind: str) -> PeftConfig:
    config = LLAMA[kind][2]()
    config.target_modules = set(OF_GPT2)
    return config


ON_GPT2 = {GPT2[kind][1]().peft_type.value for kind in GPT2}
OTHERS = {peft_type: kind for kind, (peft_type, _, _) in LLAMA.items() if peft_type not in ON_GPT2}


@pytest.mark.parametrize("peft_type", sorted(OTHERS.keys() - {"OSF"}))
def test_peft_puts_no_other_type_on_transposed_layers(
    peft_type: str, bases: Callable[[str, str], Path]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(bases("gpt2", "float32"))
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="support"):
        get_peft_model(model, of_gpt2(OTHERS[peft_type]))


def test_osf_trains_nothing_of_transposed_layers_and_so_is_refused(
    bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    base = bases("gpt2", "float32")
    adapter = tiny_adapter(tmp_path / "adapter", base, of_gpt2("OSF"))
    with pytest.raises(MalformedError, match="no tensors"):
        opened(base, adapter, tmp_path)


UNMERGEABLE = sorted(name for name, row in PEFT_TYPES.items() if row.unmergeable)


def test_every_type_in_the_table_is_one_of_pefts_and_tested_here_or_refused() -> None:
    tested = {peft_type for peft_type, _, _ in LLAMA.values()}
    assert tested.isdisjoint(UNMERGEABLE)
    assert PEFT_TYPES.keys() == tested.union(UNMERGEABLE)
    assert PEFT_TYPES.keys() <= {kind.value for kind in PeftType}


@pytest.mark.upstream
@pytest.mark.parametrize("name", sorted(PEFT_TYPES.keys() - {*UNMERGEABLE}))
def test_a_row_has_every_option_that_peft_writes_for_the_type(name: str) -> None:
    options = {field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)])}
    row = PEFT_TYPES[name]
    assert options <= row.supported_options.union(row.refused)
    assert options >= {*row.options, *row.refused}


@pytest.mark.upstream
def test_peft_has_no_type_that_the_table_lacks() -> None:
    assert {kind.value for kind in PeftType} == PEFT_TYPES.keys()


# Adding a type


def test_no_module_but_the_table_names_a_type_of_peft() -> None:
    """What adding a type takes, on paper: its row, for nothing else in the package knows types."""
    package = Path(customized_models.__file__).parent
    named = {
        (path.relative_to(package).as_posix(), node.value)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in PEFT_TYPES
    }
    assert {path for path, _ in named} == {"adapters/peft_types.py"}


@pytest.mark.parametrize("kind", ["IA3", "norms", "FRoD", "AdaLoRA", "UniLoRA", "BEFT"])
def test_adding_a_row_is_all_that_a_new_type_takes(
    kind: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by doing it: a type that the table lacks is refused; with its row it merges as PEFT."""
    name, changed, config = LLAMA[kind]
    adapter = tiny_adapter(tmp_path / "adapter", base, config())
    row = PEFT_TYPES[name]

    monkeypatch.delitem(PEFT_TYPES, name)
    with pytest.raises(UnsupportedAdapterError):
        opened(base, adapter, tmp_path / "without")
    assert peft_settings({"peft_type": name})["method"] == name

    monkeypatch.setitem(PEFT_TYPES, name, row)
    assert peft_settings({"peft_type": name})["method"] == row.method
    assert_parity(base, adapter, tmp_path, changed)


@pytest.fixture
def base(bases: Callable[[str, str], Path]) -> Path:
    return bases("llama", "bfloat16")


def change_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | values))


@pytest.mark.parametrize("kind", UNMERGEABLE)
def test_a_type_that_is_no_change_of_weights_is_refused_with_the_reason(
    kind: str, base: Path, tmp_path: Path
) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base)
    change_config(adapter, peft_type=kind)
    with pytest.raises(UnsupportedAdapterError) as caught:
        opened(base, adapter, tmp_path)
    assert f"type {kind} cannot be merged: {PEFT_TYPES[kind].unmergeable}" in str(caught.value)


def test_a_type_of_a_later_peft_is_refused_as_unknown(base: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base)
    change_config(adapter, peft_type="LATER")
    with pytest.raises(UnsupportedAdapterError, match=r"LATER .*does not know the type"):
        opened(base, adapter, tmp_path)


def test_a_bias_that_the_configuration_does_not_speak_of_is_refused(
    base: Path, tmp_path: Path
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", base, lora(bias="all")())
    change_config(adapter, bias="none")
    with pytest.raises(UnmergedTensorsError, match="bias"):
        opened(base, adapter, tmp_path)


def test_no_other_tensor_comes_along_with_trained_biases(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", base, lora(bias="all")())
    tensors = load_file(adapter / WEIGHTS)
    norm = "base_model.model.model.norm.weight"
    save_file(tensors | {norm: load_file_of(base, "model.norm.weight") + 1}, adapter / WEIGHTS)
    with pytest.raises(UnmergedTensorsError, match=r"norm\.weight"):
        opened(base, adapter, tmp_path)


def load_file_of(base: Path, name: str) -> Any:
    return Checkpoint.open(base).read(name)


def test_a_bias_that_the_base_lacks_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    config = other("BeftConfig", target_modules=["v_proj"])()
    adapter = tiny_adapter(tmp_path / "adapter", tiny_base, config)
    with pytest.raises(UnsupportedAdapterError, match=r"v_proj.*none in the base"):
        opened(tiny_base, adapter, tmp_path)


def test_indices_beyond_a_weight_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", base, other("ShiraConfig", r=4)())
    tensors = load_file(adapter / WEIGHTS)
    tensors = {n: t + 10_000 if n.endswith("indices") else t for n, t in tensors.items()}
    save_file(tensors, adapter / WEIGHTS)
    merge = opened(base, adapter, tmp_path)
    with pytest.raises(MergeError, match="PEFT cannot merge"):
        merge.read(min(merge.changed))


@pytest.mark.parametrize("key", ["r", "rank_pattern"])
def test_a_rank_beyond_what_the_file_holds_is_refused_before_it_takes_memory(
    key: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", base, other("LoHaConfig", r=4)())
    config = json.loads((adapter / "adapter_config.json").read_text())
    config[key] = {"q_proj": 65536} if key == "rank_pattern" else 65536
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    def never(*_: Any) -> None:
        raise AssertionError("PEFT was asked to build the layers")

    monkeypatch.setattr("customized_models.merging.injection.PeftModel", never)
    with pytest.raises(MalformedError, match="65536"):
        opened(base, adapter, tmp_path)


def test_saved_modules_beside_trained_norms_are_refused(base: Path, tmp_path: Path) -> None:
    config = other("LNTuningConfig", target_modules=["norm"])()
    adapter = tiny_adapter(tmp_path / "adapter", base, config)
    change_config(adapter, modules_to_save=["lm_head"])
    with pytest.raises(UnsupportedAdapterError, match="modules_to_save"):
        opened(base, adapter, tmp_path)


# Tied embeddings, and vocabularies that were resized


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose head is its embedding, in float32 so that logits can be compared."""
    directory = tmp_path_factory.mktemp("tied")
    return tiny_llama(directory, tokenizer=False, tied=True, dtype="float32")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(3, 60)[None]).logits
    return result


UNTYING: dict[str, tuple[Callable[[], PeftConfig], bool]] = {
    "LoRA on the head": (lora(target_modules=["lm_head"]), False),
    "LoRA on the embedding": (lora(target_modules=["embed_tokens"]), False),
    "LoRA on both": (lora(target_modules=["embed_tokens", "lm_head"]), False),
    "a saved head": (lora(modules_to_save=["lm_head"]), True),
    "a saved embedding": (lora(modules_to_save=["embed_tokens"]), True),
}


@pytest.mark.parametrize("kind", UNTYING)
def test_an_adapter_of_one_of_two_tied_layers_unties_them(
    kind: str, tied: Path, tmp_path: Path
) -> None:
    config, peft_is_right = UNTYING[kind]
    adapter = tiny_adapter(tmp_path / "adapter", tied, config())
    before = logits(AutoModelForCausalLM.from_pretrained(tied))
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), adapter)
    wanted = logits(trained)
    of_peft = (logits(trained.merge_and_unload()) - wanted).abs().max()
    out = written(tied, adapter, tmp_path)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= Checkpoint.open(out).infos.keys()
    ours = (logits(AutoModelForCausalLM.from_pretrained(out)) - wanted).abs().max()
    effect = (before - wanted).abs().max()
    assert ours < 1e-4 < effect
    assert of_peft < 1e-4 if peft_is_right else of_peft > effect / 10


@pytest.mark.parametrize("kind", ["tokens", "LoRA and tokens"])
def test_trained_tokens_keep_tied_layers_tied(kind: str, tied: Path, tmp_path: Path) -> None:
    _, changed, config = LLAMA[kind]
    adapter = tiny_adapter(tmp_path / "adapter", tied, config())
    assert_parity(tied, adapter, tmp_path, changed)
    assert opened(tied, adapter, tmp_path / "again").config == {}


def test_saved_layers_that_peft_keeps_tied_stay_so(tied: Path, tmp_path: Path) -> None:
    config = lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True)()
    adapter = tiny_adapter(tmp_path / "adapter", tied, config)
    assert_parity(tied, adapter, tmp_path, 5)
    assert opened(tied, adapter, tmp_path / "again").config == {}


def with_more_tokens(base: Path, directory: Path, config: PeftConfig, rows: int) -> Path:
    """An adapter trained after the vocabulary was resized."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(rows)
        trained = get_peft_model(model, config)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    trained.save_pretrained(str(directory), save_embedding_layers=True)
    return directory


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("modules", [None, ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("rows", [330, 300])
def test_a_resized_vocabulary_comes_with_the_adapter(
    rows: int, modules: list[str] | None, is_tied: bool, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False, tied=is_tied, dtype="float32")
    adapter = with_more_tokens(base, tmp_path / "adapter", lora(modules_to_save=modules)(), rows)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows)
    wanted = logits(PeftModel.from_pretrained(model, adapter))
    out = written(base, adapter, tmp_path)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == rows
    ours = logits(AutoModelForCausalLM.from_pretrained(out))
    assert ours.shape[-1] == rows
    assert (ours - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("end", ["lm_head", "model.embed_tokens"])
def test_a_resized_vocabulary_of_one_end_alone_is_refused(
    end: str, base: Path, tmp_path: Path
) -> None:
    adapter = with_more_tokens(base, tmp_path / "adapter", lora()(), 330)
    tensors = load_file(adapter / WEIGHTS)
    del tensors[f"base_model.model.{end}.weight"]
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(BaseModelMismatch, match=rf"vocabulary of 330.*{end}"):
        opened(base, adapter, tmp_path)


def test_embeddings_of_two_sizes_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = with_more_tokens(base, tmp_path / "adapter", lora()(), 330)
    tensors = load_file(adapter / WEIGHTS)
    name = "base_model.model.lm_head.weight"
    save_file(tensors | {name: tensors[name][:325].clone()}, adapter / WEIGHTS)
    with pytest.raises((MalformedError, BaseModelMismatch), match=r"lm_head|rows"):
        opened(base, adapter, tmp_path)
