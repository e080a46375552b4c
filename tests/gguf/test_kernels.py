"""The quantizers that Numba compiles, against ggml's: every bit of every block."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from customized_models.errors import MissingDependencyError
from customized_models.gguf.format import Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, TensorType
from customized_models.gguf.kernels import Quantizer, check_quantizer, quantizer
from customized_models.gguf.kernels.ggml import Ggml

TYPES = {type_.name: type_ for type_ in (Q4_K, Q5_K, Q6_K, Q8_0, Q5_0, Q5_1)}


@pytest.fixture(scope="module")
def ours() -> Quantizer:
    compiled = pytest.importorskip("customized_models.gguf.kernels.compiled")
    return compiled.Compiled()


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


def differing_blocks(ours: Quantizer, ggml: Ggml, rows: torch.Tensor, type_: TensorType) -> int:
    a, b = (torch.frombuffer(bytearray(q(rows, type_)), dtype=torch.uint8) for q in (ours, ggml))
    return int((a.view(-1, type_.size) != b.view(-1, type_.size)).any(1).sum())


def normal(generator: torch.Generator, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(16, 1024, generator=generator) * scale


def adversarial(seed: int) -> dict[str, torch.Tensor]:
    """Rows on which formulas like to go wrong."""
    g = torch.Generator().manual_seed(seed)
    shape = (16, 1024)
    uniform = torch.rand(shape, generator=g)
    one_hot = torch.zeros(shape)
    one_hot[torch.arange(16), torch.randint(1024, (16,), generator=g)] = torch.randn(
        16, generator=g
    )
    outlier, huge = normal(g, 1e-3), normal(g, 1e-6)
    outlier[:, ::251], huge[:, ::97] = 50, 1e4
    any_bits = torch.randint(-(1 << 31), (1 << 31) - 1, shape, generator=g).to(torch.int32)
    any_floats = any_bits.view(torch.float32)
    by_16 = 10.0 ** torch.randint(-38, 37, (16, 64, 1), generator=g)
    near_by_16 = 10.0 ** torch.randint(-9, 5, (16, 64, 1), generator=g)
    wild = 10.0 ** torch.randint(-38, 37, shape, generator=g)
    rows = {
        "zeros": torch.zeros(shape),
        "negative zeros": -torch.zeros(shape),
        "zeros of both signs": torch.where(uniform < 0.5, 0.0, -0.0),
        "one number": one_hot,
        "outlier": outlier,
        "negative outlier": -outlier,
        "huge outlier": huge,
        "negative": -normal(g).abs() - 0.1,
        "positive": normal(g).abs() + 0.1,
        "far from zero": 1000 + uniform,
        "far below zero": -1e7 - (uniform * 4).round(),
        "largest": torch.where(uniform < 0.5, 3.4e38, -3.4e38),
        "alternating": torch.tensor([1.0, -1.0]).repeat(16, 512),
        "sub-blocks of many sizes": (normal(g).view(16, 64, 16) * near_by_16).view(shape),
        "sub-blocks of all sizes": (normal(g).view(16, 64, 16) * by_16).view(shape),
        "numbers of all sizes": normal(g) * wild,
        "sparse": normal(g) * (uniform < 0.05),
        "ties": torch.randint(-8, 8, shape, generator=g).float(),
        "half ties": torch.randint(-31, 32, shape, generator=g) / 2,
        "three values": torch.randint(-1, 2, shape, generator=g).float(),
        "last bit": 1 + torch.randint(0, 3, shape, generator=g) * 2.0**-23,
        "ramp": torch.linspace(-1, 1, 16 * 1024).view(shape),
        "any finite bits": torch.where(any_floats.isfinite(), any_floats, 0.0),
        "half zeros": torch.cat([torch.zeros(16, 512), normal(g)[:, :512]], 1),
    }
    for value in (1, -1, 3.14159e-3, -7e-20, 1e30, -1e-16, 1e-15, 2e-15):
        rows[f"all {value}"] = torch.full(shape, float(value))
    for exponent in (-40, -37, -20, -15, -10, -7, -5, -2, 0, 4, 6, 18, 37):
        rows[f"normal times 1e{exponent}"] = normal(g, 10.0**exponent)
    return {name: tensor.contiguous() for name, tensor in rows.items()}


@pytest.mark.parametrize("name", TYPES)
def test_adversarial_rows_become_the_blocks_that_ggml_makes(
    ours: Quantizer, ggml: Ggml, name: str
) -> None:
    for seed in range(3):
        for kind, rows in adversarial(seed).items():
            assert differing_blocks(ours, ggml, rows, TYPES[name]) == 0, kind


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    blocks=st.integers(1, 5),
    scale=st.floats(1e-30, 1e30),
    mean=st.floats(-2, 2),
    seed=st.integers(0, 2**31),
)
def test_random_rows_of_any_number_become_the_blocks_that_ggml_makes(
    ours: Quantizer, ggml: Ggml, name: str, rows: int, blocks: int, scale: float, mean: float,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    type_ = TYPES[name]
    numbers = torch.randn(rows, blocks * type_.block, generator=generator)
    assert differing_blocks(ours, ggml, ((numbers + mean) * scale).contiguous(), type_) == 0


def test_where_numba_is_missing_ggml_quantizes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "numba" else find(name)
    )
    check_quantizer()
    assert isinstance(quantizer(), Ggml)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for ask in (check_quantizer, quantizer):
        with pytest.raises(MissingDependencyError, match=r"customized-models\[gguf\]"):
            ask()


QUANTIZE = """
import torch
from customized_models.gguf.format import Q8_0
from customized_models.gguf.kernels.compiled import Compiled
print(bytes(Compiled()(torch.linspace(-1, 1, 32)[None], Q8_0)).hex())
"""


def quantized_alone(cache: Path, **settings: str) -> str:
    """What a process of its own makes of a few numbers, with this directory for caches."""
    pytest.importorskip("numba")
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)} | settings
    run = subprocess.run(
        [sys.executable, "-c", QUANTIZE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_what_is_compiled_is_kept_in_a_private_directory(tmp_path: Path) -> None:
    first = quantized_alone(tmp_path)
    (kept,) = (tmp_path / "customized-models").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    files = {path: path.stat().st_mtime_ns for path in kept.rglob("*.nb*")}
    assert files
    assert quantized_alone(tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*.nb*")} == files


def test_without_a_directory_to_keep_it_in_the_kernels_are_compiled_anyway(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    first = quantized_alone(tmp_path / "kept")
    assert quantized_alone(tmp_path / "file") == first
    (tmp_path / "open").mkdir()
    quantized_alone(tmp_path / "open")
    (kept,) = (tmp_path / "open" / "customized-models").iterdir()
    for path in kept.rglob("*"):
        if path.is_file():
            path.unlink()
    kept.chmod(0o777)  # what others can write is not executed
    assert quantized_alone(tmp_path / "open") == first
    assert not list(kept.rglob("*.nb*"))
