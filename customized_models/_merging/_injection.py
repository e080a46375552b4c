"""PEFT's own layers in a skeleton, and one of them merged at a time.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from attrs import field, frozen
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from .._adapters import PREFIX, Adapter
from .._checkpoints import Checkpoint, read_tensor
from .._errors import (
    MalformedError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    UnsupportedVersionError,
    listed,
    shown,
)
from ._skeleton import Skeleton
from ._versions import installed

_NAME = "default"
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def inject(skeleton: Skeleton, adapter: Adapter) -> Injected:
    """Have PEFT put the adapter's layers into the skeleton.

    They are on the meta device as well: without memory, whatever rank the configuration states.

    Raises:
        UnsupportedAdapterError: PEFT cannot build it, or it targets layers of an unsupported kind.
    """
    of_base = frozenset(id(parameter) for parameter in skeleton.model.parameters())
    try:
        config = PeftConfig.from_pretrained(str(adapter.directory))
        config.inference_mode = True
        with torch.random.fork_rng(devices=[]), _quiet():
            model = PeftModel(skeleton.model, config, _NAME)
    except Exception as error:  # PEFT raises of all kinds at a configuration it does not like
        raise UnsupportedAdapterError(
            f"PEFT cannot build the adapter's layers: {shown(error, 500)}"
        ) from error
    return Injected(model, [Target(*found) for found in _wrapped(skeleton.model)], of_base)


@frozen
class Injected:
    """A skeleton with an adapter's layers in it."""

    model: PeftModel = field(repr=False)
    targets: list[Target]
    of_base: frozenset[int] = field(repr=False)

    def load(self, skeleton: Skeleton, base: Checkpoint, adapter: Adapter) -> None:
        """Have PEFT load the adapter's weights, if they are exactly what its layers call for.

        Raises:
            UnmergedTensorsError: the adapter holds other tensors than its configuration calls for.
            MalformedError: one of its tensors has a shape its configuration does not call for.
        """
        expected = get_peft_model_state_dict(
            self.model, adapter_name=_NAME, save_embedding_layers=False
        )
        _check_tensors(skeleton, base, adapter, expected)
        self._give_memory()
        with _quiet():
            loaded = self.model.load_adapter(
                str(adapter.directory),
                _NAME,
                torch_device="cpu",
                key_mapping=getattr(skeleton.model, "_checkpoint_conversion_mapping", {}),
            )
        if strayed := {*loaded.missing_keys, *loaded.unexpected_keys}:
            raise UnmergedTensorsError(f"PEFT did not load {listed(strayed)}", strayed)

    def _give_memory(self) -> None:
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in self.of_base:
                    memory = torch.empty(parameter.shape, dtype=parameter.dtype)
                    module._parameters[name] = torch.nn.Parameter(memory, requires_grad=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing PEFT warns of goes on here: it is refused, or means the values that are not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_tensors(
    skeleton: Skeleton, base: Checkpoint, adapter: Adapter, expected: Mapping[str, torch.Tensor]
) -> None:
    extra = adapter.tensors.keys() - expected.keys()
    if extra := {name for name in extra if not _is_copy(name, skeleton, base, adapter)}:
        raise UnmergedTensorsError(
            f"the adapter holds tensors that its configuration does not call for, or that address "
            f"the base's own: {listed(extra)}",
            extra,
        )
    if missing := expected.keys() - adapter.tensors.keys():
        raise UnmergedTensorsError(
            f"the adapter lacks tensors that its configuration calls for: {listed(missing)}",
            missing,
        )
    for name, tensor in expected.items():
        shape = adapter.tensors[name].shape
        if shape != tuple(tensor.shape):
            raise MalformedError(
                f"{shown(name)} has the shape {shape}; the adapter's configuration and base call "
                f"for {tuple(tensor.shape)}"
            )


def _is_copy(name: str, skeleton: Skeleton, base: Checkpoint, adapter: Adapter) -> bool:
    """Whether it is a base's tensor, bit for bit: PEFT saves that of a targeted `lm_head` along."""
    of = skeleton.names.get(name.removeprefix(PREFIX).replace(".base_layer.", "."))
    info = adapter.tensors[name]
    if of is None or (info.dtype, info.shape) != (base.infos[of].dtype, base.infos[of].shape):
        return False
    copy, own = read_tensor(adapter.directory / info.file, info), base.read(of)
    return torch.equal(copy.view(torch.uint8), own.view(torch.uint8))


def _wrapped(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of each layer that PEFT put around one of the model's."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, _WRAPPERS):
            _check_kind(path, module)
            inside = (*inside, f"{path}.")
            yield path, module


def _check_kind(path: str, module: Any) -> None:
    if isinstance(module, ModulesToSaveWrapper):
        used = ("original_module", "unload_and_optionally_merge_module")
        nested = any(isinstance(inner, _WRAPPERS) for inner in module.modules() if inner != module)
        if nested or module.state_dict().keys() != dict(module.named_parameters()).keys():
            raise UnsupportedAdapterError(
                f"{shown(path)} in modules_to_save holds adapted layers or buffers; this is not "
                f"supported yet"
            )
    elif type(module) is Linear and type(module.get_base_layer()) is torch.nn.Linear:
        used = ("merge", "merged_adapters")
    else:
        kind = type(module.get_base_layer()) if isinstance(module, BaseTunerLayer) else type(module)
        raise UnsupportedAdapterError(
            f"{shown(path)} is a {kind.__name__}; only adapters on Linear layers are supported yet"
        )
    if missing := [name for name in used if not hasattr(module, name)]:
        raise UnsupportedVersionError(
            f"the {type(module).__name__} of PEFT {installed()['peft']} has no {missing[0]}"
        )


@frozen
class Target:
    """A layer that PEFT wrapped. `path`: its name in the model."""

    path: str
    wrapper: Any = field(repr=False)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The base's parameters that a merge reads or replaces, below `path`."""
        return tuple(name for name, _ in self._base.named_parameters())

    @property
    def changed(self) -> tuple[str, ...]:
        """Those that come out changed."""
        if isinstance(self.wrapper, ModulesToSaveWrapper):
            return self.parameters
        return ("weight",)  # a LoRA without biases

    @property
    def _base(self) -> torch.nn.Module:
        saved = isinstance(self.wrapper, ModulesToSaveWrapper)
        base: torch.nn.Module = (
            self.wrapper.original_module if saved else self.wrapper.get_base_layer()
        )
        return base

    def merge(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The merged parameters. `values`: the base's, all of them; they may be written to.

        This is what PEFT's `merge_and_unload` does with one module.
        """
        with torch.no_grad(), _filled(self._base, values):
            if hasattr(self.wrapper, "unload_and_optionally_merge_module"):
                merged = self.wrapper.unload_and_optionally_merge_module(
                    merge=True, safe_merge=False, adapter_names=None
                )
            else:
                self.wrapper.merge(safe_merge=False, adapter_names=None)
                merged = self.wrapper.get_base_layer()
                self.wrapper.merged_adapters.clear()  # so that it can be merged again
            return {name: parameter.data for name, parameter in merged.named_parameters()}


@contextmanager
def _filled(module: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Give `module` values for as long as the block lasts."""
    empty = dict(module.named_parameters())
    try:
        for name, value in values.items():
            _set(module, name, torch.nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for name, parameter in empty.items():
            _set(module, name, parameter)


def _set(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter
