"""A source of tensors written out as a checkpoint; what it leaves unchanged is the base's."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ._checkpoints import (
    INDEX,
    SINGLE,
    Checkpoint,
    FileDigest,
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


class ShardedSource(TensorSource, Protocol):
    """Tensors, and the files that they belong in."""

    @property
    def shards(self) -> Mapping[str, Sequence[str]]:
        """The names of every tensor, in the order they have in a file, by the file's name."""


def write_checkpoint(
    source: ShardedSource,
    layout: Checkpoint,
    directory: Path,
    progress: Progress,
    changed: Collection[str],
    journal: Journal | None = None,
) -> Mapping[str, FileDigest]:
    """Write the shards of `source` into `directory`; their digests by name.

    The `changed` tensors come from `source`, of which two are in memory at a time; all others are
    copied from the file in which `layout` has them, and so is a header that is the same. Every
    file is hashed on its way and pushed to the disk. Nothing may be in the way but shards that
    `journal` has as complete, which stay; it is told of all others.

    Raises:
        MergeError: a tensor of `source` stands in no shard or in several, is neither changed nor
            the layout's, or comes other than it said.
    """
    _check(source, layout, changed)
    total = sum(info.size for info in source.infos.values())
    done, digests = 0, dict(journal.shards) if journal else {}
    for file, names in source.shards.items():
        infos = [source.infos[name] for name in names]
        if file not in digests:
            with _Output(directory / file) as output:
                pieces = _pieces(file, infos, layout, source, changed)
                _write(output, pieces, progress, done, total)
                digests[file] = output.finish()
            if journal:
                journal.add(file, digests[file])
        done += sum(info.size for info in infos)
    if [*source.shards] != [SINGLE]:
        digests[INDEX] = _write_index(source, layout, directory)
    progress("merging", total, total)
    return digests


def _check(source: ShardedSource, layout: Checkpoint, changed: Collection[str]) -> None:
    count = Counter(name for names in source.shards.values() for name in names)
    if odd := (source.infos.keys() ^ count.keys()) | {n for n in count if count[n] > 1}:
        raise MergeError(f"in no shard of the merge, or in several: {listed(odd)}")
    copied = {name: info for name, info in source.infos.items() if name not in changed}
    if odd := {n for n, info in copied.items() if not _is_as(info, layout.infos.get(n))}:
        raise MergeError(f"neither merged nor as in the base: {listed(odd)}")


def _is_as(info: TensorInfo, other: TensorInfo | None) -> bool:
    return other is not None and (info.dtype, info.shape) == (other.dtype, other.shape)


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
    file: str,
    infos: list[TensorInfo],
    layout: Checkpoint,
    source: TensorSource,
    changed: Collection[str],
) -> Iterator[tuple[int, Callable[[_Output], None]]]:
    """One shard from front to back: how many bytes of tensors, and what puts them out."""
    head = _header_bytes(file, infos, layout)
    yield 0, lambda output: output.write(head)
    for is_changed, group in groupby(infos, lambda info: info.name in changed):
        if not is_changed:
            for path, start, end in _ranges(group, layout):
                yield from _copies(path, start, end)
            continue
        for info in group:
            data = _tensor_bytes(source.read(info.name), info)
            yield info.size, lambda output, data=data: output.write(data)  # type: ignore[misc]
            del data


def _ranges(infos: Iterable[TensorInfo], layout: Checkpoint) -> Iterator[tuple[Path, int, int]]:
    """Where the layout has these tensors; those that follow one another in a file as one."""
    file, start, end = "", 0, 0
    for info in (layout.infos[info.name] for info in infos):
        if (info.file, info.start) != (file, end):
            if end > start:
                yield layout.directory / file, start, end
            file, start = info.file, info.start
        end = info.end
    if end > start:
        yield layout.directory / file, start, end


def _copies(path: Path, start: int, end: int) -> Iterator[tuple[int, Callable[[_Output], None]]]:
    while start < end:
        size = min(PIECE, end - start)
        yield size, lambda output, at=start, size=size: output.copy(path, at, size)  # type: ignore[misc]
        start += size


def _header_bytes(file: str, infos: list[TensorInfo], layout: Checkpoint) -> bytes | bytearray:
    """The file's first bytes: the layout's own where every name, dtype and shape is the same."""
    old = layout.shards.get(file, next(iter(layout.shards.values())))
    before = [(info.name, info.dtype, info.shape) for info in old.tensors.values()]
    if file in layout.shards and before == [(i.name, i.dtype, i.shape) for i in infos]:
        with opened(layout.directory / file) as fd:
            return read_at(fd, 0, old.data_start, "header")
    document: dict[str, Any] = {"__metadata__": dict(old.metadata)} if old.metadata else {}
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

    def copy(self, path: Path, start: int, size: int) -> None:
        with opened(path) as fd:
            for at in range(start, start + size, CHUNK):
                view = self._buffer[: min(CHUNK, start + size - at)]
                read_into(view, fd, at, "the base model")
                self.write(view)

    def finish(self) -> FileDigest:
        os.fsync(self._file.fileno())
        return FileDigest(self._size, self._hash.hexdigest())


def _write_index(source: ShardedSource, layout: Checkpoint, directory: Path) -> FileDigest:
    """The layout's index, if it has one, with the files and the size that are true now."""
    has_one = (layout.directory / INDEX).is_file()
    document = json_object(layout.directory / INDEX) if has_one else {}
    metadata = document.get("metadata")
    document["metadata"] = metadata if isinstance(metadata, dict) else {}
    document["metadata"]["total_size"] = sum(info.size for info in source.infos.values())
    document["weight_map"] = {n: file for file, names in source.shards.items() for n in names}
    with _Output(directory / INDEX) as output:
        output.write(json.dumps(document, indent=2, sort_keys=True).encode() + b"\n")
        return output.finish()
