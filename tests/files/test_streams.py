"""Large files, read and written front to back through a hash."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_models.errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    MalformedError,
    StorageError,
)
from customized_models.files import streams
from customized_models.files.checking import FileCheck
from customized_models.files.digests import SHA256, FileDigest, hash_file
from customized_models.files.streams import (
    FileWriter,
    HashSink,
    copy_file,
    copy_range,
    reading,
)
from customized_models.models import no_progress

MakeSystem = Callable[[pytest.MonkeyPatch], None]


def takes_direct_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As most file systems do."""


def refuses_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tmpfs did for long: the file is there, and then an error comes."""
    real = os.open

    def refusing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            os.close(real(path, flags & ~os.O_DIRECT, mode))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)


def refuses_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some do that keep their files elsewhere."""
    import fcntl

    real = os.write

    def refusing(fd: int, data: memoryview) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data)

    monkeypatch.setattr(os, "write", refusing)


def writes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of a write that was cut short is not aligned as direct writes must be."""
    import fcntl

    real, refused = os.write, set[int]()

    def partial(fd: int, data: memoryview) -> int:
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            refused.discard(fd)
            return real(fd, data)
        if fd in refused:
            raise OSError(errno.EINVAL, "Invalid argument")
        refused.add(fd)
        return real(fd, data[:4096])

    monkeypatch.setattr(os, "write", partial)


def has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS."""
    monkeypatch.setattr(streams, "DIRECT", 0)


SYSTEMS = [takes_direct_writes, refuses_to_open, refuses_to_write, writes_in_parts, has_none]
SIZES = [0, 1, 4095, 4096, 4097, 8192, 20_000, 70_001]

linux = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system has no direct writes")


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BUFFER", 8192)
    monkeypatch.setattr(streams, "PUSHED", 16_384)


def digest_of(data: bytes) -> FileDigest:
    return FileDigest(len(data), f"blake3:{blake3(data).hexdigest()}")


@linux
@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("make", SYSTEMS)
@pytest.mark.parametrize("directory", ["disk", "memory"])
def test_every_file_system_gets_the_same_bytes(
    directory: str, make: MakeSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if directory == "memory":
        tmp_path = Path("/dev/shm") / f"test-{os.getpid()}-{tmp_path.name}"
        tmp_path.mkdir()
    make(monkeypatch)
    for size in SIZES:
        data, path = os.urandom(size), tmp_path / str(size)
        with FileWriter(path) as writer:
            writer.write(data[: size // 3])
            writer.write(data[size // 3 :])
            assert writer.finish() == digest_of(data)
        assert path.read_bytes() == data
        path.unlink()
    tmp_path.rmdir()


@linux
def test_a_file_is_written_directly_to_a_disk_that_takes_it(tmp_path: Path) -> None:
    import fcntl

    with FileWriter(tmp_path / "file") as writer:
        try:
            os.close(os.open(tmp_path / "file", os.O_WRONLY | os.O_DIRECT))
        except OSError:
            pytest.skip("the file system takes no direct writes")
        [own] = [fd for fd in Path("/proc/self/fd").iterdir() if names(fd, tmp_path / "file")]
        assert fcntl.fcntl(int(own.name), fcntl.F_GETFL) & os.O_DIRECT
        writer.write(b"some")
        assert writer.finish() == digest_of(b"some")
    assert (tmp_path / "file").read_bytes() == b"some"


def names(link: Path, path: Path) -> bool:
    """Whether a descriptor, as the system lists it, is of the file at `path`."""
    try:
        return link.samefile(path)
    except OSError:  # that of the listing itself
        return False


@pytest.mark.usefixtures("small_buffers")
def test_a_file_may_come_in_pieces_of_any_size(tmp_path: Path) -> None:
    numbers = iter(range(10**6))

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 20_000)), max_size=8))
    def law(pieces: list[tuple[bool, int]]) -> None:
        path, data = tmp_path / str(next(numbers)), b""
        with FileWriter(path, SHA256) as writer, HashSink() as sink:
            for in_place, size in pieces:
                piece = os.urandom(size)
                if in_place:  # as much as there is room for
                    room = writer.room()
                    piece = piece[: len(room)]
                    room[: len(piece)] = piece
                    writer.advance(len(piece))
                else:
                    writer.write(piece)
                sink.write(piece)
                data += piece
            digest = writer.finish()
            assert sink.finish() == digest_of(data)
        assert path.read_bytes() == data
        assert digest == hash_file(path, SHA256)

    law()


def test_nothing_in_the_way_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AlreadyExistsError, match="file"):
        FileWriter(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("call", ["write", "fsync", "ftruncate"])
def test_an_error_of_the_disk_is_told_whenever_it_comes(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells it once, to whoever asks first."""
    real, told = getattr(os, call), list[int]()

    def failing_once(fd: int, *arguments: object) -> object:
        told.append(fd)
        if len(told) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, *arguments)

    monkeypatch.setattr(os, call, failing_once)
    with FileWriter(tmp_path / "file") as writer:

        def write_all() -> None:
            for _ in range(4):
                writer.write(bytes(10_000))
            writer.finish()

        with pytest.raises(StorageError, match=r"file.*No space left"):
            write_all()


def test_a_directory_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="file"):
        FileWriter(tmp_path / "none" / "file")


# Reading


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 5 << 20),
    st.lists(st.tuples(st.sampled_from(["read", "skip", "copy"]), st.integers(0, 2 << 20))),
)
def test_a_file_has_one_digest_however_it_is_read(size: int, steps: list[tuple[str, int]]) -> None:
    data = (bytes(range(251)) * (size // 251 + 1))[:size]
    path = Path("/tmp") / f"test-reading-{os.getpid()}"
    path.write_bytes(data)
    copied = b""
    with reading(path) as reader, HashSink() as sink:
        for step, wanted in steps:
            start, count = reader.position, min(wanted, size - reader.position)
            if step == "read":
                view = bytearray(count)
                reader.read_into(memoryview(view))
                assert view == data[start : start + count]
            elif step == "skip":
                reader.skip_to(start + count)
            else:
                reader.copy_to(sink, count)
                copied += data[start : start + count]
        assert reader.finish() == digest_of(data)
        assert sink.finish() == digest_of(copied)
    path.unlink()


def test_a_file_that_ends_too_early_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    with reading(tmp_path / "file") as reader, pytest.raises(MalformedError, match="byte 10"):
        reader.read_into(memoryview(bytearray(11)))


def test_a_copy_has_the_bytes_and_the_digest(tmp_path: Path) -> None:
    data = os.urandom((5 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert copy_file(tmp_path / "file", tmp_path / "copy") == digest_of(data)
    assert (tmp_path / "copy").read_bytes() == data
    with HashSink() as sink, (tmp_path / "file").open("rb") as file:
        copy_range(file.fileno(), 3, 4 << 20, sink, "file")
        assert sink.finish() == digest_of(data[3 : 3 + (4 << 20)])


# Comparing with what was recorded


@pytest.fixture
def files(tmp_path: Path) -> dict[str, FileDigest]:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(os.urandom(3 << 20))
    return {"a": hash_file(tmp_path / "a"), "b": hash_file(tmp_path / "b", SHA256)}


def check_of(directory: Path, files: dict[str, FileDigest]) -> FileCheck:
    return FileCheck(directory, files, lambda names: BaseModelMismatch(f"{sorted(names)} changed"))


def flip(path: Path) -> None:
    """Change a bit; size, time and inode stay."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_others_have_read_is_not_read_again(
    files: dict[str, FileDigest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_of(tmp_path, files)
    with check.reading("a") as reader:
        reader.read_into(memoryview(bytearray(100)))
    with check.reading("c"):  # of which nothing is recorded
        pass
    opened, real = list[str](), os.open

    def noted(path: Path, *arguments: int) -> int:
        opened.append(Path(path).name)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", noted)
    check.finish(no_progress)
    assert opened == ["b"]


def test_what_others_compare_is_not_read_until_it_is_asked_for(
    files: dict[str, FileDigest], tmp_path: Path
) -> None:
    flip(tmp_path / "a")
    check = check_of(tmp_path, files)
    check.finish(no_progress, but={"a"})
    assert check.compared() == {"b"}
    with pytest.raises(BaseModelMismatch, match="a"):
        check.finish(no_progress)
    os.utime(tmp_path / "b", (1, 1))
    with pytest.raises(BaseModelMismatch, match="b"):
        check.compared()


@pytest.mark.parametrize("name", ["a", "b"])
def test_a_changed_bit_is_found_while_it_is_read_or_in_the_end(
    name: str, files: dict[str, FileDigest], tmp_path: Path
) -> None:
    flip(tmp_path / name)
    with pytest.raises(BaseModelMismatch, match=name), check_of(tmp_path, files).reading(name):
        pass
    with pytest.raises(BaseModelMismatch, match=name):
        check_of(tmp_path, files).finish(no_progress)
    with check_of(tmp_path, files).beside() as finish, pytest.raises(BaseModelMismatch, match=name):
        finish(no_progress)


def test_a_file_that_is_touched_after_it_was_read_does_not_pass(
    files: dict[str, FileDigest], tmp_path: Path
) -> None:
    check = check_of(tmp_path, files)
    with check.reading("a"):
        pass
    os.utime(tmp_path / "a", (1, 1))
    with pytest.raises(BaseModelMismatch, match="a"):
        check.finish(no_progress)


def test_a_missing_file_does_not_pass(files: dict[str, FileDigest], tmp_path: Path) -> None:
    (tmp_path / "b").unlink()
    with pytest.raises(MalformedError, match="b"):
        check_of(tmp_path, files).finish(no_progress)
