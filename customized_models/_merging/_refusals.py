"""What cannot be merged exactly, by the name it has in a configuration, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._checkpoints import json_object
from .._errors import MalformedError, UnsupportedAdapterError, shown

MERGEABLE_TYPES = frozenset(
    {
        "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA",
        "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF",
        "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
        "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
    }
)  # fmt: skip
"""Those of PEFT whose effect is a change of the base's weights."""

_PROMPT = "it is put before the input, so no weights of the base are it"
UNMERGEABLE_TYPES = {
    "ADAPTION_PROMPT": "it adds a gated attention to prompts of its own, so no weights are it",
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "LILY": "its layers share routed factors, and PEFT has no merge for them",
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "a router mixes its skills by task, so no weights are it",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "SHADOW": "it is a second model beside the base, and PEFT has no merge for it",
    "XLORA": "a router mixes its adapters for every token, so no weights are it",
}
"""Those whose effect is not, and why."""

_TASKS = (
    None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"
)  # fmt: skip
_PLAIN = (None, True, False, "gaussian", "eva")  # none of them looks at the base's values
_VALUES = ("pissa", "olora", "orthogonal", "mica")  # exact, because they are not random

_KNOWN = frozenset(
    {
        "alpha", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "beta1",
        "beta2", "bias", "block_share", "block_size", "block_size_pattern", "boft_block_num",
        "boft_block_size", "boft_dropout", "boft_n_butterfly_factor", "cayley_neumann_eps", "coft",
        "config_A_B", "config_C", "config_D_E", "ab_svd_init", "act_fn", "apply_GS",
        "asa_importance_beta", "asa_schedule_exponent", "asa_target_subspaces",
        "asa_uncertainty_beta", "d_initial", "decompose_both", "decompose_factor",
        "decomposition_method", "deft_dropout", "delora_lambda", "deltaT", "depth",
        "effective_rank", "ensure_weight_tying", "eps", "eva_config", "exclude_modules",
        "fan_in_fan_out", "feedforward_modules", "final_warmup", "frod_dropout", "generator_seed",
        "gralora_dropout", "gralora_k", "group_size", "hira_dropout", "hybrid_r",
        "inference_mode", "init_ia3_weights", "init_logits_std", "init_lora_weights", "init_r",
        "init_scale", "init_theta_d_bound", "init_v_bound", "init_vector_bank_bound",
        "init_warmup", "init_weights", "kasa_config", "lambda_pattern", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "mask_interval",
        "mask_type", "megatron_core", "mini_r", "miss_dropout", "module_dropout",
        "modules_to_save", "monteclora_config", "n_frequency", "n_frequency_pattern",
        "num_cayley_neumann_terms", "num_subspaces", "num_vectors", "oft_block_size",
        "orth_reg_weight", "para", "peft_type", "peft_version", "progressbar",
        "projection_prng_key", "projection_seed", "proj_seed", "proportional_parameters",
        "psoft_alpha", "psoft_dropout", "psoft_mag_a", "psoft_mag_b", "psoft_orth", "psoft_svd",
        "psoft_svd_lowrank_niter", "pvera_dropout", "qalora_group_size", "r", "random_loc_seed",
        "random_seed", "randlora_alpha", "randlora_dropout", "rank_dropout", "rank_dropout_scale",
        "rank_pattern", "regularization_alpha", "revision", "runtime_config",
        "runtime_offload_base_weight", "sample_at_inference", "save_indices",
        "save_only_topk_weights", "save_precomputed_indices", "save_projection", "scaling",
        "select_top", "sparse", "sparse_rate", "sparsity", "subspace_rank", "svd_threshold",
        "target_modules", "target_parameters", "target_r", "target_svd_config", "task_type",
        "tfinal", "theta_d_length", "tinit", "tinylora_dropout", "token_indices", "topk",
        "total_step", "trainable_token_indices", "u", "unilora_dropout", "use_asa", "use_bdlora",
        "use_cayley_neumann", "use_dora", "use_dynamic_rank", "use_effective_conv2d", "use_idwt",
        "use_rslora", "variant", "vblora_dropout", "vector_length", "velora_config",
        "vera_dropout", "very_sparse", "wavelet_family", "weight_tying",
    }
)  # fmt: skip
"""Keys that PEFT acts on when it builds and merges layers, or that only matter while training."""

_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only, so no weights are it",
    "arrow_config": "a router chooses among adapters for every token, so no weights are it",
    "corda_config": "CorDA replaces the base's weights when it starts; convert it to plain LoRA",
    "layer_replication": "PEFT merges replicated layers into one another, which is wrong",
    "loftq_config": "LoftQ replaces the base's weights when it starts; convert it to plain LoRA",
    "lora_ga_config": "LoRA-GA replaces the base's weights when it starts; convert it",
    "megatron_config": "Megatron's layers are not those of the base's files",
    "use_qalora": "QALoRA has no exact merge: PEFT refuses it",
}

_REFUSED_OF_BASE = {
    "quantization_config": "the base model is quantized, and merging would round it a second time; "
    "use the model it was quantized from",
    "compression_config": "the base model is compressed; use the model it was made from",
    "transformers_weights": "it loads weights from files of other names",
}


def refuse_adapter(config: Mapping[str, Any]) -> None:
    """Refuse a PEFT configuration unless every switch that is on is known to be merged exactly.

    Raises:
        UnsupportedAdapterError: naming the key and the reason.
    """
    kind = config["peft_type"]
    if kind not in MERGEABLE_TYPES:
        reason = UNMERGEABLE_TYPES.get(kind, "this version does not know the type")
        raise UnsupportedAdapterError(f"adapters of type {kind} cannot be merged: {reason}")
    if config.get("task_type") not in _TASKS:
        raise UnsupportedAdapterError(
            f"task_type {shown(config['task_type'])} is unknown; those known are "
            f"{', '.join(filter(None, _TASKS))}"
        )
    for key, value in config.items():
        if value and (key in _REFUSED or key not in _KNOWN):
            reason = _REFUSED.get(key, "this version does not know what it does to the weights")
            raise UnsupportedAdapterError(f"the adapter has {shown(key)} set: {reason}")
    if kind in ("LORA", "ADALORA"):
        _refuse_start(config.get("init_lora_weights"))
    bias = config.get("bias") or "none"
    if bias not in ("none", "all") and not str(bias).endswith("_only"):
        raise UnsupportedAdapterError(
            f"the adapter has bias set to {shown(bias)}, which is unknown"
        )
    if kind == "LN_TUNING" and config.get("modules_to_save"):
        raise UnsupportedAdapterError(
            "the adapter has modules_to_save set: PEFT leaves them out of a merge of LN_TUNING"
        )


def _refuse_start(start: object) -> None:
    if not any(start is known or start == known for known in _PLAIN + _VALUES):
        random = str(start).startswith("pissa_niter")
        why = "starts from a random approximation" if random else "replaces the base's weights"
        raise UnsupportedAdapterError(
            f"init_lora_weights {shown(start)} {why} when it starts; convert the adapter to plain "
            f"LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def reads_values(config: Mapping[str, Any]) -> bool:
    """Whether PEFT may look at the base's values when it builds the adapter's layers."""
    start = config.get("init_lora_weights")
    plain = config["peft_type"] == "LORA" and any(start is k or start == k for k in _PLAIN)
    variants = ("kasa_config", "monteclora_config", "use_bdlora", "velora_config")
    return not plain or any(config.get(key) for key in variants)


def refuse_base(directory: Path) -> None:
    """Refuse a base whose tensors are not what the model computes with.

    Raises:
        UnsupportedAdapterError: naming the key of its `config.json` and the reason.
    """
    config = json_object(directory / "config.json")
    for key, reason in _REFUSED_OF_BASE.items():
        if config.get(key):
            raise UnsupportedAdapterError(f"the base's config.json has {key}: {reason}")
    if not isinstance(config.get("model_type"), str):
        raise MalformedError("the base's config.json has no model_type")
