"""A source of tensors written out as a checkpoint, in one pass over the base.

Each shard of the base is read once, front to back. Its bytes go through a hash; what the merge
changes goes on through the sum, everything else as it is; and all of it through another hash to the
disk. Several shards are worked on side by side.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from threading import Event

from ..errors import MergeError, listed
from ..files.checking import FileCheck
from ..files.digests import FileDigest
from ..files.reading import json_object
from ..files.safetensors import INDEX, SINGLE, Checkpoint, TensorInfo
from ..files.streams import FileWriter, HashSink, parallel_files
from ..models import BaseModel, CustomizedModel, Progress
from .journal import Journal
from .shards import ShardedSource, stream_shard

REPORTED = 16 << 20
"""Bytes of a shard between two reports of how far it is: each wakes another thread."""


def write_checkpoint(
    source: ShardedSource,
    layout: Checkpoint,
    directory: Path,
    progress: Progress,
    changed: Collection[str],
    *,
    check: FileCheck | None = None,
    journal: Journal | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Mapping[str, FileDigest]:
    """Write the shards of `source`, and an index if they are several.

    Args:
        source: Gives the tensors that change, and says which tensors there are.
        layout: The base, which has all others.
        directory: Where to; nothing may be in the way but shards that `journal` has.
        progress: Told how many bytes have been merged, in the calling thread.
        changed: The names of tensors that come from `source`.
        check: Compares the shards of `layout` with what they must hold, as they are read.
        journal: Has shards that are complete, and is told about all others.
        metadata: What the header of each shard says besides the layout's.

    Returns:
        The digest of each file by its name.

    Raises:
        MergeError: A tensor of `source` is in no shard or in several, is neither changed nor the
            layout's, or comes in another dtype or shape than announced.
        AlreadyExistsError: Something is in the way.
        StorageError: The disk failed, or is full.
        CustomizedModelsError: Of `check`: the base holds something else.
    """

    def write(file: str) -> FileWriter:
        return FileWriter(directory / file)

    done = dict(journal.shards) if journal else {}
    digests = _stream_all(
        source, layout, write, progress, changed, check, journal, done, metadata or {}
    )
    if [*source.shards] != [SINGLE]:
        with FileWriter(directory / INDEX) as writer:
            writer.write(_index(source, layout))
            digests[INDEX] = writer.finish()
    return digests


def write_shards(
    files: Collection[str],
    source: ShardedSource,
    layout: Checkpoint,
    directory: Path,
    progress: Progress,
    *,
    changed: Collection[str],
    check: FileCheck,
    complete: Mapping[str, FileDigest],
    metadata: Mapping[str, str],
) -> Mapping[str, FileDigest]:
    """Write some of the shards that `write_checkpoint` writes.

    Args:
        files: Their names.
        complete: Other shards, which count as merged.

    Returns:
        The digest of each file by its name.

    The other arguments, and the errors, are the same.
    """

    def write(file: str) -> FileWriter:
        return FileWriter(directory / file)

    digests = _stream_all(
        source, layout, write, progress, changed, check, None, dict(complete), metadata, files
    )
    return {file: digests[file] for file in files}


def checkpoint_digests(
    source: ShardedSource,
    layout: Checkpoint,
    progress: Progress,
    changed: Collection[str],
    *,
    check: FileCheck | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Mapping[str, FileDigest]:
    """The digests of what `write_checkpoint` would write; arguments and errors are the same."""

    def hash_only(file: str) -> HashSink:
        return HashSink()

    digests = _stream_all(
        source, layout, hash_only, progress, changed, check, None, {}, metadata or {}
    )
    if [*source.shards] != [SINGLE]:
        with HashSink() as sink:
            sink.write(_index(source, layout))
            digests[INDEX] = sink.finish()
    return digests


def _stream_all(
    source: ShardedSource,
    layout: Checkpoint,
    open_sink: Callable[[str], HashSink],
    progress: Progress,
    changed: Collection[str],
    check: FileCheck | None,
    journal: Journal | None,
    digests: dict[str, FileDigest],
    metadata: Mapping[str, str],
    files: Collection[str] | None = None,
) -> dict[str, FileDigest]:
    """Stream all shards, or those `files`, but for what `digests` has, and add theirs."""
    _refuse_contradictions(source, layout, changed)
    sizes = {f: sum(source.infos[n].size for n in names) for f, names in source.shards.items()}
    done, total = sum(sizes[file] for file in digests), sum(sizes.values())
    wanted = sizes.keys() if files is None else {*files}
    left = sorted(wanted - digests.keys(), key=lambda file: (-sizes[file], file))
    check = check or FileCheck.of_nothing(layout.directory)

    def stream(file: str, told: Callable[[int], None]) -> tuple[str, FileDigest]:
        with open_sink(file) as sink:
            stream_shard(file, source, layout, changed, check, sink, told, metadata)
            return file, sink.finish()

    with closing(_side_by_side(left, stream, source.max_parallel_files)) as events:
        for event in events:
            if isinstance(event, int):
                done += event
            else:
                digests.update([event])
                if journal:
                    journal.add(*event)
            progress("merging", done, total)
    progress("merging", done, total)
    return digests


def _refuse_contradictions(
    source: ShardedSource, layout: Checkpoint, changed: Collection[str]
) -> None:
    count = Counter(name for names in source.shards.values() for name in names)
    if odd := (source.infos.keys() ^ count.keys()) | {n for n in count if count[n] > 1}:
        raise MergeError(f"in no shard of the merge, or in several: {listed(odd)}")
    copied = {name: info for name, info in source.infos.items() if name not in changed}
    if odd := {n for n, info in copied.items() if not _is_as(info, layout.infos.get(n))}:
        raise MergeError(f"neither merged nor as in the base: {listed(odd)}")


def _is_as(info: TensorInfo, other: TensorInfo | None) -> bool:
    return other is not None and (info.dtype, info.shape) == (other.dtype, other.shape)


def _side_by_side(
    files: list[str],
    stream: Callable[[str, Callable[[int], None]], tuple[str, FileDigest]],
    most: int | None,
) -> Generator[int | tuple[str, FileDigest], None, None]:
    """Stream files in threads: yields bytes as they are done, and each file when it is.

    When this is closed, so does the streaming, at the next report of each file.
    """
    events: SimpleQueue[int | Future[tuple[str, FileDigest]]] = SimpleQueue()
    stopped = Event()

    def run(file: str) -> tuple[str, FileDigest]:
        unreported = 0

        def told(count: int) -> None:
            nonlocal unreported
            unreported += count
            if unreported >= REPORTED:
                if stopped.is_set():
                    raise CancelledError
                events.put(unreported)
                unreported = 0

        ended = stream(file, told)
        events.put(unreported)
        return ended

    with ThreadPoolExecutor(min(most or parallel_files(), len(files) or 1)) as pool:
        try:
            for file in files:
                pool.submit(run, file).add_done_callback(events.put)
            for _ in files:
                while isinstance(event := events.get(), int):
                    yield event
                yield event.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _index(source: ShardedSource, layout: Checkpoint) -> bytes:
    """The layout's index, if it has one, with the files and the size that are true now."""
    has_one = (layout.directory / INDEX).is_file()
    document = json_object(layout.directory / INDEX) if has_one else {}
    metadata = document.get("metadata")
    document["metadata"] = metadata if isinstance(metadata, dict) else {}
    document["metadata"]["total_size"] = sum(info.size for info in source.infos.values())
    document["weight_map"] = {n: file for file, names in source.shards.items() for n in names}
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"


def lineage_metadata(base: BaseModel, customized: CustomizedModel) -> dict[str, str]:
    """What a complete model's weights say of where they come from, wherever they are copied to.

    Digests alone: names may change while the bytes stay, and these bytes are rebuilt.
    """
    return {
        "customized_models.base": base.digest,
        "customized_models.customized": customized.digest,
    }
