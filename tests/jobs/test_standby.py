"""Interpreters that are started ahead of the job they will run."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from customized_models import (
    CompleteModel,
    CustomizedModel,
    IntegrityError,
    Job,
    JobFailed,
    Merger,
    ModelRegistry,
)
from customized_models.jobs import queue as jobs
from customized_models.jobs import standby as interpreters
from customized_models.jobs.job import workers
from tests.waiting import until


@pytest.fixture(autouse=True)
def none_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Before; and what waits afterwards is ended."""
    monkeypatch.setattr(interpreters, "_ahead", [])
    yield
    while (child := interpreters.take_started()) is not None:
        assert child.stdin is not None
        child.stdin.close()
        child.wait(timeout=60)


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


def waiting() -> subprocess.Popen[bytes]:
    (one,) = interpreters._ahead
    return one.process


def ran(job: Job[CompleteModel]) -> int:
    """The process that ran it, once it has."""
    job.result(progress=False)
    return workers[str(job.id)].pid


def test_a_save_runs_in_the_interpreter_that_waits(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    merger = Merger(registry)
    cold = merger.save(customized).result(progress=False)
    merger.warm_up()
    expected = waiting().pid
    job = merger.save(customized)
    assert ran(job) == expected
    assert job.result().digest == cold.digest
    merger.verify(job.result())
    assert interpreters._ahead == []  # none runs a second job
    assert ran(merger.save(customized)) != expected


def test_only_one_waits(registry: ModelRegistry) -> None:
    Merger(registry).warm_up()
    first = waiting().pid
    Merger(registry).warm_up()
    assert waiting().pid == first


def test_what_goes_wrong_in_it_is_raised_here(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    (registry.local_path(customized) / "adapter_config.json").write_text("{}")
    merger = Merger(registry)
    merger.warm_up()
    expected = waiting().pid
    job = merger.save(customized)
    assert workers[str(job.id)].pid == expected
    with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
        job.result(progress=False)


def test_one_that_has_died_is_not_used(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    merger = Merger(registry)
    merger.warm_up()
    dead = waiting()
    dead.kill()
    dead.wait()
    assert ran(merger.save(customized)) != dead.pid


def test_one_that_dies_while_it_is_taken_costs_no_job(
    registry: ModelRegistry, customized: CustomizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = Merger(registry)
    merger.warm_up()
    dead = interpreters.take_started()
    assert dead is not None
    dead.kill()
    dead.wait()
    monkeypatch.setattr(jobs, "take_started", lambda: dead)
    assert ran(merger.save(customized)) != dead.pid


def test_one_of_another_environment_is_ended(
    registry: ModelRegistry, customized: CustomizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = Merger(registry)
    merger.warm_up()
    old = waiting()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job = merger.save(customized)
    assert ran(job) != old.pid
    assert job.result().recipe["threads"] == 1
    assert old.wait(timeout=60) == 0


def test_one_of_another_directory_is_ended(
    registry: ModelRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Merger(registry).warm_up()
    old = waiting()
    monkeypatch.chdir(tmp_path)
    assert interpreters.take_started() is None
    assert old.wait(timeout=60) == 0


def test_a_forked_process_leaves_it_alone(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    """And may live on while a job is handed over: the interpreter does not wait for its end."""
    merger = Merger(registry)
    merger.warm_up()
    expected = waiting().pid
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_takes_none)
        assert ran(merger.save(customized)) == expected


def _takes_none() -> bool:
    return interpreters.take_started() is None


IMPORT_HOOK = """
import importlib.abc, sys, time

class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "peft":
            {statement}

sys.meta_path.insert(0, Hook())
"""


@pytest.fixture
def when_peft_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Has all interpreters from now on do something then."""

    def hook(statement: str) -> None:
        (tmp_path / "sitecustomize.py").write_text(IMPORT_HOOK.format(statement=statement))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return hook


def test_a_job_that_comes_before_all_is_imported_keeps_its_lease(
    registry: ModelRegistry,
    customized: CustomizedModel,
    when_peft_is_imported: Callable[[str], None],
) -> None:
    when_peft_is_imported("time.sleep(6)")
    merger = Merger(registry)
    merger.warm_up()
    job = merger.save(customized)
    until(lambda: job.state != "queued")
    assert job.state == "running"
    job.result(progress=False)


def test_imports_that_fail_are_the_jobs_error(
    registry: ModelRegistry,
    customized: CustomizedModel,
    when_peft_is_imported: Callable[[str], None],
) -> None:
    when_peft_is_imported("raise ImportError('this peft is broken')")
    merger = Merger(registry)
    merger.warm_up()
    with pytest.raises(JobFailed, match="this peft is broken"):
        merger.save(customized).result(progress=False)


def test_it_ends_with_the_process_that_started_it(registry: ModelRegistry) -> None:
    code = (
        "import os, sys\n"
        "from customized_models import Merger, ModelRegistry\n"
        "from customized_models.jobs import standby\n"
        "Merger(ModelRegistry(sys.argv[1])).warm_up()\n"
        "print(standby._ahead[0].process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(registry.root)], stdout=subprocess.PIPE, text=True
    )
    assert ended.returncode == -9
    until(lambda: not _lives(int(ended.stdout)))


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # where nobody takes notice of it, it stays as a zombie
    return not (status.is_file() and status.read_text().rpartition(")")[2].split()[0] == "Z")
