from __future__ import annotations

import gc
import importlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from customized_models.adapters.intake import CONFIG, WEIGHTS
from customized_models.errors import (
    BaseModelMismatch,
    MalformedError,
    NonFiniteError,
    UnchangedTargetsError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
    UnsupportedBaseError,
    UnsupportedVersionError,
)
from customized_models.files.safetensors import INDEX, SINGLE, Checkpoint, read_header
from customized_models.merging.layers import AdaptedLayer
from customized_models.merging.strategies.rows import LoraFactors
from customized_models.testing import tiny_llama, tiny_lora
from tests.merging.parity import assert_parity, opened

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
]

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
A_OF_Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a tiny Llama, each kind once."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            directory = tmp_path_factory.mktemp("base")
            made[key] = tiny_llama(directory, tokenizer=False, **options)
        return made[key]

    return make


@pytest.fixture
def base(bases: Callable[..., Path]) -> Path:
    return bases()


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A good adapter of `base`, for a test to spoil."""
    return tiny_lora(tmp_path / "adapter", base)


# Parity

KINDS = {
    "plain": (4, {}),
    "all linear layers": (14, {"target_modules": "all-linear"}),
    "rsLoRA with patterns": (
        4,
        {
            "use_rslora": True,
            "rank_pattern": {"down_proj": 6},
            "alpha_pattern": {r"layers\.0\.mlp\.down_proj": 3},
        },
    ),
    "DoRA": (4, {"use_dora": True}),
    "gaussian start": (4, {"init_lora_weights": "gaussian"}),
    "saved modules": (10, {"modules_to_save": ["lm_head", "norm"]}),
    "saved embedding and DoRA": (5, {"modules_to_save": ["embed_tokens"], "use_dora": True}),
    "expression": (4, {"target_modules": r".*layers\.\d\.self_attn\.(q_proj|v_proj)"}),
    "one layer": (2, {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluding": (2, {"exclude_modules": r".*layers\.0\..*"}),
    "untied head": (3, {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_bits_of_peft(
    kind: str, dtype: str, bases: Callable[..., Path], tmp_path: Path
) -> None:
    changed, options = KINDS[kind]
    base = bases(dtype=dtype)
    adapter = tiny_lora(tmp_path / "adapter", base, **options)
    assert_parity(base, adapter, tmp_path, changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_in_half_precision_gives_the_bits_of_peft(
    dtype: torch.dtype, base: Path, adapter: Path, tmp_path: Path
) -> None:
    tensors = {name: t.to(dtype) for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    assert_parity(base, adapter, tmp_path, 4)


def test_a_base_in_one_file_gives_the_bits_of_peft(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(shard_size="1GB")
    assert [path.name for path in base.glob("*.safetensors")] == [SINGLE]
    adapter = tiny_lora(tmp_path / "adapter", base)
    assert_parity(base, adapter, tmp_path, 4)


def recast(base: Path, directory: Path, dtypes: dict[str, torch.dtype], drop: str = "") -> Path:
    """A copy of `base` with some tensors in other dtypes and without a key of its config."""
    directory.mkdir()
    for path in base.iterdir():
        if path.suffix == ".safetensors":
            tensors = {n: t.to(dtypes.get(n, t.dtype)) for n, t in load_file(path).items()}
            save_file(tensors, directory / path.name, metadata={"format": "pt"})
        else:
            (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config.pop(drop, None)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("drop", ["", "dtype"])
def test_in_a_base_of_mixed_dtypes_only_changed_tensors_take_the_dtype_of_the_model(
    drop: str, base: Path, tmp_path: Path
) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    mixed = recast(base, tmp_path / "mixed", {Q_PROJ: torch.float32, norm: torch.float32}, drop)
    adapter = tiny_lora(tmp_path / "adapter", mixed)
    assert_parity(mixed, adapter, tmp_path, 4)
    written = Checkpoint.open(tmp_path / "out")
    assert written.infos[Q_PROJ].dtype == "BF16"
    assert written.infos[norm].dtype == "F32"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(info.size for info in written.infos.values())


def test_tensors_that_the_model_class_ignores_are_kept(base: Path, tmp_path: Path) -> None:
    more = recast(base, tmp_path / "more", {})
    shard = next(path for path in sorted(more.glob("*.safetensors")))
    save_file(load_file(shard) | {"mtp.head.weight": torch.ones(3)}, shard, {"format": "pt"})
    index = json.loads((more / INDEX).read_text())
    index["weight_map"]["mtp.head.weight"] = shard.name
    (more / INDEX).write_text(json.dumps(index))
    assert_parity(more, tiny_lora(tmp_path / "adapter", more), tmp_path, 4)
    assert torch.equal(Checkpoint.open(tmp_path / "out").read("mtp.head.weight"), torch.ones(3))


def test_biases_of_the_base_are_kept(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer=False, attention_bias=True)
    bias = Q_PROJ.replace("weight", "bias")
    shard = base / Checkpoint.open(base).infos[bias].file
    save_file(load_file(shard) | {bias: torch.randn(64).bfloat16()}, shard, {"format": "pt"})
    assert_parity(base, tiny_lora(tmp_path / "adapter", base), tmp_path, 4)


def moe(directory: Path) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).bfloat16().save_pretrained(directory, max_shard_size="20KB")
    return directory


def test_attention_beside_converted_experts_gives_the_bits_of_peft(tmp_path: Path) -> None:
    base = moe(tmp_path / "base")
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules=["q_proj", "o_proj"])
    assert_parity(base, adapter, tmp_path, 4)


def test_a_tied_model_merges_what_is_not_tied(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases(tied=True)
    assert "lm_head.weight" not in Checkpoint.open(base).infos
    assert_parity(base, tiny_lora(tmp_path / "adapter", base), tmp_path, 4)


# Row blocks instead of PEFT's whole products


@pytest.fixture
def by_peft(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the layers that PEFT merges."""
    paths: list[str] = []
    merge = AdaptedLayer.merge

    def noted(layer: AdaptedLayer, values: Any) -> Any:
        paths.append(layer.path)
        return merge(layer, values)

    monkeypatch.setattr(AdaptedLayer, "merge", noted)
    return paths


WIDE = {"hidden_size": 512, "intermediate_size": 4096}  # more than one block in each MLP layer


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_of_each_shape_blocks_are_compared_once_and_give_the_same_bits(
    dtype: str,
    bases: Callable[..., Path],
    tmp_path: Path,
    by_peft: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compared = []
    blocks_bit_identical = LoraFactors.blocks_bit_identical

    def noted(factors: LoraFactors, *arguments: Any) -> bool:
        compared.append((*factors.up.shape, *factors.down.shape))
        return blocks_bit_identical(factors, *arguments)

    monkeypatch.setattr(LoraFactors, "blocks_bit_identical", noted)
    base = bases(dtype=dtype, **WIDE)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    assert_parity(base, adapter, tmp_path, 14)
    assert len(compared) == len(set(compared)) == 4
    assert by_peft == []


def test_where_blocks_give_other_bits_peft_merges_every_layer(
    bases: Callable[..., Path],
    tmp_path: Path,
    by_peft: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product = LoraFactors.product

    def other_bits(*arguments: Any) -> torch.Tensor:
        return product(*arguments).mul_(1 + 1e-7)

    monkeypatch.setattr(LoraFactors, "product", other_bits)
    base = bases(**WIDE)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    assert_parity(base, adapter, tmp_path, 14)
    assert len(by_peft) == 14


BOTH_WAYS = """
import sys
from pathlib import Path
from tests.merging.parity import assert_parity
from customized_models.merging.layers import AdaptedLayer
from customized_models.testing import tiny_llama, tiny_lora

paths, merge = [], AdaptedLayer.merge

def noted(layer, values):
    paths.append(layer.path)
    return merge(layer, values)

AdaptedLayer.merge = noted
scratch, dtype = Path(sys.argv[1]), sys.argv[2]
sizes = {"hidden_size": 300, "intermediate_size": 5000, "num_attention_heads": 6}
base = tiny_llama(scratch / "base", tokenizer=False, dtype=dtype, **sizes)
adapter = tiny_lora(scratch / "adapter", base, r=128, target_modules="all-linear")
assert_parity(base, adapter, scratch, 14)
print(*paths)
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="is about a mode of MKL")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_where_the_math_library_sums_by_the_number_of_rows_some_shapes_are_left_to_peft(
    dtype: str, tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BOTH_WAYS, str(tmp_path), dtype],
        env={**os.environ, "MKL_CBWR": "COMPATIBLE"},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    mlp = sorted(path for path in result.stdout.split() if ".mlp." in path)
    assert mlp == [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]


def test_layers_whose_change_is_multiplied_by_zero_come_out_as_they_are(
    base: Path, tmp_path: Path
) -> None:
    targets = ["q_proj", "down_proj"]
    adapter = tiny_lora(
        tmp_path / "adapter", base, target_modules=targets, alpha_pattern={"down_proj": 0}
    )
    merge = assert_parity(base, adapter, tmp_path, changed=4)
    assert merge.untrained == {name for name in merge.changed if "down_proj" in name}


def test_threads_are_as_many_after_a_merge_as_before(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge = opened(base, adapter, tmp_path)
        assert {merge.strategy(name).name for name in merge.changed} == {"lora_blocks"}
        for name in merge.changed:
            merge.read(name)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_peft_computes_with_the_threads_of_the_one_who_opened_the_merge(
    bases: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()

    def noted(name: str) -> None:
        original = getattr(AdaptedLayer, name)

        def counted(layer: AdaptedLayer, *arguments: Any) -> Any:
            seen.add((torch.get_num_threads(), threading.current_thread()))
            return original(layer, *arguments)

        monkeypatch.setattr(AdaptedLayer, name, counted)

    noted("merge")
    noted("delta")
    base = bases()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        adapter = tiny_lora(tmp_path / "adapter", base, modules_to_save=["norm"])
        merge = opened(base, adapter, tmp_path)
        torch.set_num_threads(1)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda name: list(merge.blocks(name)), sorted(merge.changed)))
            list(pool.map(lambda name: list(merge.reference_blocks(name)), sorted(merge.changed)))
    finally:
        torch.set_num_threads(before)
    assert merge.recipe["threads"] == 3
    assert [count for count, _ in seen] == [3]  # and all in one thread


def test_threads_may_merge_side_by_side(bases: Callable[..., Path], tmp_path: Path) -> None:
    base = bases(**WIDE)
    options = {"target_modules": "all-linear", "modules_to_save": ["norm"]}
    merge = opened(base, tiny_lora(tmp_path / "adapter", base, **options), tmp_path)
    names = sorted(merge.changed)
    one_by_one = {name: merge.read(name) for name in names}

    def joined(name: str) -> torch.Tensor:
        return torch.cat([block.clone() for block in merge.blocks(name)])

    with ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(names * 3, pool.map(joined, names * 3), strict=True):
            assert torch.equal(tensor, one_by_one[name])


def test_the_last_two_blocks_of_a_thread_are_both_good(
    bases: Callable[..., Path], tmp_path: Path
) -> None:
    base = bases(**WIDE)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    merge = opened(base, adapter, tmp_path)
    rows, before = 0, None
    for name in sorted(name for name in merge.changed if "up_proj" in name):
        whole = merge.read(name)
        for block in merge.blocks(name):
            if before is not None:
                assert torch.equal(*before)
            before = (block, whole[rows % len(whole) :][: len(block)])
            rows += len(block)
            assert len(block) < len(whole)


# Reading


def test_tensors_may_be_read_in_any_order_and_again(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge = opened(base, adapter, tmp_path)
    names = sorted(merge.infos)
    first = {name: merge.read(name) for name in names}
    random.Random(0).shuffle(names)
    for name in names:
        assert torch.equal(merge.read(name), first[name])
    merge.finish()


def test_what_was_read_may_be_written_to(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge = opened(base, adapter, tmp_path)
    before = merge.read(Q_PROJ).clone()
    merge.read(Q_PROJ).zero_()
    assert torch.equal(merge.read(Q_PROJ), before)


def test_nothing_of_the_base_stays_in_memory(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge = opened(base, adapter, tmp_path)
    for name in merge.changed:
        merge.read(name)
    gc.collect()
    shape = merge.infos[Q_PROJ].shape
    held = [
        tensor
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor) and tensor.shape == shape and not tensor.is_meta
    ]
    assert not held


def test_the_adapters_values_are_in_memory_only_while_their_layer_is_merged(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge = opened(base, adapter, tmp_path)
    for name in merge.changed:
        merge.read(name)
        list(merge.reference_blocks(name))
    gc.collect()
    sizes = {tensor.numel() for tensor in load_file(adapter / WEIGHTS).values()}
    held = [
        tensor
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.nn.Parameter) and not tensor.is_meta
    ]
    assert not [tensor for tensor in held if tensor.numel() in sizes]
    assert not merge.adapter_in_memory


def test_a_merge_is_not_finished_before_every_changed_tensor_was_read(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge = opened(base, adapter, tmp_path)
    for name in merge.changed - {Q_PROJ}:
        merge.read(name)
    with pytest.raises(UnmergedTensorsError) as caught:
        merge.finish()
    assert caught.value.names == (Q_PROJ,)


def test_the_recipe_has_what_the_bits_depend_on(base: Path, adapter: Path, tmp_path: Path) -> None:
    recipe = opened(base, adapter, tmp_path).recipe
    assert recipe["torch"] == torch.__version__.partition("+")[0]
    assert recipe["threads"] == torch.get_num_threads()
    assert json.loads(json.dumps(recipe)) == recipe
    assert {"peft", "transformers", "cpu_capability", "arithmetic"} <= recipe.keys()


def test_planning_reads_headers_alone(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = {path: read_header(path).data_start for path in base.glob("*.safetensors")}
    preadv = os.preadv

    def refuse_tensors(fd: int, buffers: Any, offset: int) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        end = offset + sum(map(len, buffers))
        assert path not in headers or end <= headers[path], "a tensor was read"
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_tensors)
    merge = opened(base, adapter, tmp_path)
    assert {merge.strategy(name).name for name in merge.changed} == {"lora_blocks"}
    assert all(merge.sources(name) for name in merge.changed)


def test_planning_opens_no_connection_and_draws_no_random_numbers(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = torch.get_rng_state()
    opened(base, adapter, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# Lying adapters


def change_weights(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    tensors = {name: t.clone() for name, t in load_file(directory / WEIGHTS).items()}
    save_file(change(tensors), directory / WEIGHTS)


def change_config(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | values))


def smuggled(path: str, *shape: int) -> dict[str, torch.Tensor]:
    return {f"base_model.model.{path}": torch.full(shape, 9.0)}


LIES: dict[str, tuple[type[Exception], Callable[[Path], None]]] = {
    "half missing": (
        UnmergedTensorsError,
        lambda d: change_weights(d, lambda t: dict(list(t.items())[::2])),
    ),
    "one missing": (
        UnmergedTensorsError,
        lambda d: change_weights(d, lambda t: {n: v for n, v in t.items() if n != A_OF_Q_PROJ}),
    ),
    "another module": (
        UnmergedTensorsError,
        lambda d: change_weights(
            d, lambda t: t | {n.replace("q_proj", "o_proj"): v.clone() for n, v in t.items()}
        ),
    ),
    "a layer beyond": (
        BaseModelMismatch,
        lambda d: change_weights(
            d, lambda t: t | {n.replace("layers.1", "layers.99"): v.clone() for n, v in t.items()}
        ),
    ),
    "a norm of the base": (
        UnmergedTensorsError,
        lambda d: change_weights(d, lambda t: t | smuggled("model.norm.weight", 64)),
    ),
    "a weight below its adapter": (
        UnmergedTensorsError,
        lambda d: change_weights(
            d, lambda t: t | smuggled("model.layers.0.self_attn.q_proj.base_layer.weight", 64, 64)
        ),
    ),
    "a weight without prefix": (
        UnmergedTensorsError,
        lambda d: change_weights(d, lambda t: t | {"model.norm.weight": torch.ones(64)}),
    ),
    "an unknown tensor": (
        UnmergedTensorsError,
        lambda d: change_weights(d, lambda t: t | smuggled("whatever", 4)),
    ),
    "more targets": (
        UnmergedTensorsError,
        lambda d: change_config(d, target_modules=["q_proj", "down_proj", "o_proj"]),
    ),
    "fewer targets": (UnmergedTensorsError, lambda d: change_config(d, target_modules=["q_proj"])),
    "no targets there": (
        UnsupportedAdapterError,
        lambda d: change_config(d, target_modules=["nothing"]),
    ),
    "DoRA stated": (UnmergedTensorsError, lambda d: change_config(d, use_dora=True)),
    "a head stated": (
        UnmergedTensorsError,
        lambda d: change_config(d, modules_to_save=["lm_head"]),
    ),
    "another rank": (MalformedError, lambda d: change_config(d, r=8)),
    "the largest rank": (MalformedError, lambda d: change_config(d, r=65_536)),
    "another rank in one place": (
        MalformedError,
        lambda d: change_config(d, rank_pattern={"q_proj": 2}),
    ),
    "NaN weights": (
        NonFiniteError,
        lambda d: change_weights(d, lambda t: t | {A_OF_Q_PROJ: t[A_OF_Q_PROJ] * torch.nan}),
    ),
    "an enormous alpha": (NonFiniteError, lambda d: change_config(d, lora_alpha=1e300)),
    "nothing learnt": (
        UnchangedTargetsError,
        lambda d: change_weights(d, lambda t: {n: torch.zeros_like(v) for n, v in t.items()}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_an_adapter_that_lies_is_never_merged(
    lie: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    error, tell = LIES[lie]
    tell(adapter)

    def merge_all() -> None:
        merge = opened(base, adapter, tmp_path)
        for name in sorted(merge.changed):
            merge.read(name)

    with pytest.raises(error):
        merge_all()


def test_dora_denied_leaves_its_magnitudes_unmerged(base: Path, tmp_path: Path) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, use_dora=True)
    change_config(adapter, use_dora=False)
    with pytest.raises(UnmergedTensorsError) as caught:
        opened(base, adapter, tmp_path)
    assert len(caught.value.names) == 4
    assert all(name.endswith("lora_magnitude_vector") for name in caught.value.names)


def test_a_targeted_head_whose_saved_base_is_not_the_base_is_refused(
    base: Path, tmp_path: Path
) -> None:
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules=["lm_head"])
    name = "base_model.model.lm_head.base_layer.weight"
    change_weights(adapter, lambda t: t | {name: t[name] + 1})
    with pytest.raises(UnmergedTensorsError, match="lm_head"):
        opened(base, adapter, tmp_path)


# Refusals by name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "PROMPT_TUNING"),
        ("task_type", "LATER"),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("bias", "some"),
        ("arrow_config", {"top_k": 2}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", 1.5),
        ("some_future_switch", True),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused_by_name(
    key: str, value: object, base: Path, adapter: Path, tmp_path: Path
) -> None:
    change_config(adapter, **{key: value})
    with pytest.raises(UnsupportedAdapterError, match=str(value) if key == "peft_type" else key):
        opened(base, adapter, tmp_path)


def test_a_head_that_was_not_saved_with_the_adapter_is_missed(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    change_config(adapter, task_type="SEQ_CLS")
    with pytest.raises(BaseModelMismatch, match=r"score\.weight.*ForSequenceClassification"):
        opened(base, adapter, tmp_path)


def test_an_unknown_switch_that_is_off_does_not_matter(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    change_config(adapter, velora_config=None, use_bdlora=None, loftq_config={}, lora_bias=False)
    assert opened(base, adapter, tmp_path).changed


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_quantized_base_is_refused(key: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    quantized = recast(base, tmp_path / "quantized", {})
    config = json.loads((quantized / "config.json").read_text())
    config[key] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedBaseError, match=key):
        opened(quantized, adapter, tmp_path)


def test_a_base_whose_targets_are_in_eight_bits_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    quantized = recast(base, tmp_path / "quantized", {Q_PROJ: torch.float8_e4m3fn})
    with pytest.raises(UnsupportedBaseError, match="F8_E4M3"):
        opened(quantized, adapter, tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"model_type": "unheard_of"},
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.C"}},
        {"model_type": "clip", "auto_map": {"AutoModelForCausalLM": "evil.M"}},
        {"model_type": "clip"},
        {"num_hidden_layers": "many"},
    ],
    ids=str,
)  # fmt: skip
def test_a_base_that_transformers_cannot_build_is_refused_without_running_its_code(
    values: dict[str, Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = recast(base, tmp_path / "other", {})
    (other / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(UnsupportedArchitectureError, match=r"config\.json"):
        opened(other, adapter, tmp_path)


def test_a_base_whose_files_contradict_its_config_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = recast(base, tmp_path / "other", {})
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UnmergedTensorsError, match=r"layers\.1"):
        opened(other, adapter, tmp_path)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("transformers.modeling_utils", "_get_dtype"),
        ("transformers.core_model_loading", "rename_source_key"),
        ("transformers.conversion_mapping", "get_model_conversion_mapping"),
    ],
)
def test_a_package_without_what_we_build_on_is_named_with_its_version(
    module: str,
    name: str,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import transformers

    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(UnsupportedVersionError, match=re.escape(transformers.__version__)):
        opened(base, adapter, tmp_path)
