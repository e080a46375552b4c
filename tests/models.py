"""Fixtures that any test may use: a tiny base, an adapter for it, a registry that knows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from customized_models import CustomizedModel, ModelRegistry
from customized_models.testing import tiny_llama, tiny_lora


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama: read it, never write to it."""
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def tiny_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for `tiny_base`: read it, never write to it."""
    return tiny_lora(tmp_path_factory.mktemp("adapter") / "lora", tiny_base)


only_sqlite = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
"""For a test that looks into SQLite's file, where others of its module use every database."""


@pytest.fixture
def registry(tiny_base: Path, tmp_path: Path) -> ModelRegistry:
    """A registry that knows `tiny_base` as llama-tiny."""
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("llama-tiny", tiny_base, model_name="tests/llama-tiny")
    return registry


@pytest.fixture
def each_registry(tiny_base: Path, tmp_path: Path, database: str) -> ModelRegistry:
    """As `registry`, with every kind of database."""
    registry = ModelRegistry(tmp_path / "models", database=database)
    registry.add_base_model("llama-tiny", tiny_base, model_name="tests/llama-tiny")
    return registry


@pytest.fixture
def slow(tmp_path: Path) -> tuple[ModelRegistry, CustomizedModel]:
    """A customized model whose save takes seconds: a base of many layers."""
    base = tiny_llama(
        tmp_path / "deep", hidden_size=512, intermediate_size=2048, num_hidden_layers=48
    )
    registry = ModelRegistry(tmp_path / "models")
    registry.add_base_model("deep", base)
    adapter = tiny_lora(tmp_path / "adapter", base, target_modules="all-linear")
    return registry, registry.register(adapter, train_name="slow")
