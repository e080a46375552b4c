"""IBM's Granite with experts, and with a shared one beside them."""

from __future__ import annotations

from collections.abc import Iterable

from ..family import Part, Values, gate_and_up, register
from ..format import u32
from ..names import ATTENTION, PRE_NORMS, TEXT_MODEL, in_layers
from .granite import Granite

_EXPERTS = {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.input_linear": "ffn_gate_exps",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "shared_mlp.input_linear": "ffn_gate_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
}


@register("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM")
class GraniteMoe(Granite):
    """Upstream's `GraniteMoeModel`."""

    architecture = "granitemoe"
    names = {**TEXT_MODEL, **in_layers({**ATTENTION, **PRE_NORMS, **_EXPERTS})}

    def metadata(self) -> Values:
        shared = self.settings.get("shared_intermediate_size")
        length = {"expert_shared_feed_forward_length": u32(shared)} if shared else {}
        return super().metadata() | length

    def parts(self, name: str, stored: str, shape: tuple[int, ...]) -> Iterable[Part]:
        if name.endswith("input_linear.weight"):
            return gate_and_up(stored, shape)
        return super().parts(name, stored, shape)
