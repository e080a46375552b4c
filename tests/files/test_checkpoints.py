from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from blake3 import blake3
from safetensors.torch import load_file, save_file

from customized_models.errors import JobCancelled, MalformedError, MergeError, UnsafeFileError
from customized_models.files.digests import FileDigest, hash_file
from customized_models.files.safetensors import INDEX, SINGLE, Checkpoint, TensorInfo, read_header
from customized_models.merging.journal import JOURNAL, Journal
from customized_models.merging.writing import write_checkpoint
from customized_models.models import no_progress
from customized_models.testing import tiny_llama

CHANGED = "model.layers.0.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


class Doubled:
    """A checkpoint some of whose tensors are twice as large in value."""

    max_parallel_files = None

    def __init__(self, base: Checkpoint, names: set[str], dtypes: Mapping[str, str] = {}) -> None:
        self.base, self.names = base, names
        self.infos: dict[str, TensorInfo] = dict(base.infos)
        for name, dtype in dtypes.items():
            self.infos[name] = evolve(self.infos[name], dtype=dtype)
        self.shards = {file: (*header.tensors,) for file, header in base.shards.items()}

    def read(self, name: str) -> torch.Tensor:
        assert name in self.names
        tensor = self.base.read(name) * 2
        return tensor.float() if self.infos[name].dtype == "F32" else tensor

    def blocks(
        self, name: str, read_next: Callable[[memoryview], None] | None = None
    ) -> Iterator[torch.Tensor]:
        tensor = self.read(name)
        yield from tensor.split(7) if tensor.dim() else [tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tiny_llama(tmp_path_factory.mktemp("base"), tokenizer=False)
    return Checkpoint.open(directory)


def test_a_checkpoint_written_unchanged_has_the_bytes_it_was_read_from(
    base: Checkpoint, tmp_path: Path
) -> None:
    digests = write_checkpoint(Doubled(base, set()), base, tmp_path, no_progress, ())
    assert digests.keys() == {*base.shards, INDEX} == {path.name for path in tmp_path.iterdir()}
    for name, digest in digests.items():
        written = (tmp_path / name).read_bytes()
        if name != INDEX:
            assert written == (base.directory / name).read_bytes()
        assert digest == FileDigest(len(written), f"blake3:{blake3(written).hexdigest()}")


def test_only_changed_tensors_are_asked_for_and_all_others_keep_their_bytes(
    base: Checkpoint, tmp_path: Path
) -> None:
    source = Doubled(base, {CHANGED, EMBEDDING})
    write_checkpoint(source, base, tmp_path, no_progress, source.names)
    written = Checkpoint.open(tmp_path)
    assert list(written.infos.items()) == list(base.infos.items())
    for name in base.infos:
        expected = base.read(name) * (2 if name in source.names else 1)
        assert torch.equal(written.read(name), expected)


def test_a_tensor_of_another_dtype_moves_those_behind_it_and_the_index_has_the_true_size(
    base: Checkpoint, tmp_path: Path
) -> None:
    source = Doubled(base, {CHANGED}, {CHANGED: "F32"})
    write_checkpoint(source, base, tmp_path, no_progress, source.names)
    loaded = {}
    for file in base.shards:
        assert read_header(tmp_path / file).metadata == base.shards[file].metadata
        loaded |= load_file(tmp_path / file)
    assert loaded[CHANGED].dtype == torch.float32
    for name, tensor in loaded.items():
        assert torch.equal(tensor, base.read(name) * (2 if name == CHANGED else 1))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size() for tensor in loaded.values()
    )
    assert index["weight_map"] == {name: info.file for name, info in base.infos.items()}


def test_an_index_is_written_only_where_the_base_has_one(tmp_path: Path) -> None:
    single = Checkpoint.open(
        tiny_llama(tmp_path / "base", tokenizer=False, shard_size="1GB", dtype="float32")
    )
    (tmp_path / "out").mkdir()
    digests = write_checkpoint(Doubled(single, set()), single, tmp_path / "out", no_progress, ())
    assert digests.keys() == {SINGLE}


def test_ranges_larger_than_the_buffers_are_copied_whole(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "out").mkdir()
    tensors = {
        "a": torch.arange(3 << 20, dtype=torch.int32),  # 12 MB: more than one buffer
        "b": torch.randn(9, 7, dtype=torch.float64),
        "c": torch.arange(18 << 20, dtype=torch.int32),  # 72 MB: more than one piece
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "base" / SINGLE)
    base = Checkpoint.open(tmp_path / "base")
    seen: list[tuple[str, int, int]] = []
    source = Doubled(base, {"b", "scalar"})
    write_checkpoint(source, base, tmp_path / "out", lambda *at: seen.append(at), source.names)
    written = load_file(tmp_path / "out" / SINGLE)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor * (2 if name in source.names else 1))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (sum(t.numel() * t.element_size() for t in tensors.values()),) * 2


def test_a_progress_that_raises_stops_the_writing(base: Checkpoint, tmp_path: Path) -> None:
    def cancel(phase: str, done: int, total: int) -> None:
        if done > total / 2:
            raise JobCancelled

    with pytest.raises(JobCancelled):
        write_checkpoint(Doubled(base, set()), base, tmp_path, cancel, ())
    assert not (tmp_path / INDEX).exists()


def test_an_error_in_one_shard_ends_the_writing_of_all(base: Checkpoint, tmp_path: Path) -> None:
    class Failing(Doubled):
        def read(self, name: str) -> torch.Tensor:
            if name == CHANGED:
                raise MergeError("does not merge")
            return super().read(name)

    source = Failing(base, set(base.infos))
    before = threading.active_count()
    with pytest.raises(MergeError, match="does not merge"):
        write_checkpoint(source, base, tmp_path, no_progress, source.names)
    assert threading.active_count() == before
    assert not (tmp_path / INDEX).exists()


def test_progress_is_told_in_the_thread_that_asked(base: Checkpoint, tmp_path: Path) -> None:
    threads = set()
    source = Doubled(base, set())
    write_checkpoint(source, base, tmp_path, lambda *_: threads.add(threading.current_thread()), ())
    assert threads == {threading.current_thread()}


def test_a_tensor_that_is_not_as_announced_is_never_written(
    base: Checkpoint, tmp_path: Path
) -> None:
    source = Doubled(base, {CHANGED})
    source.infos[CHANGED] = evolve(source.infos[CHANGED], shape=(1, 2))
    with pytest.raises(MergeError, match="announced"):
        write_checkpoint(source, base, tmp_path, no_progress, source.names)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: source.infos.pop(CHANGED), "no shard.*up_proj"),
        (lambda source: source.shards.popitem(), "no shard"),
        (lambda source: source.shards.update(more=(CHANGED,)), "several.*up_proj"),
        (lambda source: change(source, dtype="F32"), "as in the base.*up_proj"),
        (lambda source: change(source, shape=(2, 3)), "as in the base.*up_proj"),
    ],
)
def test_a_source_that_contradicts_itself_or_the_base_is_refused(
    spoil: Callable[[Doubled], object], message: str, base: Checkpoint, tmp_path: Path
) -> None:
    source = Doubled(base, set())
    spoil(source)
    with pytest.raises(MergeError, match=message):
        write_checkpoint(source, base, tmp_path, no_progress, ())
    assert list(tmp_path.iterdir()) == []


def change(source: Doubled, **what: Any) -> None:
    source.infos[CHANGED] = evolve(source.infos[CHANGED], **what)


def test_a_source_may_leave_tensors_out_rename_them_and_have_files_of_its_own(
    base: Checkpoint, tmp_path: Path
) -> None:
    class Renamed(Doubled):
        def read(self, name: str) -> torch.Tensor:
            return self.base.read(CHANGED) * 2

    source = Renamed(base, {CHANGED})
    source.infos = {"new": evolve(base.infos[CHANGED], name="new")}
    kept = [name for name in base.infos if name not in (CHANGED, EMBEDDING)]
    source.infos |= {name: base.infos[name] for name in kept}
    first, last = next(iter(base.shards)), "last.safetensors"
    source.shards = {first: ("new", *kept[::-2]), last: (*kept[-2::-2],)}
    digests = write_checkpoint(source, base, tmp_path, no_progress, {"new"})

    assert digests.keys() == {first, last, INDEX}
    written = Checkpoint.open(tmp_path)  # its index and its shards agree
    assert {file: (*header.tensors,) for file, header in written.shards.items()} == source.shards
    assert torch.equal(written.read("new"), base.read(CHANGED) * 2)
    assert all(torch.equal(written.read(name), base.read(name)) for name in kept)
    for file in source.shards:
        assert written.shards[file].metadata == base.shards[first].metadata
    total = json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(info.size for info in written.infos.values())


def test_nothing_in_the_way_is_overwritten(base: Checkpoint, tmp_path: Path) -> None:
    name = next(iter(base.shards))
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError):
        write_checkpoint(Doubled(base, set()), base, tmp_path, no_progress, ())
    assert (tmp_path / name).read_text() == "mine"


def test_shards_that_a_killed_writer_completed_are_taken_over_and_not_read_again(
    base: Checkpoint, tmp_path: Path
) -> None:
    names = [CHANGED, EMBEDDING]
    killed, again, whole = (tmp_path / name for name in ("killed", "again", "whole"))
    for directory in (killed, again, whole):
        directory.mkdir()
    uninterrupted = write_checkpoint(Doubled(base, set(names)), base, whole, no_progress, names)

    def kill(phase: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(
            Doubled(base, set()), base, killed, kill, (), journal=Journal(killed, "other key")
        )
    journal = Journal(again, "key")
    journal.take_over(killed, base.shards, no_progress)
    assert journal.shards == {}

    (killed / JOURNAL).unlink()
    for path in killed.iterdir():
        path.unlink()
    source = Doubled(base, set(names))
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(source, base, killed, kill, names, journal=Journal(killed, "key"))
    lines = (killed / JOURNAL).read_text().splitlines()[1:]
    damaged, *sound = sorted(json.loads(line)["file"] for line in lines)
    with (killed / damaged).open("ab") as file:
        file.write(b"more")
    with (killed / JOURNAL).open("ab") as file:
        file.write(b'{"file":"')  # what a kill leaves of a line
    inodes = {name: (killed / name).stat().st_ino for name in sound}
    journal.take_over(killed, base.shards, no_progress)
    assert sorted(journal.shards) == sound

    digests = write_checkpoint(source, base, again, no_progress, names, journal=journal)
    journal.end()
    assert digests == uninterrupted
    assert {name: (again / name).stat().st_ino for name in sound} == inodes
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


def test_a_journal_that_a_kill_cut_at_any_byte_gives_what_was_noted_before(tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    journal = Journal(killed, "key")
    for file in ("a", "b"):
        (killed / file).write_bytes(file.encode())
        journal.add(file, hash_file(killed / file))
    whole = (killed / JOURNAL).read_bytes()
    first, *noted = whole.splitlines(keepends=True)

    for end in range(len(whole) + 1):
        left, again = tmp_path / f"left-{end}", tmp_path / f"again-{end}"
        shutil.copytree(killed, left)
        again.mkdir()
        (left / JOURNAL).write_bytes(whole[:end])
        journal = Journal(again, "key")
        journal.take_over(left, {"a", "b"}, no_progress)
        # A line counts once all of it but its line feed is there.
        lines = [len(first) + sum(map(len, noted[: i + 1])) for i in range(len(noted))]
        assert [*journal.shards] == ["a", "b"][: sum(end + 1 >= line for line in lines)]


@pytest.mark.parametrize(
    "left", [b"\0" * 64, b"\n", b"[]\n", b"\xff\n{}\n", b'{"key":"key"}\n[1]\n']
)
def test_a_journal_that_holds_anything_else_gives_nothing(left: bytes, tmp_path: Path) -> None:
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / JOURNAL).write_bytes(left)
    journal = Journal(tmp_path, "key")
    journal.take_over(tmp_path / "left", {"a"}, no_progress)
    assert journal.shards == {}


# Reading


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    "document",
    [
        {"a": entry("F32", [2], 0, 4)},
        {"a": entry("F32", [1], 4, 8)},
        {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)},
        {"a": entry("F99", [1], 0, 4)},
        {"a": entry("F32", [-1], 0, 4)},
        {"a": entry("F32", [1], 0, 4) | {"more": 1}},
        {"a": entry("F32", [True], 0, 4)},
        {"a": entry("U8", [0, 1 << 60], 0, 0)},
        {"a": 1},
        {"__metadata__": {"a": 1}},
    ],
    ids=lambda document: json.dumps(document)[:60],
)
def test_a_header_that_lies_is_refused(document: dict[str, object], tmp_path: Path) -> None:
    path = file_of(tmp_path / SINGLE, json.dumps(document).encode(), bytes(8))
    with pytest.raises(MalformedError):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 1 << 63),
        (b"{}", 100_000_001),
        (b" {}", None),
        (b"[]", None),
        (b'{"a":1,"a":1}', None),
        (b'{"a":NaN}', None),
        (b"[" * 100_000, None),
        (b"\xff\xfe", None),
    ],
    ids=["huge", "over the cap", "space", "list", "twice", "NaN", "deep", "bytes"],
)
def test_a_header_that_is_no_strict_json_is_refused(
    header: bytes, length: int | None, tmp_path: Path
) -> None:
    with pytest.raises(MalformedError):
        read_header(file_of(tmp_path / SINGLE, header, length=length))


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"a": entry("U8", [1], 0, 1)}).encode()
    with pytest.raises(MalformedError, match="end at"):
        read_header(file_of(tmp_path / SINGLE, header, b"12"))


def test_a_pipe_instead_of_a_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE)
    with pytest.raises(UnsafeFileError):
        read_header(tmp_path / SINGLE)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/outside.safetensors", "a.bin"])
def test_an_index_that_leads_out_of_the_directory_is_refused(file: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UnsafeFileError):
        Checkpoint.open(tmp_path / "model")


def indexed(base: Checkpoint, directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    """A copy of `base` whose index has another weight map."""
    write_checkpoint(Doubled(base, set()), base, directory, no_progress, ())
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_a_tensor_in_a_shard_that_the_index_does_not_name_is_there(
    base: Checkpoint, tmp_path: Path
) -> None:
    indexed(base, tmp_path, lambda weights: weights.pop("model.norm.weight"))
    assert Checkpoint.open(tmp_path).infos == base.infos


def test_a_tensor_is_where_the_shards_have_it_whatever_the_index_says(
    base: Checkpoint, tmp_path: Path
) -> None:
    def exchange(weights: dict[str, str]) -> None:
        weights.update(zip([*weights], [*weights.values()][::-1], strict=True))

    indexed(base, tmp_path, exchange)
    assert Checkpoint.open(tmp_path).infos == base.infos


def test_an_index_that_names_what_no_shard_has_is_refused(base: Checkpoint, tmp_path: Path) -> None:
    indexed(base, tmp_path, lambda weights: weights.update({"lost": next(iter(weights.values()))}))
    with pytest.raises(MalformedError, match="lost"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(MalformedError, match="convert_pickle"):
        Checkpoint.open(tmp_path)


def test_where_there_is_a_single_file_it_is_taken_before_an_index(
    base: Checkpoint, tmp_path: Path
) -> None:
    write_checkpoint(Doubled(base, set()), base, tmp_path, no_progress, ())
    save_file({"a": torch.zeros(1)}, tmp_path / SINGLE)
    assert Checkpoint.open(tmp_path).infos.keys() == {"a"}
