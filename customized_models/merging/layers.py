"""One layer that an adapter changes, and its merge by PEFT's own code.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from attrs import field, frozen
from peft.tuners.ln_tuning.layer import LNTuningLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

from ..adapters.peft_types import AdapterType
from ..errors import MergeError, shown
from .materialize import materialized

WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""The classes that PEFT puts around a model's layers."""


@frozen
class AdaptedLayer:
    """A layer that PEFT wrapped, or a plain one whose bias came with the adapter.

    Attributes:
        path: The layer's name in the model.
        wrapper_path: The name of its wrapper. PEFT puts one wrapper inside another where it adapts
            several parameters of one layer.
        kind: The adapter's type.
        module: The wrapper, or the plain layer.
        trained_values: Values of the layer's parameters that came with the adapter, or that PEFT
            computed when it built the wrapper; they replace the base's before the merge.
        readers: Functions that read the wrapper's own parameters, by name, if those have no memory.
    """

    path: str
    wrapper_path: str
    kind: AdapterType
    module: Any = field(repr=False)
    trained_values: Mapping[str, torch.Tensor] = field(repr=False)
    readers: Mapping[str, Callable[[], torch.Tensor]] = field(factory=dict, repr=False)

    @property
    def replaces_values(self) -> bool:
        """Whether values of the base are replaced by trained ones, instead of changed."""
        copies = (AuxiliaryTrainingWrapper, LNTuningLayer)
        return isinstance(self.module, copies) or not isinstance(self.module, WRAPPERS)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The layer's parameters that a merge reads or replaces, by their names below `path`."""
        return tuple(self._wrapped_names())

    def _wrapped_names(self) -> dict[str, str]:
        """By those names, the names that they have below the module that PEFT wrapped."""
        module: Any = self.module
        if not isinstance(module, WRAPPERS):
            return {name: name for name in self.trained_values}
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
        """Those of `parameters` that are written to; a bias may come out as it was."""
        names = {*self.trained_values, *self._merged()}
        return tuple(name for name in self.parameters if name in names)

    def _merged(self) -> tuple[str, ...]:
        """The parameters that PEFT's merge writes to."""
        module: Any = self.module
        if isinstance(module, ModulesToSaveWrapper | ParamWrapper):
            return self.parameters
        if isinstance(module, TrainableTokensWrapper):
            return ("weight",)
        if isinstance(module, MultiheadAttention):
            return ("in_proj_weight", "out_proj.weight")
        return self.kind.changed(module) if isinstance(module, BaseTunerLayer) else ()

    def merge(self, values: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The merged parameters: what PEFT's `merge_and_unload` does with one module.

        Args:
            values: All of `parameters` before the merge; they may be written to.

        Returns:
            All of `parameters` after it.

        Raises:
            MergeError: PEFT cannot merge these values.

        Source: `peft/tuners/tuners_utils.py`, `BaseTuner._unload_and_optionally_merge`.
        """
        if not isinstance(self.module, WRAPPERS):
            return values
        before = {inner: values[name] for name, inner in self._wrapped_names().items()}
        if isinstance(self.module, ModulesToSaveWrapper):
            before = {}  # it replaces all of them
        base = base_of(self.module)
        try:
            with torch.no_grad(), materialized(base, before), self._own_values():
                merged = self._unloaded()
                return {name: merged[name] for name in values}
        except (RuntimeError, ValueError, IndexError) as error:  # values that do not go together
            raise MergeError(f"PEFT cannot merge {shown(self.path)}: {shown(error)}") from error

    def _unloaded(self) -> dict[str, torch.Tensor]:
        """The parameters of the module that PEFT puts in the place of its wrapper."""
        module: Any = self.module
        inside = [inner for inner in module.modules() if isinstance(inner, BaseTunerLayer)]
        check_indices: Any = torch.sparse.check_sparse_tensor_invariants
        with check_indices():
            # A ParamWrapper would unload the wrappers inside it as well.
            if not isinstance(module, ParamWrapper) and hasattr(
                module, "unload_and_optionally_merge_module"
            ):
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

    def delta(self) -> torch.Tensor:
        """What PEFT adds to the weight of a plain LoRA's layer, (out, in)."""
        with self._own_values():
            return self._delta()

    def _delta(self) -> torch.Tensor:
        (adapter,), scaling = self.module.active_adapters, self.module.scaling
        before = scaling[adapter]
        scaling[adapter] = _InPlaceFactor(before)
        try:
            with torch.no_grad():
                product: torch.Tensor = self.module.get_delta_weight(adapter)
        finally:
            scaling[adapter] = before
        return product

    # Experts that are stacked in one parameter

    @property
    def experts(self) -> int:
        """How many experts the parameter stacks; 1 if it is not a stack."""
        return self.module.num_experts if isinstance(self.module, ParamWrapper) else 1

    def delta_of_experts(
        self, up: torch.Tensor, down: torch.Tensor, start: int, end: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """What PEFT adds to some of the experts.

        Args:
            up: Factor of all experts, (out, rank x experts).
            down: Factor of all experts, (experts x rank, in).
            start: The first expert.
            end: The end, exclusive; at least two experts after `start`.
            dtype: Of the parameter.

        Returns:
            The change, shaped like that part of the parameter.
        """
        count, module = self.experts, self.module
        (adapter,) = module.active_adapters
        up = up.reshape(len(up), -1, count)[:, :, start:end].reshape(len(up), -1)
        down = down.reshape(count, -1, down.shape[1])[start:end].reshape(-1, down.shape[1])
        factors = {f"lora_B.{adapter}.weight": up, f"lora_A.{adapter}.weight": down}
        weight = {module.parameter_name: torch.empty(0, dtype=dtype)}  # PEFT asks for its dtype
        with materialized(base_of(module), weight), materialized(module, factors):
            module.num_experts = end - start
            try:
                return self._delta()
            finally:
                module.num_experts = count

    # The adapter's own values

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """LoRA's factors: up (out, rank) and down (rank, in), or those of all experts together."""
        (adapter,) = self.module.active_adapters
        up, down = (self._own_value(f"{part}.{adapter}.weight") for part in ("lora_B", "lora_A"))
        return up, down

    @property
    def scaling(self) -> float:
        """What the product of the factors is multiplied by."""
        (adapter,) = self.module.active_adapters
        scaling: float = self.module.scaling[adapter]
        return scaling

    def _own_value(self, name: str) -> torch.Tensor:
        if name in self.readers:
            return self.readers[name]()
        value: torch.Tensor = self.module.get_parameter(name).data
        return value

    def _own_values(self) -> AbstractContextManager[None]:
        return materialized(self.module, {name: read() for name, read in self.readers.items()})


class _InPlaceFactor:
    """A number that PEFT multiplies a product by; it multiplies in place, which spares a copy."""

    def __init__(self, value: float) -> None:
        self._value = value

    def __rmul__(self, product: torch.Tensor) -> torch.Tensor:
        return product.mul_(self._value)


def base_of(wrapper: Any) -> torch.nn.Module:
    """The module that PEFT wrapped."""
    inner: torch.nn.Module
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        inner = wrapper.original_module
    else:
        inner = wrapper.get_base_layer()
    return inner


def nested_wrappers(path: str, module: Any) -> Iterator[tuple[str, Any]]:
    """A wrapper and those inside it that adapt other parameters of the same layer, with paths."""
    yield path, module
    while isinstance(module, ParamWrapper) and isinstance(module.base_layer, BaseTunerLayer):
        path, module = f"{path}.base_layer", module.base_layer
        yield path, module


def stay_tied(end: AdaptedLayer, other: AdaptedLayer) -> bool:
    """Whether two tied layers that are both changed are still the same afterwards.

    A layer that is changed as a whole, for another vocabulary, is the same as itself.
    """
    one, two = end.module, other.module
    if not any(isinstance(module, WRAPPERS) for module in (one, two)):
        return torch.equal(end.trained_values["weight"], other.trained_values["weight"])
    if one is two:
        return False
    if isinstance(one, ModulesToSaveWrapper) and isinstance(two, ModulesToSaveWrapper):
        saved = [list(module.modules_to_save.parameters()) for module in (one, two)]
        return len(saved[0]) == len(saved[1]) == 1 and saved[0][0] is saved[1][0]
    return bool(getattr(getattr(one, "token_adapter", one), "tied_adapter", None))
