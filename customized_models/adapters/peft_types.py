"""What this library knows about PEFT's adapter types: one table, one row a type.

Every other module asks this table. To support another type, add its row; a test in
`tests/test_merging_types.py` then compares its merge with PEFT's. Rows hold facts about PEFT, so
nothing here imports it: functions in a row only look at the attributes of the layer they are given.

Source: `peft/tuners/<type>/config.py` for the options, `layer.py` beside it for what `merge` writes
to and which arguments it takes, `model.py` for what happens while the layers are built; PEFT 0.21.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from attrs import field, frozen

Config: TypeAlias = Mapping[str, Any]
"""The JSON object of an `adapter_config.json`."""

KNOWN_PEFT = (0, 21)
"""The last version of PEFT whose options are all in this table."""

COMMON_OPTIONS = frozenset(
    {
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules",
        "fan_in_fan_out", "inference_mode", "init_weights", "layers_pattern",
        "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "r",
        "rank_pattern", "revision", "target_modules", "task_type",
    }
)  # fmt: skip
"""Options that most types have, or that any adapter may have."""

NAME_SETS = ("target_modules", "modules_to_save", "exclude_modules", "target_parameters")
"""Options whose lists PEFT treats as sets: their order differs from run to run."""

PLAIN_STARTS = (None, True, False, "gaussian", "eva")
"""Values of `init_lora_weights` for which PEFT does not look at the base's weights."""

BASE_DEPENDENT_STARTS = ("pissa", "olora", "orthogonal", "mica")
"""Those that start from the base's weights, in the same way each time."""

_LORA_OPTIONS = (
    "corda_config", "ensure_weight_tying", "eva_config", "init_lora_weights", "kasa_config",
    "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "monteclora_config", "qalora_group_size", "runtime_config", "target_parameters",
    "trainable_token_indices", "use_bdlora", "use_dora", "use_rslora", "velora_config",
)  # fmt: skip
_LORA_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so it cannot be "
    "expressed as a change of weights",
    "arrow_config": "a router chooses among adapters for every token, so it cannot be expressed "
    "as a change of weights",
    "layer_replication": "PEFT merges replicated layers into one another, which is wrong",
    "megatron_config": "Megatron's layers are not those of the base's files",
    "use_qalora": "QALoRA has no exact merge: PEFT refuses it",
}
_LORA_STARTS = {
    "corda_config": "corda",
    "eva_config": "eva",
    "loftq_config": "loftq",
    "lora_ga_config": "lora_ga",
}
"""Options that PEFT only looks at where the LoRA starts in that way; it leaves them filled."""

_LORA_BASE_DEPENDENT = ("kasa_config", "monteclora_config", "use_bdlora", "velora_config")

_SWITCHES = frozenset({"ensure_weight_tying", "fan_in_fan_out", "inference_mode", "lora_bias"})

_PROMPT = "it is put before the input, so it cannot be expressed as a change of weights"
_PROMPT_OPTIONS = ("num_virtual_tokens",)

_UNINFORMATIVE = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core",
        "progressbar", "qalora_group_size", "runtime_offload_base_weight",
    }
)  # fmt: skip
"""Options that say nothing about the result, or that have a value in every adapter."""


def _weight(layer: Any) -> tuple[str, ...]:
    return ("weight",)


def _bias(layer: Any) -> tuple[str, ...]:
    return ("bias",)


def _weight_and_bias(layer: Any) -> tuple[str, ...]:
    return ("weight", "bias")


def _weight_and_own_bias(layer: Any) -> tuple[str, ...]:
    """A LoRA trained with `lora_bias` adds to the bias as well."""
    return ("weight", "bias") if any(layer.lora_bias.values()) else ("weight",)


def _weight_and_output_bias(layer: Any) -> tuple[str, ...]:
    """IA3 scales inputs of feed-forward layers, and outputs of others: there the bias as well."""
    return ("weight",) if layer.is_feedforward else ("weight", "bias")


def _always(config: Config) -> bool:
    return True


def _lora_reads_base(config: Config) -> bool:
    start = config.get("init_lora_weights")
    plain = any(start is known or start == known for known in PLAIN_STARTS)
    return not plain or any(config.get(key) for key in _LORA_BASE_DEPENDENT)


@frozen
class AdapterType:
    """One of PEFT's adapter types.

    Attributes:
        name: `peft_type` in `adapter_config.json`.
        method: What people call it.
        unmergeable: Why its effect is not a change of the base's weights; empty if it is.
        options: Keys of `adapter_config.json` that PEFT acts on when it builds and merges the
            layers, or that only matter during training, besides `COMMON_OPTIONS`.
        refused: Keys that make the merge inexact, and why.
        requires_rank: Whether `r` is at least 1, and `lora_alpha` a number; elsewhere both may be
            null, and `r` may be 0.
        rank_masks: Whether `rank_pattern` says which ranks are left instead of how many.
        saves_indices: Whether its file says which elements it changes, in integers.
        shared: Whether all that it trains is one vector for all modules.
        changed: The parameters of the wrapped layer that a merge writes to.
        reads_base: Whether PEFT may look at the base's weights when it builds the layers.
        prepares_all_layers: Whether PEFT looks at all targeted weights before the first layer.
        low_rank_factors: Whether it may be nothing but pairs of factors, which servers apply.
        merge_arguments: What PEFT's `merge` of a layer is called with.
    """

    name: str
    method: str
    unmergeable: str = ""
    options: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(factory=dict, kw_only=True)
    requires_rank: bool = field(default=False, kw_only=True)
    rank_masks: bool = field(default=False, kw_only=True)
    saves_indices: bool = field(default=False, kw_only=True)
    shared: bool = field(default=False, kw_only=True)
    changed: Callable[[Any], tuple[str, ...]] = field(default=_weight, kw_only=True)
    reads_base: Callable[[Config], bool] = field(default=_always, kw_only=True)
    prepares_all_layers: bool = field(default=False, kw_only=True)
    low_rank_factors: bool = field(default=False, kw_only=True)
    merge_arguments: Mapping[str, Any] = field(
        factory=lambda: {"safe_merge": False, "adapter_names": None}, kw_only=True
    )

    @property
    def pattern_options(self) -> frozenset[str]:
        """Options that have values by regular expressions of module names."""
        known = self.supported_options - {"layers_pattern"}
        return frozenset(key for key in known if key.endswith("_pattern"))

    @property
    def switches(self) -> frozenset[str]:
        """Options that are true or false."""
        known = self.supported_options.union(self.refused)
        named = {key for key in known if key.startswith("use_")} - {"use_bdlora"}
        return frozenset(named.union(known & _SWITCHES))

    def inert_options(self, config: Config) -> frozenset[str]:
        """Options that PEFT does not look at in this configuration, whatever they are set to."""
        start = config.get("init_lora_weights")
        idle = {key for key, needed in _LORA_STARTS.items() if start != needed}
        return frozenset(idle & config.keys() & self.supported_options)

    @property
    def supported_options(self) -> frozenset[str]:
        """Keys that may be set in an `adapter_config.json` of this type."""
        return COMMON_OPTIONS.union(self.options)

    @property
    def card_options(self) -> frozenset[str]:
        """Keys that a model card repeats.

        Nested configurations are left out: they may name files of the machine it was trained on.
        """
        every = self.supported_options.union(self.refused)
        return frozenset(key for key in every if not key.endswith("_config")) - _UNINFORMATIVE


_TYPES = (
    AdapterType("ADALORA", "AdaLoRA", options=(
        *_LORA_OPTIONS, "beta1", "beta2", "deltaT", "init_r", "orth_reg_weight", "target_r",
        "tfinal", "tinit", "total_step",
    ), refused=_LORA_REFUSED, rank_masks=True, changed=_weight_and_own_bias),
    AdapterType("ADAMSS", "AdaMSS", options=(
        "asa_importance_beta", "asa_schedule_exponent", "asa_target_subspaces",
        "asa_uncertainty_beta", "final_warmup", "init_warmup", "mask_interval", "num_subspaces",
        "random_seed", "subspace_rank", "svd_threshold", "use_asa", "use_dynamic_rank",
    ), changed=_weight_and_bias),
    AdapterType(
        "ADAPTION_PROMPT", "LLaMA-Adapter",
        "it adds a gated attention to prompts of its own, so it cannot be expressed as a change "
        "of weights",
        ("adapter_layers", "adapter_len"),
    ),
    AdapterType("BEFT", "BEFT", changed=_bias),
    AdapterType("BOFT", "BOFT", options=(
        "boft_block_num", "boft_block_size", "boft_dropout", "boft_n_butterfly_factor",
    )),
    AdapterType("C3A", "C3A", options=("block_size", "block_size_pattern")),
    AdapterType("CARTRIDGE", "Cartridge", _PROMPT, _PROMPT_OPTIONS),
    AdapterType("CPT", "CPT", _PROMPT, _PROMPT_OPTIONS),
    AdapterType("DEFT", "DEFT", options=(
        "alpha", "decomposition_method", "deft_dropout", "init_scale", "para",
    )),
    AdapterType("DELORA", "DeLoRA", options=("delora_lambda", "lambda_pattern", "module_dropout")),
    AdapterType("FOURIERFT", "FourierFT", options=(
        "n_frequency", "n_frequency_pattern", "random_loc_seed", "scaling",
    )),
    AdapterType("FROD", "FRoD", options=(
        "frod_dropout", "progressbar", "projection_prng_key", "regularization_alpha",
        "runtime_offload_base_weight", "save_projection", "sparse_rate",
    ), saves_indices=True, prepares_all_layers=True),
    AdapterType(
        "GLORA", "GLoRA", options=("config_A_B", "config_C", "config_D_E"),
        changed=_weight_and_bias,
    ),
    AdapterType("GRALORA", "GraLoRA", options=(
        "alpha", "gralora_dropout", "gralora_k", "hybrid_r",
    )),
    AdapterType("HIRA", "HiRA", options=("hira_dropout",)),
    AdapterType("HRA", "HRA", options=("apply_GS",)),
    AdapterType(
        "IA3", "IA3", options=("feedforward_modules", "init_ia3_weights"),
        changed=_weight_and_output_bias,
    ),
    AdapterType(
        "LILY", "Lily", "its layers share routed factors, and PEFT has no merge for them",
        ("num_B", "scaling", "stride_A"),
    ),
    AdapterType(
        "LN_TUNING", "LayerNorm tuning", changed=_weight_and_bias,
        refused={"modules_to_save": "PEFT leaves them out of a merge of LayerNorm tuning"},
        merge_arguments={"adapter_names": None},
    ),
    AdapterType("LOHA", "LoHa", options=(
        "alpha", "module_dropout", "rank_dropout", "use_effective_conv2d",
    )),
    AdapterType("LOKR", "LoKr", options=(
        "alpha", "decompose_both", "decompose_factor", "module_dropout", "rank_dropout",
        "rank_dropout_scale", "use_effective_conv2d",
    )),
    AdapterType(
        "LORA", "LoRA", options=_LORA_OPTIONS, refused=_LORA_REFUSED, requires_rank=True,
        changed=_weight_and_own_bias, reads_base=_lora_reads_base, low_rank_factors=True,
    ),
    AdapterType("MISS", "MiSS", options=("mini_r", "miss_dropout")),
    AdapterType(
        "MULTITASK_PROMPT_TUNING", "multitask prompt tuning", _PROMPT, _PROMPT_OPTIONS
    ),
    AdapterType("OFT", "OFT", options=(
        "block_share", "coft", "eps", "module_dropout", "num_cayley_neumann_terms",
        "oft_block_size", "use_cayley_neumann",
    )),
    AdapterType("OSF", "OSF", options=("effective_rank", "target_svd_config")),
    AdapterType("PEANUT", "PEANuT", options=("act_fn", "depth", "scaling")),
    AdapterType(
        "POLY", "Poly",
        "a router mixes its skills by task, so it cannot be expressed as a change of weights",
        ("n_skills", "n_splits", "n_tasks", "poly_type"),
    ),
    AdapterType("PREFIX_TUNING", "prefix tuning", _PROMPT, _PROMPT_OPTIONS),
    AdapterType("PROMPT_TUNING", "prompt tuning", _PROMPT, _PROMPT_OPTIONS),
    AdapterType("PSOFT", "PSOFT", options=(
        "ab_svd_init", "cayley_neumann_eps", "num_cayley_neumann_terms", "psoft_alpha",
        "psoft_dropout", "psoft_mag_a", "psoft_mag_b", "psoft_orth", "psoft_svd",
        "psoft_svd_lowrank_niter", "random_seed", "use_cayley_neumann",
    )),
    AdapterType("PVERA", "PVeRA", options=(
        "d_initial", "generator_seed", "projection_prng_key", "pvera_dropout",
        "sample_at_inference", "save_projection",
    )),
    AdapterType("P_TUNING", "P-tuning", _PROMPT, _PROMPT_OPTIONS),
    AdapterType("RANDLORA", "RandLoRA", options=(
        "projection_prng_key", "randlora_alpha", "randlora_dropout", "save_projection", "sparse",
        "very_sparse",
    )),
    AdapterType("ROAD", "RoAd", options=("group_size", "variant"), changed=_weight_and_bias),
    AdapterType(
        "SHADOW", "Shadow", "it is a second model beside the base, and PEFT has no merge for it"
    ),
    AdapterType("SHIRA", "SHiRA", options=("mask_type", "random_seed"), saves_indices=True),
    AdapterType("SUPERTUNING", "Supertuning", options=(
        "lora_alpha", "lora_dropout", "save_precomputed_indices", "select_top", "sparsity",
    ), saves_indices=True),
    AdapterType("TINYLORA", "TinyLoRA", options=(
        "init_v_bound", "projection_seed", "save_projection", "tinylora_dropout", "u",
        "weight_tying",
    )),
    AdapterType("TRAINABLE_TOKENS", "trainable tokens", options=("token_indices",)),
    AdapterType("UNILORA", "UniLoRA", options=(
        "init_theta_d_bound", "proj_seed", "save_indices", "theta_d_length", "unilora_dropout",
    ), saves_indices=True, shared=True),
    AdapterType("VBLORA", "VB-LoRA", options=(
        "init_logits_std", "init_vector_bank_bound", "num_vectors", "save_only_topk_weights",
        "topk", "vblora_dropout", "vector_length",
    )),
    AdapterType("VERA", "VeRA", options=(
        "d_initial", "projection_prng_key", "save_projection", "vera_dropout",
    )),
    AdapterType("WAVEFT", "WaveFT", options=(
        "n_frequency", "n_frequency_pattern", "proportional_parameters", "random_loc_seed",
        "scaling", "use_idwt", "wavelet_family",
    )),
    AdapterType(
        "XLORA", "X-LoRA",
        "a router mixes its adapters for every token, so it cannot be expressed as a change of "
        "weights",
    ),
)  # fmt: skip

PEFT_TYPES: dict[str, AdapterType] = {row.name: row for row in _TYPES}
"""The rows by their name."""


def adapter_type(config: Config) -> AdapterType:
    """The row for an `adapter_config.json`; one that refuses the merge if PEFT_TYPES has none."""
    name = str(config.get("peft_type"))
    unknown = AdapterType(name, name, "this version does not know the type")
    return PEFT_TYPES.get(name, unknown)
