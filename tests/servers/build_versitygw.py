"""Builds the S3 server that the tests run against, unless it is there already.

    python3 tests/servers/build_versitygw.py

Needs Go 1.25 or later and Go's module proxy; takes two minutes. It lies outside the repository,
where `cache.py` says: `versitygw-<version>/versitygw`. Needs the standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run as a script, beside which the other modules lie
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import cache

VERSION = "1.7.0"
COMMAND = "github.com/versity/versitygw/cmd/versitygw"


def binary() -> Path:
    """The server."""
    return cache.directory() / f"versitygw-{VERSION}" / "versitygw"


def missing() -> str | None:
    """Why it cannot run here; None if it can."""
    if _runs(binary()):
        return None
    return f"no versitygw {VERSION} at {binary()}; tests/servers/build_versitygw.py builds it"


def _runs(path: Path) -> bool:
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return answer.returncode == 0 and VERSION in answer.stdout


def build() -> None:
    """Build it if it is not there, aside, and move it into place whole.

    Raises:
        FileNotFoundError: No Go is installed.
        subprocess.CalledProcessError: It does not compile.
    """
    if _runs(binary()):
        return
    if shutil.which("go") is None:
        raise FileNotFoundError("building versitygw needs Go 1.25 or later")
    print("building versitygw: two minutes", flush=True)
    binary().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=binary().parent) as aside:
        environment = {**os.environ, "GOFLAGS": "", "GOBIN": aside}
        flags = f"-ldflags=-X=main.Version={VERSION}"
        subprocess.run(
            ["go", "install", flags, f"{COMMAND}@v{VERSION}"], env=environment, check=True
        )
        os.replace(Path(aside, "versitygw"), binary())


def main() -> None:
    """Build it if it is not there; say where it is."""
    build()
    print(binary())


if __name__ == "__main__":
    main()
