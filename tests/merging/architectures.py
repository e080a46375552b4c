"""Tiny random models of the architectures that people train adapters for, and such adapters.

A checkpoint comes in up to three layouts: as `save_pretrained` writes it ("saved"), with the names
and tensors that checkpoints on the Hub have since transformers 4 ("hub"), and with those that the
model has in memory ("memory").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from attrs import frozen
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedModel

from customized_models.adapters.intake import WEIGHTS
from customized_models.files.safetensors import Checkpoint

Tensors = Mapping[str, torch.Tensor]


@frozen
class Architecture:
    """One row of the table: how to make the model, and what an adapter of it targets.

    `auto`: the class that loads it for its task, and `saved_by` the one that wrote the checkpoint,
    if another. `targets`: attention and MLP. `saved`: for `modules_to_save`. `task`: the
    `task_type` that people set. `experts`: fused, for `target_parameters`. `hub`: the tensors of a
    checkpoint on the Hub, out of those in memory. `converted`: transformers saves other tensors
    than it has in memory. `options`: what people pass to `from_pretrained`. `untied`: a tensor
    that the checkpoint has although the class ties it.
    """

    auto: str
    config: Callable[[], PreTrainedConfig]
    targets: tuple[str, ...]
    saved: str
    task: str | None = "CAUSAL_LM"
    experts: tuple[str, ...] = ()
    convolutions: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    hub: Callable[[Tensors], Tensors] | None = None
    converted: bool = False
    saved_by: str | None = None
    options: Mapping[str, Any] = {}
    untied: str | None = None

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, self.auto)

    @property
    def layouts(self) -> tuple[str, ...]:
        return (
            "saved",
            *(("hub",) if self.hub else ()),
            *(("memory",) if self.converted else ()),
        )


@frozen
class Adaptation:
    """A PEFT configuration, and a pattern for the names in memory of the tensors that change."""

    config: Callable[[], PeftConfig]
    touches: str


def make_base(
    directory: Path,
    architecture: Architecture,
    *,
    layout: str = "saved",
    dtype: str = "bfloat16",
    sharded: bool = True,
) -> Path:
    """The checkpoint of a random model whose biases and norms are not all alike either."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        auto = getattr(transformers, architecture.saved_by or architecture.auto)
        model = auto.from_config(architecture.config())
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1 and tensor.is_floating_point():
                tensor.data.add_(torch.randn_like(tensor) * 0.1)
        if architecture.untied:
            path, _, name = architecture.untied.rpartition(".")
            tied = model.get_parameter(architecture.untied)
            own = torch.nn.Parameter(tied.detach() + torch.randn_like(tied))
            setattr(model.get_submodule(path), name, own)
            del model.all_tied_weights_keys[architecture.untied]
    model.to(getattr(torch, dtype))
    shard_size = "20KB" if sharded else "1GB"
    in_memory = layout == "memory"
    model.save_pretrained(directory, max_shard_size=shard_size, save_original_format=not in_memory)
    if layout == "hub":
        assert architecture.hub is not None
        for path in directory.glob("model*.safetensors*"):
            path.unlink()
        tensors = architecture.hub(_without_ties(model))
        save_torch_state_dict(
            {name: t.contiguous() for name, t in tensors.items()},
            directory,
            max_shard_size=shard_size,
        )
    return directory


def _without_ties(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    ties = model.all_tied_weights_keys
    return {name: t for name, t in model.state_dict().items() if name not in ties}


def make_adapter(
    directory: Path,
    base: Path,
    architecture: Architecture,
    config: PeftConfig,
    *,
    seed: int = 0,
) -> Path:
    """The adapter that PEFT makes of `config`, with noise on everything it would have trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = architecture.auto_class
        model = auto.from_pretrained(base, dtype="auto", **architecture.options)
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(directory))
    return directory


def make_old_adapter(
    directory: Path, base: Path, targets: Collection[str], *, seed: int = 0
) -> Path:
    """The LoRA that PEFT saved under transformers 4, whose modules were those of the "hub" layout.

    `targets`: the last part of the names of the modules in `base` that have one.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = 4
    tensors = {}
    for name, info in Checkpoint.open(base).infos.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets and len(info.shape) == 2:
            rows, columns = info.shape
            for part, shape in ("A", (rank, columns)), ("B", (rows, rank)):
                path = f"base_model.model.{module}.lora_{part}.weight"
                tensors[path] = torch.randn(shape, generator=generator) * 0.1
    config = LoraConfig(r=rank, target_modules=[*targets], task_type="CAUSAL_LM")
    config.inference_mode = True
    config.save_pretrained(str(directory))
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    return directory


def weights_of(*modules: str) -> str:
    """A pattern for the weights of modules by the ends of their paths."""
    return rf"(^|\.)({'|'.join(map(re.escape, modules))})\.weight$"


def everything_in(module: str) -> str:
    """A pattern for what is in modules whose paths end so, as PEFT finds those to save."""
    return rf"{re.escape(module)}\.(?!e_score_correction_bias)"


def lora(architecture: Architecture, **options: Any) -> Adaptation:
    """A LoRA on attention and MLP; PEFT saves a classifier's head without being asked."""
    settings = {"r": 4, "task_type": architecture.task, "target_modules": [*architecture.targets]}
    settings |= options
    touches = weights_of(*settings["target_modules"])
    if settings.get("target_parameters"):
        touches += f"|({'|'.join(map(re.escape, settings['target_parameters']))})$"
    if settings.get("modules_to_save") or architecture.task == "SEQ_CLS":
        touches += f"|{everything_in(architecture.saved)}"
    return Adaptation(lambda: LoraConfig(**settings), touches)


def adaptations(architecture: Architecture) -> dict[str, Adaptation]:
    """The LoRAs that every architecture is tested with."""
    kinds = {
        "LoRA": lora(architecture),
        "DoRA": lora(architecture, use_dora=True),
        "saved module": lora(architecture, modules_to_save=[architecture.saved]),
    }
    if architecture.experts:
        kinds["experts"] = lora(architecture, target_parameters=[*architecture.experts])
    if architecture.attention:
        kinds["attention"] = lora(architecture, target_modules=[*architecture.attention])
    if architecture.convolutions:
        kinds["convolutions"] = lora(architecture, target_modules=[*architecture.convolutions])
    return kinds


# Checkpoints as they are on the Hub


def renamed(*rules: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Gives every tensor the name that each rule, a pattern and a replacement, makes of it."""

    def rename(tensors: Tensors) -> Tensors:
        result = {}
        for name, tensor in tensors.items():
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            result[name] = tensor
        return result

    return rename


def split_experts(
    block: str = "mlp", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Callable[[Tensors], Tensors]:
    """Every expert's projections by themselves, in the block and under the names given."""

    def split(tensors: Tensors) -> Tensors:
        result = {}
        for name, tensor in tensors.items():
            path, found, fused = name.partition(".mlp.experts.")
            if not found:
                name = name.replace(".mlp.gate.", f".{block}.gate.")
                result[name] = tensor
                continue
            for number, expert in enumerate(tensor):
                parts = {gate: expert.chunk(2)[0], up: expert.chunk(2)[1]}
                for part, weight in parts.items() if fused == "gate_up_proj" else [(down, expert)]:
                    result[f"{path}.{block}.experts.{number}.{part}.weight"] = weight.clone()
        return result

    return split


def deepseek(tensors: Tensors) -> Tensors:
    """Corrections in float32, and a layer for multi-token prediction that the class ignores."""
    result = {
        name: t.float() if name.endswith("e_score_correction_bias") else t
        for name, t in split_experts()(tensors).items()
    }
    norm = tensors["model.norm.weight"]
    return result | {
        "model.layers.2.enorm.weight": norm + 1,
        "model.layers.2.hnorm.weight": norm + 2,
        "model.layers.2.eh_proj.weight": torch.stack([norm] * len(norm)).repeat(1, 2),
    }


def gpt2(tensors: Tensors) -> Tensors:
    """Without the prefix, and with the masks of every layer."""
    result = dict(renamed((r"^transformer\.", ""))(tensors))
    mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    return result | {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}


def gpt_neox(tensors: Tensors) -> Tensors:
    """With the masks and frequencies of every layer, and the output layer's old name."""
    result = dict(renamed((r"^lm_head\.", "embed_out."))(tensors))
    for layer in range(2):
        path = f"gpt_neox.layers.{layer}.attention"
        result[f"{path}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        result[f"{path}.masked_bias"] = torch.tensor(-1e9)
        result[f"{path}.rotary_emb.inv_freq"] = torch.tensor([1.0])
    return result


def falcon(tensors: Tensors) -> Tensors:
    """With the output layer, although it is tied."""
    return {**tensors, "lm_head.weight": tensors["transformer.word_embeddings.weight"].clone()}


def t5(tensors: Tensors) -> Tensors:
    """With copies of what is tied, and with a table that the class has no more."""
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    bias = "decoder.block.0.layer.{}.relative_attention_bias.weight"
    return {
        **{name: tensors["shared.weight"].clone() for name in copies},
        **tensors,
        bias.format("1.EncDecAttention"): tensors[bias.format("0.SelfAttention")] + 1,
    }


def headless_bert(tensors: Tensors) -> Tensors:
    """As Google's were saved: a prefix, old names of norms, and the heads of the pretraining."""
    result = dict(renamed((r"^", "bert."), *OLD_NORMS)(tensors))
    return result | {
        "cls.predictions.bias": torch.zeros(64),
        "cls.predictions.transform.dense.weight": torch.eye(32),
        "cls.seq_relationship.weight": torch.ones(2, 32),
    }


OLD_NORMS = ((r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta"))

OLD_LLAVA = renamed(
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
)


# The table

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 16}
MIXTURE = GROUPED | {"num_experts_per_tok": 2}
LATENT = SIZES | {
    "num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_routed_experts": 4, "first_k_dense_replace": 1, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BERT = SIZES | {"type_vocab_size": 2}

CAUSAL = "AutoModelForCausalLM"
CLASSIFICATION = "AutoModelForSequenceClassification"
VISION_LANGUAGE = "AutoModelForImageTextToText"
SEQ2SEQ = "AutoModelForSeq2SeqLM"

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = LLAMA_TARGETS[:4]
LATENT_ATTENTION = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
NEOX_TARGETS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
BERT_TARGETS = ("query", "value", "intermediate.dense", "output.dense")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
OLD_EXPERTS = {"experts": EXPERTS, "converted": True}

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
CLIP_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "projection_dim": 16,
}  # fmt: skip
SOUND = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16,
}  # fmt: skip


ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture(
        CAUSAL, lambda: transformers.LlamaConfig(**GROUPED), LLAMA_TARGETS, "lm_head"
    ),
    "Mistral": Architecture(
        CAUSAL, lambda: transformers.MistralConfig(**GROUPED), LLAMA_TARGETS, "embed_tokens"
    ),
    "Qwen2": Architecture(
        CAUSAL, lambda: transformers.Qwen2Config(**GROUPED), LLAMA_TARGETS, "input_layernorm"
    ),
    "Qwen3, tied": Architecture(
        CAUSAL,
        lambda: transformers.Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True),
        LLAMA_TARGETS,
        "q_norm",
    ),
    "Gemma 2": Architecture(
        CAUSAL, lambda: transformers.Gemma2Config(**GEMMA), LLAMA_TARGETS, "norm"
    ),
    "Gemma 3 text": Architecture(
        CAUSAL,
        lambda: transformers.Gemma3TextConfig(
            **GEMMA, layer_types=["sliding_attention", "full_attention"]
        ),
        LLAMA_TARGETS,
        "k_norm",
    ),
    "Phi-3": Architecture(
        CAUSAL,
        lambda: transformers.Phi3Config(**GROUPED),
        ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
        "lm_head",
    ),
    "GPT-2": Architecture(
        CAUSAL,
        lambda: transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
            eos_token_id=2,
        ),
        ("c_attn", "c_proj", "c_fc"),
        "ln_f",
        hub=gpt2,
    ),
    "GPT-NeoX": Architecture(
        CAUSAL,
        lambda: transformers.GPTNeoXConfig(**SIZES, tie_word_embeddings=False),
        NEOX_TARGETS,
        "lm_head",
        hub=gpt_neox,
        converted=True,
    ),
    "Falcon": Architecture(
        CAUSAL,
        lambda: transformers.FalconConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
        ),
        NEOX_TARGETS,
        "ln_f",
        hub=falcon,
    ),
    "Mixtral": Architecture(
        CAUSAL,
        lambda: transformers.MixtralConfig(**MIXTURE, num_local_experts=4),
        ATTENTION,
        "lm_head",
        hub=split_experts("block_sparse_moe", "w1", "w3", "w2"),
        **OLD_EXPERTS,
    ),
    "Qwen3-MoE": Architecture(
        CAUSAL,
        lambda: transformers.Qwen3MoeConfig(
            **MIXTURE, num_experts=4, moe_intermediate_size=16, head_dim=8
        ),
        ATTENTION,
        "mlp.gate",
        hub=split_experts(),
        **OLD_EXPERTS,
    ),
    "OLMoE": Architecture(
        CAUSAL,
        lambda: transformers.OlmoeConfig(**MIXTURE, num_experts=4),
        ATTENTION,
        "mlp.experts",
        hub=split_experts(),
        **OLD_EXPERTS,
    ),
    "DeepSeek-V2": Architecture(
        CAUSAL,
        lambda: transformers.DeepseekV2Config(**LATENT, n_shared_experts=2, q_lora_rank=None),
        ("q_proj", *LATENT_ATTENTION),
        "lm_head",
        hub=split_experts(),
        **OLD_EXPERTS,
    ),
    "DeepSeek-V3": Architecture(
        CAUSAL,
        lambda: transformers.DeepseekV3Config(
            **LATENT, n_shared_experts=1, q_lora_rank=8, n_group=2, topk_group=1
        ),
        ("q_a_proj", "q_b_proj", *LATENT_ATTENTION),
        "mlp.gate",
        hub=deepseek,
        **OLD_EXPERTS,
    ),
    "Qwen2.5-VL": Architecture(
        VISION_LANGUAGE,
        lambda: transformers.Qwen2_5_VLConfig(
            text_config=GROUPED | {
                "rope_parameters": {
                    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2],
                }
            },
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4,
                "patch_size": 4, "out_hidden_size": 32, "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
        ),
        (*LLAMA_TARGETS, "qkv", "attn.proj"),
        "merger",
        convolutions=("patch_embed.proj",),
        hub=renamed((r"^model\.visual\.", "visual."), (r"^model\.language_model\.", "model.")),
        converted=True,
    ),
    "LLaVA": Architecture(
        VISION_LANGUAGE,
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**GROUPED),
            vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
            image_token_id=60, image_seq_length=4,
        ),
        (*LLAMA_TARGETS, "out_proj", "fc1", "fc2"),
        "multi_modal_projector",
        None,
        attention=("q_proj", "v_proj"),
        convolutions=("patch_embedding",),
        hub=OLD_LLAVA,
        converted=True,
    ),
    "LLaVA with SigLIP": Architecture(
        VISION_LANGUAGE,
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**GROUPED),
            vision_config=transformers.SiglipVisionConfig(**VISION),
            image_token_id=60, image_seq_length=4, vision_feature_select_strategy="full",
        ),
        (*ATTENTION, "fc1", "fc2"),
        "linear_2",
        None,
        convolutions=("patch_embedding",),
        hub=OLD_LLAVA,
        converted=True,
    ),
    "Gemma 3": Architecture(
        VISION_LANGUAGE,
        lambda: transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(
                **GEMMA, layer_types=["sliding_attention", "full_attention"]
            ),
            vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False),
            mm_tokens_per_image=4, boi_token_index=61, eoi_token_index=62, image_token_index=63,
        ),
        (*LLAMA_TARGETS, "out_proj", "fc1", "fc2"),
        "multi_modal_projector",
        attention=("q_proj", "v_proj"),
        convolutions=("patch_embedding",),
        hub=OLD_LLAVA,
        converted=True,
    ),
    "Whisper": Architecture(
        "AutoModelForSpeechSeq2Seq",
        lambda: transformers.WhisperConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, num_mel_bins=8, max_source_positions=20, max_target_positions=20,
            bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=3,
            suppress_tokens=None, begin_suppress_tokens=None,
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "layer_norm",
        None,
        attention=("q_proj", "v_proj"),
        convolutions=("conv1", "conv2"),
    ),
    "T5": Architecture(
        SEQ2SEQ,
        lambda: transformers.T5Config(**T5),
        ("q", "k", "v", "o", "wi", "wo"),
        "relative_attention_bias",
        "SEQ_2_SEQ_LM",
        attention=("q", "v"),
        hub=t5,
    ),
    "T5 1.1": Architecture(
        SEQ2SEQ,
        lambda: transformers.T5Config(
            **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False
        ),
        ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
        "lm_head",
        "SEQ_2_SEQ_LM",
        hub=t5,
        untied="lm_head.weight",
    ),
    "Marian": Architecture(
        SEQ2SEQ,
        lambda: transformers.MarianConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=0,
            decoder_start_token_id=0,
        ),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        "final_layer_norm",
        "SEQ_2_SEQ_LM",
    ),
    "ViT": Architecture(
        "AutoModelForImageClassification",
        lambda: transformers.ViTConfig(**VISION, num_labels=3),
        ("q_proj", "v_proj"),
        "classifier",
        None,
    ),
    "CLIP": Architecture(
        "AutoModel",
        lambda: transformers.CLIPConfig(
            text_config=CLIP_TEXT, vision_config=VISION | {"projection_dim": 16}, projection_dim=16
        ),
        ("q_proj", "v_proj", "fc1"),
        "visual_projection",
        None,
    ),
    "Wav2Vec2 for letters": Architecture(
        "AutoModelForCTC",
        lambda: transformers.Wav2Vec2Config(**SOUND),
        ("q_proj", "v_proj"),
        "lm_head",
        None,
    ),
    "Wav2Vec2 for classes": Architecture(
        "AutoModelForAudioClassification",
        lambda: transformers.Wav2Vec2Config(**SOUND, num_labels=3),
        ("q_proj", "v_proj"),
        "projector",
        None,
    ),
    "BERT with a head": Architecture(
        CLASSIFICATION,
        lambda: transformers.BertConfig(**BERT, num_labels=3),
        BERT_TARGETS,
        "classifier",
        "SEQ_CLS",
        hub=renamed(*OLD_NORMS),
    ),
    "BERT without a head": Architecture(
        CLASSIFICATION,
        lambda: transformers.BertConfig(**BERT),
        BERT_TARGETS,
        "classifier",
        "SEQ_CLS",
        hub=headless_bert,
        saved_by="AutoModel",
    ),
    "BERT with more labels": Architecture(
        CLASSIFICATION,
        lambda: transformers.BertConfig(**BERT),
        BERT_TARGETS,
        "classifier",
        "SEQ_CLS",
        saved_by="AutoModel",
        options={"num_labels": 3},
    ),
    "Llama with a score head": Architecture(
        CLASSIFICATION,
        lambda: transformers.LlamaConfig(**GROUPED, num_labels=3),
        LLAMA_TARGETS,
        "score",
        "SEQ_CLS",
    ),
    "Llama without a score head": Architecture(
        CLASSIFICATION,
        lambda: transformers.LlamaConfig(**GROUPED),
        LLAMA_TARGETS,
        "score",
        "SEQ_CLS",
        saved_by=CAUSAL,
    ),
}  # fmt: skip
