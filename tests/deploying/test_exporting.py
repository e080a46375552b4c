"""A model as a file of its own, for tools that are given files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from customized_models import (
    AlreadyExistsError,
    CustomizedModel,
    Deployer,
    ModelRegistry,
    NotFoundError,
    UnsupportedQuantizationError,
)
from customized_models.deploying.exporting import put_file
from customized_models.errors import IntegrityError, JobCancelled
from customized_models.files.digests import SHA256, hash_file
from customized_models.gguf import GGUFFile
from customized_models.gguf.reading import read_preamble


@pytest.fixture
def customized(registry: ModelRegistry, tiny_adapter: Path) -> CustomizedModel:
    return registry.register(tiny_adapter, train_name="support")


def test_an_exported_file_is_the_one_that_is_deployed_to_llama_cpp(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    path = tmp_path / "support.gguf"
    job = Deployer(registry).export_gguf(customized, path, quantization="q8_0")
    assert job.result(progress=False) == path
    assert job.kind == "export"
    assert registry.job(job.id).result(progress=False) == path

    assert "tokenizer.chat_template" in read_preamble(path).metadata
    (cached,) = (registry.root / "gguf").glob("*/model.gguf")
    assert path.read_bytes() == cached.read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_not_replaced(
    registry: ModelRegistry, customized: CustomizedModel, tmp_path: Path
) -> None:
    deployer, path = Deployer(registry), tmp_path / "support.gguf"
    path.write_bytes(b"theirs")
    with pytest.raises(AlreadyExistsError, match=r"support\.gguf"):
        deployer.export_gguf(customized, path)
    with pytest.raises(NotFoundError, match="no directory"):
        deployer.export_gguf(customized, tmp_path / "nowhere" / "support.gguf")
    with pytest.raises(UnsupportedQuantizationError):
        deployer.export_gguf(customized, tmp_path / "new.gguf", quantization="q5_K_M")
    assert path.read_bytes() == b"theirs"


def test_a_copy_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target" / "file.gguf"
    target.parent.mkdir()
    source.write_bytes(b"GGUF" * 1000)
    good = GGUFFile(source, 4000, hash_file(source, SHA256).digest)
    bad = GGUFFile(source, 4000, f"sha256:{hashlib.sha256().hexdigest()}")

    def cancel(phase: str, done: int, total: int) -> None:
        raise JobCancelled(phase)

    with pytest.raises(JobCancelled):
        put_file(good, target, cancel)
    with pytest.raises(IntegrityError, match="changed while it was copied"):
        put_file(bad, target, lambda *_: None)
    target.write_bytes(b"theirs")
    with pytest.raises(AlreadyExistsError):
        put_file(good, target, lambda *_: None)
    assert [path.read_bytes() for path in target.parent.iterdir()] == [b"theirs"]
