"""Leases: who holds a key, and when others may take it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import update

from customized_models import IntegrityError, InUseError, JobLost, LeaseLostError
from customized_models.catalog import leases as leases_module
from customized_models.catalog.catalog import Catalog
from customized_models.catalog.dialect import BUSY_SECONDS
from customized_models.catalog.leases import BEGIN_SECONDS, LEASE_SECONDS, RENEWAL_SECONDS
from customized_models.catalog.schema import leases as table
from customized_models.processes import Process
from tests.models import only_sqlite

KEY = "customized/a"


@pytest.fixture
def catalog(database: str) -> Catalog:
    return Catalog(database)


@pytest.fixture
def clock(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock that leases go by: this host's, or what they are to the server's."""
    ahead = 0.0
    real = time.monotonic
    monkeypatch.setattr(leases_module.time, "monotonic", lambda: real() + ahead)

    def advance(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds
        if catalog.database.has_clock:
            with catalog.database.write() as connection:
                connection.execute(update(table).values(renewed=table.c.renewed - seconds))

    return advance


def held(catalog: Catalog, process: Process | None = None, owner: str = "owner") -> None:
    """`KEY` is held by that process; by this one if None."""
    with pytest.MonkeyPatch.context() as patch, catalog.database.write() as connection:
        if process is not None:
            patch.setattr(leases_module.Process, "current", lambda: process)
        catalog.leases.take(connection, owner, [KEY], "a test")


def refused(catalog: Catalog) -> bool:
    catalog.leases.wait_for_other_hosts([KEY])
    try:
        with catalog.database.write() as connection:
            catalog.leases.refuse_if_held(connection, KEY)
    except InUseError:
        return True
    return False


def test_times_are_consistent_with_each_other() -> None:
    """A process that waits for the database as long as it may has not lost its lease meanwhile."""
    assert RENEWAL_SECONDS + BUSY_SECONDS < LEASE_SECONDS


def test_what_a_living_process_holds_is_refused_to_others(catalog: Catalog) -> None:
    held(catalog)
    assert refused(catalog)


def test_what_a_dead_process_of_this_host_held_is_free_at_once(catalog: Catalog) -> None:
    child = os.fork()
    if child == 0:
        signal.pause()
    process = Process.of(child)  # one that has ended has none
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert process is not None
    held(catalog, process)
    assert not refused(catalog)


def test_a_process_of_the_same_number_is_not_taken_for_the_one_that_held(catalog: Catalog) -> None:
    this = Process.current()
    held(catalog, Process(this.host, this.pid, "at another time"))
    assert not refused(catalog)


def test_a_process_that_does_not_renew_loses_what_it_held(
    catalog: Catalog, clock: Callable[[float], None]
) -> None:
    held(catalog)
    clock(LEASE_SECONDS - 1)
    assert refused(catalog)
    clock(2)
    assert not refused(catalog)


def test_a_process_that_has_still_to_begin_has_minutes_for_it(
    catalog: Catalog, clock: Callable[[float], None]
) -> None:
    with catalog.database.write() as connection:
        catalog.leases.take(connection, "owner", [KEY], "a test", Process.current())
    clock(BEGIN_SECONDS - 1)
    assert refused(catalog)
    assert catalog.leases.renew("owner")
    clock(LEASE_SECONDS + 1)
    assert not refused(catalog)


def test_a_process_that_ended_before_it_began_holds_nothing(catalog: Catalog) -> None:
    this = Process.current()
    with catalog.database.write() as connection:
        gone = Process(this.host, this.pid, "at another time")
        catalog.leases.take(connection, "owner", [KEY], "a test", gone)
    assert not refused(catalog)


def test_a_lease_that_has_ended_is_not_renewed(
    catalog: Catalog, clock: Callable[[float], None]
) -> None:
    """Others may have seen that it ended, though nobody has taken its keys yet."""
    held(catalog)
    assert catalog.leases.renew("owner")
    clock(LEASE_SECONDS + 1)
    assert not catalog.leases.renew("owner")


ELSEWHERE = Process("another host", 1, "then")


@only_sqlite
@pytest.mark.parametrize("skew", [-1e6, 0.0, 1e6])
def test_what_another_host_renews_is_refused_whatever_its_clock_says(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    monkeypatch.setattr(leases_module, "WATCH_SECONDS", 0.05)
    held(catalog, ELSEWHERE)
    ended = threading.Event()

    def renew() -> None:
        beat = 0
        while not ended.wait(0.02):
            beat += 1
            with catalog.database.write() as connection:
                connection.exec_driver_sql(f"UPDATE leases SET renewed = {skew + beat}")

    other = threading.Thread(target=renew)
    other.start()
    try:
        assert refused(catalog)
    finally:
        ended.set()
        other.join()


@only_sqlite
def test_what_another_host_does_not_renew_is_free_once_it_was_watched_for_a_lease(
    catalog: Catalog, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases_module.time, "sleep", lambda seconds: clock(seconds))
    held(catalog, ELSEWHERE)
    with pytest.raises(InUseError), catalog.database.write() as connection:
        catalog.leases.refuse_if_held(connection, KEY)  # without having watched it
    assert not refused(catalog)


@pytest.mark.parametrize("database", ["postgresql"], indirect=True)
def test_what_another_host_holds_is_free_a_lease_after_its_renewal_by_the_clock_of_the_server(
    catalog: Catalog, clock: Callable[[float], None]
) -> None:
    held(catalog, ELSEWHERE)
    clock(LEASE_SECONDS - 10)
    assert refused(catalog)
    clock(11)
    assert not refused(catalog)


def test_a_hold_that_was_lost_is_told_at_the_end_of_its_block(catalog: Catalog) -> None:
    def lose() -> None:
        with catalog.lease() as lease:
            with catalog.database.write() as connection:
                lease.take(connection, [KEY], "a test")
            with catalog.database.write() as connection:
                catalog.leases.end(connection, lease.owner)  # as another process does

    with pytest.raises(LeaseLostError, match="may have been deleted"):
        lose()


def test_an_error_in_the_block_is_not_hidden_by_a_lost_hold(catalog: Catalog) -> None:
    def fail() -> None:
        with catalog.lease() as lease:
            with catalog.database.write() as connection:
                lease.take(connection, [KEY], "a test")
            lease.lost.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert "may have been deleted" in caught.value.__notes__[0]


def test_a_lease_that_took_nothing_has_nothing_to_lose(catalog: Catalog) -> None:
    with catalog.lease():
        pass


def test_a_lost_lease_publishes_nothing(catalog: Catalog, clock: Callable[[float], None]) -> None:
    with catalog.lease() as lease:
        with catalog.database.write() as connection:
            lease.take(connection, [KEY], "a test")
            lease.check(connection)
        clock(LEASE_SECONDS + 1)
        with pytest.raises(JobLost), catalog.database.write() as connection:
            lease.check(connection)
        clock(-LEASE_SECONDS - 1)


def test_a_fork_does_not_end_what_its_parent_holds(catalog: Catalog) -> None:
    with catalog.lease() as lease:
        with catalog.database.write() as connection:
            lease.take(connection, [KEY], "a test")
        child = os.fork()
        if child == 0:
            lease.__exit__(None, None, None)
            os._exit(0)
        os.waitpid(child, 0)
        assert refused(catalog)


@pytest.mark.parametrize("process", ["{bad", '{"x": 1}', "[]", "7"])
def test_a_damaged_lease_is_named_and_stands_in_nobodys_way(catalog: Catalog, process: str) -> None:
    held(catalog)
    held_elsewhere = "customized/b"
    with catalog.database.write() as connection:
        catalog.leases.take(connection, "other", [held_elsewhere], "a test")
        mine = table.c.owner == "owner"
        connection.execute(update(table).where(mine).values(process=process))
    with pytest.raises(IntegrityError, match="the lease of 'owner' on 'customized/a'"):
        refused(catalog)
    with catalog.database.write() as connection:
        assert catalog.leases.held(connection, {"owner", "other"}) == {"other"}
        catalog.leases.forget_ended(connection)
    assert not refused(catalog)


def test_leases_of_the_dead_are_forgotten(catalog: Catalog) -> None:
    this = Process.current()
    held(catalog, Process(this.host, this.pid, "at another time"), owner="dead")
    with catalog.database.write() as connection:
        catalog.leases.forget_ended(connection)
        rows = connection.exec_driver_sql("SELECT owner FROM leases").all()
    assert rows == []
