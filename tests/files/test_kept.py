"""Files in the memory of a host: read once, compared, sealed, and gone when nobody needs them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

if sys.platform != "linux":
    pytest.skip("Linux alone has memory that can be sealed", allow_module_level=True)

from customized_models.files import kept
from customized_models.files.checking import FileCheck
from customized_models.files.digests import FileDigest, hash_file
from customized_models.files.keeper import SEALS
from customized_models.files.kept import kept_in_memory
from customized_models.models import no_progress
from tests.opens import counting_opens
from tests.waiting import until

CONTENT = {"weights": b"w" * 3_000_000, "config.json": b"{}", "empty": b"", "inner/file": b"x"}


@pytest.fixture(autouse=True)
def ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "IDLE_SECONDS", 0.5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, data in CONTENT.items():
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_bytes(data)
    return tmp_path / "base"


@pytest.fixture
def files(directory: Path) -> dict[str, FileDigest]:
    return {name: hash_file(directory / name) for name in CONTENT}


def keeper() -> int:
    """The number of the one process of this one that keeps files."""
    (keeper,) = {
        child.pid for child in psutil.Process().children() if "keeper" in " ".join(child.cmdline())
    }
    return keeper


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
        raise InterruptedError

    with pytest.raises(InterruptedError), kept_in_memory(tmp_path, files, progress):
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
        before = keeper()
        os.kill(before, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(before))
        assert (view / "weights").read_bytes() == CONTENT["weights"]
        with kept_in_memory(directory, files, no_progress) as other:
            assert other is not None
            assert keeper() != before


def test_a_keeper_ends_when_nobody_has_been_connected_for_a_while(
    directory: Path, files: dict[str, FileDigest]
) -> None:
    with kept_in_memory(directory, files, no_progress):
        pid = keeper()
    until(lambda: not psutil.pid_exists(pid))


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


@pytest.mark.parametrize("given", ["unsealed", "a file", "few", "nothing", "no answer"])
def test_what_could_change_or_is_not_all_is_not_taken(
    given: str,
    stranger: socket.socket,
    directory: Path,
    files: dict[str, FileDigest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "_SILENT_SECONDS", 0.2)

    def answer() -> socket.socket:
        client, _ = stranger.accept()
        names = {"unsealed": list(files), "a file": list(files), "few": ["empty"]}.get(given, [])
        for name in names:
            fd = os.memfd_create(name, os.MFD_ALLOW_SEALING)
            if given == "a file":
                fd = os.open(directory / name, os.O_RDWR)
            elif given == "few":
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            os.pwrite(fd, CONTENT[name], 0)
            socket.send_fds(client, [json.dumps([name]).encode()], [fd])
            os.close(fd)
        if given == "nothing":
            client.close()
        elif given != "no answer":
            client.send(b"null")
        return client

    with ThreadPoolExecutor(1) as pool:
        client = pool.submit(answer)
        with kept_in_memory(directory, files, no_progress) as view:
            assert view is None
        client.result().close()


def test_another_users_keeper_is_not_asked(
    stranger: socket.socket,
    directory: Path,
    files: dict[str, FileDigest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kept, "_TRIES", 2)
    monkeypatch.setattr(kept, "is_of_this_user", lambda _: False)
    with kept_in_memory(directory, files, no_progress) as view:
        assert view is None


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
