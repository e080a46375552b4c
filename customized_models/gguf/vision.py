"""Models that see: which of their tensors are the text model's, and what those are called."""

from __future__ import annotations

_OTHER = ("mlp", "vit.", "vpm.", "siglip2.", "merger.", "resampler.")
_OTHER_INSIDE = (
    "visual.", "vision.", "vision_", "projector.", "pre_mm_projector_norm", "image_newline",
    "patch_embed", "patch_merger.", "model.connector.",
)  # fmt: skip


def text_name(name: str) -> str | None:
    """The tensor's name in a model of text alone; None for what belongs to the eyes.

    Source: `TextModel.filter_tensors` in `conversion/base.py` of llama.cpp b11434.
    """
    if name.startswith(_OTHER) or any(part in name for part in _OTHER_INSIDE):
        return None
    return name.replace("language_model.", "")
