"""One layer that an adapter changes, and its merge by PEFT's own code.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

from .._checkpoints import TensorInfo, read_tensor
from .._errors import MergeError, shown
from ._values import filled

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)

_WEIGHT_AND_BIAS = ("ADAMSS", "GLORA", "LN_TUNING", "ROAD")


@frozen
class Stored:
    """A tensor in the adapter's file, and the dtype in which PEFT would hold it."""

    path: Path
    info: TensorInfo
    dtype: torch.dtype

    def read(self) -> torch.Tensor:
        """Its values, in fresh memory."""
        return read_tensor(self.path, self.info).to(self.dtype)


@frozen
class Target:
    """A layer that PEFT wrapped, or a plain one that has a bias of the adapter's.

    `path`: its name in the model. `kind`: the adapter's type. `own`: values of its parameters that
    came with the adapter, or that PEFT computed when it built the layer; they take the place of
    the base's before the merge. `stored`: the parameters of the wrapper that have no values but
    while they are needed.
    """

    path: str
    kind: str
    module: Any = field(repr=False)
    own: Mapping[str, torch.Tensor] = field(repr=False)
    stored: Mapping[str, Stored] = field(factory=dict, repr=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The base's parameters that a merge reads or replaces, below `path`."""
        if not isinstance(self.module, WRAPPERS):
            return tuple(self.own)
        return tuple(name for name, _ in base_of(self.module).named_parameters())

    @property
    def changed(self) -> tuple[str, ...]:
        """Those that come out changed; a bias beside a weight may come out as it was."""
        names = {*self.own, *self._merged()}
        return tuple(name for name in self.parameters if name in names)

    def _merged(self) -> tuple[str, ...]:
        """Those that PEFT's merge writes to."""
        module: Any = self.module
        if isinstance(module, ModulesToSaveWrapper):
            return self.parameters
        if isinstance(module, TrainableTokensWrapper):
            return ("weight",)
        if isinstance(module, ParamWrapper):
            return tuple(wrapper.parameter_name for wrapper in _nested(module))
        if not isinstance(module, BaseTunerLayer):
            return ()
        if self.kind == "BEFT":
            return ("bias",)
        with_bias = any(getattr(module, "lora_bias", {}).values())
        if self.kind == "IA3":
            with_bias = not getattr(module, "is_feedforward")  # noqa: B009
        return ("weight", "bias") if with_bias or self.kind in _WEIGHT_AND_BIAS else ("weight",)

    def merge(self, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The merged parameters. `values`: all of them as they were; they may be written to.

        This is what PEFT's `merge_and_unload` does with one module.

        Raises:
            MergeError: PEFT cannot merge these values.
        """
        if not isinstance(self.module, WRAPPERS):
            return values
        try:
            with torch.no_grad(), filled(base_of(self.module), values), self._loaded():
                return {name: p.data for name, p in self._unloaded().named_parameters()}
        except (RuntimeError, ValueError, IndexError) as error:  # values that do not go together
            raise MergeError(f"PEFT cannot merge {shown(self.path)}: {shown(error)}") from error

    def delta(self) -> torch.Tensor:
        """What PEFT adds to the weight of a plain LoRA's layer."""
        (adapter,) = self.module.active_adapters
        with torch.no_grad(), self._loaded():
            product: torch.Tensor = self.module.get_delta_weight(adapter)
            return product

    def value(self, name: str) -> torch.Tensor:
        """That of a parameter of the wrapper."""
        if name in self.stored:
            return self.stored[name].read()
        value: torch.Tensor = self.module.get_parameter(name).data
        return value

    def _loaded(self) -> AbstractContextManager[None]:
        """While it lasts the wrapper has the values that are stored."""
        return filled(self.module, {name: stored.read() for name, stored in self.stored.items()})

    def _unloaded(self) -> torch.nn.Module:
        merged: torch.nn.Module
        checked: Any = torch.sparse.check_sparse_tensor_invariants
        with filled(self.module, {}), checked():
            if hasattr(self.module, "unload_and_optionally_merge_module"):
                merged = self.module.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=None
                )
            elif self.kind == "LN_TUNING":  # takes no other argument
                self.module.merge(None)
                merged = self.module.get_base_layer()
            else:
                self.module.merge(safe_merge=False, adapter_names=None)
                merged = self.module.get_base_layer()
        for inner in self.module.modules():
            if isinstance(inner, BaseTunerLayer):
                inner.merged_adapters.clear()  # so that it can be merged again
        return merged


def base_of(wrapper: Any) -> torch.nn.Module:
    """The module that was there before PEFT wrapped it."""
    inner: torch.nn.Module
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        inner = wrapper.original_module
    else:
        inner = wrapper.get_base_layer()
    return inner


def _nested(wrapper: Any) -> Iterator[Any]:
    """A wrapper of a parameter, and those of other parameters of the same module inside of it."""
    while isinstance(wrapper, ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def move_together(ends: list[Target]) -> bool:
    """Whether tied layers of which these are changed are still the same afterwards."""
    head, embedding = ends[0], ends[-1]
    one, other = head.module, embedding.module
    if not any(isinstance(module, WRAPPERS) for module in (one, other)):
        return torch.equal(head.own["weight"], embedding.own["weight"])  # a resized vocabulary
    if one is other:
        return False
    if isinstance(one, ModulesToSaveWrapper) and isinstance(other, ModulesToSaveWrapper):
        saved = [list(module.modules_to_save.parameters()) for module in (one, other)]
        return len(saved[0]) == len(saved[1]) == 1 and saved[0][0] is saved[1][0]
    return bool(getattr(getattr(one, "token_adapter", one), "tied_adapter", None))
