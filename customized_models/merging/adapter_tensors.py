"""Whether an adapter's file holds exactly the tensors that its configuration calls for.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..adapters.intake import Adapter
from ..errors import MalformedError, UnmergedTensorsError, listed, shown
from ..files.safetensors import read_tensor
from .adapter_sizes import base_parameter
from .skeleton import Skeleton


def check_tensors(
    skeleton: Skeleton,
    adapter: Adapter,
    expected: Mapping[str, torch.Tensor],
    stated: Mapping[str, torch.Tensor],
) -> tuple[str, ...]:
    """Check that the adapter holds what its layers call for.

    Returns:
        The names of copies of the base's tensors, which are not used.

    Raises:
        UnmergedTensorsError, MalformedError: See `Injected.load`.
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
    """Whether it has the bits of a tensor of the base, or of the adapter's under another name.

    PEFT saves such copies for an `lm_head` that is targeted or saved.
    """
    if name not in adapter.tensors:
        return False
    parameter, info = base_parameter(name), adapter.tensors[name]
    twin = adapter.tensors.get(name.replace(".modules_to_save.", "."))
    holder = skeleton.tied.get(parameter, parameter)
    conversion = skeleton.conversions.by_parameter.get(holder)
    as_it_is = conversion is not None and conversion.patterns is None
    of = skeleton.base.infos[conversion.tensors[0]] if conversion and as_it_is else None
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
