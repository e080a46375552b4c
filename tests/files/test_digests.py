"""Digests of values and files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from customized_models.errors import MalformedError
from customized_models.files.digests import (
    SHA256,
    FileDigest,
    canonical_json,
    digest_of,
    hash_file,
    new_hash,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(VALUES)
def test_a_value_has_one_digest_whatever_the_order_of_its_keys(value: object) -> None:
    reordered = dict(reversed(value.items())) if isinstance(value, dict) else value
    assert digest_of(value) == digest_of(reordered)
    assert digest_of(value) == f"blake3:{blake3(canonical_json(value)).hexdigest()}"


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (8 << 20) + 3])
def test_a_file_has_the_digest_of_its_bytes(size: int, tmp_path: Path) -> None:
    data = bytes(range(251)) * (size // 251 + 1)
    (tmp_path / "file").write_bytes(data[:size])
    ours, theirs = hash_file(tmp_path / "file"), hash_file(tmp_path / "file", SHA256)
    assert ours == FileDigest(size, f"blake3:{blake3(data[:size]).hexdigest()}")
    assert theirs == FileDigest(size, f"sha256:{hashlib.sha256(data[:size]).hexdigest()}")
    assert (ours.algorithm, theirs.algorithm) == ("blake3", "sha256")


def test_a_hash_of_pieces_is_that_of_the_whole() -> None:
    hash = new_hash()
    for piece in (b"a", b"", b"bc"):
        hash.update(piece)
    assert hash.hexdigest() == blake3(b"abc").hexdigest()


def test_a_missing_file_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(MalformedError, match="missing"):
        hash_file(tmp_path / "none")
