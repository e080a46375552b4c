"""Tiny real models and adapters, made in a second and the same on every run.

They are like models on the Hub, only small: several shards, grouped-query attention, a byte-level
BPE tokenizer with special tokens and a ChatML template, adapters saved by PEFT.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 320
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_llama(
    directory: str | os.PathLike[str],
    *,
    tied: bool = False,
    dtype: str = "bfloat16",
    tokenizer: bool = True,
    shard_size: str = "20KB",
    **options: Any,
) -> Path:
    """A Llama of two layers and about 110,000 random parameters, saved by `save_pretrained`.

    Args:
        directory: Where to save it.
        tied: Whether the output layer is the embedding.
        dtype: By its name in torch.
        tokenizer: Whether to save a tokenizer with it.
        shard_size: The largest size of a shard.
        options: Other fields of `LlamaConfig`.

    Returns:
        `directory`.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | options)))
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=1, eos_token_id=2, pad_token_id=2, do_sample=True, temperature=0.7, top_p=0.9
    )
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=shard_size)
    if tokenizer:
        tiny_tokenizer().save_pretrained(directory)
    return Path(directory)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCABULARY_SIZE` tokens that splits text as SmolLM does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([__doc__, tiny_llama.__doc__, CHAT_TEMPLATE], trainer)
    end_of_text, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end_of_text,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def tiny_lora(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str],
    *,
    seed: int = 0,
    **options: Any,
) -> Path:
    """A LoRA of rank 4 on `q_proj` and `down_proj` of `base` that changes all its targets.

    Args:
        directory: Where to save it.
        base: The base model's directory.
        seed: Other seeds give other weights.
        options: Other fields of `LoraConfig`.

    Returns:
        `directory`.
    """
    from peft import LoraConfig

    settings: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **(settings | options))
    return tiny_adapter(directory, base, config, seed=seed)


def tiny_adapter(
    directory: str | os.PathLike[str],
    base: str | os.PathLike[str],
    config: PeftConfig,
    *,
    seed: int = 0,
) -> Path:
    """A PEFT adapter of any type, with noise on everything that a training would change.

    Args:
        directory: Where to save it.
        base: The base model's directory.
        config: The adapter's configuration.
        seed: Other seeds give other weights.

    Returns:
        `directory`.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(directory))
    return Path(directory)
