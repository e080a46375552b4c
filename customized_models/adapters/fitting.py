"""Checks by the names and shapes in the headers that an adapter fits a base model."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import BaseModelMismatch, listed
from ..files.safetensors import Checkpoint, TensorInfo
from .intake import Adapter
from .peft_types import adapter_type
from .tensor_names import PREFIX, layer_of, tail


def check_fits(adapter: Adapter, base: Checkpoint) -> None:
    """Check by names and shapes in the headers that the adapter may have been trained on `base`.

    Where `base` has a weight with the name of an adapted module, the shapes must agree. Other
    modules are not checked as long as some are found, because transformers renames and fuses the
    tensors of some architectures while it loads them. Where it renames all, or a weight with only
    the end of the name has another shape, it is enough that some module's factors have the shape of
    a matrix in their layer: what a vision tower calls `k_proj` today may have another name in the
    files, where the language model has a `k_proj` too. The merge plan checks the rest.

    Raises:
        BaseModelMismatch: Shapes differ, the base has too few layers, or no module is found.
    """
    rows = _rows_outside_of_layers(adapter)
    here, weights = {name: [info] for name, info in base.infos.items()}, _by_tail(base)
    modules = {name.split(".")[-2] for name in base.infos if "." in name}
    layers = max((layer_of(name) for name in base.infos), default=-1)
    wrong: set[str] = set()
    odd: set[str] = set()  # of another shape than a weight whose name ends alike
    found = False
    for name, info in adapter.tensors.items():
        path = name.removeprefix(PREFIX)
        if layer_of(path) > layers:
            wrong.add(name)
            continue
        named = _targets(path, here)
        targets = named or _targets(tail(path), weights)
        if not targets:  # renamed while it is loaded, or a tied head without a tensor
            alike = modules.intersection(path.split("."))
            found = found or "experts" in alike or bool(alike and layer_of(path) < 0)
            found = found or path.startswith("lm_head.")
            continue
        found = True
        if not any(_same_shape(path, info, target, adapter, rows) for target in targets):
            (wrong if named else odd).add(name)
    elsewhere = adapter_type(adapter.config).shared or adapter.config.get("target_parameters")
    sure = not odd and (found or elsewhere)
    if wrong or not (sure or _has_shapes_of(adapter, base)):
        wrong |= odd
        reason = f"{listed(wrong)} do not fit" if wrong else "none belongs to a module of it"
        raise BaseModelMismatch(
            f"the adapter was not trained on this base model, as its tensors show: {reason}; "
            f"register it with the base model that it was trained on; if the training added "
            f"tokens, save the adapter with its embeddings (save_embedding_layers=True)"
        )


def _has_shapes_of(adapter: Adapter, base: Checkpoint) -> bool:
    """Whether any LoRA changes a matrix of a shape that the base has in the same layer."""
    known = {(layer_of(name), info.shape) for name, info in base.infos.items()}
    for name, down in adapter.tensors.items():
        up = adapter.tensors.get(name.replace(".lora_A.", ".lora_B."))
        if up is None or up is down or not len(up.shape) == len(down.shape) == 2:
            continue
        if (layer_of(name), (up.shape[0], down.shape[1])) in known:
            return True
    return False


def _rows_outside_of_layers(adapter: Adapter) -> set[int]:
    """How many rows the adapter's own matrices have that are in no layer, as embeddings are."""
    own = (name for name in adapter.tensors if ".lora_" not in name and layer_of(name) < 0)
    shapes = (adapter.tensors[name].shape for name in own)
    return {shape[0] for shape in shapes if len(shape) == 2}


def _by_tail(base: Checkpoint) -> dict[str, list[TensorInfo]]:
    """The base's tensors by tail. A language model and a vision tower may share one."""
    result: dict[str, list[TensorInfo]] = {}
    for name, info in base.infos.items():
        result.setdefault(tail(name), []).append(info)
    return result


def _targets(path: str, infos: Mapping[str, list[TensorInfo]]) -> list[TensorInfo]:
    """The tensor of that name, or the weight of the nearest module around it."""
    if path in infos:
        return infos[path]
    while "." in path:
        path = path.rpartition(".")[0]
        if f"{path}.weight" in infos:
            return infos[f"{path}.weight"]
    return []


def _same_shape(
    path: str, info: TensorInfo, target: TensorInfo, adapter: Adapter, rows: Collection[int]
) -> bool:
    """Whether a LoRA factor or a full copy fits its target; other kinds are not checked.

    `rows`: what the target may have instead, if its vocabulary was resized.
    """
    if tail(path) == tail(target.name):
        resizable = layer_of(path) < 0 and len(info.shape) == 2
        return info.shape[resizable:] == target.shape[resizable:]
    blocks = adapter.config.get("use_bdlora")
    if len(target.shape) != 2 or len(info.shape) != 2 or blocks:
        return True
    out, into = target.shape[::-1] if adapter.config.get("fan_in_fan_out") else target.shape
    outs = {out, *rows} if layer_of(path) < 0 else {out}
    if path.endswith(".lora_A.weight"):
        return info.shape[1] == into
    if path.endswith(".lora_B.weight"):
        return info.shape[0] in outs
    return True
