"""A model's configuration, as upstream's converter sees it: with what transformers fills in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import MalformedError, shown

_THETA = ("global_rope_theta", "rope_global_theta", "rope_theta_global", "rope_theta",
          "rotary_emb_base")  # fmt: skip
_LOCAL_THETA = ("local_rope_theta", "rope_local_theta", "rope_theta_local", "swa_rope_theta",
                "rope_local_base_freq")  # fmt: skip
_PARTIAL = ("partial_rotary_factor", "rope_pct", "rope_percent")


class Settings(dict[str, Any]):
    """`config.json` with transformers' defaults; of a model of several parts that of its text part.

    `rope`: the rotary embedding's settings, wherever the file keeps them; by kind of layer under
    "full_attention" and "sliding_attention" where they differ.

    Source: `load_hparams` and `TextModel.__init__` in `conversion/base.py` of llama.cpp b11434.
    """

    def __init__(self, document: Mapping[str, Any]) -> None:
        """Fill in the defaults.

        Raises:
            MalformedError: transformers refuses the configuration.
        """
        values = _filled_in(document)
        values |= values.get("text_config") or {}
        super().__init__(values)
        self.rope: dict[str, Any] = dict(
            self.get("rope_parameters", self.get("rope_scaling")) or {}
        )
        if "full_attention" in self.rope or "sliding_attention" in self.rope:
            return
        if (local := self.first(*_LOCAL_THETA)) is not None:
            self.rope["sliding_attention"] = {"rope_theta": local}
        spread = {
            "rope_theta": self.first(*_THETA),
            "rope_type": self.rope.get("type"),
            "partial_rotary_factor": self.first(*_PARTIAL),
            "original_max_position_embeddings": self.get("original_max_position_embeddings"),
        }
        for key, value in spread.items():
            if value is not None:
                self.rope.setdefault(key, value)

    def first(self, *keys: str) -> Any:
        """The value of the first of `keys` that is there; None without one."""
        return next((self[key] for key in keys if key in self), None)

    @property
    def full_rope(self) -> Mapping[str, Any]:
        """The rotary settings of the layers that attend to everything."""
        found: Mapping[str, Any] = self.rope.get("full_attention", self.rope)
        return found

    @property
    def head_size(self) -> int:
        """Components of one attention head."""
        size = self.get("head_dim")
        return int(size or self["hidden_size"] // self["num_attention_heads"])


def _filled_in(document: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return dict(document)
    try:
        filled: dict[str, Any] = CONFIG_MAPPING[kind].from_dict(dict(document)).to_dict()
    except Exception as error:  # each configuration class checks its values in its own way
        raise MalformedError(
            f"config.json: transformers does not take it: {shown(error)}"
        ) from error
    return filled
