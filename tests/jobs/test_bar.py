"""Progress bars."""

from __future__ import annotations

import pytest

from customized_models.jobs.bar import Bar


def test_a_bar_ends_at_all_of_it_unless_it_failed(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("merge", shown=True) as bar:
        bar.update("reading", 10, 100)
        bar.update("writing", 60, 200)
    assert "merge: 100%" in capsys.readouterr().err

    with pytest.raises(ValueError, match="failed"), Bar("merge", shown=True) as bar:  # noqa: PT012
        bar.update("reading", 10, 100)
        raise ValueError("failed")
    assert "100%" not in capsys.readouterr().err


def test_a_bar_that_is_not_wanted_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("merge", shown=False) as bar:
        bar.update("reading", 10, 100)
    assert capsys.readouterr().err == ""
