"""The pages of the documentation do what they say, as their readers type them in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.pages import blocks_of, run_page
from tests.servers.hub_server import TOKEN, hub_server
from tests.servers.ollama_server import OllamaServer
from tests.servers.postgresql_server import PostgreSQLServer
from tests.servers.s3_server import S3Server

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parent.parent / "docs"
OLLAMA_PORT = "11434"
DATABASE = "postgresql+psycopg://models@db.example.org/models"
EMPTY_DATABASE = "postgresql+psycopg://models@db.example.org/team"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"},
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(DOCS), os.environ.get("PYTHONPATH")])),
}
"""`docs` is importable, so that the tutorial finds `quickstart.py`; pytest on a page is plain."""

PAGES = [page for page in sorted(DOCS.rglob("*.md")) if blocks_of(page.read_text())]
WITH_OLLAMA = [page for page in PAGES if OLLAMA_PORT in page.read_text()]
WITH_POSTGRESQL = [page for page in PAGES if DATABASE in page.read_text()]
WITH_HUB = [page for page in PAGES if "push_to_hub(" in page.read_text()]
WITH_S3 = [page for page in PAGES if 'storage="s3://' in page.read_text()]
ALONE = [page for page in PAGES if page not in WITH_OLLAMA + WITH_POSTGRESQL + WITH_HUB + WITH_S3]


@pytest.mark.parametrize("page", ALONE, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, ENVIRONMENT)


@pytest.mark.parametrize("page", WITH_OLLAMA, ids=lambda page: page.stem)
def test_a_page_that_talks_to_ollama_does_what_it_says(
    page: Path, tmp_path: Path, ollama: OllamaServer
) -> None:
    run_page(page, tmp_path, ENVIRONMENT, {OLLAMA_PORT: str(ollama.port)})


@pytest.mark.parametrize("page", WITH_POSTGRESQL, ids=lambda page: page.stem)
def test_a_page_that_talks_to_postgresql_does_what_it_says(
    page: Path, tmp_path: Path, postgresql: PostgreSQLServer
) -> None:
    urls = {name: postgresql.database() for name in (DATABASE, EMPTY_DATABASE)}
    run_page(page, tmp_path, ENVIRONMENT, urls)


@pytest.mark.parametrize("page", WITH_HUB, ids=lambda page: page.stem)
def test_a_page_that_talks_to_the_hub_does_what_it_says(page: Path, tmp_path: Path) -> None:
    with hub_server() as hub:
        environment = ENVIRONMENT | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": TOKEN,
        }
        (tmp_path / "page").mkdir()
        run_page(page, tmp_path / "page", environment)


@pytest.mark.parametrize("page", WITH_S3, ids=lambda page: page.stem)
def test_a_page_that_talks_to_s3_does_what_it_says(
    page: Path, tmp_path: Path, s3: S3Server
) -> None:
    (tmp_path / "page").mkdir()
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    run_page(page, tmp_path / "page", ENVIRONMENT | s3.environment | cache)


@pytest.mark.parametrize("name", ["tour", "sweep"])
def test_the_notebook_shows_what_is_stored_in_it(tmp_path: Path, name: str) -> None:
    stored = nbformat.read(DOCS / f"{name}.ipynb", as_version=4)
    run = nbformat.read(DOCS / f"{name}.ipynb", as_version=4)
    NotebookClient(run, kernel_name="python3", timeout=300).execute(cwd=str(tmp_path))
    assert [shown_by(cell) for cell in run.cells] == [shown_by(cell) for cell in stored.cells]
    assert "The lighthouse.\n" in [text for cell in run.cells for text in shown_by(cell)]


def shown_by(cell: Any) -> list[Any]:
    """What a cell prints, and in which forms it shows the rest; warnings and bars do not count."""
    outputs = [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"]
    return [o["text"] if o.output_type == "stream" else sorted(o["data"]) for o in outputs]


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
