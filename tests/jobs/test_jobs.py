"""Jobs: what is known of them, their turns, and waiting for them without blocking anything."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from customized_models import (
    CompleteModel,
    CustomizedModel,
    IntegrityError,
    Job,
    JobCancelled,
    JobLost,
    Merger,
    ModelRegistry,
    NotFoundError,
)
from customized_models.catalog.sqlite import SQLite
from customized_models.errors import MergeError
from tests.waiting import until


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


def submitted(registry: ModelRegistry, max_running: int = 1) -> Job[CompleteModel]:
    """A job without a worker; this process holds its lease."""
    id = registry.catalog.jobs.add(
        "save", lambda id: f"a_s_{id.hex[:4]}", {"customized": "a"}, (), max_running
    )
    return registry.job(id)


def end(
    registry: ModelRegistry, job: Job[CompleteModel], state: str, error: Exception | None = None
) -> None:
    with registry.catalog.database.write() as connection:
        registry.catalog.jobs.end(connection, str(job.id), state, error)
        registry.catalog.leases.end(connection, str(job.id))


def lose(registry: ModelRegistry, job: Job[CompleteModel]) -> None:
    with registry.catalog.database.write() as connection:
        registry.catalog.leases.end(connection, str(job.id))


def test_a_damaged_job_is_in_no_other_models_way(registry: ModelRegistry) -> None:
    job = submitted(registry)
    lose(registry, job)
    with registry.catalog.database.write() as connection:
        connection.exec_driver_sql("UPDATE jobs SET arguments = '{bad'")
    assert registry.catalog.jobs.give_up_saves_of("other") == []


# What is known of a job


def test_a_job_knows_when_and_how_it_went(registry: ModelRegistry) -> None:
    job = submitted(registry)
    assert (job.state, job.started, job.ended, job.error) == ("queued", None, None, None)
    registry.catalog.jobs.begin(str(job.id))
    registry.catalog.jobs.report(str(job.id), "merging", 1, 4)
    assert (job.state, job.progress.percent, job.ended) == ("running", 25, None)
    end(registry, job, "succeeded")
    assert job.started is not None
    assert job.ended is not None
    assert job.created <= job.started <= job.ended
    assert (job.progress.phase, job.progress.percent, job.error) == ("done", 100, None)
    assert json.loads(json.dumps(job.to_dict())) == job.record.to_dict()
    assert dict(job) == dict(job.record)


def test_a_job_knows_what_ended_it(registry: ModelRegistry) -> None:
    failed, cancelled, lost = (submitted(registry) for _ in range(3))
    end(registry, failed, "failed", MergeError("it went wrong"))
    end(registry, cancelled, "cancelled")
    lose(registry, lost)
    for job, error in ((failed, MergeError), (cancelled, JobCancelled), (lost, JobLost)):
        assert type(job.error) is error
        with pytest.raises(error):
            job.result(progress=False)
    assert failed.record.error == "MergeError: it went wrong"
    assert [job.state for job in registry.jobs()] == ["lost", "cancelled", "failed"]
    for state in ("lost", "cancelled", "failed"):
        assert [job.state for job in registry.jobs(state)] == [state]  # type: ignore[arg-type]
    assert len(registry.jobs("succeeded")) == 0


def test_a_damaged_row_of_a_job_is_an_error(registry: ModelRegistry) -> None:
    job = submitted(registry)
    with closing(sqlite3.connect(registry.root / "registry.db")) as connection, connection:
        connection.execute("UPDATE jobs SET phase = 'x'")
    with pytest.raises(IntegrityError, match=job.name):
        _ = job.state


# Turns


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    max_running=st.integers(1, 3),
    steps=st.lists(st.sampled_from(["submit", "begin", "end", "lose"]), max_size=20),
    choices=st.randoms(use_true_random=False),
)
def test_jobs_begin_in_order_and_never_more_than_may(
    tmp_path_factory: pytest.TempPathFactory,
    max_running: int,
    steps: list[str],
    choices: object,
) -> None:
    registry = ModelRegistry(tmp_path_factory.mktemp("jobs"))
    alive: list[Job[CompleteModel]] = []
    running: set[object] = set()
    for step in ["submit", *steps]:
        if step == "submit":
            alive.append(submitted(registry, max_running))
        for job in list(alive):
            waits = job.id not in running and registry.catalog.jobs.seconds_to_wait(str(job.id))
            assert bool(waits) == (job.id not in running and alive.index(job) >= max_running)
            if step == "begin" and not waits and job.id not in running:
                assert registry.catalog.jobs.begin(str(job.id)) is not None
                running.add(job.id)
        if step in ("end", "lose") and alive:
            job = choices.choice(alive)  # type: ignore[attr-defined]
            (lose if step == "lose" else lambda r, j: end(r, j, "cancelled"))(registry, job)
            alive.remove(job)
            running.discard(job.id)
        assert len(running) <= max_running


def test_saves_of_several_processes_run_one_after_the_other(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models", max_running=1)
    registry.add_base_model("llama-tiny", tiny_base)
    customized = registry.register(tiny_adapter, train_name="a", base_model="llama-tiny")
    first, cancelled, second = (Merger(registry).save(customized) for _ in range(3))
    cancelled.cancel()
    for job in (first, second):
        job.result(progress=False)
    with pytest.raises(JobCancelled):
        cancelled.result(progress=False)
    assert first.ended is not None
    assert second.started is not None
    assert second.started >= first.ended
    assert "merging" in second.log
    assert second.progress.percent == 100
    registry.gc(grace_seconds=0)
    assert second.log == ""


def test_the_second_does_not_wait_for_a_worker_that_was_killed(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    one_at_a_time = ModelRegistry(registry.root, max_running=1)
    lost = submitted(registry)
    job = Merger(one_at_a_time).save(customized)
    until(lambda: job.log == "" and job.state == "queued")
    lose(registry, lost)
    job.result(progress=False)


# Waiting


def test_many_threads_may_wait_for_one_job(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    def result(job: Job[CompleteModel]) -> str:
        return job.result(120, progress=False).name

    for _ in range(3):
        job = Merger(registry).save(customized)
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(result, [job] * 8)) == {job.name}


def test_one_thread_tells_all_who_wait(registry: ModelRegistry) -> None:
    jobs = [submitted(registry) for _ in range(3)]

    async def main() -> list[object]:
        waiting = [asyncio.ensure_future(_awaited(job)) for job in jobs for _ in range(10)]
        await asyncio.to_thread(until, lambda: len(watchers()) == 1)
        for job in jobs:
            await asyncio.to_thread(end, registry, job, "cancelled")
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert {type(outcome) for outcome in asyncio.run(main())} == {JobCancelled}
    until(lambda: not watchers())


async def _awaited(job: Job[CompleteModel]) -> CompleteModel:
    return await job


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "job watcher"]


@contextmanager
def locked(registry: ModelRegistry) -> Iterator[None]:
    """Another writer has the database for itself."""
    with closing(sqlite3.connect(registry.root / "registry.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


def test_the_event_loop_goes_on_while_another_has_the_database(registry: ModelRegistry) -> None:
    """If it waited, the lock would never be released."""
    job = submitted(registry)

    async def main() -> None:
        with locked(registry):
            waiting = asyncio.ensure_future(_awaited(job))
            await asyncio.to_thread(until, lambda: len(watchers()) == 1)
            for _ in range(20):
                await asyncio.sleep(0.01)
        await asyncio.to_thread(end, registry, job, "cancelled")
        with pytest.raises(JobCancelled):
            await waiting

    asyncio.run(main())


def test_progress_is_told_until_the_end(registry: ModelRegistry) -> None:
    job = submitted(registry)

    async def main() -> list[str]:
        phases = []
        async for progress in job:
            phases.append(progress.phase)
            if progress.phase == "waiting":
                await asyncio.to_thread(registry.catalog.jobs.begin, str(job.id))
            elif progress.phase == "starting":
                await asyncio.to_thread(registry.catalog.jobs.report, str(job.id), "merging", 1, 2)
            elif progress.phase == "merging":
                await asyncio.to_thread(end, registry, job, "succeeded")
        return phases

    assert asyncio.run(main()) == ["waiting", "starting", "merging", "done"]


def test_who_stops_looking_is_told_no_more(
    registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SQLite, "poll_seconds", 3600.0)  # nobody waits for the next look
    job = submitted(registry)

    async def main() -> None:
        async for _ in job:
            break

    asyncio.run(main())
    until(lambda: not watchers())


def test_awaiting_a_job_of_which_there_is_no_row_is_an_error(registry: ModelRegistry) -> None:
    job = submitted(registry)
    with closing(sqlite3.connect(registry.root / "registry.db")) as connection, connection:
        connection.execute("DELETE FROM jobs")
    with pytest.raises(NotFoundError):
        asyncio.run(_awaited(job))
