"""The plan of a save: what it says, and that it is true."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from customized_models import CustomizedModel, Merger, ModelRegistry
from customized_models.errors import (
    BaseModelMismatch,
    BaseModelMissingError,
    CustomizedModelsError,
    JobFailed,
    MalformedError,
    NonFiniteError,
    NotFoundError,
    UnchangedTargetsError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
    UnsupportedBaseError,
)
from customized_models.testing import MemoryStorage, tiny_llama, tiny_lora

Tensors: TypeAlias = dict[str, torch.Tensor]


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


def test_a_plan_names_every_adapter_tensor_under_the_tensor_it_changes(
    registry: ModelRegistry, customized: CustomizedModel, tiny_adapter: Path
) -> None:
    plan = Merger(registry).plan(customized)

    assert (plan.customized, plan.base) == (customized.name, "llama-tiny")
    expected = {
        f"model.layers.{layer}.{module}.weight": {
            f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"
            for factor in "AB"
        }
        for layer in range(2)
        for module in ("self_attn.q_proj", "mlp.down_proj")
    }
    assert {c.tensor: set(c.adapter_tensors) for c in plan.changes} == expected
    assert (
        set().union(*expected.values())
        == load_file(tiny_adapter / "adapter_model.safetensors").keys()
    )
    assert plan.unused_adapter_tensors == ()


def test_a_plan_says_what_the_save_then_does(
    registry: ModelRegistry, customized: CustomizedModel, tiny_base: Path
) -> None:
    plan = Merger(registry).plan(customized)
    complete = Merger(registry).save(customized).result(progress=False)

    with registry.checkout(complete) as directory:
        written = {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}
    base = {k: v for f in tiny_base.glob("*.safetensors") for k, v in load_file(f).items()}
    assert plan.tensors == len(written)
    assert plan.size == sum(t.numel() * t.element_size() for t in written.values())
    assert {c.tensor: c.shape for c in plan.changes} == {
        name: tuple(t.shape) for name, t in written.items() if not t.equal(base[name])
    }
    assert {c.dtype for c in plan.changes} == {"BF16"}
    assert {c.merged_by for c in plan.changes} == {"lora_blocks"}
    assert plan.recipe == complete.recipe


def test_a_whole_module_that_was_trained_stands_under_its_own_tensor(
    registry: ModelRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = tiny_lora(tmp_path / "adapter", tiny_base, modules_to_save=["lm_head"])
    plan = Merger(registry).plan(registry.register(adapter, train_name="head"))

    sources = {c.tensor: c.adapter_tensors for c in plan.changes}
    assert sources["lm_head.weight"] == ("base_model.model.lm_head.weight",)
    assert {c.tensor for c in plan.changes if c.merged_by == "peft_module"} == {"lm_head.weight"}
    assert len(sources) == 5


def changed(tensors: Tensors, part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Tensors:
    return {n: change(t) if part in n else t for n, t in tensors.items()}


def in_the_last_row(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[-1] = value
        return tensor

    return change


def with_more(tensors: Tensors) -> Tensors:
    """With a layer that the configuration does not name."""
    more = {n.replace("q_proj", "v_proj"): t for n, t in tensors.items() if "q_proj.lora_A" in n}
    return tensors | {n: t.clone() for n, t in more.items()}


REFUSED_CONFIGURATIONS: list[tuple[dict[str, Any], type[CustomizedModelsError]]] = [
    ({"of_tomorrow": True, "peft_version": "99.0.0"}, UnsupportedAdapterError),
    ({"use_qalora": True}, UnsupportedAdapterError),
    ({"alora_invocation_tokens": [1]}, UnsupportedAdapterError),
    ({"layer_replication": [[0, 2]]}, UnsupportedAdapterError),
    ({"init_lora_weights": "pissa_niter_4"}, UnsupportedAdapterError),
    ({"init_lora_weights": "corda"}, UnsupportedAdapterError),
    ({"task_type": "OF_TOMORROW"}, UnsupportedAdapterError),
    ({"bias": "some"}, UnsupportedAdapterError),
    ({"target_modules": ["q_proj"]}, UnmergedTensorsError),
    ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, UnmergedTensorsError),
    ({"modules_to_save": ["lm_head"]}, UnmergedTensorsError),
    ({"use_dora": True}, UnmergedTensorsError),
    ({"r": 5}, MalformedError),
    ({"lora_alpha": 0}, UnchangedTargetsError),
]
ONE = "layers.1.self_attn.q_proj"
REFUSED_WEIGHTS: list[tuple[str, Callable[[Tensors], Tensors], type[CustomizedModelsError]]] = [
    ("more", with_more, UnmergedTensorsError),
    ("fewer", lambda t: dict([*t.items()][2:]), UnmergedTensorsError),
    ("all zero", lambda t: changed(t, "lora_B", torch.zeros_like), UnchangedTargetsError),
    ("lost", lambda t: changed(t, "layers.1.mlp", lambda x: x * 1e-20), UnchangedTargetsError),
    # In one tensor: files are written side by side, and the first error ends them.
    ("too large", lambda t: changed(t, ONE, in_the_last_row(1e30)), NonFiniteError),
]
REFUSED_BASES: list[tuple[dict[str, Any], type[CustomizedModelsError]]] = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, UnsupportedBaseError),
    ({"model_type": "of_tomorrow"}, UnsupportedArchitectureError),
    ({"attention_bias": True}, BaseModelMismatch),
    ({"num_hidden_layers": 3}, UnmergedTensorsError),
    ({"intermediate_size": 112}, MalformedError),
]


def shown_in_names(value: object) -> str | None:
    if isinstance(value, type):
        return value.__name__
    return None if callable(value) else str(value)


def assert_refused_alike(
    registry: ModelRegistry, customized: CustomizedModel, error: type[CustomizedModelsError]
) -> None:
    """By the plan and by the save, in the same words; nothing is published."""
    merger = Merger(registry)
    with pytest.raises(error) as planned:
        merger.plan(customized)
    with pytest.raises(error) as saved:
        merger.save(customized).result(progress=False)
    assert (type(planned.value), str(planned.value)) == (type(saved.value), str(saved.value))
    assert list(registry.complete_models()) == []


@pytest.mark.parametrize(("values", "error"), REFUSED_CONFIGURATIONS, ids=shown_in_names)
def test_plan_and_save_refuse_the_same_configurations(
    values: dict[str, Any],
    error: type[CustomizedModelsError],
    registry: ModelRegistry,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    adapter = tiny_lora(tmp_path / "adapter", tiny_base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | values))
    assert_refused_alike(registry, registry.register(adapter, train_name="new"), error)


@pytest.mark.parametrize(("name", "change", "error"), REFUSED_WEIGHTS, ids=shown_in_names)
def test_plan_and_save_refuse_the_same_weights(
    name: str,
    change: Callable[[Tensors], Tensors],
    error: type[CustomizedModelsError],
    registry: ModelRegistry,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    adapter = tiny_lora(tmp_path / "adapter", tiny_base)
    weights = adapter / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    assert_refused_alike(registry, registry.register(adapter, train_name="new"), error)


@pytest.mark.parametrize(("values", "error"), REFUSED_BASES, ids=shown_in_names)
def test_plan_and_save_refuse_the_same_bases(
    values: dict[str, Any], error: type[CustomizedModelsError], tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base")
    adapter = tiny_lora(tmp_path / "adapter", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("other", base)
    customized = registry.register(adapter, train_name="new", base_model="other")
    assert_refused_alike(registry, customized, error)


def test_adapter_tensors_that_nothing_calls_for_are_all_named(
    registry: ModelRegistry, tiny_adapter: Path, tmp_path: Path
) -> None:
    file = "adapter_model.safetensors"
    (tmp_path / "adapter").mkdir()
    config = (tiny_adapter / "adapter_config.json").read_text()
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    tensors = load_file(tiny_adapter / file)
    extra = "base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"
    tensors[extra] = next(t for n, t in tensors.items() if "q_proj.lora_A" in n).clone()
    save_file(tensors, tmp_path / "adapter" / file)
    customized = registry.register(tmp_path / "adapter", train_name="more")

    with pytest.raises(UnmergedTensorsError) as caught:
        Merger(registry).plan(customized)
    assert caught.value.names == (extra,)


def test_a_base_whose_files_are_gone_cannot_be_planned(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("moved", base)
    adapter = tiny_lora(tmp_path / "adapter", base)
    customized = registry.register(adapter, train_name="support")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(BaseModelMissingError, match="relocate_base_model"):
        Merger(registry).plan(customized)


def test_a_deleted_model_cannot_be_planned(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    registry.delete(customized)
    with pytest.raises(NotFoundError):
        Merger(registry).plan(customized)


def test_planning_loads_nothing_into_the_caller_and_leaves_nothing_behind(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    script = (
        "import sys, json; from customized_models import CustomizedModel, Merger, ModelRegistry\n"
        "registry = ModelRegistry(sys.argv[1])\n"
        "plan = Merger(registry).plan(registry.get(CustomizedModel, sys.argv[2]))\n"
        "assert plan.changes\n"
        "print(json.dumps([m for m in ('torch', 'transformers', 'peft') if m in sys.modules]))"
    )
    output = subprocess.check_output(
        [sys.executable, "-c", script, str(registry.root), customized.name], text=True
    )
    assert json.loads(output) == []
    assert list(registry.jobs()) == []
    assert list((registry.root / ".staging").iterdir()) == []
    registry.delete(customized)  # no lease is left


def test_a_plan_is_a_value_and_a_table_in_terminals_and_an_escaped_one_in_notebooks(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    plan = Merger(registry).plan(customized)
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert len({plan, evolve(plan, memory=0)}) == 2
    assert len(repr(plan)) < 200
    assert repr(plan).startswith(f"<MergePlan {customized.name}: 4 of 21 tensors change")
    first, header, *rows = str(plan).splitlines()
    assert first == repr(plan)
    assert header.split() == ["tensor", "dtype", "shape", "bytes", "by", "from"]
    assert [row.split()[0] for row in rows] == [change.tensor for change in plan.changes]
    assert "&lt;MergePlan" in plan._repr_html_()

    hostile = evolve(plan.changes[0], tensor="<script>")
    shown = evolve(plan, changes=(hostile,) * 30)
    assert "<script>" not in shown._repr_html_()
    assert str(shown).splitlines()[-1] == "and 10 more"


PEAK = """
import sys
from customized_models import BaseModel, CustomizedModel, ModelRegistry
from customized_models.merging.plan import plan_merge
from customized_models.merging.proof import prove
from customized_models.sources import merge_of
from customized_models.merging.writing import write_checkpoint
import torch, transformers, peft, peft.tuners.lora
from customized_models.merging import MergeExecution  # the imports are not counted
transformers.AutoModelForCausalLM, transformers.AutoConfig

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

registry = ModelRegistry(sys.argv[1])
customized = registry.get(CustomizedModel, sys.argv[2])
before = peak()
base = registry.get(BaseModel, customized.base)
directories = registry.local_path(base), registry.local_path(customized)
with merge_of(*directories) as merged, registry.shelf.storage.staging("peak") as out:
    write_checkpoint(merged.merge, merged.layout, out, lambda *_: None, merged.merge.changed)
    prove(merged, out, "seed", lambda *_: None)
taken = peak() - before
print(plan_merge(registry.shelf, base, customized).memory, taken)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("use_dora", [False, True])
def test_a_save_stays_within_the_memory_that_its_plan_states(
    use_dora: bool, tmp_path: Path
) -> None:
    base = tiny_llama(tmp_path / "base", hidden_size=2048, intermediate_size=8192)
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("wide", base)
    options = {"r": 16, "target_modules": "all-linear", "use_dora": use_dora}
    customized = registry.register(
        tiny_lora(tmp_path / "adapter", base, **options), train_name="wide"
    )

    output = subprocess.check_output(
        [sys.executable, "-c", PEAK, str(registry.root), customized.name], text=True
    )
    stated, taken = map(int, output.split())
    assert stated / 4 < taken < stated


def test_a_registry_of_one_process_cannot_be_planned_in_another(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models", storage=MemoryStorage())
    registry.add_base_model("llama-tiny", tiny_base)
    customized = registry.register(tiny_adapter, train_name="support")
    with pytest.raises(JobFailed, match="pickle"):
        Merger(registry).plan(customized)
