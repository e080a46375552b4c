"""What a family of architectures is: names, shapes and settings, told in one file of `families`.

A family is a class with tables, registered under the classes in `config.json` that it stands for.
Its files have the bytes that upstream's converter writes; where that drops, ignores or guesses
what changes the model's answers, a family refuses.
"""

from __future__ import annotations

import importlib
import pkgutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from attrs import frozen

from ..errors import MalformedError, UnsupportedArchitectureError, shown
from .format import Change, Tensor, f32, u32
from .quantization import Network
from .rotary import TYPES as ROPE_TYPES
from .rotary import kind_of as rope_kind_of
from .rotary import scaling as rope_scaling
from .rotary import sections as rope_sections
from .settings import Settings

if TYPE_CHECKING:
    from .tokenizer import TokenizerFiles

Values = dict[str, bytes]
"""Encoded values by key."""

FILE_TYPE: Values = {"general.file_type": b""}
"""Where the file type comes among a family's keys; its value is put in when it is known."""

GATING = {"softmax": 1, "sigmoid": 2}
"""`expert_gating_func` by what configurations call it: `ExpertGatingFuncType` in gguf."""

_REGISTERED: dict[str, type[Family]] = {}

F = TypeVar("F", bound="type[Family]")


def register(*classes: str) -> Callable[[F], F]:
    """Let the decorated `Family` convert models of these classes, as `config.json` names them."""

    def add(family: F) -> F:
        _REGISTERED.update(dict.fromkeys(classes, family))
        return family

    return add


def registered() -> Mapping[str, type[Family]]:
    """Every family by the class of model: those in `families`, and any registered since."""
    for module in pkgutil.iter_modules([str(Path(__file__).with_name("families"))]):
        importlib.import_module(f"{__package__}.families.{module.name}")
    return _REGISTERED


def family_of(config: Mapping[str, Any]) -> type[Family]:
    """The family for a model with this `config.json`, by its class alone.

    Raises:
        UnsupportedArchitectureError: there is none; the message names the classes that have one.
    """
    named = config.get("architectures")
    if (family := registered_family(config)) is None:
        raise UnsupportedArchitectureError(
            f"no GGUF mapping for the architecture {shown(named)}; there is one for "
            f"{', '.join(sorted(registered()))}. Name a checkout of llama.cpp (llama_cpp=...), "
            f"whose converter knows others, or give a finished file (gguf=...)"
        )
    return family


def registered_family(config: Mapping[str, Any]) -> type[Family] | None:
    """The family for a model with this `config.json`, if there is one."""
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        return None
    return registered().get(named[0])


@frozen
class Part:
    """What a checkpoint tensor becomes, or one of the tensors that it becomes.

    `name`: in the file. `shape`: as stored there, without that of a stack.
    """

    name: str
    shape: tuple[int, ...]
    change: Change | None = None


def gate_and_up(stored: str, shape: tuple[int, ...]) -> Iterable[Part]:
    """The gate, which goes under `stored`, and the up projection behind it in one tensor."""
    *outer, rows, columns = shape
    half = (*outer, rows // 2, columns)
    yield Part(stored, half, Change(lambda values: values[..., : rows // 2, :], rows=0))
    yield Part(stored.replace("gate", "up"), half, Change(lambda v: v[..., rows // 2 :, :], rows=0))


PLUS_ONE = Change(lambda values: values + 1)
"""For norms: the runtime multiplies by the weight, transformers by one more."""


class Family:
    """A family of architectures: subclasses are tables, and methods where a table does not do.

    `architecture`: what llama.cpp calls it. `names`: modules in a checkpoint, or tensors with their
    suffix, to names in the file; `{}` stands for a number, and one that is on the left alone for
    what is stacked; None drops a tensor that the network does not need. `assumes`: settings that
    llama.cpp does not ask for, with the values it takes for granted. `rope_types`: kinds of rotary
    scaling that it computes. `partial_rotary`: whether it turns only a part of each head
    where the settings say so. `grouped`: whether fewer key-value heads may serve the query heads.
    `some_layers`: names in the file that not every layer has.

    Source: `TextModel` in `conversion/base.py` of llama.cpp b11434.
    """

    architecture: ClassVar[str]
    names: ClassVar[Mapping[str, str | None]]
    assumes: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    rope_types: ClassVar[tuple[str, ...]] = ROPE_TYPES
    partial_rotary: ClassVar[bool] = False
    grouped: ClassVar[bool] = True
    some_layers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: Settings) -> None:
        """Take the settings.

        Raises:
            UnsupportedArchitectureError: a setting that llama.cpp has no equal for.
            MalformedError: it has no number of layers, or no vocabulary.
        """
        self.settings = settings
        self.layers = self._count("num_hidden_layers", "n_layer", "num_layers", "n_layers")
        self.vocabulary = self._count("vocab_size")
        for key, values in self.assumes.items():
            if key in settings and settings[key] not in values:
                raise UnsupportedArchitectureError(
                    f"config.json: {key} is {shown(settings[key])}; llama.cpp has only "
                    f"{', '.join(map(str, values))} for this architecture"
                )
        if (kind := rope_kind_of(settings.full_rope)) not in self.rope_types:
            raise UnsupportedArchitectureError(
                f"config.json: rope type {shown(kind)}; supported are {', '.join(self.rope_types)}"
            )
        part = settings.full_rope.get("partial_rotary_factor")
        if part not in (None, 1) and not self.partial_rotary:
            raise UnsupportedArchitectureError(
                f"config.json: a partial rotary embedding ({shown(part)}), which llama.cpp has not "
                f"for this architecture"
            )

        if self.network.grouped and not self.grouped:
            raise UnsupportedArchitectureError(
                "config.json: num_key_value_heads; llama.cpp has as many as query heads for this "
                "architecture"
            )

    def _count(self, *keys: str) -> int:
        value = self.settings.first(*keys)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise MalformedError(f"config.json: {keys[0]} is {shown(value)}, no positive number")
        return value

    def knows(self, pattern: str) -> bool:
        """Whether `names` has a tensor whose name is `pattern`, `{}` for each of its numbers."""
        module, _, suffix = pattern.rpartition(".")
        return pattern in self.names or (module in self.names and suffix in ("weight", "bias"))

    def stored_name(self, pattern: str) -> str | None:
        """What `names` makes of a known tensor, with its suffix; None for one that is dropped."""
        if pattern in self.names:
            return self.names[pattern]
        module, _, suffix = pattern.rpartition(".")
        stored = self.names[module]
        return stored and f"{stored}.{suffix}"

    # What follows, a family may say in its own way.

    def metadata(self) -> Values:
        """The keys below the architecture's name, in upstream's order."""
        return self.common()

    def leading_metadata(self) -> Values:
        """Keys below the architecture's name that come before the general ones."""
        return {}

    def tokenizer(self, files: TokenizerFiles) -> Values:
        """The keys below `tokenizer`."""
        return files.bpe(self.vocabulary)

    def extra_tensors(self) -> list[Tensor]:
        """Tensors that no checkpoint has; they come first."""
        return []

    def source_name(self, name: str) -> str | None:
        """A checkpoint tensor's name as `names` has it; None for one that is no part of this."""
        return name

    def parts(self, name: str, stored: str, shape: tuple[int, ...]) -> Iterable[Part]:
        """What the checkpoint tensor `name` of that shape becomes; `stored`: by `names`."""
        yield Part(stored, shape, self.change(name))

    def change(self, name: str) -> Change | None:
        """What the values of the checkpoint tensor `name` go through."""
        return None

    @property
    def network(self) -> Network:
        """What decides the tensors' types when it is quantized."""
        experts = self.settings.first(
            "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
        )
        heads, shared = (self.settings.get(f"num_{of}_heads") for of in ("attention", "key_value"))
        return Network(self.architecture, self.layers, experts or 0, grouped=heads != shared)

    def common(self) -> Values:
        """What all text models say: upstream's `TextModel.set_gguf_parameters`."""
        settings, rope = self.settings, self.settings.full_rope
        values: Values = {"block_count": u32(self.layers)}

        def put(key: str, encode: Callable[[Any], bytes], *names: str) -> None:
            if (value := settings.first(*names)) is not None:
                values[key] = encode(value)

        put("context_length", u32, "max_position_embeddings", "n_ctx", "n_positions", "max_length",
            "max_sequence_length", "model_max_length")  # fmt: skip
        put("embedding_length", u32, "hidden_size", "n_embd", "dim")
        put("feed_forward_length", u32, "prefix_dense_intermediate_size",
            "dense_intermediate_size", "intermediate_size", "n_inner", "hidden_dim")  # fmt: skip
        put("attention.head_count", u32, "num_attention_heads", "n_head", "n_heads")
        put("attention.head_count_kv", u32, "num_key_value_heads", "n_kv_heads")
        values |= rope_scaling(rope)
        if "mrope_section" in settings.rope:
            values["rope.dimension_sections"] = rope_sections(settings.rope["mrope_section"])
        if rope.get("rope_theta") is not None:
            values["rope.freq_base"] = f32(rope["rope_theta"])
        local = settings.rope.get("sliding_attention", {}).get("rope_theta")
        if local is not None:
            values["rope.freq_base_swa"] = f32(local)
        put("attention.layer_norm_rms_epsilon", f32, "rms_norm_eps", "norm_eps")
        put("attention.layer_norm_epsilon", f32, "layer_norm_eps", "layer_norm_epsilon",
            "norm_epsilon")  # fmt: skip
        put("expert_count", u32, "num_local_experts", "num_experts", "n_routed_experts")
        put("expert_used_count", u32, "num_experts_per_tok", "num_experts_per_token",
            "top_k_experts")  # fmt: skip
        put("expert_group_count", u32, "n_group")
        put("expert_group_used_count", u32, "topk_group")
        put("expert_gating_func", lambda name: u32(GATING[name]), "score_function", "scoring_func",
            "score_func", "moe_router_activation", "moe_router_activation_func",
            "expert_selection_fn")  # fmt: skip
        put("attention.key_length", u32, "head_dim")
        put("attention.value_length", u32, "head_dim")
        return values | FILE_TYPE


def checked(architecture: str, keys: Callable[[], Values]) -> Values:
    """`keys()`, with what is wrong about the settings told as our error.

    Raises:
        MalformedError: a setting is missing, or has not the type or range that it needs.
    """
    try:
        return keys()
    except (AttributeError, KeyError, TypeError, ValueError, struct.error) as error:
        raise MalformedError(
            f"config.json: a setting of {architecture} is missing or wrong: {shown(error)}"
        ) from error
