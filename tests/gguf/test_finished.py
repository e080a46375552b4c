"""A finished file that somebody else made, against the model that it is said to be of."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from customized_models import gguf as _gguf
from customized_models.errors import BaseModelMismatch, MalformedError
from customized_models.gguf.finished import check_finished
from customized_models.gguf.reading import read_preamble
from tests.gguf.models import MODELS, Tiny, tiny_model
from tests.gguf.test_families import no_progress, source


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's directory and a file of it."""
    scratch = tmp_path_factory.mktemp("finished")
    directory = tiny_model(scratch / "model", MODELS["llama"], "bfloat16")
    plan = _gguf.plan(source(directory), "q4_K_M", name="anything", chat_template=True)
    return directory, plan.write(scratch / "file.gguf", no_progress).path


def test_a_file_of_the_model_is_taken_whatever_its_types_and_name(made: tuple[Path, Path]) -> None:
    directory, path = made
    reports: list[tuple[str, int, int]] = []
    file = check_finished(path, source(directory), lambda *report: reports.append(report))
    data = path.read_bytes()
    assert (file.path, file.size) == (path, len(data))
    assert file.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert reports[-1] == ("hashing", len(data), len(data))


def test_a_file_whose_data_were_cut_is_refused(tmp_path: Path, made: tuple[Path, Path]) -> None:
    directory, path = made
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(MalformedError, match="ends at byte 100000"):
        check_finished(tmp_path / "cut.gguf", source(directory), no_progress)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"num_hidden_layers": 3}, "number of layers"),
        ({"hidden_size": 128, "num_attention_heads": 4}, "width"),
        ({"intermediate_size": 320}, "shape"),
        ({"attention_bias": True}, "lacks the tensors"),
    ],
)
def test_a_file_of_another_model_is_refused_and_the_difference_named(
    tmp_path: Path, made: tuple[Path, Path], changes: dict, difference: str
) -> None:
    other = tiny_model(tmp_path / "other", Tiny("LlamaConfig", changes), "bfloat16")
    with pytest.raises(BaseModelMismatch, match=difference):
        check_finished(made[1], source(other), no_progress)


def test_a_file_with_another_vocabulary_or_architecture_is_refused(
    tmp_path: Path, made: tuple[Path, Path]
) -> None:
    qwen = tiny_model(tmp_path / "qwen", MODELS["qwen2"], "bfloat16")
    with pytest.raises(BaseModelMismatch, match="architecture"):
        check_finished(made[1], source(qwen), no_progress)
    other = tiny_model(tmp_path / "other", MODELS["llama"], "bfloat16")
    document = json.loads((other / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (300, 301))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BaseModelMismatch, match="vocabulary"):
        check_finished(made[1], source(other), no_progress)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.floats(0, 0.999), at=st.integers(0, 4000), byte=st.integers(0, 255))
def test_a_file_that_was_cut_or_spoilt_parses_or_is_malformed(
    tmp_path: Path, made: tuple[Path, Path], cut: float, at: int, byte: int
) -> None:
    data = bytearray(made[1].read_bytes()[: read_preamble(made[1]).end])
    data[at % len(data)] = byte
    (tmp_path / "spoilt.gguf").write_bytes(data)
    (tmp_path / "cut.gguf").write_bytes(data[: int(cut * len(data))])
    for name in ("spoilt.gguf", "cut.gguf"):
        try:
            read_preamble(tmp_path / name)
        except MalformedError as error:
            assert name in str(error)  # noqa: PT017
