"""The base's values, given to PEFT for as long as it looks at one module.

Many methods compute what they start from out of the weights they adapt. So PEFT builds their
layers on the CPU: every parameter is there with its shape and dtype, none with memory, and the
module that PEFT is at has its values.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from transformers.pytorch_utils import Conv1D

from ..adapters.peft_types import AdapterType
from ..errors import UnsupportedAdapterError, UnsupportedVersionError
from .private_apis import installed
from .skeleton import Skeleton


class Placeholders:
    """The parameters of a skeleton while they hold no values."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = {id(p): p for p in model.parameters()}  # alive: an id is not used again

    def __contains__(self, parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in self._parameters


def place_on_cpu(model: torch.nn.Module) -> None:
    """Replace parameters on the meta device by such on the CPU that take one element of memory."""
    placed: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in placed:
                one = torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)
                placed[id(parameter)] = torch.nn.Parameter(one, requires_grad=False)
            module._parameters[name] = placed[id(parameter)]


def has_memory(parameter: torch.Tensor) -> bool:
    """Whether each element has a place of its own."""
    size = parameter.numel() * parameter.element_size()
    return not parameter.is_meta and parameter.untyped_storage().nbytes() >= size


@contextmanager
def filled(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give `module` values for as long as the block lasts; then it is as it was, inside as well."""
    before = [
        (m, dict(m._modules), dict(m._parameters), dict(m._buffers)) for m in module.modules()
    ]
    try:
        for name, value in values.items():
            path, _, leaf = name.rpartition(".")
            parameter = torch.nn.Parameter(value, requires_grad=False)
            module.get_submodule(path)._parameters[leaf] = parameter
        yield
    finally:
        for inner, modules, parameters, buffers in before:
            inner._modules, inner._parameters, inner._buffers = modules, parameters, buffers


@contextmanager
def values_while_injecting(
    skeleton: Skeleton, placeholders: Placeholders, config: PeftConfig, kind: AdapterType
) -> Iterator[None]:
    """While the block lasts, every module that PEFT wraps has the base's values when it does.

    What the injection makes of them stays: some methods put a residual in the weight's place.

    Raises:
        UnsupportedVersionError: PEFT has no such hook.
    """
    kinds: Mapping[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    tuner = kinds[config.peft_type]
    paths = {id(module): path for path, module in skeleton.model.named_modules()}
    create, prepare = _hook(tuner, "_create_and_replace"), _hook(tuner, "_pre_injection_hook")

    def create_with_values(
        self: Any, config: Any, name: Any, target: Any, *rest: Any, **more: Any
    ) -> None:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        with _given(skeleton, placeholders, {paths[id(base)]: base}):
            create(self, config, name, target, *rest, **more)

    def prepare_with_values(self: Any, model: Any, config: Any, name: Any) -> None:
        if config.target_modules in (None, "all-linear"):  # resolved later than we need it
            raise UnsupportedAdapterError("target_modules does not name its modules; list them")
        chosen = {
            path: module
            for path, module in model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D))
            and self._check_target_module_exists(config, path)
        }
        with _given(skeleton, placeholders, chosen):
            prepare(self, model, config, name)

    hooks: dict[str, Any] = {"_create_and_replace": create_with_values}
    if kind.prepares_all_layers:
        hooks["_pre_injection_hook"] = prepare_with_values
    inherited = {name: vars(tuner).get(name) for name in hooks}
    try:
        for name, hook in hooks.items():
            setattr(tuner, name, hook)
        yield
    finally:
        for name, own in inherited.items():
            delattr(tuner, name) if own is None else setattr(tuner, name, own)


def _hook(tuner: Any, name: str) -> Any:
    try:
        return getattr(tuner, name)
    except AttributeError as error:
        raise UnsupportedVersionError(
            f"{tuner.__name__} of PEFT {installed()['peft']} has no {name}"
        ) from error


@contextmanager
def _given(
    skeleton: Skeleton, placeholders: Placeholders, modules: Mapping[str, torch.nn.Module]
) -> Iterator[None]:
    """Values for what is empty in `modules`, by path; whatever was changed then keeps its value."""
    given = []
    for path, module in modules.items():
        for name, parameter in list(module.named_parameters()):
            if parameter in placeholders:
                below, _, leaf = name.rpartition(".")
                owner = module.get_submodule(below)
                value = skeleton.read(f"{path}.{name}")
                owner._parameters[leaf] = torch.nn.Parameter(value.clone(), requires_grad=False)
                given.append((owner, leaf, parameter, value))
    yield
    for owner, leaf, placeholder, value in given:
        now = owner._parameters[leaf]
        if now is not None and torch.equal(now.data, value):
            owner._parameters[leaf] = placeholder
