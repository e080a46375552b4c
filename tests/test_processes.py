"""What a process may still take of its host's memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from customized_models import processes
from customized_models.processes import available_memory

GIB = 1 << 30


def make_group(
    directory: Path, version: int, limit: str, used: int, cache: int, tmpfs: int
) -> None:
    """A control group as the system shows it."""
    directory.mkdir(parents=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    cached, shared = {1: ("total_cache", "total_shmem"), 2: ("file", "shmem")}[version]
    for name, value in zip(names[version], (limit, str(used)), strict=True):
        (directory / name).write_text(f"{value}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{cached} {cache}\n{shared} {tmpfs}\n")


@pytest.mark.parametrize(
    ("version", "line"), [(2, "0::/outer/inner"), (1, "4:memory:/outer/inner")]
)
def test_of_nested_groups_the_one_that_leaves_least_counts(
    version: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache of a group gives way; what is in its tmpfs does not."""
    controller = {1: "memory", 2: ""}[version]
    monkeypatch.setitem(
        processes._GROUPS, controller, (str(tmp_path), *processes._GROUPS[controller][1:])
    )
    make_group(tmp_path / "outer", version, str(8 * GIB), 6 * GIB, 3 * GIB, GIB)
    make_group(tmp_path / "outer/inner", version, str(7 * GIB), GIB, 0, 0)
    assert [*processes._left_in(f"9:name=systemd:/\n{line}\n")] == [6 * GIB, 4 * GIB]


@pytest.mark.parametrize("inner", ["no limit", "not shown"])
def test_a_group_without_a_limit_says_nothing(
    inner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, which sees its own group at the top."""
    monkeypatch.setitem(processes._GROUPS, "", (str(tmp_path / "top"), *processes._GROUPS[""][1:]))
    make_group(tmp_path / "top", 2, str(2 * GIB), GIB, 0, 0)
    if inner == "no limit":
        make_group(tmp_path / "top/inner", 2, "max", GIB, 0, 0)
    assert [*processes._left_in("0::/inner")] == [GIB]


def test_no_more_is_available_than_the_host_has() -> None:
    assert 0 <= available_memory() <= psutil.virtual_memory().total
