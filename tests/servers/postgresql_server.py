"""A real PostgreSQL for a while, with a directory of its own, as a user who is not root."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg

from . import install_postgresql
from .process import ended_with_us, free_port

PASSWORD = "a/secret@of:ours"  # needs quoting in a URL
QUOTED = "a%2Fsecret%40of%3Aours"


class PostgreSQLServer:
    """A server with a socket, which asks nothing, and a port, which asks for a password.

    `directory`: where all of it lies; `settings`: further parameters of the server's. Its order of
    texts is that of a language, as it is where nobody has thought of it.
    """

    def __init__(self, directory: Path, **settings: str) -> None:
        self.directory = directory
        self._settings = settings
        self.port = free_port()
        self._programs, self._libraries = _programs(directory)
        self._process: subprocess.Popen[bytes] | None = None
        self._watched = ExitStack()
        (directory / "password").write_text(PASSWORD)
        if os.geteuid() == 0:
            for path in (directory, directory / "password"):
                shutil.chown(path, *_user())
        options = ["--locale-provider=icu", "--icu-locale=en-US", "--locale=C", "--encoding=UTF8"]
        access = ["--auth-local=trust", "--auth-host=scram-sha-256", "--username=registry"]
        command = [self._programs / "initdb", "--no-sync", *options, *access]
        self._run([*command, f"--pwfile={directory}/password", "-D", directory / "data"])

    def start(self) -> None:
        """Start it, and wait until it answers."""
        settings = {
            "port": self.port,
            "unix_socket_directories": self.directory,
            "listen_addresses": "127.0.0.1",
            "fsync": "off",  # a process that is killed loses nothing by that
            "max_connections": 60,
            **self._settings,
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.directory / "data", *options],
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as_user(),
            )
        self._watched.enter_context(ended_with_us(self._process.pid))
        for _ in range(600):
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                if self._process.poll() is not None:
                    break
                time.sleep(0.05)
            else:
                return
        raise RuntimeError((self.directory / "log").read_text()[-3000:])

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: in order by SIGINT, at once and without tidying up by SIGQUIT."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(60)
            self._watched.close()

    def execute(self, statement: Any, *values: Any) -> list[Any]:
        """What a statement finds, executed apart from every transaction."""
        with self.connect() as connection:
            cursor = connection.execute(statement, values or None)
            return cursor.fetchall() if cursor.description else []

    def connect(self) -> psycopg.Connection[Any]:
        """A connection of the test's own."""
        return psycopg.connect(
            host=str(self.directory),
            port=self.port,
            user="registry",
            dbname="postgres",
            autocommit=True,
        )

    def database(self) -> str:
        """The URL of a new, empty schema."""
        name = f"schema_{uuid.uuid4().hex}"
        self.execute(f"CREATE SCHEMA {name}")
        return f"{self.url()}&options=-csearch_path%3D{name}"

    def url(self, name: str = "postgres") -> str:
        """The URL of a database, by the socket."""
        where = f"host={self.directory}&port={self.port}"
        return f"postgresql+psycopg://registry@/{name}?{where}"

    def by_network(self, database: str, port: int | None = None, password: str = QUOTED) -> str:
        """The URL of the same database through a port: the server's, or a proxy's before it."""
        schema = database.partition("&options=")[2]
        where = f"127.0.0.1:{port or self.port}"
        url = f"postgresql+psycopg://registry:{password}@{where}/postgres?sslmode=disable"
        return f"{url}&options={schema}" if schema else url

    def _run(self, command: list[str | Path]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, **self._as_user())
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    def _as_user(self) -> dict[str, Any]:
        """PostgreSQL refuses to run as root."""
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", **self._libraries}
        common = {"cwd": self.directory, "env": environment}
        if os.geteuid() != 0:
            return common
        user, group = _user()
        return {**common, "user": user, "group": group, "extra_groups": []}


def _user() -> tuple[int, int]:
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _programs(directory: Path) -> tuple[Path, dict[str, str]]:
    """Where the programs are and how they find libraries; copied to where their user may read."""
    found = install_postgresql.programs()
    assert found is not None
    place = install_postgresql.fetched()
    if not found.is_relative_to(place):
        return found, {}
    if os.geteuid() == 0:
        copy = directory / "programs"
        shutil.copytree(place, copy, symlinks=True)
        found, place = copy / found.relative_to(place), copy
    return found, install_postgresql.libraries(place)


@contextmanager
def postgresql_server(**settings: str) -> Iterator[PostgreSQLServer]:
    """A server, once it answers; its directory is short, as names of sockets have to be."""
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as directory:
        server = PostgreSQLServer(Path(directory), **settings)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGQUIT)
