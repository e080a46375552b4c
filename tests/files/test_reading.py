"""JSON of others is read with bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from customized_models import MalformedError
from customized_models.files.reading import MAX_NESTING, python_json, strict_json


@pytest.mark.parametrize("parse", [python_json, strict_json])
@pytest.mark.parametrize(("before", "after"), [("[", "]"), ('{"a":', "}")])
@pytest.mark.parametrize("levels", [MAX_NESTING + 1, 600, 900, 5000, 100_000])
def test_what_nests_deeper_than_anybody_writes_is_refused(
    parse: Callable[[bytes, str], Any], before: str, after: str, levels: int
) -> None:
    """Whoever walks through it or copies it does so by recursion, as transformers does."""
    with pytest.raises(MalformedError, match=r"config\.json"):
        parse(f"{before * levels}1{after * levels}".encode(), "config.json")


@pytest.mark.parametrize("parse", [python_json, strict_json])
def test_what_nests_as_deep_as_allowed_is_read(parse: Callable[[bytes, str], Any]) -> None:
    value = parse(b"[" * MAX_NESTING + b"]" * MAX_NESTING, "x")
    for _ in range(MAX_NESTING - 1):
        (value,) = value
    assert value == []
