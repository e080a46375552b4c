"""NVIDIA's Nemotron 3 and Minitron."""

from __future__ import annotations

from ..family import PLUS_ONE, Family, Values, register
from ..format import Change, f32, text, u32
from ..names import ATTENTION, PRE_NORMS, TEXT_MODEL, in_layers
from ..tokenizer import TokenizerFiles

_MLP = {"mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


@register("NemotronForCausalLM")
class Nemotron(Family):
    """Upstream's `NemotronModel`."""

    architecture = "nemotron"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **_MLP})}
    assumes = {"hidden_act": ("relu2",)}
    rope_types = ("default",)
    partial_rotary = True

    def metadata(self) -> Values:
        settings = self.settings
        part, width = settings.rope["partial_rotary_factor"], settings["hidden_size"]
        return self.common() | {
            "vocab_size": u32(self.vocabulary),
            "attention.layer_norm_epsilon": f32(settings["norm_eps"]),
            "rope.dimension_count": u32(int(part * width) // settings["num_attention_heads"]),
            "rope.scaling.type": text("none"),
        }

    def change(self, name: str) -> Change | None:
        return PLUS_ONE if name.endswith("norm.weight") else None

    def tokenizer(self, files: TokenizerFiles) -> Values:
        ids = {"ggml.padding_token_id": u32(0), "ggml.unknown_token_id": u32(1)}
        return files.sentencepiece(self.vocabulary) | ids
