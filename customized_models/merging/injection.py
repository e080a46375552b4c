"""PEFT's own layers in a skeleton, holding exactly what the adapter's file holds.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from attrs import define, field
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper

from ..adapters.intake import Adapter
from ..adapters.peft_types import adapter_type
from ..errors import (
    CustomizedModelsError,
    MalformedError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    UnsupportedVersionError,
    listed,
    shown,
)
from ..files.safetensors import read_tensor
from .adapter_tensors import StoredAdapter
from .layers import WRAPPERS, Target, base_of, each_wrapper
from .materialize import Placeholders, has_memory, place_on_cpu, values_while_injecting
from .private_apis import installed
from .skeleton import Skeleton, base_parameter

_NAME = "default"


def inject(skeleton: Skeleton, adapter: Adapter) -> Injected:
    """Have PEFT put the adapter's layers into the skeleton.

    Those of a plain LoRA are on the meta device as well: without memory, whatever rank the
    configuration states. Others are on the CPU, because PEFT computes what they start from.

    Raises:
        UnsupportedAdapterError: PEFT cannot build it, or it targets layers of an unsupported kind.
        MalformedError: it states a rank that none of its tensors can have.
    """
    kind = adapter_type(adapter.config)
    on_cpu = kind.reads_base(adapter.config)
    if on_cpu:
        _refuse_unheld_rank(adapter)
        place_on_cpu(skeleton.model)
    placeholders = Placeholders(skeleton.model)
    try:
        config = PeftConfig.from_pretrained(str(adapter.directory))
        config.inference_mode = True
        values: AbstractContextManager[None] = nullcontext()
        if on_cpu:
            values = values_while_injecting(skeleton, placeholders, config, kind)
        with torch.random.fork_rng(devices=[]), _quiet(), values:
            model = PeftModel(skeleton.model, config, _NAME)
    except CustomizedModelsError:
        raise
    except Exception as error:  # PEFT raises of all kinds at a configuration it does not like
        raise UnsupportedAdapterError(
            f"PEFT cannot build the adapter's layers: {shown(error, 500)}"
        ) from error
    return Injected(skeleton, adapter, model, placeholders)


def _refuse_unheld_rank(adapter: Adapter) -> None:
    """PEFT will make layers of the ranks that are stated: let no file claim more than it brings."""
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

    Once it is loaded, `sources` tells what of the adapter's file each layer is merged with.
    """

    skeleton: Skeleton = field(repr=False)
    adapter: Adapter = field(repr=False)
    model: PeftModel = field(repr=False)
    placeholders: Placeholders = field(repr=False)
    _file: StoredAdapter | None = field(default=None, init=False, repr=False)
    _unused: tuple[str, ...] = field(default=(), init=False, repr=False)
    _readers: dict[int, Callable[[], torch.Tensor]] = field(factory=dict, init=False, repr=False)

    @property
    def keeps_values(self) -> bool:
        """Whether values of the adapter are in memory, and not only read when they are needed."""
        return not self._readers

    def targets(self) -> list[Target]:
        """What the adapter changes, once it is loaded."""
        kind, found = adapter_type(self.adapter.config), []
        for path, module in _wrapped(self.skeleton.model):
            own = self._own(base_of(module), recurse=True)
            for place, wrapper in each_wrapper(path, module):
                readers = self._readers_of(wrapper)
                found.append(Target(path, place, kind, wrapper, own, readers))
        inside = tuple(f"{target.path}." for target in found)
        for path, module in self.skeleton.model.named_modules():
            own = {} if f"{path}.".startswith(inside) else self._own(module, recurse=False)
            if own:
                found.append(Target(path, path, kind, module, own))
        return found

    def _own(self, module: torch.nn.Module, *, recurse: bool) -> dict[str, torch.Tensor]:
        """Parameters of the base that are no longer without a value."""
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
        """By the path of a layer, the names in the adapter's file of what it is merged with."""
        return self._file.by_layer(paths, self._unused) if self._file else {}

    def load(self) -> None:
        """Have PEFT load the adapter's weights, if they are exactly what its layers call for.

        Those of layers without memory are only noted: each is read when its layer is merged.

        Raises:
            UnmergedTensorsError: the adapter holds other tensors than its configuration calls for.
            MalformedError: one of its tensors has a shape its configuration does not call for.
        """
        expected = get_peft_model_state_dict(
            self.model,
            self.model.state_dict(keep_vars=True),
            adapter_name=_NAME,
            save_embedding_layers=False,
        )
        expected |= self._resized(expected)
        self._refuse_overwriting(expected)
        self._file = StoredAdapter(self.adapter, self.model, _NAME)
        self._unused = _check_tensors(self.skeleton, self.adapter, expected, self._file.tensors)
        if self._reads_later(expected, self._file):
            return
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

    def _reads_later(self, expected: Mapping[str, torch.Tensor], file: StoredAdapter) -> bool:
        """Note where the values of each parameter lie, if none has memory; the base's are read."""
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
        """The base's embeddings that come along because they have another number of rows."""
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
        """The base's own tensors may come with an adapter that trained biases or new tokens."""
        bases = {name for name, p in self.model.named_parameters() if p in self.placeholders}
        odd = {name for name in bases & expected.keys() if not name.endswith(".bias")}
        if self.skeleton.vocabulary is not None:
            odd = {name for name in odd if base_parameter(name) not in self.skeleton.embeddings}
        if odd:
            raise UnmergedTensorsError(f"the adapter addresses the base's own: {listed(odd)}", odd)

    def _give_memory(self, expected: Mapping[str, torch.Tensor]) -> None:
        given: dict[int, torch.nn.Parameter] = {}  # what was one parameter stays one
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Nothing PEFT warns of goes on here: it is refused, or means the values that are not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_tensors(
    skeleton: Skeleton,
    adapter: Adapter,
    expected: Mapping[str, torch.Tensor],
    stated: Mapping[str, torch.Tensor],
) -> tuple[str, ...]:
    """The names of copies of the base's tensors, which nothing is done with.

    Raises:
        UnmergedTensorsError, MalformedError: as `Injected.load`.
    """
    copies = stated.keys() - expected.keys()
    if extra := {name for name in copies if not _is_copy(name, skeleton, adapter)}:
        raise UnmergedTensorsError(
            f"the adapter holds tensors that its configuration does not call for, or that address "
            f"the base's own: {listed(extra)}",
            extra,
        )
    if missing := expected.keys() - stated.keys():
        raise UnmergedTensorsError(
            f"the adapter lacks tensors that its configuration calls for: {listed(missing)}",
            missing,
        )
    for name, tensor in expected.items():
        shape = tuple(stated[name].shape)
        if shape != tuple(tensor.shape):
            raise MalformedError(
                f"{shown(name)} has the shape {shape}; the adapter's configuration and base call "
                f"for {tuple(tensor.shape)}"
            )
    return tuple(sorted(copies))


def _is_copy(name: str, skeleton: Skeleton, adapter: Adapter) -> bool:
    """Whether it is bit for bit a tensor of the base, or of the adapter under another name.

    PEFT saves both along, for a targeted `lm_head` and for a saved one.
    """
    if name not in adapter.tensors:
        return False
    parameter, info = base_parameter(name), adapter.tensors[name]
    twin = adapter.tensors.get(name.replace(".modules_to_save.", "."))
    unit = skeleton.loading.units.get(skeleton.tied.get(parameter, parameter))
    of = skeleton.base.infos[unit.tensors[0]] if unit and unit.patterns is None else None
    if twin is not None and twin is not info:
        directory, of = adapter.directory, twin
    else:
        directory = skeleton.base.directory
    if of is None or (info.dtype, info.shape) != (of.dtype, of.shape):
        return False
    copy, own = (
        read_tensor(adapter.directory / info.file, info),
        read_tensor(directory / of.file, of),
    )
    return torch.equal(copy.view(torch.uint8), own.view(torch.uint8))


def _wrapped(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and module of each layer that PEFT put around one of the model's."""
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
    *_, (_, innermost) = each_wrapper(path, module)
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
