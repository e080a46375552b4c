"""Jobs that an executor runs: pools of the standard library, and Dask; what is killed or lost."""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest
from distributed import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from customized_models import (
    CompleteModel,
    CustomizedModel,
    Deployer,
    DeploymentEnvironment,
    InUseError,
    InvalidArgumentError,
    Job,
    JobCancelled,
    JobFailed,
    JobLost,
    JobTimeoutError,
    Merger,
    ModelRegistry,
    NotFoundError,
    as_completed,
)
from customized_models.catalog.jobs import WORKERS
from customized_models.files.kept import can_keep
from customized_models.storage import Storage
from customized_models.testing import tiny_llama, tiny_lora
from tests.deploying.third_party import Shelf
from tests.jobs.storages import Deadly, Gated, Shared
from tests.opens import counting_opens
from tests.servers.postgresql_server import PASSWORD, QUOTED, PostgreSQLServer, postgresql_server
from tests.servers.process import free_port
from tests.waiting import stop_outside_a_transaction, until

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


def with_storage(registry: ModelRegistry, kind: Callable[[Path], Storage]) -> ModelRegistry:
    """The same registry, whose workers have a storage of that kind."""
    database = registry.catalog.database.url
    return ModelRegistry(registry.root, storage=kind(registry.root), database=database)


def at_the_gate(registry: ModelRegistry) -> None:
    """Wait until a worker has done all but publish."""
    until((registry.root / "waiting").exists)


def open_the_gate(registry: ModelRegistry) -> None:
    (registry.root / "gate").touch()


def begun(job: Job[Any], number: int = 1) -> psutil.Process:
    """The process of that worker of the job, once it has begun."""
    said = re.compile(rf"worker {job.id}\.{number}, process (\d+) of")
    until(lambda: said.search(job.log))
    return psutil.Process(int(said.findall(job.log)[0]))


def workers_of(job: Job[Any]) -> int:
    """How many workers have begun it."""
    return len(re.findall(rf"worker {job.id}\.\d+, process", job.log))


@pytest.fixture
def busy() -> Iterator[ThreadPoolExecutor]:
    """An executor that has something else to do for as long as the test lasts."""
    free = Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(free.wait)
        yield pool
        free.set()


# Pools of the standard library


@pytest.mark.slow
def test_an_executor_saves_what_a_process_of_this_host_does(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        jobs = Merger(registry, executor=pool).save_many([customized, customized.name])
        assert {job.result().digest for job in as_completed(jobs)} == {
            Merger(registry).save(customized).result(progress=False).digest
        }
    assert [job.state for job in jobs] == ["succeeded"] * 2
    assert "merging" in jobs[0].log


@pytest.mark.skipif(not can_keep(), reason="this Python knows of no memory that can be sealed")
@pytest.mark.parametrize("workers", [None, 2])
def test_a_fleet_reads_its_base_once(workers: int | None, tmp_path: Path) -> None:
    registry, base = ModelRegistry(tmp_path / "models"), tiny_llama(tmp_path / "base")
    registry.add_base_model("llama-tiny", base)
    kinds = {"lora": {}, "dora": {"use_dora": True}, "head": {"modules_to_save": ["lm_head"]}}
    models = [
        registry.register(tiny_lora(tmp_path / kind, base, **options), train_name=kind)
        for kind, options in kinds.items()
    ]
    alone = [Merger(registry).save(model).result(progress=False).digest for model in models]
    with ExitStack() as stack:
        opened = stack.enter_context(counting_opens(base))
        pool = stack.enter_context(ThreadPoolExecutor(workers)) if workers else None
        jobs = Merger(registry, executor=pool).save_many(models)
        assert [job.result(progress=False).digest for job in jobs] == alone
        weights = {path.name for path in base.glob("*.safetensors")}
        assert {name: opened()[name] for name in weights} == dict.fromkeys(weights, 1)


def test_jobs_are_in_the_order_of_their_models(
    registry: ModelRegistry, tiny_adapter: Path, busy: ThreadPoolExecutor
) -> None:
    names = [registry.register(tiny_adapter, train_name=name).name for name in ("b", "a", "c")]
    jobs = Merger(registry, executor=busy).save_many(names)
    assert [job.name.startswith(name) for job, name in zip(jobs, names, strict=True)] == [True] * 3
    with pytest.raises(JobTimeoutError, match="3 jobs"):
        next(as_completed(jobs, timeout=0))
    for job in jobs[1:]:
        job.cancel()
    ended = as_completed(jobs)
    assert {next(ended).id, next(ended).id} == {job.id for job in jobs[1:]}
    jobs[0].cancel()
    assert [job.id for job in ended] == [jobs[0].id]


def test_of_several_models_none_is_saved_if_one_is_not_there(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    with pytest.raises(NotFoundError, match="other"):
        Merger(registry).save_many([customized, "other"])
    for alone in (customized, customized.name):
        with pytest.raises(InvalidArgumentError, match="several models"):
            Merger(registry).save_many(alone)  # type: ignore[arg-type]
    assert len(registry.jobs()) == 0


def test_what_is_no_executor_is_refused(registry: ModelRegistry) -> None:
    for face in (Merger, Deployer):
        with pytest.raises(InvalidArgumentError, match="executor"):
            face(registry, executor="threads")  # type: ignore[arg-type]


def test_an_engine_that_logs_what_it_is_given_logs_no_password(
    postgresql: PostgreSQLServer, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    logged: list[str] = []

    class Logging(Executor):
        def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            logged.append(repr((fn, args, kwargs)))
            return Future()

    by_network = postgresql.by_network(postgresql.database())
    registry = ModelRegistry(tmp_path / "models", database=by_network)
    registry.add_base_model("llama-tiny", tiny_base)
    customized = registry.register(tiny_adapter, train_name="support")
    job = Merger(registry, executor=Logging()).save(customized)
    job.cancel()
    assert str(job.id) in logged[0]
    assert not any(secret in logged[0] for secret in (PASSWORD, QUOTED))


# While a job waits in an executor


def test_what_waits_in_an_executor_is_held_and_in_no_other_jobs_way(
    registry: ModelRegistry, customized: CustomizedModel, busy: ThreadPoolExecutor
) -> None:
    one_at_a_time = ModelRegistry(registry.root, max_running=1)
    job = Merger(one_at_a_time, executor=busy).save(customized)
    assert (job.state, job.progress.phase) == ("queued", "waiting")
    Merger(one_at_a_time).save(customized).result(progress=False)
    with pytest.raises(InUseError):
        registry.delete(customized)
    job.cancel()


def test_a_job_that_waits_in_an_executor_is_cancelled_at_once(
    registry: ModelRegistry, customized: CustomizedModel, busy: ThreadPoolExecutor
) -> None:
    job = Merger(registry, executor=busy).save(customized)
    assert job.cancel() is True
    with pytest.raises(JobCancelled):
        job.result(progress=False)
    assert job.cancel() is False
    registry.delete(customized)


def test_what_an_executor_drops_has_failed_and_can_be_submitted_again(
    registry: ModelRegistry, customized: CustomizedModel, busy: ThreadPoolExecutor
) -> None:
    job = Merger(registry, executor=busy).save(customized)
    busy.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(JobFailed, match="submit it again"):
        job.result(progress=False)
    with pytest.raises(JobFailed, match="does not take the job"):
        Merger(registry, executor=busy).save(customized)
    assert [job.state for job in registry.jobs()] == ["failed", "failed"]
    registry.delete(customized)


# Workers that are killed


@pytest.mark.slow
def test_another_worker_does_the_job_of_one_that_was_killed(
    each_registry: ModelRegistry, tiny_adapter: Path
) -> None:
    registry = each_registry
    customized = registry.register(tiny_adapter, train_name="support")
    gated = with_storage(registry, Gated)
    with ThreadPoolExecutor(1) as pool:
        job = Merger(gated, executor=pool).save(customized)
        at_the_gate(registry)
        begun(job).kill()
        begun(job, 2)
        open_the_gate(registry)
        complete = job.result(progress=False)
    assert f"worker {job.id}.1 has gone without a word" in job.log
    assert list(registry.complete_models()) == [complete]
    assert list((registry.root / ".staging").iterdir()) == []
    assert Merger(registry).save(customized).result(progress=False).digest == complete.digest


@pytest.mark.slow
def test_jobs_of_an_executor_are_done_though_the_database_is_away_for_a_while(
    tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    """What was just being published is finished by another worker, and one that waits begins."""
    with postgresql_server() as server:
        registry = ModelRegistry(tmp_path / "models", database=server.database())
        registry.add_base_model("llama-tiny", tiny_base)
        customized = registry.register(tiny_adapter, train_name="support")
        with ThreadPoolExecutor(1) as pool:
            merger = Merger(with_storage(registry, Gated), executor=pool)
            jobs = merger.save_many([customized] * 2)
            at_the_gate(registry)
            worker = begun(jobs[0])
            server.stop()
            open_the_gate(registry)
            until(lambda: not worker.is_running())
            server.start()
            saved = [job.result(progress=False) for job in jobs]
        assert f"worker {jobs[0].id}.1 has gone without a word" in jobs[0].log
        assert [workers_of(job) for job in jobs] == [1, 1]  # to do all of the work
        assert sorted(registry.complete_models(), key=saved.index) == saved
        assert saved[0].digest == saved[1].digest
        assert registry.recover() == []
        assert list((registry.root / ".staging").iterdir()) == []


@pytest.mark.slow
def test_a_job_that_kills_its_workers_fails_and_says_so(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    with ThreadPoolExecutor(1) as pool:
        job = Merger(with_storage(registry, Deadly), executor=pool).save(customized)
        with pytest.raises(JobFailed, match=rf"{WORKERS} workers were killed.*my last words"):
            job.result(progress=False)
    assert workers_of(job) == WORKERS
    registry.delete(customized)


@pytest.mark.slow
def test_a_deployment_whose_worker_is_killed_is_not_begun_again(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    (tmp_path / "served").mkdir()
    settings = {"directory": str(tmp_path / "served"), "kill": True}
    registry.add_environment(DeploymentEnvironment("there", "shelf", settings=settings))
    with ThreadPoolExecutor(1) as pool:
        deployer = Deployer(registry, backends={"shelf": Shelf}, executor=pool)
        job = deployer.deploy(customized)
        with pytest.raises(JobLost, match=r"'there'.*recover"):
            job.result(progress=False)
    assert workers_of(job) == 1
    assert deployer.recover() == [f"undid the deployment of {job.name} at there"]
    assert list((tmp_path / "served").iterdir()) == []


class Twice(ThreadPoolExecutor):
    """As an engine that has lost sight of the worker that it has sent, and sends another."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        super().submit(fn, *args, **kwargs)
        return super().submit(fn, *args, **kwargs)


@pytest.mark.slow
def test_of_two_that_are_sent_to_do_a_job_one_waits_for_the_other(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    with Twice(2) as pool:
        job = Merger(registry, executor=pool).save(customized)
        complete = job.result(progress=False)
    assert workers_of(job) == 1
    assert list(registry.complete_models()) == [complete]


@pytest.mark.slow
def test_a_worker_that_comes_back_after_its_lease_disturbs_nobody(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    """It is stopped just before it publishes, and another has published before it goes on."""
    with Twice(2) as pool:
        job = Merger(with_storage(registry, Gated), executor=pool).save(customized)
        at_the_gate(registry)
        stopped = begun(job)
        stop_outside_a_transaction(stopped.pid, registry)
        with registry.catalog.database.write() as connection:
            connection.exec_driver_sql(
                f"UPDATE leases SET renewed = renewed - 1000 WHERE owner = '{job.id}.1'"
            )
        begun(job, 2)
        open_the_gate(registry)
        complete = job.result(progress=False)
        inode = registry.local_path(complete).stat().st_ino
        stopped.resume()
    until(lambda: not stopped.is_running())
    assert "JobLost" in job.log
    assert registry.local_path(complete).stat().st_ino == inode
    registry.verify(complete)
    assert list(registry.complete_models()) == [complete]
    assert list((registry.root / ".staging").iterdir()) == []


SUBMITTER = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from customized_models import Merger, ModelRegistry
from tests.jobs.storages import Gated

root, name = sys.argv[1:]
merger = Merger(ModelRegistry(root, storage=Gated(root)), executor=ThreadPoolExecutor(1))
print(*(job.id for job in merger.save_many([name, name])), flush=True)
time.sleep(3600)
"""


@pytest.mark.slow
def test_what_has_begun_outlives_the_process_that_submitted_it(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    command = [sys.executable, "-c", SUBMITTER, str(registry.root), customized.name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as submitter:
        assert submitter.stdout is not None
        ids = submitter.stdout.readline().split()
        at_the_gate(registry)
        submitter.kill()
    first, second = (registry.job(uuid.UUID(id)) for id in ids)
    with pytest.raises(JobLost, match="the process that submitted"):
        second.result(progress=False)
    assert first.state == "running"
    open_the_gate(registry)
    assert first.result(progress=False).customized == customized.name  # type: ignore[attr-defined]
    registry.delete(customized)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(st.sampled_from(["begin", "kill", "forget", "cancel"]), max_size=12))
def test_a_job_has_one_worker_at_a_time_and_no_more_than_may_die_of_it(
    registry: ModelRegistry, steps: list[str]
) -> None:
    """And none that is gone can change anything, however late it comes back."""
    jobs, leases, database = (
        registry.catalog.jobs,
        registry.catalog.leases,
        registry.catalog.database,
    )
    id = str(jobs.add("save", lambda id: f"a_s_{id.hex}", {"customized": "a"}, (), None))
    workers, works, vouched, ended = list[str](), False, True, False
    for step in steps:
        if step == "begin":
            try:
                owner = jobs.take_up(id, (), None, "")
            except InUseError:
                assert works
                continue
            assert not works
            ended = owner is None
            if owner is not None:
                workers.append(owner)
                works = jobs.begin(id, owner) is not None
        elif step == "cancel":
            assert jobs.ask_to_stop(id) is not ended
            ended = ended or not works
        else:
            with database.write() as connection:
                gone = workers[-1] if step == "kill" and workers else id
                leases.end(connection, gone)
            works, vouched = works and gone == id, vouched and gone != id
        lost = not (ended or works or vouched)
        assert (jobs.row(id)["state"] == "lost") is lost
        assert (jobs.row(id)["state"] in ("failed", "cancelled")) is ended
        for before in workers[: -1 if works else None]:
            with database.write() as connection, pytest.raises(JobLost):
                registry.catalog.lease(before).check(connection)
        assert len(workers) <= WORKERS


# Dask


CLUSTER = """
import sys, time
from distributed import LocalCluster

if __name__ == "__main__":
    port, workers = map(int, sys.argv[1:])
    cluster = LocalCluster(
        n_workers=workers, threads_per_worker=1, scheduler_port=port, dashboard_address=":0"
    )
    print(flush=True)
    time.sleep(3600)
"""


@contextmanager
def dask(directory: Path, port: int, workers: int) -> Iterator[subprocess.Popen[str]]:
    """A real Dask: a process with the scheduler, and those that it sends work to."""
    script = directory / "cluster.py"
    script.write_text(CLUSTER)
    command = [sys.executable, str(script), str(port), str(workers)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as cluster:
        assert cluster.stdout is not None
        try:
            cluster.stdout.readline()
            yield cluster
        finally:
            cluster.kill()


def engine_of(worker: psutil.Process) -> psutil.Process:
    """Dask's process that has started the fork server of that worker."""
    server = worker.parent()
    assert server is not None
    engine = server.parent()
    assert engine is not None
    return engine


def is_about_a_job(cluster: subprocess.Popen[str]) -> bool:
    """Whether a process of Dask's, which was not killed, has a fork server."""
    with suppress(psutil.Error):  # one that was killed has no command line
        for child in psutil.Process(cluster.pid).children(recursive=True):
            if "fork_server" in " ".join(child.cmdline()):
                return True
    return False


@pytest.mark.slow
def test_dask_sends_another_worker_once_engine_and_worker_are_gone(tmp_path: Path) -> None:
    """A worker goes on though the process that Dask had sent is killed; the next one waits."""
    base = tiny_llama(
        tmp_path / "deep", hidden_size=256, intermediate_size=1024, num_hidden_layers=48
    )
    registry, port = ModelRegistry(tmp_path / "models"), free_port()
    registry.add_base_model("deep", base)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    customized = registry.register(adapter, train_name="support")
    with dask(tmp_path, port, 2) as cluster, Client(f"127.0.0.1:{port}") as client:
        job = Merger(registry, executor=client.get_executor()).save(customized)
        staging = registry.root / ".staging" / f"save-{job.id}.1"
        journal = staging / "shards.jsonl"
        until(lambda: journal.is_file() and journal.read_bytes().count(b"size") >= 3)
        worker = begun(job)
        stop_outside_a_transaction(worker.pid, registry)
        engine_of(worker).kill()
        until(lambda: is_about_a_job(cluster))
        assert worker.is_running()
        assert workers_of(job) == 1
        files = [json.loads(line)["file"] for line in journal.read_bytes().splitlines()[1:]]
        inodes = {file: (staging / file).stat().st_ino for file in files}
        worker.kill()
        complete = job.result(progress=False)

    print(job.log)
    directory = registry.local_path(complete)
    assert workers_of(job) == 2
    assert {file: (directory / file).stat().st_ino for file in inodes} == inodes
    assert list((registry.root / ".staging").iterdir()) == []
    Merger(registry).verify(complete)


@pytest.mark.slow
def test_two_processes_of_dask_share_a_save(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    of_workers, port = with_storage(registry, Shared), free_port()
    with dask(tmp_path, port, 2), Client(f"127.0.0.1:{port}") as client:
        job = Merger(of_workers, executor=client.get_executor()).save(customized, workers=2)
        complete = job.result(progress=False)
    assert f"helper {job.id}.h1 makes" in job.log
    Merger(registry).verify(complete)


@pytest.mark.slow
def test_what_a_scheduler_takes_with_it_has_failed_and_what_has_begun_goes_on(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    """The same executor takes jobs again once the scheduler has been started again."""
    port = free_port()
    with dask(tmp_path, port, 1) as cluster:
        client = Client(f"127.0.0.1:{port}", timeout="300s")  # for so long it looks for it
        merger = Merger(with_storage(registry, Gated), executor=client.get_executor())
        first, second = merger.save_many([customized] * 2)
        at_the_gate(registry)
        cluster.kill()
    with pytest.raises(JobFailed, match="submit it again"):
        second.result(progress=False)
    assert first.state == "running"
    open_the_gate(registry)
    complete: CompleteModel = first.result(progress=False)
    with dask(tmp_path, port, 1), client:
        until(lambda: client.status == "running")
        again = merger.save(customized).result(progress=False)
    assert {model.name for model in registry.complete_models()} == {again.name, complete.name}
    assert again.digest == complete.digest
