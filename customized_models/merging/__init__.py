"""An adapter merged into its base, one module at a time, through PEFT's own code.

The result is a stream of tensors; who takes them, and in which order, is not known here.
"""

from __future__ import annotations

import atexit
import gc
import sys
from importlib import import_module
from typing import TYPE_CHECKING

from ..adapters.intake import Adapter
from ..files.reading import json_object
from ..files.safetensors import Checkpoint
from .adapter_refusals import refuse_adapter
from .base_formats import refuse_base, refuse_unreadable_codes

if TYPE_CHECKING:
    from .execution import Merge

__all__ = ["Merge", "open_merge", "preload"]


def open_merge(base: Checkpoint, adapter: Adapter) -> Merge:
    """Plan the merge of `adapter` into `base`, out of headers where PEFT does not need more.

    Every tensor that the adapter changes will have the bits and dtype that
    `PeftModel.from_pretrained(AutoModelFor...from_pretrained(base, dtype="auto"), adapter)
    .merge_and_unload()` gives it on the CPU, with the class for the adapter's task; every other
    tensor has the bytes of the base's file, or what they dequantize to. An output layer and an
    embedding that are tied come apart if the adapter changes one of them.

    Methods that start from the base's weights have PEFT read those; tensors that both stand in the
    files though they are tied, and copies of the base's in the adapter, are read to compare them.

    Raises:
        UnsupportedAdapterError: a type or option that cannot be merged exactly, or an adapter
            that changes tensors that are tied in another way; the message names it.
        MalformedError: the configuration states sizes that the adapter's tensors do not have.
        UnsupportedBaseError: the base is quantized in a way that cannot be undone.
        UnsupportedArchitectureError: transformers has no model of that class, or does not save
            tensors that the adapter changes as it loads them.
        UnsupportedVersionError: an installed package lacks what this builds on.
        BaseModelMismatch: the adapter changes modules that the base lacks, or of another shape.
        UnmergedTensorsError: the adapter holds tensors that its configuration does not call for,
            or lacks some that it does.
    """
    refuse_adapter(adapter.config)
    refuse_base(base.directory)
    refuse_unreadable_codes(json_object(base.directory / "config.json"), base.infos)
    preload()
    from .execution import plan

    return plan(base, adapter)


def preload() -> None:
    """Import torch, transformers and PEFT, which takes seconds, in an interpreter of our own.

    What is imported never becomes garbage: to look for it there, then and later, takes a second.
    """
    if f"{__name__}.execution" in sys.modules:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        import_module(f"{__name__}.execution")
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries count at the end what nobody freed
    finally:
        if enabled:
            gc.enable()


def __getattr__(name: str) -> object:
    if name == "Merge":
        from .execution import Merge

        return Merge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
