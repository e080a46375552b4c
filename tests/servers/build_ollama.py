"""Builds the Ollama server that the tests run against, unless it is there already.

    python3 tests/servers/build_ollama.py

Needs Go 1.24 or later, a C++ compiler and Go's module proxy; takes a few minutes. The binary lies
outside the repository, where `cache.py` says. Needs the standard library only.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run as a script, from anywhere
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import cache

# The newest version that `go install` builds without anything else.
VERSION = "0.11.4"
MODULE = "github.com/ollama/ollama"


def binary() -> Path:
    """Where the built server lies, or will."""
    return cache.directory() / f"ollama-{VERSION}" / "ollama"


def runs(path: Path) -> bool:
    """Whether there is a binary at `path` of the right version that this machine can run."""
    # It asks the server at this address first; nothing listens there.
    settings = {**os.environ, "OLLAMA_HOST": "127.0.0.1:1"}
    try:
        answer = subprocess.run(
            [path, "--version"], env=settings, capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    return answer.returncode == 0 and VERSION in answer.stdout


def build() -> None:
    """Compile it aside and move it into place whole."""
    target = binary()
    target.parent.mkdir(parents=True, exist_ok=True)
    flags = "-O3"
    if platform.machine() in ("x86_64", "AMD64"):
        flags += " -mavx2 -mfma -mf16c"
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        settings = {
            "GOBIN": aside,
            "CGO_ENABLED": "1",
            "CGO_CFLAGS": flags,
            "CGO_CXXFLAGS": flags,
        }
        command = [
            "go",
            "install",
            f"-ldflags=-X={MODULE}/version.Version={VERSION}",
            f"{MODULE}@v{VERSION}",
        ]
        subprocess.run(command, env={**os.environ, **settings}, check=True)
        built = Path(aside, "ollama")
        if not runs(built):
            sys.exit(f"the Ollama that was built does not say that it is {VERSION}")
        os.replace(built, target)


def main() -> None:
    """Build if need be; say where it is."""
    if not runs(binary()):
        if shutil.which("go") is None:
            sys.exit("building Ollama needs Go 1.24 or later: https://go.dev/dl/")
        print(f"building Ollama {VERSION}, which takes a few minutes", flush=True)
        build()
    print(binary())


if __name__ == "__main__":
    main()
