"""Contract suites for storages and backends, storages for tests, and tiny real models.

The contract suites need pytest; the models need torch, transformers and peft. Each module is
imported when one of its names is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backends import (
        AddressedContract,
        BackendContract,
        DescribingContract,
        ProbingContract,
        PromotingContract,
        UnloadingContract,
        deployed,
    )
    from .storage import CopyingStorage, MemoryStorage, StorageContract, publish_files
    from .tiny_models import tiny_adapter, tiny_llama, tiny_lora, tiny_tokenizer

_HOMES = {
    "AddressedContract": "backends",
    "BackendContract": "backends",
    "CopyingStorage": "storage",
    "DescribingContract": "backends",
    "MemoryStorage": "storage",
    "ProbingContract": "backends",
    "PromotingContract": "backends",
    "StorageContract": "storage",
    "UnloadingContract": "backends",
    "deployed": "backends",
    "publish_files": "storage",
    "tiny_adapter": "tiny_models",
    "tiny_llama": "tiny_models",
    "tiny_lora": "tiny_models",
    "tiny_tokenizer": "tiny_models",
}

__all__ = [
    "AddressedContract",
    "BackendContract",
    "CopyingStorage",
    "DescribingContract",
    "MemoryStorage",
    "ProbingContract",
    "PromotingContract",
    "StorageContract",
    "UnloadingContract",
    "deployed",
    "publish_files",
    "tiny_adapter",
    "tiny_llama",
    "tiny_lora",
    "tiny_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
