"""Processes that do this library's work: forked from one that has imported the libraries."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
    NotFoundError,
)
from customized_models.jobs.isolated import run_isolated
from customized_models.jobs.job import workers
from customized_models.jobs.workers import PID, Worker, warm_up
from customized_models.processes import Process
from tests.waiting import until

pytestmark = pytest.mark.slow

linux = pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere")


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> int:
    """A server that no other test has."""
    monkeypatch.setenv("OF_THIS_TEST", uuid.uuid4().hex)
    return warm_up()


def ran(job: Job[CompleteModel]) -> int:
    """The process that ran it, once it has."""
    pid = workers[str(job.id)].pid
    assert pid is not None
    job.result(progress=False)
    return pid


def parent_of_task() -> int:
    return run_isolated(os.getppid)


def test_the_time_for_an_answer_begins_when_the_worker_does() -> None:
    here, there = socket.socketpair()
    begun = PID.pack(os.getpid())
    begins = threading.Timer(1.0, lambda: (there.sendall(begun + b"the answer"), there.close()))
    begins.start()
    worker = Worker(here)
    assert worker.answer(seconds=0.1) == b"the answer"
    worker.close()
    begins.join()


# The server


@linux
def test_every_piece_of_work_has_a_process_of_its_own_that_one_server_forked(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    server, merger = warm_up(), Merger(registry)
    first, second = ran(merger.save(customized)), ran(merger.save(customized))
    assert len({first, second, run_isolated(os.getpid), server, os.getpid()}) == 5
    assert parent_of_task() == server == warm_up()
    one, other = registry.complete_models()
    assert one.digest == other.digest


def imported(name: str) -> bool:
    return name in sys.modules


@linux
def test_a_worker_has_the_libraries_and_none_of_the_callers_modules() -> None:
    assert run_isolated(imported, "peft")
    assert run_isolated(imported, "torch")
    assert "tests.jobs.test_workers" in sys.modules
    assert not run_isolated(imported, "hypothesis")


def thread_count() -> int:
    return len(os.listdir(f"/proc/{os.getpid()}/task"))


@linux
def test_a_worker_begins_with_one_thread() -> None:
    assert run_isolated(thread_count) == 1


def test_a_server_that_has_died_is_replaced(
    registry: ModelRegistry, customized: CustomizedModel, own_server: int
) -> None:
    os.kill(own_server, signal.SIGKILL)
    complete = Merger(registry).save(customized).result(progress=False)
    assert complete.customized == customized.name
    assert warm_up() != own_server


@linux
def test_work_goes_on_without_its_server(
    registry: ModelRegistry, customized: CustomizedModel, own_server: int
) -> None:
    job = Merger(registry).save(customized)
    assert workers[str(job.id)].pid is not None
    os.kill(own_server, signal.SIGKILL)
    assert job.result(progress=False).customized == customized.name


def test_a_server_of_another_environment_ends_and_another_is_started(
    registry: ModelRegistry,
    customized: CustomizedModel,
    own_server: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    complete = Merger(registry).save(customized).result(progress=False)
    assert complete.recipe["threads"] == 1
    assert warm_up() != own_server
    until(lambda: Process.of(own_server) is None)


def test_a_worker_is_in_the_callers_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = warm_up()
    monkeypatch.chdir(tmp_path)
    assert run_isolated(os.getcwd) == str(tmp_path)
    assert warm_up() == server


def test_a_forked_process_leaves_the_server_alone(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    """And may live on: the server is its parent's, and ends with that."""
    server = warm_up()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(warm_up) != server
    assert warm_up() == server
    ran(Merger(registry).save(customized))


def test_a_server_ends_with_the_process_that_started_it() -> None:
    code = (
        "import os\n"
        "from customized_models.jobs.workers import warm_up\n"
        "print(warm_up(), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert ended.returncode == -9
    until(lambda: Process.of(int(ended.stdout)) is None)


def test_a_job_is_done_though_the_process_that_submitted_it_has_ended(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    script = (
        "import sys; from customized_models import CustomizedModel, Merger, ModelRegistry\n"
        "registry = ModelRegistry(sys.argv[1])\n"
        "print(Merger(registry).save(registry.get(CustomizedModel, sys.argv[2])).id)"
    )
    id = subprocess.check_output(
        [sys.executable, "-c", script, str(registry.root), customized.name], text=True
    )
    job = registry.job(uuid.UUID(id.strip()))
    assert job.result(progress=False).customized == customized.name  # type: ignore[attr-defined]


# Imports


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
        path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        monkeypatch.setenv("PYTHONPATH", path)

    return hook


def test_a_job_that_comes_before_all_is_imported_keeps_its_lease(
    registry: ModelRegistry,
    customized: CustomizedModel,
    when_peft_is_imported: Callable[[str], None],
) -> None:
    when_peft_is_imported("time.sleep(6)")
    job = Merger(registry).save(customized)
    assert job.state == "queued"
    job.result(progress=False)


def test_imports_that_fail_are_the_jobs_error(
    registry: ModelRegistry,
    customized: CustomizedModel,
    when_peft_is_imported: Callable[[str], None],
) -> None:
    when_peft_is_imported("raise ImportError('this peft is broken')")
    with pytest.raises(JobFailed, match="this peft is broken"):
        Merger(registry).save(customized).result(progress=False)


@linux
def test_where_threads_are_left_after_the_imports_each_process_does_one_piece_of_work(
    registry: ModelRegistry,
    customized: CustomizedModel,
    when_peft_is_imported: Callable[[str], None],
) -> None:
    when_peft_is_imported(
        "import threading; threading.Thread(target=time.sleep, args=[3600], daemon=True).start()"
    )
    server = warm_up()
    assert ran(Merger(registry).save(customized)) == server
    until(lambda: Process.of(server) is None)
    assert run_isolated(os.getpid) != server


@linux
def test_work_that_comes_before_all_is_imported_is_done_where_threads_are_left(
    when_peft_is_imported: Callable[[str], None],
) -> None:
    when_peft_is_imported(
        "import threading; threading.Thread(target=time.sleep, args=[3600], daemon=True).start(); "
        "time.sleep(1)"
    )
    server = warm_up()
    with ThreadPoolExecutor(3) as pool:
        pids = list(pool.map(lambda _: run_isolated(os.getpid), range(3)))
    assert server in pids
    assert len(set(pids)) == 3


# What a worker answers


def test_what_goes_wrong_in_a_worker_is_raised_here(
    registry: ModelRegistry, customized: CustomizedModel
) -> None:
    (registry.local_path(customized) / "adapter_config.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"adapter_config\.json"):
        Merger(registry).save(customized).result(progress=False)


def refuse() -> None:
    raise NotFoundError("it is not there")


def die() -> None:
    print("my last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise KeyError("an error of another kind")


def test_a_function_that_is_run_apart_raises_our_errors_as_they_are() -> None:
    with pytest.raises(NotFoundError, match="not there"):
        run_isolated(refuse)


@pytest.mark.parametrize(("task", "said"), [(die, "my last words"), (fail, "another kind")])
def test_the_last_output_of_a_function_that_fails_is_told(
    task: Callable[[], None], said: str
) -> None:
    with pytest.raises(JobFailed, match=said):
        run_isolated(task)


def sleep_and_tell(path: str) -> None:
    Path(path).write_text(str(os.getpid()))
    signal.pause()


@linux
def test_a_function_ends_when_its_caller_is_interrupted(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, threading, time\n"
        "from pathlib import Path\n"
        "from customized_models.jobs.isolated import run_isolated\n"
        "from tests.jobs.test_workers import sleep_and_tell\n"
        "path = Path(sys.argv[1])\n"
        "def interrupt():\n"
        "    while not path.exists() or not path.read_text():\n"
        "        time.sleep(0.02)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt).start()\n"
        "run_isolated(sleep_and_tell, str(path))\n"
    )
    path = tmp_path / "pid"
    root = Path(__file__).parent.parent.parent
    ended = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=root, stderr=subprocess.PIPE, text=True
    )
    assert "KeyboardInterrupt" in ended.stderr
    until(lambda: Process.of(int(path.read_text())) is None)
