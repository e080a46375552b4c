"""A tiny real model of every family that becomes a GGUF file, made by transformers on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from customized_models.testing.tiny_models import VOCABULARY_SIZE, tiny_tokenizer
from tests.servers import build_llama_cpp

SHAPE = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 256,
    "intermediate_size": 288,  # no whole blocks of 256: down projections fall back
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
HEADS = {"head_dim": 32}
TIED = {"tie_word_embeddings": True}


def varint(number: int) -> bytes:
    """A number as protocol buffers have it."""
    low = b""
    while number > 127:
        low += bytes([number & 127 | 128])
        number >>= 7
    return low + bytes([number])


def message(number: int, body: bytes) -> bytes:
    """A field of a protocol buffer that holds bytes."""
    return varint(number << 3 | 2) + varint(len(body)) + body


def sentencepiece_model(
    pieces: list[tuple[str, float, int]],
    *,
    kind: int = 2,
    dummy_prefix: int = 1,
    remove_extra_spaces: int = 0,
) -> bytes:
    """A `tokenizer.model` as the SentencePiece library writes it, in its protocol buffer."""
    data = b""
    for text, score, type_ in pieces:
        body = message(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        data += message(1, body + b"\x18" + varint(type_))
    data += message(2, b"\x18" + varint(kind) + b"\x98\x02\x01")  # model_type, byte_fallback
    # NormalizerSpec: name, add_dummy_prefix, remove_extra_whitespaces
    spec = message(1, b"identity") + b"\x18" + varint(dummy_prefix)
    return data + message(3, spec + b"\x20" + varint(remove_extra_spaces))


PIECES = [
    ("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3),
    *((f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)),
    ("bc", -1.0, 1), ("ab", -2.0, 1), ("abc", -3.0, 1), ("\u2581ab", -4.0, 1),
    ("\u2581", -5.0, 1), ("a", -6.0, 1), ("b", -7.0, 1), ("c", -8.0, 1),
]  # fmt: skip


def bpe(directory: Path) -> None:
    """A byte-level BPE tokenizer."""
    tiny_tokenizer().save_pretrained(directory)


def gpt2_bpe(directory: Path) -> None:
    """The same under the class that Phi-4 names."""
    bpe(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    path.write_text(json.dumps(settings))


def glm_bpe(directory: Path) -> None:
    """The same with the tokens that GLM's have."""
    tokenizer = tiny_tokenizer()
    names = ["[gMASK]", "<|user|>", "<|observation|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.save_pretrained(directory)


def sentencepiece(directory: Path, **settings: Any) -> None:
    """A SentencePiece tokenizer with an added token, without `tokenizer.json`."""
    model = sentencepiece_model(PIECES, dummy_prefix=settings.pop("dummy_prefix", 1))
    (directory / "tokenizer.model").write_bytes(model)
    added = {
        "1": {"content": "<s>", "special": True},
        "267": {"content": "<|im_end|>", "special": False},
        "268": {"content": "\u2581tool\u2581", "special": False},
    }
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
        "chat_template": "{{ bos_token }}{{ messages }}",
        "added_tokens_decoder": added,
    } | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def gpt2_vocabulary(directory: Path) -> None:
    """GPT-2's own tokenizer, out of what upstream has of it: one whose name upstream finds."""
    import gguf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    reader = gguf.GGUFReader(build_llama_cpp.directory() / "models" / "ggml-vocab-gpt-2.gguf")
    tokens, merges = (
        reader.fields[f"tokenizer.ggml.{column}"].contents() for column in ("tokens", "merges")
    )
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end
    ).save_pretrained(directory)


def llama_sentencepiece(directory: Path) -> None:
    """The tokenizer of the first Llamas, out of what upstream has of it."""
    import gguf

    reader = gguf.GGUFReader(build_llama_cpp.directory() / "models" / "ggml-vocab-llama-spm.gguf")
    columns = ("tokens", "scores", "token_type")
    fields = [reader.fields[f"tokenizer.ggml.{column}"].contents() for column in columns]
    pieces = list(zip(*fields, strict=True))[:32000]
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def gemma(directory: Path) -> None:
    """A SentencePiece tokenizer that puts no space before a text."""
    sentencepiece(directory, dummy_prefix=0, tokenizer_class="GemmaTokenizer")


@frozen
class Tiny:
    """How to make one. `config`: the class in transformers. `tokenizer` writes its files.

    `old`: what files of older versions of transformers have, and upstream asks for. `upstream`:
    whether its converter manages with the installed transformers.
    """

    config: str
    options: Mapping[str, Any] = {}
    tokenizer: Callable[[Path], None] = bpe
    shape: Mapping[str, Any] = SHAPE
    old: Mapping[str, Any] = {}
    upstream: bool = True


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
MULTIPLIERS = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
WINDOW = {"sliding_window": 64}
SCALE = {"query_pre_attn_scalar": 32}
GPT = {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 512}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + i / 4 for i in range(16)],
    "short_factor": [1.0 + i / 8 for i in range(16)],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}

MODELS = {
    "llama": Tiny("LlamaConfig"),
    "llama, tied": Tiny("LlamaConfig", TIED),
    "llama, llama3": Tiny("LlamaConfig", {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn": Tiny("LlamaConfig", {"rope_parameters": YARN}),
    "llama, linear": Tiny(
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama, biased": Tiny("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, nine layers": Tiny("LlamaConfig", {"num_hidden_layers": 9, "intermediate_size": 512}),
    "llama, odd": Tiny("LlamaConfig", {"hidden_size": 96, "intermediate_size": 80, "head_dim": 12}),
    "llama, padded": Tiny("LlamaConfig", {"vocab_size": 352}),
    "llama, sentencepiece": Tiny("LlamaConfig", {}, sentencepiece),
    "mistral": Tiny("MistralConfig", {**HEADS, **WINDOW}, sentencepiece),
    "mixtral": Tiny("MixtralConfig", FEW, sentencepiece),
    "mixtral of eight": Tiny("MixtralConfig", {**FEW, "num_local_experts": 8}, sentencepiece),
    "ministral3": Tiny("Ministral3Config", HEADS),
    "arcee": Tiny("ArceeConfig"),
    "smollm3": Tiny("SmolLM3Config"),
    "granite": Tiny("GraniteConfig", MULTIPLIERS),
    "granitemoe": Tiny("GraniteMoeConfig", {**FEW, **MULTIPLIERS}),
    "granitemoeshared": Tiny(
        "GraniteMoeSharedConfig", {**FEW, **MULTIPLIERS, "shared_intermediate_size": 256}
    ),
    "qwen2": Tiny("Qwen2Config", TIED),
    "qwen2moe": Tiny("Qwen2MoeConfig", {**EXPERTS, "shared_expert_intermediate_size": 256}),
    "qwen3": Tiny("Qwen3Config", HEADS),
    "qwen3moe": Tiny("Qwen3MoeConfig", {**HEADS, **EXPERTS, "norm_topk_prob": True}),
    "gemma": Tiny("GemmaConfig", HEADS, gemma),
    "gemma2": Tiny("Gemma2Config", {**HEADS, **WINDOW, **SCALE}, gemma),
    "gemma3": Tiny("Gemma3TextConfig", {**HEADS, **WINDOW, **SCALE, "num_hidden_layers": 7}, gemma),
    "gemma3, bpe": Tiny("Gemma3TextConfig", {**HEADS, **WINDOW, **SCALE}),
    "phi": Tiny("PhiConfig", {"num_key_value_heads": 8, "intermediate_size": 1024}),
    "phi3": Tiny("Phi3Config", WINDOW, sentencepiece),
    "phi3, long": Tiny(
        "Phi3Config",
        {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256},
        sentencepiece,
    ),
    "phi4": Tiny("Phi3Config", {}, gpt2_bpe),
    "olmo": Tiny("OlmoConfig", {"clip_qkv": 8.0}),
    "olmo2": Tiny("Olmo2Config"),
    "olmo3": Tiny("Olmo3Config", WINDOW),
    "olmoe": Tiny(
        "OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 8}
    ),
    "glm4": Tiny("Glm4Config", {**HEADS, "vocab_size": 352}, glm_bpe),
    "glm4moe": Tiny(
        "Glm4MoeConfig",
        {**HEADS, **ROUTED, "vocab_size": 352, "num_nextn_predict_layers": 0},
        glm_bpe,
    ),
    "gpt2": Tiny("GPT2Config", {**GPT, "vocab_size": 352}, old={"n_ctx": 512}),
    "gptbigcode": Tiny("GPTBigCodeConfig", GPT),
    "gptneox": Tiny("GPTNeoXConfig", upstream=False),
    "bloom": Tiny("BloomConfig", {"n_layer": 4, "n_head": 8}),
    "falcon": Tiny("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, one group": Tiny("FalconConfig", {"multi_query": True, "num_kv_heads": 1}),
    "starcoder2": Tiny("Starcoder2Config"),
    "cohere": Tiny("CohereConfig"),
    "cohere2": Tiny("Cohere2Config", WINDOW, old={"rotary_pct": 1.0}),
    "stablelm": Tiny("StableLmConfig"),
    "gpt_oss": Tiny("GptOssConfig", {**HEADS, **FEW, **WINDOW}),
    "exaone4": Tiny(
        "Exaone4Config",
        {**HEADS, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    ),
    "ernie4_5": Tiny("Ernie4_5Config", HEADS, sentencepiece),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_MoeConfig",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 256,
            "moe_num_shared_experts": 1,
            "intermediate_size": 512,
        },
        sentencepiece,
    ),
    "seed_oss": Tiny("SeedOssConfig", HEADS),
    "nemotron": Tiny("NemotronConfig", {}, sentencepiece),
}


def tiny_model(directory: Path, tiny: Tiny, dtype: str, *, shard_size: str = "1GB") -> Path:
    """Save the model and its tokenizer in `directory`, which it returns.

    Every number is drawn, so that none is where another could be: norms are no ones, biases no
    zeros.
    """
    import torch
    import transformers

    config = getattr(transformers, tiny.config)(**{**tiny.shape, **tiny.options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 1 + noise * 0.1 if parameter.dim() == 1 else noise * 0.06
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard_size)
    tiny.tokenizer(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(tiny.old)))
    return directory
