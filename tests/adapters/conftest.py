"""An adapter that PEFT has saved, and copies of it to spoil."""

from __future__ import annotations

from pathlib import Path

import pytest

from customized_models.adapters.intake import WEIGHTS
from customized_models.adapters.settings import CONFIG
from customized_models.testing import tiny_llama, tiny_lora


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    base = tiny_llama(directory / "base", tokenizer=False)
    return tiny_lora(directory / "adapter", base)


@pytest.fixture
def untrusted(trained: Path, tmp_path: Path) -> Path:
    """A copy of a good adapter, for a test to spoil."""
    directory = tmp_path / "untrusted"
    directory.mkdir()
    for name in (CONFIG, WEIGHTS):
        (directory / name).write_bytes((trained / name).read_bytes())
    return directory
