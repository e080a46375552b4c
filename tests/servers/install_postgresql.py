"""Finds PostgreSQL's programs, or fetches Debian's packages of them if there are none.

    python3 tests/servers/install_postgresql.py

What a distribution or Homebrew has installed is used as it is. Else Debian's packages are fetched
and unpacked, without root, outside the repository, where `cache.py` says:

    postgresql/usr/lib/postgresql/<version>/bin/postgres

Needs the standard library, and in the latter case apt-get and dpkg.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run as a script, beside which the other modules lie
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import cache

INSTALLED = ("usr/lib/postgresql/*/bin", "opt/homebrew/opt/postgresql*/bin")
NEEDED = ("initdb", "postgres")


def fetched() -> Path:
    """Where packages are unpacked, or will be."""
    return cache.directory() / "postgresql"


def programs() -> Path | None:
    """The directory with `initdb` and `postgres`; None if there is none."""
    on_path = [Path(found).parent for found in [shutil.which("initdb")] if found]
    below = [path for root in (Path("/"), fetched()) for p in INSTALLED for path in root.glob(p)]
    every = on_path + sorted(below, key=_version, reverse=True)
    return next((p for p in every if all((p / name).exists() for name in NEEDED)), None)


def _version(path: Path) -> int:
    return max([int(number) for number in re.findall(r"\d+", str(path))], default=0)


def libraries(place: Path) -> dict[str, str]:
    """The environment variable by which programs that were unpacked there find their libraries."""
    found = [str(path) for path in place.glob("usr/lib/*-linux-*")]
    return {"LD_LIBRARY_PATH": os.pathsep.join(found)} if found else {}


def missing() -> str | None:
    """Why there is no PostgreSQL; None if there is."""
    if programs() is not None:
        return None
    return "no PostgreSQL; install it, or let tests/servers/install_postgresql.py fetch it"


def build() -> None:
    """Fetch what is not there.

    Raises:
        FileNotFoundError: There is no apt-get.
        subprocess.CalledProcessError: It cannot be fetched.
    """
    if programs() is not None:
        return
    if shutil.which("apt-get") is None:
        raise FileNotFoundError("PostgreSQL is not installed, and without apt-get not fetched")
    fetched().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=fetched().parent) as aside:
        would = ["apt-get", "install", "--print-uris", "-qq", "--no-install-recommends"]
        listed = subprocess.run(
            [*would, "postgresql"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        packages = re.findall(r"^'\S+' ([^_\s]+)_", listed, re.MULTILINE)
        # As root, apt-get would fetch as a user who may not write here.
        fetch = ["apt-get", "-o", "APT::Sandbox::User=root", "download"]
        subprocess.run([*fetch, *packages], cwd=aside, check=True)
        for package in Path(aside).glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, f"{aside}/root"], check=True)
        os.replace(f"{aside}/root", fetched())


def main() -> None:
    """Fetch what is not there; say where it is."""
    build()
    print(programs())


if __name__ == "__main__":
    main()
