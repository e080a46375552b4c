"""The base's values, given to PEFT only while it looks at one module.

Many adapter types compute what they start from out of the weights that they adapt. PEFT builds the
layers of those on the CPU: every parameter is there with its shape and dtype, none takes memory,
and only the module that PEFT is working on has its values.

This module is only imported when a merge is prepared.
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
    """The parameters of a skeleton as long as they hold no values."""

    def __init__(self, model: torch.nn.Module) -> None:
        # Keeping them alive keeps their ids from being used again.
        self._parameters = {id(p): p for p in model.parameters()}

    def __contains__(self, parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in self._parameters


def place_on_cpu(model: torch.nn.Module) -> None:
    """Replace parameters on the meta device by ones on the CPU that take one element of memory."""
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
    """Whether each element of the tensor has memory of its own."""
    size = parameter.numel() * parameter.element_size()
    return not parameter.is_meta and parameter.untyped_storage().nbytes() >= size


@contextmanager
def materialized(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give parameters of `module` these values within the `with` block.

    Afterwards the module and everything inside it is as it was before, whatever the block did.

    Args:
        module: The module.
        values: By the parameter's name below `module`.
    """
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
def base_values_during_injection(
    skeleton: Skeleton, placeholders: Placeholders, config: PeftConfig, kind: AdapterType
) -> Iterator[None]:
    """Within the `with` block, each module that PEFT wraps has the base's values when it does.

    What PEFT changes in them then stays: some types put a residual in the weight's place.

    Source: `peft/tuners/tuners_utils.py`, `BaseTuner.inject_adapter`, which calls both hooks.

    Raises:
        UnsupportedVersionError: PEFT has no such hook.
    """
    tuners: Mapping[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
    tuner = tuners[config.peft_type]
    paths = {id(module): path for path, module in skeleton.model.named_modules()}
    create, prepare = _hook(tuner, "_create_and_replace"), _hook(tuner, "_pre_injection_hook")

    def create_with_values(
        self: Any, config: Any, name: Any, target: Any, *rest: Any, **more: Any
    ) -> None:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        with _given(skeleton, placeholders, {paths[id(base)]: base}):
            create(self, config, name, target, *rest, **more)

    def prepare_with_values(self: Any, model: Any, config: Any, name: Any) -> None:
        if config.target_modules in (None, "all-linear"):  # PEFT resolves these later
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
    """Values for the placeholders in `modules`, by path; what the block changes keeps its value."""
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
