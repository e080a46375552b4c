"""PEFT's own layers in a skeleton, with exactly the values that the adapter's file holds.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from attrs import define, field
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper

from ..adapters.intake import Adapter
from ..adapters.patterns import check_patterns, many_expressions
from ..adapters.peft_types import adapter_type
from ..adapters.tensor_names import PREFIX, is_factor, module_of
from ..errors import (
    CustomizedModelsError,
    MalformedError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    UnsupportedVersionError,
    listed,
    shown,
)
from .adapter_sizes import base_parameter
from .adapter_state import AdapterStateDict
from .adapter_tensors import check_tensors
from .layers import WRAPPERS, AdaptedLayer, base_of, nested_wrappers
from .materialize import Placeholders, base_values_during_injection, has_memory, place_on_cpu
from .model_choice import without_initialization
from .private_apis import installed
from .skeleton import Skeleton

_NAME = "default"


def inject(skeleton: Skeleton, adapter: Adapter) -> Injected:
    """Let PEFT put the adapter's layers into the skeleton.

    The layers of a plain LoRA are on the meta device: they take no memory, whatever rank the
    configuration states. Others are on the CPU, because PEFT computes what they start from.

    Raises:
        UnsupportedAdapterError: PEFT cannot build it, it targets layers of an unsupported kind, or
            its patterns take long to match.
        MalformedError: It states a rank that none of its tensors can have.
    """
    kind = adapter_type(adapter.config)
    check_patterns(adapter.config, [path for path, _ in skeleton.model.named_modules() if path])
    on_cpu = kind.reads_base(adapter.config)
    if on_cpu:
        _refuse_unheld_rank(adapter)
        place_on_cpu(skeleton.model)
    placeholders = Placeholders(skeleton.model)
    try:
        config = PeftConfig.from_pretrained(str(adapter.directory))
        config.inference_mode = True
        values: AbstractContextManager[None] = without_initialization()
        if on_cpu:
            values = base_values_during_injection(skeleton, placeholders, config, kind)
        with torch.random.fork_rng(devices=[]), _quiet(), many_expressions(), values:
            model = PeftModel(skeleton.model, config, _NAME)
    except CustomizedModelsError:
        raise
    except Exception as error:  # PEFT raises all kinds of errors for a configuration it rejects
        raise UnsupportedAdapterError(
            f"PEFT cannot build the adapter's layers: {shown(error, 500)}"
        ) from error
    return Injected(skeleton, adapter, model, placeholders)


def _refuse_unheld_rank(adapter: Adapter) -> None:
    """Refuse a rank larger than any of the file's tensors: PEFT would make layers of that size."""
    largest = max(max(info.shape, default=0) for info in adapter.tensors.values())
    stated = {key: adapter.config.get(key) for key in ("r", "init_r", "target_r")}
    patterns = adapter.config.get("rank_pattern") or {}
    stated |= {f"rank_pattern {shown(key)}": value for key, value in patterns.items()}
    for key, rank in stated.items():
        if type(rank) is int and rank > largest:
            raise MalformedError(
                f"the adapter's configuration states {key} {rank}, but no dimension of its "
                f"tensors is larger than {largest}"
            )


@define
class Injected:
    """A skeleton with an adapter's layers in it.

    Attributes:
        skeleton: The base model, which PEFT has changed.
        adapter: The adapter.
        model: What PEFT made of both.
        placeholders: The base's parameters that hold no values.
    """

    skeleton: Skeleton = field(repr=False)
    adapter: Adapter = field(repr=False)
    model: PeftModel = field(repr=False)
    placeholders: Placeholders = field(repr=False)
    _file: AdapterStateDict | None = field(default=None, init=False, repr=False)
    _unused: tuple[str, ...] = field(default=(), init=False, repr=False)
    _readers: dict[int, Callable[[], torch.Tensor]] = field(factory=dict, init=False, repr=False)
    _moved: dict[str, bool] = field(factory=dict, init=False, repr=False)
    _zero: set[str] | None = field(default=None, init=False, repr=False)

    @property
    def adapter_in_memory(self) -> bool:
        """Whether the adapter's values are in memory; else each is read when it is needed."""
        return not self._readers

    def layers(self) -> list[AdaptedLayer]:
        """The layers that the adapter changes; to be called after `load`."""
        kind, found = adapter_type(self.adapter.config), []
        for path, module in _wrapped(self.skeleton.model):
            own = self._own(base_of(module), recurse=True)
            for wrapper_path, wrapper in nested_wrappers(path, module):
                readers = self._readers_of(wrapper)
                found.append(AdaptedLayer(path, wrapper_path, kind, wrapper, own, readers))
        inside = tuple(f"{layer.path}." for layer in found)
        for path, module in self.skeleton.model.named_modules():
            own = {} if f"{path}.".startswith(inside) else self._own(module, recurse=False)
            if own:
                found.append(AdaptedLayer(path, path, kind, module, own))
        return found

    def _own(self, module: torch.nn.Module, *, recurse: bool) -> dict[str, torch.Tensor]:
        """The base's parameters that have a value now."""
        every = module.named_parameters(recurse=recurse)
        return {name: p.data for name, p in every if p not in self.placeholders and has_memory(p)}

    def _readers_of(self, module: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
        found = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            inside = isinstance(module, ParamWrapper) and name.startswith("base_layer.")
            if id(parameter) in self._readers and not inside:
                found[name] = self._readers[id(parameter)]
        return found

    def sources(self, paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """The names in the adapter's file of what each wrapper is merged with, by its path."""
        return self._file.by_layer(paths, self._unused) if self._file else {}

    def is_untrained(self, layer: AdaptedLayer, adapter_tensors: Iterable[str]) -> bool:
        """Whether a layer is merged with what it starts from before a training, without effect.

        Of a LoRA, a factor is zero, or what their product is multiplied by. Of other types, all
        that starts from one number, as zeros or ones, is still that.

        Args:
            layer: The layer.
            adapter_tensors: The names in the adapter's file of what it is merged with.
        """
        modules = {module_of(name) for name in adapter_tensors if is_factor(name)}
        if modules:
            if self._zero is None:
                self._zero = self.adapter.zero_modules()
            zero = modules <= self._zero or layer.scaling == 0
            return zero and not layer.trained_values
        prefix = f"{PREFIX}{layer.wrapper_path}."
        moved = [moved for name, moved in self._moved.items() if name.startswith(prefix)]
        return bool(moved) and not any(moved)

    def load(self) -> None:
        """Let PEFT load the adapter's weights, if they are exactly what its layers call for.

        For layers on the meta device it is only noted where their values are; each is read when
        its layer is merged.

        Raises:
            UnmergedTensorsError: The adapter holds other tensors than its configuration calls for.
            MalformedError: One of its tensors has a shape its configuration does not call for.
        """
        expected = get_peft_model_state_dict(
            self.model,
            self.model.state_dict(keep_vars=True),
            adapter_name=_NAME,
            save_embedding_layers=False,
        )
        expected |= self._resized(expected)
        self._refuse_overwriting(expected)
        self._file = AdapterStateDict(self.adapter, self.model, _NAME, expected)
        self._unused = check_tensors(self.skeleton, self.adapter, expected, self._file)
        if self._reads_later(expected, self._file):
            return
        starts = {
            name: tensor.flatten()[0].clone()
            for name, tensor in expected.items()
            if _is_one_number(tensor)
        }
        self._give_memory(expected)
        with _quiet():
            loaded = self.model.load_adapter(
                str(self.adapter.directory),
                _NAME,
                torch_device="cpu",
                key_mapping=getattr(self.skeleton.model, "_checkpoint_conversion_mapping", {}),
            )
        missing = {*loaded.missing_keys} & expected.keys()
        copies = self.adapter.tensors.keys() - expected.keys()
        if strayed := {*missing, *loaded.unexpected_keys} - copies:
            raise UnmergedTensorsError(f"PEFT did not load {listed(strayed)}", strayed)
        self._moved = {name: bool((expected[name] != at).any()) for name, at in starts.items()}

    def _reads_later(self, expected: Mapping[str, torch.Tensor], file: AdapterStateDict) -> bool:
        """Note where the value of each parameter is, if none has memory.

        Parameters of the base that come with the adapter are read now.
        """
        known = {id(parameter) for parameter in self.model.parameters() if parameter.is_meta}
        if any(id(parameter) not in known for parameter in expected.values()):
            return False
        parameter: Any
        for name, parameter in expected.items():
            read = file.reader(name, parameter.dtype)
            if parameter in self.placeholders:
                owner, _, leaf = name.rpartition(".")
                value = torch.nn.Parameter(read(), requires_grad=False)
                self.model.get_submodule(owner)._parameters[leaf] = value
            else:
                self._readers[id(parameter)] = read
        return True

    def _resized(self, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base's embeddings, if they come with the adapter in another number of rows."""
        if self.skeleton.vocabulary is None:
            return {}
        empty = self.model.named_parameters(remove_duplicate=False)
        return {
            name: parameter
            for name, parameter in empty
            if parameter in self.placeholders
            and name in self.adapter.tensors.keys() - expected.keys()
            and base_parameter(name) in self.skeleton.embeddings
        }

    def _refuse_overwriting(self, expected: Mapping[str, torch.Tensor]) -> None:
        """Refuse tensors of the base itself, but for biases and embeddings of new tokens."""
        bases = {name for name, p in self.model.named_parameters() if p in self.placeholders}
        odd = {name for name in bases & expected.keys() if not name.endswith(".bias")}
        if self.skeleton.vocabulary is not None:
            odd = {name for name in odd if base_parameter(name) not in self.skeleton.embeddings}
        if odd:
            raise UnmergedTensorsError(f"the adapter addresses the base's own: {listed(odd)}", odd)

    def _give_memory(self, expected: Mapping[str, torch.Tensor]) -> None:
        """Memory for what PEFT is about to load."""
        given: dict[int, torch.nn.Parameter] = {}  # shared parameters stay shared
        for path, module in self.model.named_modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                of_base = base_parameter(f"{path}.{name}") in self.skeleton.shapes
                if f"{path}.{name}" in expected if of_base else not has_memory(parameter):
                    if of_base or id(parameter) not in given:
                        memory = torch.empty(parameter.shape, dtype=parameter.dtype)
                        given[id(parameter)] = torch.nn.Parameter(memory, requires_grad=False)
                    module._parameters[name] = given[id(parameter)]
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta and ".modules_to_save." in path:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _is_one_number(tensor: torch.Tensor) -> bool:
    """Whether all elements are there, and the same."""
    return has_memory(tensor) and tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings: what PEFT warns about is refused here, or is about the missing values."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _wrapped(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of each outermost wrapper."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, WRAPPERS):
            _check_kind(path, module)
            inside = (*inside, f"{path}.")
            yield path, module


def _check_kind(path: str, module: Any) -> None:
    base = base_of(module)
    nested = any(isinstance(inner, WRAPPERS) for inner in base.modules())
    *_, (_, innermost) = nested_wrappers(path, module)
    nested = nested or (
        isinstance(module, ParamWrapper) and not isinstance(innermost, ParamWrapper)
    )
    if nested and not isinstance(module, MultiheadAttention):
        raise UnsupportedAdapterError(
            f"{shown(path)} is a {type(module).__name__} of PEFT around a {type(base).__name__} "
            f"that is adapted inside as well; this is not supported yet"
        )
    auxiliary = isinstance(module, AuxiliaryTrainingWrapper)
    used = ("unload_and_optionally_merge_module",) if auxiliary else ("merge", "merged_adapters")
    if missing := [name for name in used if not hasattr(module, name)]:
        raise UnsupportedVersionError(
            f"the {type(module).__name__} of PEFT {installed()['peft']} has no {missing[0]}"
        )
