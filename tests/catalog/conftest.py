"""The tests of this directory run with every kind of database."""

from __future__ import annotations

import pytest

from customized_models import ModelRegistry


@pytest.fixture
def registry(each_registry: ModelRegistry) -> ModelRegistry:
    """A registry that knows `tiny_base` as llama-tiny."""
    return each_registry
