"""The documentation does what it says."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import customized_models

ROOT = Path(__file__).parent.parent
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_readmes_example_runs_as_it_stands(tmp_path: Path, ollama: object) -> None:
    blocks = PYTHON.findall((ROOT / "README.md").read_text())
    assert len(blocks) == 2
    script = "\n".join(blocks)
    assert script.count("11434") == 1
    script = script.replace("11434", str(ollama.port))  # the fixture's server has a free port

    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "ThirdPartyModel(" in done.stdout


def test_docstring_examples_hold() -> None:
    package = Path(customized_models.__file__).parent
    tried = 0
    for path in sorted(package.rglob("*.py")):
        if ">>> " in path.read_text():
            name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
            results = doctest.testmod(importlib.import_module(name))
            assert results.failed == 0
            tried += results.attempted
    assert tried > 0


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_the_readme_says_can_be_done_is_what_the_tables_say() -> None:
    readme = (ROOT / "README.md").read_text()
    assert load(ROOT / "docs/support.py").with_support(readme) == readme, "run docs/support.py"


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")), ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.slow
def test_the_quickstart_teaches_a_real_model_a_new_fact(tmp_path: Path, ollama: object) -> None:
    environment = os.environ | {"OLLAMA_HOST": f"{ollama.address}:{ollama.port}"}
    done = subprocess.run(
        [sys.executable, ROOT / "docs/quickstart.py", "--registry", tmp_path / "models"],
        env=environment,
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
