"""A planned file, written front to back in one pass: read, reorder, quantize, append, digest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch  # this module is imported only to write

from ..errors import IntegrityError, NonFiniteError, shown
from ..files.digests import SHA256
from ..files.finite import all_finite
from ..files.safetensors import ModelSource, dtype_name
from ..files.streams import FileWriter, parallel_files
from ..merging.threads import set_threads
from ..models import Progress
from .format import PLAIN, Tensor, padded
from .kernels import Quantizer, quantizer

BLOCK = 4 << 20  # bytes of float32 rows that are worked on at once

_PLAIN_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(
    path: Path, preamble: bytes, tensors: Sequence[Tensor], source: ModelSource, progress: Progress
) -> tuple[int, str]:
    """Write the file, in place of what is there; its bytes and `sha256:` digest.

    What is cut short is removed.

    Raises:
        NonFiniteError: a tensor holds NaN or infinity, or a value its type cannot hold.
        IntegrityError: a tensor is not what the plan was made for.
        StorageError: the disk refused it.
    """
    total = len(preamble) + sum(padded(tensor.size) for tensor in tensors)
    plain = all(tensor.type.name in PLAIN for tensor in tensors)
    quantize = None if plain else quantizer()
    done = 0
    path.unlink(missing_ok=True)  # the writer takes no file that is there
    # One thread of torch in each: there is one of them for each core already.
    threads = ThreadPoolExecutor(parallel_files(), "quantize", set_threads, (1,))
    with FileWriter(path, SHA256) as writer, threads as pool:
        try:
            for data in _chunks(preamble, tensors, source, quantize, pool):
                writer.write(data)
                done += len(data)
                progress("quantizing", done, total)
            digest = writer.finish()
        except BaseException:
            path.unlink()
            raise
    return digest.size, digest.digest


def _chunks(
    preamble: bytes,
    tensors: Sequence[Tensor],
    source: ModelSource,
    quantize: Quantizer | None,
    pool: ThreadPoolExecutor,
) -> Iterator[bytes | bytearray | memoryview]:
    """The file's bytes in order: blocks of rows that are quantized side by side."""
    yield preamble
    for tensor in tensors:
        waiting: deque[Future[bytearray | memoryview]] = deque()
        try:
            for block in _blocks(tensor, source):
                waiting.append(pool.submit(_encoded, block, tensor, quantize))
                if len(waiting) > 2 * parallel_files():
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for job in waiting:
                job.cancel()
        yield bytes(padded(tensor.size) - tensor.size)


def _blocks(tensor: Tensor, source: ModelSource) -> Iterator[torch.Tensor]:
    """The tensor's rows, changed, in blocks that nobody else writes to; a vector is one row."""
    if tensor.load is not None:
        yield from _cut(tensor.load().reshape(-1, tensor.shape[-1]))
        return
    if not tensor.sources:
        yield torch.tensor(tensor.values, dtype=torch.float32).view(1, -1)
        return
    for name in tensor.sources:
        yield from _changed(tensor, name, source)


def _changed(tensor: Tensor, name: str, source: ModelSource) -> Iterator[torch.Tensor]:
    change, shape = tensor.change, source.tensors.infos[name].shape
    whole = len(shape) < 2 or (change is not None and change.rows == 0)
    if whole:
        values = _counted(source, name)
        pieces: Iterable[torch.Tensor] = [change.apply(_exact(values)) if change else values]
    else:
        rows = (piece.reshape(-1, shape[-1]) for piece in _read(source, name))
        pieces = _runs(rows, change.rows if change else 1)
        if change:
            pieces = (change.apply(_exact(piece)) for piece in pieces)
    for piece in pieces:
        yield from _cut(piece.reshape(-1, tensor.shape[-1]))


def _read(source: ModelSource, name: str) -> Iterator[torch.Tensor]:
    """The tensor as its source gives it: in blocks of rows, or whole.

    Raises:
        IntegrityError: it is not what the headers say.
    """
    info, done = source.tensors.infos[name], 0
    blocks: Callable[[str], Iterator[torch.Tensor]] | None
    blocks = getattr(source.tensors, "blocks", None)
    for piece in blocks(name) if blocks else [source.tensors.read(name)]:
        done += piece.shape[0] if piece.dim() else 1
        if dtype_name(piece.dtype) != info.dtype or tuple(piece.shape[1:]) != info.shape[1:]:
            raise IntegrityError(f"tensor {shown(name)} changed since the plan was made")
        yield piece
    if done != info.shape[0]:
        raise IntegrityError(f"tensor {shown(name)} changed since the plan was made")


def _counted(source: ModelSource, name: str) -> torch.Tensor:
    pieces = [piece.clone() for piece in _read(source, name)]
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _exact(values: torch.Tensor) -> torch.Tensor:
    """As upstream computes with them: bfloat16 becomes float32, the others stay."""
    return values.float() if values.dtype == torch.bfloat16 else values


def _runs(pieces: Iterator[torch.Tensor], unit: int) -> Iterator[torch.Tensor]:
    """The same rows, in runs whose length is a multiple of `unit`."""
    left: torch.Tensor | None = None
    for piece in pieces:
        rows = piece if left is None else torch.cat([left, piece])
        whole = len(rows) // unit * unit
        left = rows[whole:].clone() if whole < len(rows) else None
        if whole:
            yield rows[:whole]
    if left is not None:
        yield left


def _cut(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Copies of runs of rows that are small enough to be worked on at once."""
    count = max(1, BLOCK // (4 * rows.shape[1]))
    for start in range(0, rows.shape[0], count):
        yield rows[start : start + count].clone()


def _encoded(
    block: torch.Tensor, tensor: Tensor, quantize: Quantizer | None
) -> bytearray | memoryview:
    if not all_finite(block):
        raise NonFiniteError(f"tensor {shown(_names(tensor))} holds NaN or infinity")
    stored = _rounded(block, tensor, tensor.through.name)
    if quantize and tensor.type.name not in PLAIN:
        return _finite(quantize(stored.to(torch.float32).contiguous(), tensor.type), tensor)
    stored = _rounded(stored, tensor, tensor.type.name).contiguous()
    return memoryview(stored.view(-1).view(torch.uint8).numpy().data)


def _finite(data: bytearray | memoryview, tensor: Tensor) -> bytearray | memoryview:
    """`data`, if no scale has outgrown its float16."""
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(-1, tensor.type.size)
    for place in tensor.type.scales:
        scales = blocks[:, place : place + 2].contiguous().view(torch.float16)
        if not all_finite(scales):
            raise NonFiniteError(
                f"tensor {shown(_names(tensor))} does not fit into {tensor.type.name}"
            )
    return data


def _rounded(block: torch.Tensor, tensor: Tensor, name: str) -> torch.Tensor:
    stored = block.to(_PLAIN_DTYPES[name])
    if stored.dtype == torch.float16 != block.dtype and not all_finite(stored):
        raise NonFiniteError(f"tensor {shown(_names(tensor))} does not fit into {name}")
    return stored


def _names(tensor: Tensor) -> str:
    return ", ".join(tensor.sources[:2]) or tensor.name
