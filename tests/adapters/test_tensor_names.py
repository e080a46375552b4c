"""Names of tensors as wrappers leave them, and as PEFT gives them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from customized_models.adapters.tensor_names import is_factor, module_of, plain_names
from customized_models.errors import MalformedError

PREFIX = "base_model.model."
PLAIN = [
    f"{PREFIX}model.layers.{layer}.self_attn.{module}.lora_{factor}.weight"
    for layer in range(2)
    for module in ("q_proj", "v_proj")
    for factor in "AB"
]
WITH_EVERYTHING = [
    *PLAIN,
    f"{PREFIX}model.layers.0.self_attn.q_proj.lora_magnitude_vector",
    f"{PREFIX}model.embed_tokens.lora_embedding_A",
    f"{PREFIX}model.embed_tokens.lora_embedding_B",
    f"{PREFIX}score.weight",
]


def named(name: str, adapter: str) -> str:
    """The name in the model's state dict, with the adapter's name in it."""
    if name.endswith("score.weight"):
        return name.replace("score.", f"score.modules_to_save.{adapter}.")
    if name.endswith("vector"):
        return f"{name}.{adapter}.weight"
    head, _, last = name.rpartition(".")
    return f"{head}.{adapter}.{last}" if last == "weight" else f"{name}.{adapter}"


LEFT: dict[str, Callable[[str], str]] = {
    "_orig_mod": lambda name: f"_orig_mod.{name}",
    "_orig_mod inside": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "_orig_mod in blocks": lambda name: name.replace("self_attn.", "_orig_mod.self_attn."),
    "_fsdp_wrapped_module": lambda n: n.replace("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "_checkpoint_wrapped_module": lambda name: name.replace(
        "self_attn", "_checkpoint_wrapped_module.self_attn"
    ),
    "module": lambda name: f"module.{name}",
    "DDP around torch.compile": lambda name: f"module._orig_mod.{name}",
    "doubled prefix": lambda name: f"{PREFIX}{name}",
    "threefold prefix": lambda name: f"{PREFIX}{PREFIX}{name}",
    "no prefix": lambda name: name.removeprefix(PREFIX),
    "default": lambda name: named(name, "default"),
    "FSDP, default and compile": lambda n: f"_orig_mod._fsdp_wrapped_module.{named(n, 'default')}",
}


@pytest.mark.parametrize("what", LEFT)
def test_what_wraps_a_model_leaves_no_trace_in_names(what: str) -> None:
    left = [LEFT[what](name) for name in WITH_EVERYTHING]
    renamed, notes = plain_names(left, prefixed=True)
    assert renamed == dict(zip(left, WITH_EVERYTHING, strict=True))
    assert notes
    assert plain_names(renamed.values(), prefixed=True)[1] == []


@pytest.mark.parametrize("adapter", ["default", "support", "my_adapter"])
def test_an_adapters_own_name_is_taken_out_of_a_loras(adapter: str) -> None:
    left = [named(name, adapter) for name in PLAIN]
    assert [*plain_names(left, prefixed=True)[0].values()] == PLAIN


@pytest.mark.parametrize(
    "names",
    [
        WITH_EVERYTHING,
        [f"{PREFIX}model.default.q_proj.lora_A.weight", f"{PREFIX}model.q_proj.lora_B.weight"],
        [f"{PREFIX}model.layers.0.self_attn.k_proj.ia3_l"],
        [f"{PREFIX}model.norm.weight"],
        ["base_model.vera_A", f"{PREFIX}model.layers.0.q_proj.vera_lambda_b"],
        [],
    ],
)
def test_names_as_peft_gives_them_stay(names: list[str]) -> None:
    assert plain_names(names, prefixed=True) == (dict(zip(names, names, strict=True)), [])


def test_a_prompt_has_no_prefix() -> None:
    assert plain_names(["prompt_embeddings"], prefixed=False)[1] == []


def test_two_names_for_one_tensor_are_refused() -> None:
    with pytest.raises(MalformedError, match=r"several tensors for .*q_proj\.lora_A"):
        plain_names([PLAIN[0], f"_orig_mod.{PLAIN[0]}"], prefixed=True)


def test_the_module_of_a_tensor_is_what_peft_wraps() -> None:
    assert module_of(PLAIN[0]) == "model.layers.0.self_attn.q_proj"
    assert module_of(f"{PREFIX}model.embed_tokens.lora_embedding_A") == "model.embed_tokens"
    assert module_of(f"{PREFIX}score.weight") == "score"
    assert [is_factor(name) for name in WITH_EVERYTHING] == [*[True] * 8, False, True, True, False]
