"""A source of tensors written out as a checkpoint; what it leaves unchanged is the base's."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from ..errors import MergeError, listed, shown
from ..files.digests import BLAKE3, FileDigest, new_hash
from ..files.reading import json_object, opened, read_at, read_into
from ..files.safetensors import (
    INDEX,
    SINGLE,
    Checkpoint,
    TensorInfo,
    TensorSource,
    dtype_name,
    tensor_bytes,
)
from ..models import Progress
from .journal import Journal

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes held at once of what is copied: they stay in the cache
PIECE = 64 << 20  # bytes copied between two calls of `progress`, and pushed to the disk at once
_MOST_AT_ONCE = 8  # files: more would only take more memory, for the disk is the limit then

Piece: TypeAlias = "tuple[int, Callable[[_Output], None]]"
"""How many bytes of tensors, and what puts them out."""


class ShardedSource(TensorSource, Protocol):
    """Tensors that several threads may ask for at a time, and the files that they belong in."""

    @property
    def shards(self) -> Mapping[str, Sequence[str]]:
        """The names of every tensor, in the order they have in a file, by the file's name."""

    @property
    def max_parallel_files(self) -> int | None:
        """How many files may be written side by side, if it matters to the source."""

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor of that name in pieces, its first rows first.

        Each is good until the next but one is asked for.
        """


def write_checkpoint(
    source: ShardedSource,
    layout: Checkpoint,
    directory: Path,
    progress: Progress,
    changed: Collection[str],
    journal: Journal | None = None,
) -> Mapping[str, FileDigest]:
    """Write the shards of `source` into `directory`; their digests by name.

    The `changed` tensors come from `source`; all others are copied from the file in which `layout`
    has them, and so is a header that is the same. Every file is hashed on its way and pushed to
    the disk; several are written side by side, and of each two pieces are in memory at a time.
    Nothing may be in the way but shards that `journal` has as complete, which stay; it is told of
    all others. `progress` is called from this thread alone.

    Raises:
        MergeError: A tensor of `source` stands in no shard or in several, is neither changed nor
            the layout's, or comes other than it said.
    """
    _check(source, layout, changed)
    infos = {file: [source.infos[n] for n in names] for file, names in source.shards.items()}
    sizes = {file: sum(info.size for info in infos[file]) for file in infos}
    digests = dict(journal.shards) if journal else {}
    done, total = sum(sizes[file] for file in digests), sum(sizes.values())
    todo = {
        directory / file: _pieces(file, infos[file], layout, source, changed)
        for file in infos
        if file not in digests
    }
    with closing(_write_all(todo, source.max_parallel_files or files_at_once())) as events:
        for event in events:
            if isinstance(event, int):
                done += event
            else:
                file, digests[file] = event
                if journal:
                    journal.add(*event)
            progress("merging", done, total)
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


def _write_all(
    todo: Mapping[Path, Iterable[Piece]], at_once: int
) -> Generator[int | tuple[str, FileDigest], None, None]:
    """Write files side by side: yields bytes as they are put out, and each file once it is whole.

    When this is closed, so does the writing, before the next piece of each file.
    """
    events: SimpleQueue[int | Future[tuple[str, FileDigest]]] = SimpleQueue()
    stopped = Event()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for path, pieces in todo.items():
                future = pool.submit(_write_file, path, pieces, events.put, stopped)
                future.add_done_callback(events.put)
            for _ in todo:
                while isinstance(event := events.get(), int):
                    yield event
                yield event.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _write_file(
    path: Path, pieces: Iterable[Piece], told: Callable[[int], None], stopped: Event
) -> tuple[str, FileDigest]:
    """Put each piece out beside the work on the next one."""
    with _Output(path) as output, ThreadPoolExecutor(1) as behind:
        pending: deque[tuple[int, Future[None]]] = deque()
        for size, work in chain(pieces, [(0, lambda output: None)]):
            if stopped.is_set():
                raise CancelledError
            pending.append((size, behind.submit(work, output)))
            if len(pending) > 1:
                before, put_out = pending.popleft()
                put_out.result()
                told(before)
        return path.name, output.finish()


def files_at_once() -> int:
    """One for each processor that this process may use, up to a limit."""
    known = sys.platform == "linux"
    return min(len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1, _MOST_AT_ONCE)


def _pieces(
    file: str,
    infos: list[TensorInfo],
    layout: Checkpoint,
    source: ShardedSource,
    changed: Collection[str],
) -> Iterator[Piece]:
    """One shard from front to back: how many bytes of tensors, and what puts them out."""
    head = _header_bytes(file, infos, layout)
    yield 0, partial(_Output.write, data=head)
    for is_changed, group in groupby(infos, lambda info: info.name in changed):
        if not is_changed:
            for path, start, end in _ranges(group, layout):
                yield from _copies(path, start, end)
            continue
        for info in group:
            for data in _data(source, info):
                yield len(data), partial(_Output.write, data=data)


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


def _copies(path: Path, start: int, end: int) -> Iterator[Piece]:
    for at in range(start, end, PIECE):
        size = min(PIECE, end - at)
        yield size, partial(_Output.copy, path=path, start=at, size=size)


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


def _data(source: ShardedSource, info: TensorInfo) -> Iterator[memoryview]:
    """The elements of a tensor, which must be as `info` states, in row-major order."""
    count = 0
    for block in source.blocks(info.name):
        count += block.numel()
        as_said = (dtype_name(block.dtype), block.shape[1:]) == (info.dtype, info.shape[1:])
        if not as_said or count > math.prod(info.shape):
            break
        yield tensor_bytes(block.contiguous())
    else:
        if count == math.prod(info.shape):
            return
    raise MergeError(
        f"{shown(info.name)} was announced as {info.dtype} {info.shape}, "
        f"but came as {block.dtype} {tuple(block.shape)}"
    )


class _Output:
    """A new file, hashed while it is written, and pushed to the disk beside that."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = new_hash()
        self._size = 0
        self._buffer = memoryview(bytearray(CHUNK))
        self._beside = ThreadPoolExecutor(1, "sync")
        self._pushed: tuple[int, Future[None]] | None = None

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown()
        self._file.close()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        self._hash.update(view)
        self._size += len(view)
        while view:
            view = view[self._file.write(view) :]
        self._push()

    def _push(self) -> None:
        """Else the system would begin when all is written, and the end would wait for all of it."""
        size, pushing = self._pushed or (0, None)
        if self._size - size >= PIECE and (pushing is None or pushing.done()):
            if pushing is not None:
                pushing.result()  # an error is told once
            self._pushed = self._size, self._beside.submit(os.fsync, self._file.fileno())

    def copy(self, path: Path, start: int, size: int) -> None:
        with opened(path) as fd:
            for at in range(start, start + size, CHUNK):
                view = self._buffer[: min(CHUNK, start + size - at)]
                read_into(view, fd, at, "the base model")
                self.write(view)

    def finish(self) -> FileDigest:
        if self._pushed is not None:
            self._pushed[1].result()
        os.fsync(self._file.fileno())
        return FileDigest(self._size, f"{BLAKE3}:{self._hash.hexdigest()}")


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
