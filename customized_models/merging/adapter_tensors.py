"""Whether an adapter's file holds exactly the tensors that its configuration calls for.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ..adapters.intake import Adapter
from ..adapters.tensor_names import PREFIX, is_factor, module_of
from ..errors import MalformedError, UnmergedTensorsError, listed, shown
from ..files.safetensors import read_tensor
from .adapter_sizes import base_parameter
from .adapter_state import AdapterStateDict
from .skeleton import Skeleton


def check_tensors(
    skeleton: Skeleton,
    adapter: Adapter,
    expected: Mapping[str, torch.Tensor],
    file: AdapterStateDict,
) -> tuple[str, ...]:
    """Check that the adapter holds what its layers call for.

    Returns:
        The names of tensors that are not used: copies of the base's, and those of a LoRA that is
        zero, of a module that today's class of the model does not have.

    Raises:
        UnmergedTensorsError, MalformedError: See `Injected.load`.
    """
    stated = file.tensors
    unused = stated.keys() - expected.keys()
    extra = {name for name in unused if not _is_copy(name, skeleton, adapter)}
    if extra and (zero := adapter.zero_modules()):
        of_zero = {name for name in adapter.tensors if is_factor(name) and module_of(name) in zero}
        extra = {name for name in extra if not of_zero.issuperset(file.origins[name])}
    if extra:
        raise UnmergedTensorsError(
            f"the adapter holds tensors that its configuration does not call for, or that address "
            f"the base's own: {listed(extra)}. Were target_modules or exclude_modules changed "
            f"after the training, or is it another model's adapter? PEFT would leave them out",
            extra,
        )
    if missing := expected.keys() - stated.keys():
        raise UnmergedTensorsError(
            f"the adapter lacks tensors that its configuration calls for: {listed(missing)}. If "
            f"the file is whole, name in target_modules only what was trained, or the rest in "
            f"exclude_modules; else save the adapter again",
            missing,
        )
    for name, tensor in expected.items():
        shape = tuple(stated[name].shape)
        if shape != tuple(tensor.shape):
            raise MalformedError(
                f"{shown(name)} has the shape {shape}; the adapter's configuration and base call "
                f"for {tuple(tensor.shape)}"
            )
    return tuple(sorted(unused))


def _is_copy(name: str, skeleton: Skeleton, adapter: Adapter) -> bool:
    """Whether it has the bits of a tensor of the base, or of the adapter's under another name.

    PEFT saves such copies for an `lm_head` that is targeted or saved, and everything twice that is
    trained of an embedding and an output layer that are tied.
    """
    if name not in adapter.tensors:
        return False
    parameter, info = base_parameter(name), adapter.tensors[name]
    twin = next(filter(None, map(adapter.tensors.get, _other_names(name, skeleton))), None)
    holder = skeleton.tied.get(parameter, parameter)
    conversion = skeleton.conversions.by_parameter.get(holder)
    as_it_is = conversion is not None and conversion.patterns is None
    of = skeleton.base.infos[conversion.tensors[0]] if conversion and as_it_is else None
    if twin is not None:
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


def _other_names(name: str, skeleton: Skeleton) -> Iterator[str]:
    """Names that PEFT gives the same tensor: of the module that it is tied to, of a saved one."""
    if ".modules_to_save." in name:
        yield name.replace(".modules_to_save.", ".")
    path = name.removeprefix(PREFIX)
    for parameter, holder in skeleton.tied.items():
        one, other = (end.rpartition(".")[0] + "." for end in (parameter, holder))
        if path.startswith(one):
            yield PREFIX + other + path.removeprefix(one)
