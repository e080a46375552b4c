"""Rotary embeddings: the keys for their scaling, and the order of rows that they need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .format import Change, f32, i32s, text, u32
from .settings import Settings

if TYPE_CHECKING:
    import torch

TYPES = ("default", "linear", "yarn", "llama3", "longrope", "su")
"""Kinds of scaling that llama.cpp computes for most architectures."""

_YARN = {
    "yarn_ext_factor": ("extrapolation_factor",),
    "yarn_attn_factor": ("attention_factor", "attn_factor"),
    "yarn_beta_fast": ("beta_fast",),
    "yarn_beta_slow": ("beta_slow",),
}


def kind_of(rope: Mapping[str, Any]) -> str:
    """The kind of scaling, "default" for none."""
    return str(rope.get("rope_type") or "default").lower()


def scaling(rope: Mapping[str, Any]) -> dict[str, bytes]:
    """The keys for linear, YaRN and long-context scaling; others have none."""
    kind, factor = kind_of(rope), rope.get("factor")
    if kind in ("longrope", "su"):
        return {"rope.scaling.type": text("longrope")}
    if kind not in ("linear", "yarn") or factor is None:
        return {}
    values = {"rope.scaling.type": text(kind), "rope.scaling.factor": f32(factor)}
    if kind == "yarn":
        original = rope["original_max_position_embeddings"]
        values["rope.scaling.original_context_length"] = u32(original)
        for key, names in _YARN.items():
            value = next((rope[name] for name in names if rope.get(name) is not None), None)
            if value is not None:
                values[f"rope.scaling.{key}"] = f32(value)
    return values


def sections(lengths: list[int]) -> bytes:
    """How many pairs of components turn by time, height, width and one more."""
    return i32s([*lengths, 0, 0, 0, 0][:4])


def llama3_factors(settings: Settings) -> tuple[float, ...]:
    """What each rotary frequency is divided by under Llama 3's rule; none without that rule.

    Source: `generate_extra_tensors` in `conversion/llama.py` of llama.cpp b11434, which restates
    `_compute_llama3_parameters` of transformers; in float32, as there.
    """
    rope = settings.full_rope
    if kind_of(rope) != "llama3":
        return ()
    import torch

    size = settings.head_size
    base, factor = rope.get("rope_theta", 10000.0), rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    old = rope["original_max_position_embeddings"]
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    factors = []
    for frequency in 1.0 / (base**exponents):
        wavelength = 2 * math.pi / frequency
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(float(factor))
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(float(1 / ((1 - smooth) / factor + smooth)))
    return tuple(factors)


def pairs_of_halves(head_size: int) -> Change:
    """Rows of whole heads, from halves side by side to pairs side by side.

    transformers rotates component i of a head with i + size/2, llama.cpp 2i with 2i + 1.
    Source: `LlamaModel.permute` in `conversion/llama.py` of llama.cpp b11434.
    """

    def apply(rows: torch.Tensor) -> torch.Tensor:
        heads = rows.reshape(-1, 2, head_size // 2, *rows.shape[1:])
        return heads.swapaxes(1, 2).reshape(rows.shape)

    return Change(apply, rows=head_size)
