"""A source of tensors written out as a checkpoint, in the layout of its base."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._checkpoints import (
    INDEX,
    SINGLE,
    Checkpoint,
    FileDigest,
    Header,
    TensorInfo,
    TensorSource,
    dtype_name,
    json_object,
    opened,
    read_at,
    read_into,
)
from ._errors import MergeError, listed, shown
from ._journal import Journal
from ._models import Progress

if TYPE_CHECKING:
    import torch

CHUNK = 8 << 20  # bytes held at once of what is copied
PIECE = 64 << 20  # bytes between two calls of `progress`


def write_checkpoint(
    source: TensorSource,
    layout: Checkpoint,
    directory: Path,
    progress: Progress,
    changed: Collection[str],
    journal: Journal | None = None,
) -> Mapping[str, FileDigest]:
    """Write `source` into `directory` as shards like those of `layout`; their digests by name.

    File names, tensor order and metadata are the layout's; tensors that it lacks come last, in
    the last file. The `changed` tensors come from `source`, of which two are in memory at a time;
    all other bytes are copied from the layout's files. Every file is hashed on its way and pushed
    to the disk. Nothing may be in the way but shards that `journal` has as complete, which stay;
    it is told of all others.

    Raises:
        MergeError: `source` lacks tensors of `layout`, or gives one that is not as it said.
    """
    if odd := layout.infos.keys() - source.infos.keys():
        raise MergeError(f"the merge lacks tensors of its base: {listed(odd)}")
    new = [info for name, info in source.infos.items() if name not in layout.infos]
    total = sum(info.size for info in source.infos.values())
    done, digests = 0, dict(journal.shards) if journal else {}
    for file, header in layout.shards.items():
        infos = [source.infos[name] for name in header.tensors]
        infos += new if file == list(layout.shards)[-1] else []
        if file not in digests:
            with opened(layout.directory / file) as fd, _Output(directory / file) as output:
                pieces = _pieces(fd, header, infos, source, changed)
                _write(output, pieces, progress, done, total)
                digests[file] = output.finish()
            if journal:
                journal.add(file, digests[file])
        done += sum(info.size for info in infos)
    if SINGLE not in layout.shards:
        digests[INDEX] = _write_index(source, layout, directory, [info.name for info in new])
    progress("merging", total, total)
    return digests


def _write(
    output: _Output,
    pieces: Iterable[tuple[int, Callable[[_Output], None]]],
    progress: Progress,
    done: int,
    total: int,
) -> None:
    """Put each piece out beside the work on the next one; `done` of `total` bytes came before."""
    with ThreadPoolExecutor(1) as behind:
        pending: deque[Future[None]] = deque()
        for size, work in pieces:
            progress("merging", done, total)
            pending.append(behind.submit(work, output))
            done += size
            while len(pending) > 1:
                pending.popleft().result()
        while pending:
            pending.popleft().result()


def _pieces(
    fd: int,
    header: Header,
    infos: list[TensorInfo],
    source: TensorSource,
    changed: Collection[str],
) -> Iterator[tuple[int, Callable[[_Output], None]]]:
    """One shard from front to back: how many bytes of tensors, and what puts them out."""
    head = _header_bytes(fd, header, infos)
    yield 0, lambda output: output.write(head)
    start = end = header.data_start
    for info, old in zip(infos, header.tensors.values(), strict=False):
        if info.name not in changed:
            end = old.end
            continue
        yield from _copies(fd, start, end)
        data = _tensor_bytes(source.read(info.name), info)
        yield info.size, lambda output, data=data: output.write(data)  # type: ignore[misc]
        del data
        start = end = old.end
    yield from _copies(fd, start, end)
    for info in infos[len(header.tensors) :]:
        data = _tensor_bytes(source.read(info.name), info)
        yield info.size, lambda output, data=data: output.write(data)  # type: ignore[misc]
        del data


def _copies(fd: int, start: int, end: int) -> Iterator[tuple[int, Callable[[_Output], None]]]:
    while start < end:
        size = min(PIECE, end - start)
        yield size, lambda output, at=start, size=size: output.copy(fd, at, size)  # type: ignore[misc]
        start += size


def _header_bytes(fd: int, header: Header, infos: list[TensorInfo]) -> bytes | bytearray:
    """The file's first bytes: the layout's own where every dtype and shape is the layout's."""
    old = header.tensors
    before = {info.name: (info.dtype, info.shape) for info in old.values()}
    if before == {info.name: (info.dtype, info.shape) for info in infos}:
        return read_at(fd, 0, header.data_start, "header")
    document: dict[str, Any] = {"__metadata__": dict(header.metadata)} if header.metadata else {}
    position = 0
    for info in infos:
        offsets = [position, position := position + info.size]
        document[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _tensor_bytes(tensor: torch.Tensor, info: TensorInfo) -> memoryview:
    """The elements of `tensor`, which must be as `info` states, in row-major order."""
    import torch

    if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (info.dtype, info.shape):
        raise MergeError(
            f"{shown(info.name)} was announced as {info.dtype} {info.shape} "
            f"but came as {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Output:
    """A new file, hashed while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()
        self._size = 0
        self._buffer = memoryview(bytearray(CHUNK))

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        self._hash.update(view)
        self._size += len(view)
        while view:
            view = view[self._file.write(view) :]

    def copy(self, fd: int, start: int, size: int) -> None:
        for at in range(start, start + size, CHUNK):
            view = self._buffer[: min(CHUNK, start + size - at)]
            read_into(view, fd, at, "the base model")
            self.write(view)

    def finish(self) -> FileDigest:
        os.fsync(self._file.fileno())
        return FileDigest(self._size, self._hash.hexdigest())


def _write_index(
    source: TensorSource, layout: Checkpoint, directory: Path, new: list[str]
) -> FileDigest:
    """The layout's index with the size that is true now, and the `new` tensors."""
    document = json_object(layout.directory / INDEX)
    metadata = document.get("metadata")
    document["metadata"] = metadata if isinstance(metadata, dict) else {}
    document["metadata"]["total_size"] = sum(info.size for info in source.infos.values())
    document["weight_map"] |= dict.fromkeys(new, list(layout.shards)[-1])
    with _Output(directory / INDEX) as output:
        output.write(json.dumps(document, indent=2, sort_keys=True).encode() + b"\n")
        return output.finish()
