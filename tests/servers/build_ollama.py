"""Builds the Ollama servers that the tests run against, unless they are there already.

    python3 tests/servers/build_ollama.py

Needs Go 1.26 or later, a C++ compiler and Go's module proxy; takes a few minutes. Everything lies
outside the repository, where `cache.py` says. Needs the standard library only.

    ollama-<version>/bin/ollama
    ollama-<version>/bin/render-template       Ollama's template package alone; render_template.go
    ollama-<version>/lib/ollama/llama-server   a link to what build_llama_cpp.py builds
    ollama-<version>/templates/                the Go templates that Ollama itself knows
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run as a script, beside which the other modules lie
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import cache

# The newest that `go install` builds with a runner inside, and a current one, which serves with
# the llama-server in `../lib/ollama` beside the directory that holds it.
VERSIONS = ("0.11.4", "0.34.1")
WITH_LLAMA_SERVER = ("0.34.1",)
LLAMA_SERVER = Path("llama-cpp-11434.0.0", "llama-server")
MODULE = "github.com/ollama/ollama"


def place(version: str) -> Path:
    """Where all of one version lies, or will."""
    return cache.directory() / f"ollama-{version}"


def binary(version: str) -> Path:
    """The server of that version."""
    return place(version) / "bin" / "ollama"


def renderer(version: str) -> Path:
    """The program that renders with that version's template package."""
    return place(version) / "bin" / "render-template"


def missing(version: str) -> str | None:
    """Why that version cannot run here; None if it can."""
    here = binary(version)
    if not _runs(here, version):
        return f"no Ollama {version} at {here}; tests/servers/build_ollama.py builds it"
    if version in WITH_LLAMA_SERVER and not (cache.directory() / LLAMA_SERVER).exists():
        return f"no {cache.directory() / LLAMA_SERVER}; tests/servers/build_llama_cpp.py builds it"
    return None


def _runs(path: Path, version: str) -> bool:
    # It asks the server at this address first; nothing listens there.
    settings = {**os.environ, "OLLAMA_HOST": "127.0.0.1:1"}
    try:
        answer = subprocess.run(
            [path, "--version"], env=settings, capture_output=True, text=True, check=False
        )
    except OSError:
        return False
    return answer.returncode == 0 and version in answer.stdout


def build_server(version: str) -> None:
    """Compile the server aside and move it into place whole."""
    flags = "-O3"
    if platform.machine() in ("x86_64", "AMD64"):
        flags += " -mavx2 -mfma -mf16c"
    with tempfile.TemporaryDirectory(dir=place(version)) as aside:
        settings = {"GOBIN": aside, "CGO_ENABLED": "1", "CGO_CFLAGS": flags, "CGO_CXXFLAGS": flags}
        named = f"-ldflags=-X={MODULE}/version.Version={version}"
        _go("install", named, f"{MODULE}@v{version}", settings=settings)
        built = Path(aside, "ollama")
        if not _runs(built, version):
            sys.exit(f"the Ollama that was built does not say that it is {version}")
        os.replace(built, binary(version))


def build_renderer(version: str) -> None:
    """Compile `render_template.go` with that version's template package; keep its templates."""
    with tempfile.TemporaryDirectory(dir=place(version)) as aside:
        shutil.copy(Path(__file__).with_name("render_template.go"), aside)
        _go("mod", "init", "render-template", directory=aside)
        _go("get", f"{MODULE}@v{version}", directory=aside)
        _go("build", "-mod=mod", "-o", "render-template", ".", directory=aside)
        listed = _go("list", "-m", "-json", MODULE, directory=aside)
        known = Path(aside, "templates")
        known.mkdir()
        for path in Path(json.loads(listed)["Dir"], "template").glob("*.gotmpl"):
            shutil.copyfile(path, known / path.name)
        shutil.rmtree(place(version) / "templates", ignore_errors=True)
        os.replace(known, place(version) / "templates")
        os.replace(Path(aside, "render-template"), renderer(version))


def link_llama_server(version: str) -> None:
    """Put a relative link to llama-server where that version looks for it."""
    link = place(version) / "lib" / "ollama" / LLAMA_SERVER.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..", "..", "..") / LLAMA_SERVER)


def _go(
    *arguments: str, directory: str | None = None, settings: dict[str, str] | None = None
) -> str:
    environment = {**os.environ, "GOFLAGS": "", **(settings or {})}
    command = ["go", *arguments]
    done = subprocess.run(
        command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout


def build() -> None:
    """Build what is not there.

    Raises:
        FileNotFoundError: No Go is installed.
        subprocess.CalledProcessError: It does not compile.
    """
    for version in VERSIONS:
        (place(version) / "bin").mkdir(parents=True, exist_ok=True)
        if version in WITH_LLAMA_SERVER:
            link_llama_server(version)
        steps = {binary(version): build_server, renderer(version): build_renderer}
        for path, make in steps.items():
            there = _runs(path, version) if make is build_server else path.exists()
            if not there:
                if shutil.which("go") is None:
                    raise FileNotFoundError("building Ollama needs Go 1.26 or later")
                print(f"building {path.name} of Ollama {version}: minutes", flush=True)
                make(version)


def main() -> None:
    """Build what is not there; say where it is."""
    build()
    for version in VERSIONS:
        print(binary(version))


if __name__ == "__main__":
    main()
