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

from ..adapters.peft_types import AdapterType
from ..errors import MergeError, shown
from .materialize import filled

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


@frozen
class Target:
    """A layer that PEFT wrapped, or a plain one that has a bias of the adapter's.

    `path`: its name in the model, and `place` that of the wrapper: PEFT puts one inside another
    where it adapts several parameters of a layer by themselves. `kind`: the adapter's type. `own`:
    values of its parameters that came with the adapter, or that PEFT computed when it built the
    layer; they take the place of the base's before the merge. `stored`: what reads the parameters
    of the wrapper that have no values but while they are needed.
    """

    path: str
    place: str
    kind: AdapterType
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
        if isinstance(module, ParamWrapper):
            return {module.parameter_name: module.parameter_name}
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
        return self.kind.changed(module)

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
        with self._loaded():
            return self._delta()

    def _delta(self) -> torch.Tensor:
        (adapter,), scaling = self.module.active_adapters, self.module.scaling
        before = scaling[adapter]
        scaling[adapter] = _InPlace(before)
        try:
            with torch.no_grad():
                product: torch.Tensor = self.module.get_delta_weight(adapter)
        finally:
            scaling[adapter] = before
        return product

    @property
    def experts(self) -> int:
        """How many are stacked in the parameter; 1 where it is no stack."""
        return self.module.num_experts if isinstance(self.module, ParamWrapper) else 1

    def delta_of_experts(
        self, up: torch.Tensor, down: torch.Tensor, start: int, end: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """What PEFT adds to the experts from `start` to `end`, exclusive: at least two of them.

        `up` (out, rank x experts) and `down` (experts x rank, in) are the factors of all.
        """
        count, module = self.experts, self.module
        (adapter,) = module.active_adapters
        up = up.reshape(len(up), -1, count)[:, :, start:end].reshape(len(up), -1)
        down = down.reshape(count, -1, down.shape[1])[start:end].reshape(-1, down.shape[1])
        factors = {f"lora_B.{adapter}.weight": up, f"lora_A.{adapter}.weight": down}
        weight = {module.parameter_name: torch.empty(0, dtype=dtype)}  # it is asked for its dtype
        with filled(base_of(module), weight), filled(module, factors):
            module.num_experts = end - start
            try:
                return self._delta()
            finally:
                module.num_experts = count

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a LoRA: up (out, rank) and down (rank, in), or those of all experts together."""
        (adapter,) = self.module.active_adapters
        up, down = (self._value(f"{part}.{adapter}.weight") for part in ("lora_B", "lora_A"))
        return up, down

    def _value(self, name: str) -> torch.Tensor:
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
            if isinstance(module, ParamWrapper):  # would unload those inside of it as well
                module.merge(safe_merge=False, adapter_names=None)
                unloaded = module.get_base_layer()
            elif hasattr(module, "unload_and_optionally_merge_module"):
                unloaded = module.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=None
                )
            else:
                module.merge(**self.kind.merge_arguments)
                unloaded = module.get_base_layer()
            merged = {name: tensor.detach() for name, tensor in unloaded.state_dict().items()}
        for inner in inside:
            inner.merged_adapters.clear()  # so that it can be merged again
        return merged


class _InPlace:
    """A factor that PEFT multiplies a product with; it spares a copy of the product."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __rmul__(self, product: torch.Tensor) -> torch.Tensor:
        return product.mul_(self._value)


def base_of(wrapper: Any) -> torch.nn.Module:
    """The module that was there before PEFT wrapped it."""
    inner: torch.nn.Module
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        inner = wrapper.original_module
    else:
        inner = wrapper.get_base_layer()
    return inner


def each_wrapper(path: str, module: Any) -> Iterator[tuple[str, Any]]:
    """A wrapper and its place; those of a layer's parameters are one inside another."""
    yield path, module
    while isinstance(module, ParamWrapper) and isinstance(module.base_layer, BaseTunerLayer):
        path, module = f"{path}.base_layer", module.base_layer
        yield path, module


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
