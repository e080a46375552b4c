"""What can happen to a server that several hosts share: nothing is lost, and nothing done twice."""

from __future__ import annotations

import asyncio
import pickle
import queue
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from customized_models import (
    CompleteModel,
    CustomizedModelsError,
    DatabaseError,
    DeploymentEnvironment,
    Event,
    Job,
    JobFailed,
    Merger,
    MissingDependencyError,
    ModelRegistry,
    as_completed,
)
from customized_models.catalog import postgresql as dialect
from customized_models.catalog.catalog import Catalog
from customized_models.catalog.database import Database
from customized_models.catalog.postgresql import PostgreSQL
from customized_models.catalog.schema import litter
from customized_models.jobs.worker import Reporter
from customized_models.processes import Process
from tests.servers.commit_proxy import CommitProxy, commit_proxy
from tests.servers.postgresql_server import PASSWORD, PostgreSQLServer, postgresql_server
from tests.waiting import until

SECONDS = 60  # for what takes milliseconds


@pytest.fixture
def url(postgresql: PostgreSQLServer) -> str:
    """The URL of an empty schema."""
    return postgresql.database()


@pytest.fixture
def proxy(postgresql: PostgreSQLServer) -> Iterator[CommitProxy]:
    """A proxy before the server."""
    with commit_proxy(postgresql.port) as running:
        yield running


def note(database: Database, key: str) -> None:
    """A change of one row."""
    with database.write() as connection:
        connection.execute(insert(litter).values(key=key, seen=0.0))


def noted(database: Database) -> set[str]:
    return {row["key"] for row in database.rows(select(litter.c.key))}


# Faults


def test_a_transaction_whose_backend_is_killed_changes_nothing(
    postgresql: PostgreSQLServer, url: str
) -> None:
    database = Database(url)
    note(database, "before")

    def be_killed() -> None:
        with database.write() as connection:
            connection.execute(insert(litter).values(key="killed", seen=0.0))
            pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            postgresql.execute("SELECT pg_terminate_backend(%s)", pid)
            connection.execute(insert(litter).values(key="late", seen=0.0))

    with pytest.raises(DatabaseError, match="terminating connection") as caught:
        be_killed()
    assert not caught.value.outcome_unknown
    note(database, "after")
    assert noted(database) == {"before", "after"}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT], ids=["in order", "at once"])
def test_a_server_that_is_started_again_has_all_that_was_committed(how: signal.Signals) -> None:
    with postgresql_server() as server:
        database = Database(server.database())
        note(database, "before")

        def be_stopped() -> None:
            with database.write() as connection:
                connection.execute(insert(litter).values(key="stopped", seen=0.0))
                server.stop(how)
                connection.execute(insert(litter).values(key="late", seen=0.0))

        with pytest.raises(DatabaseError):
            be_stopped()
        with pytest.raises(DatabaseError):
            noted(database)
        server.start()
        note(database, "after")
        assert noted(database) == {"before", "after"}


def test_a_job_goes_on_while_the_server_is_away_for_a_moment() -> None:
    with postgresql_server() as server:
        catalog = Catalog(server.database())
        id = str(catalog.jobs.add("save", lambda id: f"a_s_{id.hex}", {}, (), 1))
        with catalog.lease(id) as lease:
            report = Reporter(catalog, id, lease)
            report("starting", 0, 0)
            server.stop()
            report("merging", 1, 2)
            server.start()
            report("writing", 2, 2)
            assert catalog.jobs.row(id)["phase"] == "writing"


def test_a_job_that_ends_while_somebody_looks_is_not_lost(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks goes on to see the row as it was, and does not find the process any more."""
    catalog, other = Catalog(url), Catalog(url)
    id = str(catalog.jobs.add("save", lambda id: f"a_s_{id.hex}", {}, (), 1))
    seen = []

    def ends(process: Process) -> bool:
        if not seen:
            seen.append(process)
            with other.database.write() as connection:
                other.jobs.end(connection, id, "succeeded")
        return True

    monkeypatch.setattr(Process, "is_gone", property(ends))
    assert catalog.jobs.row(id)["state"] == "succeeded"
    assert seen


def test_a_commit_whose_answer_is_lost_was_made(
    postgresql: PostgreSQLServer, url: str, proxy: CommitProxy
) -> None:
    database = Database(postgresql.by_network(url, proxy.port))
    note(database, "before")
    proxy.cut = "after"
    note(database, "committed")
    assert proxy.cuts == 1
    proxy.cut = ""
    assert noted(database) == {"before", "committed"}


def test_a_commit_that_is_lost_on_its_way_was_not_made(
    postgresql: PostgreSQLServer, url: str, proxy: CommitProxy
) -> None:
    database = Database(postgresql.by_network(url, proxy.port))
    note(database, "before")
    proxy.cut = "before"
    with pytest.raises(DatabaseError) as caught:
        note(database, "lost")
    assert not caught.value.outcome_unknown
    proxy.cut = ""
    note(database, "lost")
    assert noted(database) == {"before", "lost"}


@pytest.mark.parametrize("cut", ["before", "after"])
def test_of_a_commit_after_which_the_server_stays_away_nothing_is_known(
    postgresql: PostgreSQLServer,
    url: str,
    proxy: CommitProxy,
    monkeypatch: pytest.MonkeyPatch,
    cut: str,
) -> None:
    monkeypatch.setattr(dialect, "RECONNECT_SECONDS", 0.5)
    database = Database(postgresql.by_network(url, proxy.port))
    note(database, "before")
    proxy.cut, proxy.then_refuse = cut, True
    with pytest.raises(DatabaseError, match="not known") as caught:
        note(database, "unknown")
    assert caught.value.outcome_unknown
    assert PASSWORD not in str(caught.value)


def test_a_registration_is_made_once_though_every_answer_is_lost(
    postgresql: PostgreSQLServer,
    url: str,
    proxy: CommitProxy,
    tiny_base: Path,
    tiny_adapter: Path,
    tmp_path: Path,
) -> None:
    through_proxy = postgresql.by_network(url, proxy.port)
    registry = ModelRegistry(tmp_path / "models", database=through_proxy)
    registry.add_base_model("llama-tiny", tiny_base)
    proxy.cut = "after"
    model = registry.register(tiny_adapter, train_name="support")
    registry.tag(model, "keep")
    assert proxy.cuts >= 3
    proxy.cut = ""
    assert list(registry.customized_models()) == [model]
    registry.verify(model)
    actions = Counter(event.action for event in registry.events(model))
    assert actions == {"created": 1, "tagged": 1}
    assert registry.recover() == []


@pytest.mark.slow
def test_a_job_is_done_for_a_registry_behind_a_password(
    postgresql: PostgreSQLServer, url: str, tiny_base: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models", database=postgresql.by_network(url))
    registry.add_base_model("llama-tiny", tiny_base)
    model = registry.register(tiny_adapter, train_name="support")
    complete = Merger(registry).save(model).result(progress=False)
    assert list(registry.complete_models()) == [complete]
    assert [job.state for job in registry.jobs()] == ["succeeded"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"a%2Fsecret" in path.read_bytes() for path in files)


def test_a_process_that_stands_still_in_a_transaction_loses_it_before_others_give_up(
    url: str,
) -> None:
    with Database(url).write() as connection:
        names = ("idle_in_transaction_session_timeout", "lock_timeout")
        idle, wait = (connection.exec_driver_sql(f"SHOW {name}").scalar() for name in names)
    assert (idle, wait) == ("15s", "30s")


def test_reading_waits_for_nobody(url: str) -> None:
    one, other = Database(url), Database(url)
    note(one, "before")
    with one.write() as connection:
        connection.execute(insert(litter).values(key="first", seen=0.0))
        assert noted(other) == {"before"}


# Being told


@pytest.fixture
def never_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits looks once an hour, unless told."""
    monkeypatch.setattr(PostgreSQL, "poll_seconds", 3600.0)


def listener_of(postgresql: PostgreSQLServer, but: int = 0) -> int:
    """The number of the server's process that listens for this one, once it is not that one."""
    listening = "SELECT pid FROM pg_stat_activity WHERE query = 'SELECT current_schema()'"
    pids: list[int] = []

    def one_listens() -> bool:
        pids[:] = [pid for (pid,) in postgresql.execute(listening)]
        return len(pids) == 1 and pids != [but]

    until(one_listens)  # that of another test goes on for a second
    return pids[0]


@pytest.mark.usefixtures("never_polls")
def test_whoever_waits_for_a_job_is_told_of_its_end(
    postgresql: PostgreSQLServer, url: str, tmp_path: Path
) -> None:
    registry, other = ModelRegistry(tmp_path, database=url), Catalog(url)
    id = other.jobs.add("save", lambda id: f"a_s_{id.hex}", {}, (), 1)
    job: Job[CompleteModel] = registry.job(id)

    async def wait() -> CompleteModel:
        return await job

    with ThreadPoolExecutor(3) as pool:
        waiting = [
            pool.submit(job.result, progress=False),
            pool.submit(lambda: asyncio.run(wait())),
            pool.submit(lambda: next(as_completed([job])).result()),
        ]
        listener_of(postgresql)
        with other.database.write() as connection:
            other.jobs.end(connection, str(id), "failed", JobFailed("on purpose"))
        errors = [future.exception(SECONDS) for future in waiting]
    assert [str(error) for error in errors] == ["on purpose"] * 3


@pytest.mark.usefixtures("never_polls")
def test_a_subscriber_is_told_at_once_also_after_its_connection_was_cut(
    postgresql: PostgreSQLServer, url: str, tmp_path: Path
) -> None:
    registry, other = (ModelRegistry(tmp_path, database=url) for _ in range(2))
    received: queue.Queue[Event] = queue.Queue()
    with registry.subscribe(received.put):
        first = listener_of(postgresql)
        other.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
        assert received.get(timeout=SECONDS).name == "here"
        postgresql.execute("SELECT pg_terminate_backend(%s)", first)
        listener_of(postgresql, but=first)
        other.add_environment(DeploymentEnvironment("there", backend="llama_cpp"))
        assert received.get(timeout=SECONDS).name == "there"


def test_who_is_told_nothing_looks_now_and_then(
    postgresql: PostgreSQLServer, url: str, tmp_path: Path
) -> None:
    """As behind a pooler that passes no notifications on."""
    registry, other = (ModelRegistry(tmp_path, database=url) for _ in range(2))
    other.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    schema = url.rpartition("%3D")[2]
    for table in ("events", "jobs"):
        postgresql.execute(f"ALTER TABLE {schema}.{table} DISABLE TRIGGER {table}_tell")
    received: queue.Queue[Event] = queue.Queue()
    with registry.subscribe(received.put):
        listener_of(postgresql)
        other.add_environment(DeploymentEnvironment("there", backend="llama_cpp"))
        assert received.get(timeout=SECONDS).name == "there"


# Races


@pytest.mark.slow
def test_sixteen_processes_change_a_registry_at_once(
    database: str, tiny_base: Path, tmp_path: Path
) -> None:
    registry = ModelRegistry(tmp_path / "models", database=database)
    registry.add_base_model("llama-tiny", tiny_base)
    script, count = Path(__file__).with_name("racing.py"), 5
    command = [sys.executable, script, database, "16", str(count)]
    names = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert len(set(names)) == len(names) == 16 * count
    created = [event.name for event in registry.events() if "Environment" in event.kind]
    assert Counter(created) == {f"box-{number}": 1 for number in range(count)}


def test_processes_that_make_the_tables_at_once_make_them_once(url: str) -> None:
    script = (
        "import sys; from customized_models.catalog.catalog import Catalog\n"
        "Catalog(sys.argv[1]).litter.age('a')"
    )
    command = [sys.executable, "-c", script, url]
    racing = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in racing] == [0] * 3
    assert noted(Database(url)) == {"a"}


# What a URL says


def test_two_registries_in_one_database_know_nothing_of_each_other(
    postgresql: PostgreSQLServer, tmp_path: Path
) -> None:
    one, other = (ModelRegistry(tmp_path / name, database=postgresql.database()) for name in "ab")
    here = one.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    assert list(one.environments()) == [here]
    assert list(other.environments()) == []
    with one.catalog.database.write():
        other.add_environment(DeploymentEnvironment("there", backend="llama_cpp"))
    assert [event.name for event in other.events()] == ["there"]


def test_reading_makes_no_tables(postgresql: PostgreSQLServer, url: str, tmp_path: Path) -> None:
    schema = url.rpartition("%3D")[2]
    registry = ModelRegistry(tmp_path / "models", database=url)
    assert list(registry.base_models()) == []
    count = "SELECT count(*) FROM pg_tables WHERE schemaname = %s"
    assert postgresql.execute(count, schema) == [(0,)]
    registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    assert postgresql.execute(count, schema) > [(10,)]


@pytest.mark.parametrize("how", ["in the URL", "PGPASSWORD"])
def test_a_password_is_used_and_shown_nowhere(
    postgresql: PostgreSQLServer,
    url: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    caplog.set_level("DEBUG")
    if how == "PGPASSWORD":
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        by_network = postgresql.by_network(url).replace(":a%2Fsecret%40of%3Aours@", "@")
    else:
        by_network = postgresql.by_network(url)
    registry = ModelRegistry(tmp_path / "models", database=by_network)
    registry.add_environment(DeploymentEnvironment("here", backend="llama_cpp"))
    again = pickle.loads(pickle.dumps(registry))
    assert list(again.environments()) == list(registry.environments())

    wrong = postgresql.by_network(url, password="another-secret")
    refused = Database(f"{wrong}&sslpassword=third-secret")
    with pytest.raises(DatabaseError, match="password authentication failed") as caught:
        noted(refused)
    shown = [str(caught.value), caplog.text]
    for known in (registry, registry.catalog, registry.catalog.database, refused):
        shown += [repr(known), str(known)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for secret in (PASSWORD, "a%2Fsecret", "another-secret", "third-secret"):
        assert not any(secret in text for text in shown)
        assert not any(secret.encode() in path.read_bytes() for path in files)


def test_a_server_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    registry = ModelRegistry(tmp_path, database="postgresql+psycopg://me:SECRET@127.0.0.1:1/models")
    with pytest.raises(DatabaseError, match="port 1 failed") as caught:
        registry.base_models()
    assert "SECRET" not in str(caught.value)


def test_a_schema_that_is_not_there_is_a_clear_error(url: str) -> None:
    with pytest.raises(DatabaseError, match="no schema has been selected"):
        note(Database(url[:-4] + "none"), "a")


def test_a_database_of_another_encoding_is_refused(postgresql: PostgreSQLServer) -> None:
    postgresql.execute(
        "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C' LOCALE_PROVIDER libc"
    )
    try:
        with pytest.raises(DatabaseError, match="ENCODING 'UTF8'"):
            note(Database(postgresql.url("latin")), "a")
    finally:
        postgresql.execute("DROP DATABASE latin")


def test_tables_of_another_version_are_refused(postgresql: PostgreSQLServer, url: str) -> None:
    note(Database(url), "a")
    schema = url.rpartition("%3D")[2]
    postgresql.execute(f"UPDATE {schema}.registry SET version = 99")
    with pytest.raises(DatabaseError, match="version 99"):
        noted(Database(url))


def test_without_psycopg_the_message_says_how_to_install_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingDependencyError, match=r"customized-models\[postgres\]"):
        noted(Database(url))


# Values


def test_numbers_may_be_as_large_as_in_sqlite(database: str) -> None:
    catalog = Catalog(database)
    id = str(catalog.jobs.add("save", lambda id: f"a_s_{id.hex}", {}, (), 1))
    catalog.jobs.report(id, "merging", 2**40, 2**41)
    row = catalog.jobs.row(id)
    assert (row["done"], row["total"]) == (2**40, 2**41)


def test_names_have_the_order_of_their_characters(database: str) -> None:
    """Not that of a language, which leaves hyphens and capital letters out of account."""
    names = ["Z", "a-b", "aB", "ab", "a_a"]
    found = Database(database)
    for name in names:
        note(found, name)
    listed = [row["key"] for row in found.rows(select(litter.c.key).order_by(litter.c.key))]
    assert listed == sorted(names)


def test_what_is_not_text_is_an_error_of_ours(url: str) -> None:
    with pytest.raises(CustomizedModelsError, match="NUL"):
        note(Database(url), "a\0b")
