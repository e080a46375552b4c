"""Some of the fuzzer's cases; `python -m tests.fuzz` runs more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fuzz

# Numbers of cases that were faults once are added here.
FIRST_CASES = [0, 100, 200]


@pytest.mark.parametrize("first", FIRST_CASES)
def test_changed_files_are_accepted_or_refused_by_an_error_of_ours(
    first: int, tmp_path: Path
) -> None:
    counts, faults, _ = fuzz.run(first, 100, tmp_path)
    assert not faults, "\n".join(faults)
    assert min(counts["accepted"], counts["refused"]) > 10
