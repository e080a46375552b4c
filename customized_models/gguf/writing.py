"""A planned file, written front to back in one pass: read, reorder, quantize, append, digest."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch  # this module is imported only to write

from ..errors import IntegrityError, NonFiniteError, shown
from ..files.safetensors import ModelSource, dtype_name
from ..models import Progress
from .format import PLAIN, Tensor, padded
from .kernel import Kernel

BLOCK = 4 << 20  # bytes of float32 rows that are worked on at once

_PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(
    path: Path, preamble: bytes, tensors: Sequence[Tensor], source: ModelSource, progress: Progress
) -> tuple[int, str]:
    """Write the file; its bytes and `sha256:` digest. What is cut short is removed.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity, or a value its type cannot hold.
        IntegrityError: a tensor is not what the plan was made for.
        OSError: the disk refused it.
    """
    total = len(preamble) + sum(padded(tensor.size) for tensor in tensors)
    plain = all(tensor.type.name in PLAIN for tensor in tensors)
    kernel = None if plain else Kernel()
    digest, done = hashlib.sha256(), 0
    try:
        with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(_threads()) as pool:
            for data in _chunks(preamble, tensors, source, kernel, pool):
                _write_all(file.fileno(), data)
                digest.update(data)
                done += len(data)
                progress("quantizing", done, total)
            os.fsync(file.fileno())
    except BaseException:
        with suppress(FileNotFoundError):
            path.unlink()
        raise
    return done, f"sha256:{digest.hexdigest()}"


def _chunks(
    preamble: bytes,
    tensors: Sequence[Tensor],
    source: ModelSource,
    kernel: Kernel | None,
    pool: ThreadPoolExecutor,
) -> Iterator[bytes | bytearray | memoryview]:
    """The file's bytes in order. One tensor is in memory, and two blocks of it a thread."""
    yield preamble
    for tensor in tensors:
        values = _values(tensor, source)
        waiting: deque[Future[bytearray | memoryview]] = deque()
        try:
            for block in _blocks(values, tensor.head_size):
                waiting.append(pool.submit(_encoded, block, tensor, kernel))
                if len(waiting) > 2 * _threads():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()
        yield bytes(padded(tensor.size) - tensor.size)


def _values(tensor: Tensor, source: ModelSource) -> torch.Tensor:
    """The tensor as read, its rows as a matrix: a vector is one row, or a column of heads."""
    if tensor.source is None:
        return torch.tensor(tensor.values, dtype=torch.float32).view(1, -1)
    values = source.tensors.read(tensor.source)
    dtype = dtype_name(values.dtype)
    info = source.tensors.infos[tensor.source]
    if tuple(values.shape) != tensor.shape or dtype != info.dtype:
        raise IntegrityError(f"tensor {shown(tensor.source)} changed since the plan was made")
    if values.dim() > 1:
        return values
    return values.view(-1, 1) if tensor.head_size else values.view(1, -1)


def _blocks(values: torch.Tensor, head_size: int) -> Iterator[torch.Tensor]:
    """Runs of whole rows, and of whole heads where heads are reordered."""
    unit = head_size or 1
    rows = max(unit, BLOCK // (4 * values.shape[1]) // unit * unit)
    for start in range(0, values.shape[0], rows):
        yield values[start : start + rows]


def _encoded(block: torch.Tensor, tensor: Tensor, kernel: Kernel | None) -> bytearray | memoryview:
    if tensor.head_size:
        block = reordered(block, tensor.head_size)
    if not torch.isfinite(block).all():
        raise NonFiniteError(f"tensor {shown(tensor.source)} holds NaN or infinity")
    if kernel and tensor.type.name not in PLAIN:
        return kernel.quantize(block.to(torch.float32).contiguous(), tensor.type)
    stored = block.to(_PLAIN_DTYPES[tensor.type.name]).contiguous()
    if stored.dtype != block.dtype and not torch.isfinite(stored).all():
        raise NonFiniteError(f"tensor {shown(tensor.source)} does not fit into {tensor.type.name}")
    return memoryview(stored.view(-1).view(torch.uint8).numpy().data)


def reordered(rows: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rows of whole heads, from halves side by side to pairs side by side.

    transformers rotates component i of a head with i + size/2, llama.cpp 2i with 2i + 1.
    Source: `LlamaModel.permute` in `conversion/llama.py` of llama.cpp b11434.
    """
    heads = rows.view(-1, 2, head_size // 2, rows.shape[1])
    return heads.transpose(1, 2).reshape(rows.shape)


def _threads() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4)


def _write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
