"""Some of the fuzzer's cases; `python -m tests.fuzz` runs more."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fuzz

# Among the later ones are cases that were faults once: a dtype that is a list, or an object.
FIRST_CASES = [0, 1800, 2800]


@pytest.mark.parametrize("first", FIRST_CASES)
def test_changed_files_are_accepted_or_refused_by_an_error_of_ours(
    first: int, tmp_path: Path
) -> None:
    counts, faults, _ = fuzz.run(first, 100, tmp_path)
    assert not faults, "\n".join(faults)
    assert min(counts["accepted"], counts["refused"]) > 10
