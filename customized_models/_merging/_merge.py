"""`Merge`: base and adapter seen as one checkpoint whose tensors are computed when asked for.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import evolve, frozen

from .._adapters import Adapter, check_fits
from .._checkpoints import Checkpoint, TensorInfo, dtype_name
from .._errors import (
    BaseModelMismatch,
    MergeError,
    NonFiniteError,
    UnchangedTargetsError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
    listed,
    shown,
)
from ._fused import Merging
from ._injection import Target, inject
from ._skeleton import Skeleton, build_skeleton
from ._versions import installed

_MERGEABLE = ("F16", "BF16", "F32")


def plan(base: Checkpoint, adapter: Adapter) -> Merge:
    """See `open_merge`, which has refused by configuration what it can."""
    check_fits(adapter, base)
    skeleton = build_skeleton(base)
    shapes = {name: tuple(p.shape) for name, p in skeleton.model.named_parameters()}
    dtype = next(skeleton.model.parameters()).dtype
    injected = inject(skeleton, adapter)
    modules = {}
    for target in injected.targets:
        names = _checkpoint_names(target, skeleton, base, shapes)
        modules.update({names[name]: _Module(target, names) for name in target.changed})
    injected.load(skeleton, base, adapter)
    return Merge(base, modules, dtype)


@frozen
class _Module:
    """A layer to merge, and the checkpoint's name of each of its parameters."""

    target: Target
    names: Mapping[str, str]


def _checkpoint_names(
    target: Target, skeleton: Skeleton, base: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    names = {}
    for name in target.parameters:
        parameter = f"{target.path}.{name}"
        if parameter in skeleton.tied:
            raise UnsupportedAdapterError(
                f"the adapter changes {shown(parameter)}, which the base model ties to another "
                f"tensor: PEFT would change both, which is not what was trained"
            )
        if parameter in skeleton.converted:
            raise UnsupportedArchitectureError(
                f"transformers converts {shown(parameter)} while it loads the base; merging into "
                f"converted tensors is not supported yet"
            )
        if parameter not in skeleton.names:
            raise BaseModelMismatch(f"the base model's files lack {shown(parameter)}")
        info = base.infos[skeleton.names[parameter]]
        if info.shape != shapes[parameter]:
            raise BaseModelMismatch(
                f"{shown(info.name)} has the shape {info.shape} in the base's files and "
                f"{shapes[parameter]} by its config.json"
            )
        if info.dtype not in _MERGEABLE:
            raise UnsupportedAdapterError(
                f"{shown(info.name)} is quantized to {info.dtype}; use the model it was made from"
            )
        names[name] = info.name
    return names


class Merge:
    """An adapter merged into its base, seen as a checkpoint; a `TensorSource`.

    `infos`: every tensor; where one is not as in the base's file, its offsets mean nothing.
    `changed`: the names that the adapter changes. `recipe`: what the merged bits depend on.
    """

    def __init__(self, base: Checkpoint, modules: Mapping[str, _Module], dtype: torch.dtype):
        self._base = base
        self._modules = modules
        self._dtype = dtype
        self._merging = Merging()
        self._unread = set(modules)
        self.changed = frozenset(modules)
        self.infos: Mapping[str, TensorInfo] = {
            **base.infos,
            **{name: evolve(base.infos[name], dtype=dtype_name(dtype)) for name in modules},
        }
        self.recipe: Mapping[str, Any] = {
            "arithmetic": "peft merge_and_unload, each module by itself",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            **installed(),
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that checkpoint name, merged now if the adapter changes it.

        Raises:
            NonFiniteError: the merged tensor holds NaN or infinity.
            UnchangedTargetsError: the merged tensor is the base's.
        """
        if name not in self._modules:
            return self._base.read(name)
        module = self._modules[name]
        values = {parameter: self._before(of) for parameter, of in module.names.items()}
        heads = {parameter: _head(value).clone() for parameter, value in values.items()}
        merged = self._merging.merge(module.target, values)
        for parameter, of in module.names.items():
            self._check(of, merged[parameter], heads[parameter])
        self._unread.discard(name)
        return next(merged[p] for p, of in module.names.items() if of == name)

    def _before(self, name: str) -> torch.Tensor:
        """A fresh copy of the base's tensor, as transformers would load it."""
        return self._base.read(name).to(self._dtype)

    def _check(self, name: str, merged: torch.Tensor, head: torch.Tensor) -> None:
        extremes = torch.stack(torch.aminmax(merged))  # NaN if there is any
        if not torch.isfinite(extremes).all():
            raise NonFiniteError(f"merging gives NaN or infinity in {shown(name)}")
        same = torch.equal(_head(merged), head) and torch.equal(merged, self._before(name))
        if same and name in self.changed:
            raise UnchangedTargetsError(f"the adapter leaves {shown(name)} as it is in the base")
        if not same and name not in self.changed:
            raise MergeError(f"merging changed {shown(name)}, which the adapter does not target")

    def finish(self) -> None:
        """State that every tensor has been taken.

        Raises:
            UnmergedTensorsError: some that the adapter changes were never read.
        """
        if self._unread:
            raise UnmergedTensorsError(f"never merged: {listed(self._unread)}", self._unread)


def _head(tensor: torch.Tensor) -> torch.Tensor:
    """Its first elements, which tell most changed tensors from the base's."""
    return tensor.reshape(-1)[:4096]
