"""One shard of a merged checkpoint, made while the base's shard is read front to back."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ..errors import MergeError, shown
from ..files.checking import FileCheck
from ..files.reading import opened
from ..files.safetensors import (
    Checkpoint,
    TensorInfo,
    TensorSource,
    dtype_name,
    header_bytes,
    tensor_bytes,
)
from ..files.streams import FileReader, Sink, copy_range

if TYPE_CHECKING:
    import torch

_PIECE = 8 << 20  # bytes that are copied between two reports


class ShardedSource(TensorSource, Protocol):
    """Tensors that several threads may ask for at a time, and the files that they belong in."""

    @property
    def shards(self) -> Mapping[str, Sequence[str]]:
        """The names of every tensor, in the order they have in a file, by the file's name."""

    @property
    def max_parallel_files(self) -> int | None:
        """How many files may be made side by side, if it matters to the source."""

    def blocks(
        self, name: str, read_next: Callable[[memoryview], None] | None = None
    ) -> Iterator[torch.Tensor]:
        """The tensor of that name in pieces, its first rows first.

        Each is valid until the next but one is asked for.

        Args:
            name: Of the tensor.
            read_next: Fills a view with the next bytes that the base has of the tensor; all of
                them are to be read, or none. Without it, the source reads for itself.
        """


def stream_shard(
    file: str,
    source: ShardedSource,
    layout: Checkpoint,
    changed: Collection[str],
    check: FileCheck,
    sink: Sink,
    told: Callable[[int], None],
    metadata: Mapping[str, str],
) -> None:
    """Give `sink` the bytes of one shard.

    Args:
        file: The shard's name.
        source: Gives the tensors that change.
        layout: The base, which has all others: in its shard of the same name, or elsewhere.
        changed: The names of tensors that come from `source`.
        check: Opens the base's shard, and compares it once it has been read.
        sink: What takes the bytes.
        told: Called with how many bytes of tensors went; raises to stop.
        metadata: What its header says besides the layout's.

    Raises: as `write_checkpoint`.
    """
    infos = [source.infos[name] for name in source.shards[file]]
    if file not in layout.shards:
        first, *_ = layout.shards.values()
        sink.write(header_bytes(infos, {**first.metadata, **metadata}))
        for info in infos:
            _stream_elsewhere(info, source, layout, changed, sink, told)
        return
    with check.reading(file) as reader:
        _stream_header(file, infos, layout, reader, sink, metadata)
        for info in infos:
            stored = layout.infos.get(info.name)
            if stored is None or stored.file != file or stored.start < reader.position:
                _stream_elsewhere(info, source, layout, changed, sink, told)
                continue
            reader.skip_to(stored.start)
            if info.name in changed:
                _put_blocks(info, source.blocks(info.name, reader.read_into), sink, told)
                reader.skip_to(stored.end)
            else:
                for _, count in _pieces(stored.size):
                    reader.copy_to(sink, count)
                    told(count)


def _stream_header(
    file: str,
    infos: list[TensorInfo],
    layout: Checkpoint,
    reader: FileReader,
    sink: Sink,
    metadata: Mapping[str, str],
) -> None:
    """The shard's first bytes: the layout's own where nothing is to be said that it does not."""
    old = layout.shards[file]
    before = [(info.name, info.dtype, info.shape) for info in old.tensors.values()]
    same = before == [(info.name, info.dtype, info.shape) for info in infos]
    if same and metadata.items() <= old.metadata.items():
        reader.copy_to(sink, old.data_start)
    else:
        sink.write(header_bytes(infos, {**old.metadata, **metadata}))


def _stream_elsewhere(
    info: TensorInfo,
    source: ShardedSource,
    layout: Checkpoint,
    changed: Collection[str],
    sink: Sink,
    told: Callable[[int], None],
) -> None:
    """A tensor that does not come next in the base's shard."""
    if info.name in changed:
        _put_blocks(info, source.blocks(info.name), sink, told)
        return
    stored = layout.infos[info.name]
    with opened(layout.path_of(stored)) as fd:
        for start, count in _pieces(stored.size):
            copy_range(fd, stored.start + start, count, sink, shown(stored.file))
            told(count)


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(_PIECE, size - start)) for start in range(0, size, _PIECE))


def _put_blocks(
    info: TensorInfo,
    blocks: Iterator[torch.Tensor],
    sink: Sink,
    told: Callable[[int], None],
) -> None:
    """The elements of a tensor, which must be as `info` states, in row-major order."""
    count = 0
    for block in blocks:
        count += block.numel()
        as_said = (dtype_name(block.dtype), block.shape[1:]) == (info.dtype, info.shape[1:])
        if not as_said or count > math.prod(info.shape):
            break
        data = tensor_bytes(block.contiguous())
        sink.write(data)
        told(len(data))
    else:
        if count == math.prod(info.shape):
            return
    raise MergeError(
        f"{shown(info.name)} was announced as {info.dtype} {info.shape}, "
        f"but came as {block.dtype} {tuple(block.shape)}"
    )
