"""Falcon."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import UnsupportedArchitectureError
from ..family import FILE_TYPE, Family, Values, register
from ..format import Change, f32, text, u32
from ..names import in_layers
from ..settings import Settings

if TYPE_CHECKING:
    import torch

_MODULES = {
    "input_layernorm": "attn_norm",
    "ln_mlp": "attn_norm",
    "ln_attn": "attn_norm_2",
    "self_attention.query_key_value": "attn_qkv",
    "self_attention.dense": "attn_output",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_CONTEXT = 2048  # tokens; its configuration does not say


@register("FalconForCausalLM")
class Falcon(Family):
    """Upstream's `FalconModel`."""

    architecture = "falcon"
    names = {
        "transformer.word_embeddings": "token_embd",
        "transformer.ln_f": "output_norm",
        "lm_head": "output",
        **in_layers(_MODULES, "transformer.h"),
    }
    assumes = {
        "alibi": (False,),
        "bias": (False,),
        "parallel_attn": (True,),
        "activation": ("gelu",),
        "ffn_hidden_size": (None,),
    }
    rope_types = ("default",)

    def __init__(self, settings: Settings) -> None:
        size = settings.get("ffn_hidden_size")
        if size == 4 * settings["hidden_size"]:
            settings["ffn_hidden_size"] = None
        super().__init__(settings)
        self._heads = settings.first("num_attention_heads", "n_head")
        if settings.get("new_decoder_architecture"):
            self._groups = settings["num_kv_heads"]
        elif settings.get("multi_query"):
            self._groups = 1
        else:
            self._groups = self._heads
        if self._groups != (settings.get("num_kv_heads") or 1):
            raise UnsupportedArchitectureError(
                f"config.json: num_kv_heads is {settings.get('num_kv_heads')}, but the network "
                f"has {self._groups}: upstream takes the former; set it to the latter"
            )

    def metadata(self) -> Values:
        width = self.settings["hidden_size"]
        return {
            "context_length": u32(_CONTEXT),
            "tensor_data_layout": text("jploski"),
            "embedding_length": u32(width),
            "feed_forward_length": u32(4 * width),
            "block_count": u32(self.layers),
            "attention.head_count": u32(self._heads),
            "attention.head_count_kv": u32(self._groups),
            "attention.layer_norm_epsilon": f32(self.settings["layer_norm_epsilon"]),
            **FILE_TYPE,
        }

    def change(self, name: str) -> Change | None:
        return Change(self._apart, rows=0) if "query_key_value" in name else None

    def _apart(self, rows: torch.Tensor) -> torch.Tensor:
        """All queries, all keys, all values, from groups of some queries, a key and a value."""
        import torch

        size = self.settings["hidden_size"] // self._heads
        groups = rows.reshape(self._groups, -1, size, rows.shape[-1])
        parts = groups[:, :-2], groups[:, -2:-1], groups[:, -1:]
        return torch.cat([part.reshape(-1, rows.shape[-1]) for part in parts])
