"""One layer that an adapter changes, and its merge by PEFT's own code.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import field, frozen
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

from .._errors import MergeError, shown
from ._values import filled

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)

_WEIGHT_AND_BIAS = ("ADAMSS", "GLORA", "LN_TUNING", "ROAD")


@frozen
class Target:
    """A layer that PEFT wrapped, or a plain one that has a bias of the adapter's.

    `path`: its name in the model. `kind`: the adapter's type. `own`: values of its parameters that
    came with the adapter, or that PEFT computed when it built the layer; they take the place of
    the base's before the merge. `stored`: what reads the parameters of the wrapper that have no
    values but while they are needed.
    """

    path: str
    kind: str
    module: Any = field(repr=False)
    own: Mapping[str, torch.Tensor] = field(repr=False)
    stored: Mapping[str, Callable[[], torch.Tensor]] = field(factory=dict, repr=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The base's parameters that a merge reads or replaces, below `path`."""
        return tuple(self._places())

    def _places(self) -> dict[str, str]:
        """Where each of them is now, below the module that was there before."""
        module: Any = self.module
        if not isinstance(module, WRAPPERS):
            return {name: name for name in self.own}
        if isinstance(module, ParamWrapper):  # those beside it may be large
            return {wrapper.parameter_name: wrapper.parameter_name for wrapper in _nested(module)}
        if isinstance(module, ModulesToSaveWrapper):  # buffers are saved along
            return {name: name for name in base_of(module).state_dict()}
        inside = [name for name, _ in base_of(module).named_parameters()]
        if isinstance(module, MultiheadAttention):  # has another layer inside
            return {n.replace(".base_layer.", "."): n for n in inside if ".lora_" not in n}
        return {name: name for name in inside}

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
            return self.parameters
        if isinstance(module, MultiheadAttention):
            return ("in_proj_weight", "out_proj.weight")
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
        places = {place: values[name] for name, place in self._places().items()}
        if isinstance(self.module, ModulesToSaveWrapper):
            places = {}  # it replaces them all
        try:
            with torch.no_grad(), filled(base_of(self.module), places), self._loaded():
                merged = self._unloaded()
                return {name: merged[name] for name in values}
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
            return self.stored[name]()
        value: torch.Tensor = self.module.get_parameter(name).data
        return value

    def _loaded(self) -> AbstractContextManager[None]:
        """While it lasts the wrapper has its values; then it is as it was, whatever PEFT did."""
        return filled(self.module, {name: read() for name, read in self.stored.items()})

    def _unloaded(self) -> dict[str, torch.Tensor]:
        """The parameters of the module that PEFT puts in the place of its wrapper."""
        module: Any = self.module
        inside = [inner for inner in module.modules() if isinstance(inner, BaseTunerLayer)]
        checked: Any = torch.sparse.check_sparse_tensor_invariants
        with checked():
            if hasattr(module, "unload_and_optionally_merge_module"):
                unloaded = module.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=None
                )
            elif self.kind == "LN_TUNING":  # takes no other argument
                module.merge(None)
                unloaded = module.get_base_layer()
            else:
                module.merge(safe_merge=False, adapter_names=None)
                unloaded = module.get_base_layer()
            merged = {name: tensor.detach() for name, tensor in unloaded.state_dict().items()}
        for inner in inside:
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


def move_together(end: Target, other: Target) -> bool:
    """Whether tied layers that are both changed are still the same afterwards.

    A layer that is changed as a whole, for another vocabulary, is the same as itself.
    """
    one, two = end.module, other.module
    if not any(isinstance(module, WRAPPERS) for module in (one, two)):
        return torch.equal(end.own["weight"], other.own["weight"])
    if one is two:
        return False
    if isinstance(one, ModulesToSaveWrapper) and isinstance(two, ModulesToSaveWrapper):
        saved = [list(module.modules_to_save.parameters()) for module in (one, two)]
        return len(saved[0]) == len(saved[1]) == 1 and saved[0][0] is saved[1][0]
    return bool(getattr(getattr(one, "token_adapter", one), "tied_adapter", None))
