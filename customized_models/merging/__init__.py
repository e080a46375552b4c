"""An adapter merged into its base, one tensor group at a time, with the bits of PEFT's own merge.

The result is a stream of tensors. Who takes them, and in which order, is not known here.
"""

from __future__ import annotations

import atexit
import gc
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from ..adapters.intake import Adapter
from ..files.reading import json_object
from ..files.safetensors import Checkpoint
from .adapter_refusals import refuse_adapter
from .base_formats import refuse_base, refuse_unreadable_codes

if TYPE_CHECKING:
    from .execution import MergeExecution

__all__ = ["MergeExecution", "open_merge", "preload"]


def open_merge(
    base: Checkpoint, adapter: Adapter, *, trust_remote_code: bool = False
) -> MergeExecution:
    """Prepare the merge of `adapter` into `base`, from headers alone where PEFT allows it.

    Every tensor that the adapter changes will have the bits and dtype that
    `PeftModel.from_pretrained(AutoModelFor...from_pretrained(base, dtype="auto"), adapter)
    .merge_and_unload()` gives it on the CPU, with the class for the adapter's task. Every other
    tensor has the bytes of the base's file, or what they dequantize to. An output layer and an
    embedding that are tied come apart if the adapter changes one of them.

    Adapter types that start from the base's weights make PEFT read those now. Tied tensors that
    are both in the files, and copies of the base's tensors in the adapter, are compared.

    Args:
        base: What to merge into.
        adapter: A checked copy.
        trust_remote_code: Run the base's own code where transformers does not know its model.

    Raises:
        UnsupportedAdapterError: A type or option that cannot be merged exactly, or an adapter
            that changes tensors that are tied in another way; the message names it.
        MalformedError: The configuration states sizes that the adapter's tensors do not have.
        UnsupportedBaseError: The base is quantized in a way that cannot be undone.
        UnsupportedArchitectureError: transformers has no model of that class, or does not save
            tensors that the adapter changes as it loads them.
        UnsupportedVersionError: An installed package lacks what this builds on.
        BaseModelMismatch: The adapter changes modules that the base lacks, or of another shape.
        UnmergedTensorsError: The adapter holds tensors that its configuration does not call for,
            or lacks some that it does.
    """
    refuse_adapter(adapter.config)
    refuse_base(base.directory)
    refuse_unreadable_codes(json_object(base.directory / "config.json"), base.infos)
    preload()
    from .execution import prepare_merge

    return prepare_merge(base, adapter, trust_remote_code=trust_remote_code)


def preload() -> None:
    """Import torch, transformers and PEFT, which takes seconds, in an interpreter of our own.

    transformers' table of conversions, with a thousand regular expressions, is made too, and what
    Numba compiles is taken up, where that is installed.

    The collector does not run meanwhile, and never looks at what was imported: with the about one
    million objects of the three, each full collection takes a second.
    """
    if f"{__name__}.execution" in sys.modules:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        import_module(f"{__name__}.execution")
        import_module(f"{__name__}.strategies.fused").kernels()
        with suppress(Exception):  # a merge that needs the table says what is wrong with it
            import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping(
                "llama"
            )
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries count their leaks at exit
    finally:
        if enabled:
            gc.enable()


def __getattr__(name: str) -> object:
    if name == "MergeExecution":
        from .execution import MergeExecution

        return MergeExecution
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
