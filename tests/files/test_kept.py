"""Files in the memory of a host: read once, compared, sealed, and gone when nobody needs them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from customized_models import JobCancelled
from customized_models.files import kept
from customized_models.files.checking import FileCheck
from customized_models.files.digests import FileDigest, hash_file
from customized_models.files.keeper import seals
from customized_models.files.kept import kept_in_memory
from customized_models.models import no_progress
from tests.opens import counting_opens
from tests.waiting import until

if not kept.can_keep():
    pytest.skip("this Python knows of no memory that can be sealed", allow_module_level=True)

F_SEAL_FUTURE_WRITE = 0x10  # which not every Python names

CONTENT = {"weights": b"w" * 3_000_000, "config.json": b"{}", "empty": b"", "inner/file": b"x"}


@pytest.fixture(autouse=True)
def ends_soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keepers of a test end with it; and there is memory."""
    monkeypatch.setattr(kept, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(kept, "available_memory", lambda: 1 << 40)
    yield
    until(lambda: not keepers())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, data in CONTENT.items():
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_bytes(data)
    return tmp_path / "base"


@pytest.fixture
def files(directory: Path) -> dict[str, FileDigest]:
    return {name: hash_file(directory / name) for name in CONTENT}


def keepers() -> list[int]:
    """The numbers of the processes of this one that keep files."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            if "files.keeper" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


def test_what_is_kept_has_the_bytes_and_nobody_can_change_it(
    directory: Path, files: dict[str, FileDigest]
) -> None:
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is not None
        for name, data in CONTENT.items():
            assert (view / name).read_bytes() == data
            with pytest.raises(PermissionError):
                (view / name).write_bytes(b"other")
        (directory / "weights").write_bytes(b"other")
        assert (view / "weights").read_bytes() == CONTENT["weights"]
    assert not view.exists()


def test_files_are_read_once_however_many_ask_for_them(
    directory: Path, files: dict[str, FileDigest]
) -> None:
    with counting_opens(directory) as opened:
        for _ in range(3):
            with kept_in_memory(directory, files, no_progress) as view:
                assert view is not None
                assert (view / "weights").read_bytes() == CONTENT["weights"]
        assert opened() == {"weights": 1, "config.json": 1, "empty": 1}


def test_more_files_than_fit_in_a_message(tmp_path: Path) -> None:
    for number in range(250):
        (tmp_path / f"file-{number}").write_bytes(b"%d" % number)
    files = {path.name: hash_file(path) for path in tmp_path.iterdir()}
    with kept_in_memory(tmp_path, files, no_progress) as view:
        assert view is not None
        assert all((view / f"file-{number}").read_text() == str(number) for number in range(250))


def test_whoever_waits_is_told_how_far_it_is_and_may_stop(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as large:
        large.truncate(1 << 29)
    files, told = {"large": hash_file(tmp_path / "large")}, []

    def progress(phase: str, done: int, total: int) -> None:
        told.append((done, total))
        raise JobCancelled

    with pytest.raises(JobCancelled), kept_in_memory(tmp_path, files, progress):
        pass
    ((done, total),) = told
    assert 0 <= done < total == 1 << 29


@pytest.mark.parametrize("change", ["other bytes", "shorter", "missing"])
def test_what_is_not_what_was_recorded_is_not_kept(
    directory: Path, files: dict[str, FileDigest], change: str
) -> None:
    weights = directory / "weights"
    if change == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"v" * (3_000_000 if change == "other bytes" else 2))
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is None


def test_memory_that_is_not_there_is_not_taken(
    directory: Path, files: dict[str, FileDigest], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 4 * sum(digest.size for digest in files.values())
    monkeypatch.setattr(kept, "available_memory", lambda: left - 1)
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is None
    monkeypatch.setattr(kept, "available_memory", lambda: left)
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is not None
        monkeypatch.setattr(kept, "available_memory", lambda: 0)  # it is taken already
        with kept_in_memory(directory, files, no_progress) as other:
            assert other is not None


def test_files_outlive_their_keeper_for_whoever_has_them(
    directory: Path, files: dict[str, FileDigest]
) -> None:
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is not None
        (before,) = keepers()
        os.kill(before, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(before))
        assert (view / "weights").read_bytes() == CONTENT["weights"]
        with kept_in_memory(directory, files, no_progress) as other:
            assert other is not None
            assert keepers() != [before]


def test_a_keeper_ends_when_nobody_has_been_connected_for_a_while(
    directory: Path, files: dict[str, FileDigest]
) -> None:
    with kept_in_memory(directory, files, no_progress):
        (keeper,) = keepers()
    until(lambda: not psutil.pid_exists(keeper))


def test_it_waits_from_when_the_last_has_gone_and_not_from_when_it_came(
    directory: Path, files: dict[str, FileDigest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "IDLE_SECONDS", 2.0)
    with kept_in_memory(directory, files, no_progress):
        before = keepers()
        time.sleep(2.5)
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is not None
        assert keepers() == before


def test_files_that_were_touched_are_read_again(
    directory: Path, files: dict[str, FileDigest]
) -> None:
    with kept_in_memory(directory, files, no_progress), counting_opens(directory) as opened:
        os.utime(directory / "config.json")
        with kept_in_memory(directory, files, no_progress) as view:
            assert view is not None
        assert opened()["weights"] == 1


@pytest.fixture
def stranger(directory: Path, files: dict[str, FileDigest]) -> Iterator[socket.socket]:
    """Somebody who has the keeper's name."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(kept._name(directory, files))
        listener.listen()
        yield listener


def memory(data: bytes, promises: int) -> int:
    """A descriptor of memory of which the system promises this."""
    fd = os.memfd_create("given", os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, promises)
    return fd


def sealed(data: bytes) -> int:
    return memory(data, seals())


GIVEN: dict[str, Callable[[str], int | None]] = {
    "all that it must be": lambda name: sealed(CONTENT[name]),
    "a seal more": lambda name: memory(CONTENT[name], seals() | F_SEAL_FUTURE_WRITE),
    "may be written": lambda name: memory(CONTENT[name], seals() & ~fcntl.F_SEAL_WRITE),
    "may be unsealed": lambda name: memory(CONTENT[name], 0),
    "another size": lambda name: sealed(CONTENT[name] + b"more"),
    "too few": lambda name: sealed(b"") if name == "empty" else None,
    "a file": lambda name: os.open(__file__, os.O_RDONLY),
    "nothing": lambda name: None,
}


def hand_over(
    listener: socket.socket, names: Iterable[str], give: Callable[[str], int | None]
) -> None:
    """As a keeper does, to one client."""
    client, _ = listener.accept()
    with client:
        for name in names:
            if (fd := give(name)) is not None:
                socket.send_fds(client, [json.dumps([name]).encode()], [fd])
                os.close(fd)
        client.send(b"null")


@pytest.mark.parametrize("given", GIVEN)
def test_what_could_change_or_is_not_all_is_not_taken(
    given: str, stranger: socket.socket, directory: Path, files: dict[str, FileDigest]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        handing = pool.submit(hand_over, stranger, files, GIVEN[given])
        with kept_in_memory(directory, files, no_progress) as view:
            assert (view is not None) == (given in ("all that it must be", "a seal more"))
        handing.result()


def test_what_another_user_gives_is_not_taken(
    stranger: socket.socket,
    directory: Path,
    files: dict[str, FileDigest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "_TRIES", 1)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(kept, "_name", lambda *_: stranger.getsockname().decode())
        handing = pool.submit(hand_over, stranger, files, GIVEN["all that it must be"])
        with kept_in_memory(directory, files, no_progress) as view:
            assert view is None
        handing.exception()  # BrokenPipeError, if it is late


def test_who_says_nothing_is_not_waited_for(
    stranger: socket.socket,
    directory: Path,
    files: dict[str, FileDigest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "_SILENT_SECONDS", 0.2)
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is None


def test_another_user_is_given_nothing(directory: Path, files: dict[str, FileDigest]) -> None:
    """Nor does it keep the keeper from ending."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    with kept_in_memory(directory, files, no_progress):
        code = (
            "import os, socket, sys; os.setuid(12345); one = socket.socket(socket.AF_UNIX, "
            "socket.SOCK_SEQPACKET); one.connect(sys.argv[1].encode().decode('unicode_escape')); "
            "print(one.recv(100))"
        )
        name = kept._name(directory, files).replace("\0", "\\0")
        ran = subprocess.run([sys.executable, "-c", code, name], capture_output=True, check=True)
    assert ran.stdout == b"b''\n"


def test_a_python_that_knows_of_no_such_memory_reads_as_usual(
    directory: Path, files: dict[str, FileDigest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those that are built for old Linuxes."""
    monkeypatch.delattr(os, "memfd_create")
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is None


@pytest.mark.parametrize("error", [OSError(24, "too many"), RuntimeError("can't start new thread")])
def test_what_the_system_refuses_is_no_error(
    error: Exception,
    directory: Path,
    files: dict[str, FileDigest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: object) -> None:
        raise error

    monkeypatch.setattr(kept, "_start_keeper", refused)
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is None


def test_a_keeper_that_reads_for_nobody_does_not_go_on(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as large:
        large.truncate(2 << 30)
    files, read = {"large": FileDigest(2 << 30, "blake3:unknown")}, [0]

    def progress(phase: str, done: int, total: int) -> None:
        raise JobCancelled

    with pytest.raises(JobCancelled), kept_in_memory(tmp_path, files, progress):
        pass
    while found := keepers():  # for a while after it has read all, if it does
        with suppress(psutil.NoSuchProcess):
            read.append(psutil.Process(found[0]).io_counters().read_chars)
    assert 0 < max(read) < 2 << 30


def test_a_check_from_memory_reads_nothing_again(
    directory: Path, files: dict[str, FileDigest]
) -> None:
    check = FileCheck(directory, files, lambda names: AssertionError(names))  # type: ignore[arg-type, return-value]
    with check.from_memory(no_progress) as (view, of_memory), counting_opens(directory) as opened:
        with of_memory.reading("weights") as reader:
            reader.skip_to(len(CONTENT["weights"]))
        of_memory.finish(no_progress)
        assert view != directory
        assert not opened()
