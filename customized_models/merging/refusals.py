"""What cannot be merged exactly, by the name it has in a configuration, and why not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MalformedError, UnsupportedAdapterError, shown
from ..files.reading import json_object
from ..files.safetensors import TensorInfo

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

DEQUANTIZED = ("fp8", "mxfp4")
"""Methods whose weights transformers turns into 16-bit ones on any machine, with the same bits."""

_PACKED = "its codes are laid out for the kernels that multiply them"
_ROUNDED = "its values before they were rounded are lost, and a merge would be rounded again"
_CODEBOOK = "its weights are looked up in codebooks, which a change of the weights does not fit"
QUANTIZED = {
    "aqlm": ("AQLM", _CODEBOOK),
    "auto-round": ("AutoRound", _PACKED),
    "autoround": ("AutoRound", _PACKED),
    "awq": ("AWQ", _PACKED),
    "bitnet": ("BitNet", "its weights have three values, which a merge would leave"),
    "bitsandbytes_4bit": ("bitsandbytes in 4 bits", _ROUNDED),
    "bitsandbytes_8bit": ("bitsandbytes in 8 bits", _ROUNDED),
    "compressed-tensors": (
        "compressed-tensors",
        "the name stands for many formats of packed codes",
    ),
    "eetq": ("EETQ", _PACKED),
    "fbgemm_fp8": ("FBGEMM FP8", "transformers loads its weights on a GPU only"),
    "fouroversix": ("Four Over Six", _PACKED),
    "fp_quant": (
        "FP-Quant",
        "its weights are rotated by Hadamard matrices before they are rounded",
    ),
    "gemma": ("Gemma's quantization", "transformers does not turn its weights into 16-bit ones"),
    "gguf": ("GGUF", _PACKED),
    "gptq": ("GPTQ", f"{_PACKED}, and PEFT refuses to merge into them"),
    "higgs": ("HIGGS", _CODEBOOK),
    "hqq": ("HQQ", _ROUNDED),
    "metal": ("Metal", _PACKED),
    "modelopt": ("ModelOpt", "transformers does not load its weights"),
    "modelopt_fp4": ("ModelOpt NVFP4", "transformers does not load its weights"),
    "mxfp8": ("MXFP8", "this version does not read its scales"),
    "nvfp4": ("NVFP4", "transformers does not turn its weights into 16-bit ones"),
    "quanto": ("Quanto", _ROUNDED),
    "quark": ("Quark", "the name stands for many formats of packed codes"),
    "sinq": ("SINQ", _PACKED),
    "spqr": ("SpQR", "its weights are codes and a sparse matrix of outliers"),
    "torchao": ("TorchAO", "the name stands for many formats of packed codes"),
    "vptq": ("VPTQ", _CODEBOOK),
}
"""Methods that are refused: what they are called, and why."""

_WAY_OUT = (
    "merge onto the 16-bit model it was quantized from: add that as a base model and register the "
    "adapter on it"
)
_KNOWN_OF_METHOD = {
    "fp8": {
        "activation_scheme", "dequantize", "fmt", "ignored_layers", "modules_to_not_convert",
        "quant_method", "scale_fmt", "weight_block_size",
    },
    "mxfp4": {"dequantize", "modules_to_not_convert", "quant_method"},
}  # fmt: skip
"""Keys of a quantization_config that do not change which weights it stands for."""

_SCALES_OF_FP8 = ("weight_scale_inv", "scale", "qscale_weight")  # what transformers reads
_DTYPES_OF_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
CODES = ("F8_E4M3", "F8_E5M2", "I8", "U8")

_REFUSED_OF_BASE = {
    "compression_config": f"the base model is compressed; {_WAY_OUT}",
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
    """Refuse a base whose tensors are not, and do not become, what the model computes with.

    Raises:
        UnsupportedAdapterError: naming the key of its `config.json` and the reason.
        MalformedError: its `config.json` states no model type, or a quantization that is none.
    """
    config = json_object(directory / "config.json")
    for key, reason in _REFUSED_OF_BASE.items():
        if config.get(key):
            raise UnsupportedAdapterError(f"the base's config.json has {key}: {reason}")
    if dequantizes(config) is None and (directory / "hf_quant_config.json").exists():
        raise UnsupportedAdapterError(
            f"the base has a hf_quant_config.json: it is quantized by ModelOpt; {_WAY_OUT}"
        )
    if not isinstance(config.get("model_type"), str):
        raise MalformedError("the base's config.json has no model_type")


def dequantizes(config: Mapping[str, Any]) -> str | None:
    """The method of `DEQUANTIZED` that a `config.json` states; None if it states none at all.

    Raises:
        UnsupportedAdapterError: another method, by its name, or an option of one of them that
            transformers does not turn into 16-bit weights.
        MalformedError: it states something that is no method.
    """
    if _stated(config.get("text_config") or {}):
        raise UnsupportedAdapterError(
            f"the base's config.json has quantization_config in its text_config; {_WAY_OUT}"
        )
    stated = _stated(config)
    if not stated:
        return None
    method = stated.get("quant_method")
    if stated.get("load_in_4bit") or stated.get("load_in_8bit") or method == "bitsandbytes":
        method = f"bitsandbytes_{8 if stated.get('load_in_8bit') else 4}bit"
    if method not in DEQUANTIZED:
        raise UnsupportedAdapterError(
            f"the base's config.json has quantization_config: {_why(method)}"
        )
    for key, value in stated.items():
        if value and key not in _KNOWN_OF_METHOD[method]:
            raise UnsupportedAdapterError(
                f"the base's quantization_config of {method} has {shown(key)} set, and this "
                f"version does not know what it does to the weights; {_WAY_OUT}"
            )
    scheme = stated.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):  # either way the weights are the same
        raise UnsupportedAdapterError(
            f"the base's quantization_config has the unknown activation_scheme {shown(scheme)}"
        )
    if method == "fp8":
        _block(stated)
    return str(method)


def _stated(config: Any) -> dict[str, Any]:
    stated = config.get("quantization_config") if isinstance(config, Mapping) else None
    if stated and not isinstance(stated, dict):
        raise MalformedError("the base's quantization_config is no object")
    return stated or {}


def _why(method: object) -> str:
    if method is None:
        return f"it names no method of quantization; {_WAY_OUT}"
    if not isinstance(method, str) or method not in QUANTIZED:
        return f"this version does not know the method {shown(method)}; {_WAY_OUT}"
    name, reason = QUANTIZED[method]
    fits = " (QLoRA adapters fit it unchanged)" if name.startswith("bitsandbytes") else ""
    return f"the base model is quantized by {name}: {reason}; {_WAY_OUT}{fits}"


def _block(stated: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a scale; None if all of them do."""
    block = stated.get("weight_block_size", (128, 128))
    if block is None:
        return None
    sizes = isinstance(block, list | tuple) and all(type(n) is int and n > 0 for n in block)
    if not sizes or len(block) != 2:
        raise MalformedError(f"the base's weight_block_size {shown(block)} is not two sizes")
    return block[0], block[1]


def refuse_codes(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> None:
    """Refuse quantized tensors to which transformers would give other values than they stand for.

    `config`: the base's `config.json`. `infos`: all tensors of its checkpoint. A base that is not
    quantized has nothing to refuse.

    Raises:
        UnsupportedAdapterError: naming a tensor and what is missing or odd about it; or as
            `dequantizes`.
    """
    method, stated = dequantizes(config), _stated(config)
    for name, info in infos.items():
        if method is None or info.dtype not in CODES:
            continue
        odd = _odd_fp8(info, infos, _block(stated)) if method == "fp8" else _odd_mxfp4(info, infos)
        if odd:
            raise UnsupportedAdapterError(
                f"{shown(name)} is quantized to {info.dtype} and {odd}; {_WAY_OUT}"
            )


def _odd_fp8(
    info: TensorInfo, infos: Mapping[str, TensorInfo], block: tuple[int, int] | None
) -> str | None:
    """Why transformers does not multiply it by its scales, or by the wrong ones."""
    module, _, parameter = info.name.rpartition(".")
    if parameter in _SCALES_OF_FP8 and info.dtype in _DTYPES_OF_SCALES:
        return None
    if not info.dtype.startswith("F8"):
        return "packed, which this version does not know of FP8"
    found = [infos[f"{module}.{s}"] for s in _SCALES_OF_FP8 if f"{module}.{s}" in infos]
    if parameter != "weight" or len(found) != 1:
        return "transformers finds no weight_scale_inv of it"
    scales = found[0]
    if scales.dtype not in _DTYPES_OF_SCALES:
        return f"its scales are {scales.dtype}"
    if scales.shape in ((), (1,), (1, 1)):
        return None
    if len(info.shape) != 2:
        return f"has the shape {info.shape}, which has no blocks"
    if block is None:
        per_row = scales.shape == (info.shape[0], 1)
        return None if per_row else f"has {scales.shape} scales, neither one nor one a row"
    grid = tuple(-(-size // of) for size, of in zip(info.shape, block, strict=True))
    if scales.shape != grid:
        return f"has {scales.shape} scales for {grid} blocks"
    if any(size % of and size > of for size, of in zip(info.shape, block, strict=True)):
        return f"its shape {info.shape} is not whole blocks of {block}: transformers misplaces them"
    return None


def _odd_mxfp4(info: TensorInfo, infos: Mapping[str, TensorInfo]) -> str | None:
    """Why transformers does not turn it into a weight of an expert."""
    name, _, part = info.name.rpartition("_")
    pair = infos.get(f"{name}_blocks"), infos.get(f"{name}_scales")
    if part not in ("blocks", "scales") or not name.endswith((".gate_up_proj", ".down_proj")):
        return "no expert's gate_up_proj or down_proj"
    if None in pair or info.dtype != "U8" or name in infos:
        return "not one of a pair of _blocks and _scales in U8"
    blocks, scales = pair
    whole = blocks and scales and (*scales.shape, 16) == blocks.shape and len(scales.shape) == 3
    return None if whole else "its pair does not have 32 values for each scale"
