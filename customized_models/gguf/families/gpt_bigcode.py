"""GPT BigCode: SantaCoder and the first StarCoder."""

from __future__ import annotations

from ..family import FILE_TYPE, Family, Values, register
from ..format import f32, u32
from .gpt2 import GPT_NAMES


@register("GPTBigCodeForCausalLM")
class GPTBigCode(Family):
    """Upstream's `StarCoderModel`."""

    architecture = "starcoder"
    names = GPT_NAMES
    assumes = {
        "activation_function": ("gelu_pytorch_tanh", "gelu_new"),
        "multi_query": (True,),
        "n_inner": (None,),
    }

    def metadata(self) -> Values:
        settings = self.settings
        return {
            "context_length": u32(settings["n_positions"]),
            "embedding_length": u32(settings["n_embd"]),
            "feed_forward_length": u32(4 * settings["n_embd"]),
            "block_count": u32(self.layers),
            "attention.head_count": u32(settings["n_head"]),
            "attention.head_count_kv": u32(1),
            "attention.layer_norm_epsilon": f32(settings["layer_norm_epsilon"]),
            **FILE_TYPE,
        }
