"""TRL's trainers: the callback registers what each of them trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from customized_models import Merger, ModelRegistry
from customized_models.training import RegisterCallback

PAIRS = {
    "prompt": [[{"role": "user", "content": f"question {i}"}] for i in range(4)],
    "chosen": [[{"role": "assistant", "content": "yes"}]] * 4,
    "rejected": [[{"role": "assistant", "content": "no"}]] * 4,
}
PROMPTS = {"prompt": [f"question {i}" for i in range(4)]}


def longest(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


KINDS: dict[str, tuple[Any, Any, dict[str, Any], dict[str, Any], str]] = {
    "sft": (SFTTrainer, SFTConfig, {"text": ["Lighthouses guide ships."] * 4}, {}, "CAUSAL_LM"),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}, "CAUSAL_LM"),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, {"reward_funcs": longest}, "CAUSAL_LM"),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {}, "SEQ_CLS"),
}
"""By the name of the method: the trainer, its arguments, data, what else it takes, and the task."""

SHORT = {"grpo": {"num_generations": 2, "max_completion_length": 4}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("default")  # TRL's and PEFT's own
def test_what_trl_trains_is_registered_and_can_be_saved(
    kind: str, registry: ModelRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    trainer_class, config_class, data, more, task = KINDS[kind]
    callback = RegisterCallback(registry, train_name=kind, base_model="llama-tiny", strict=True)
    args = config_class(
        str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **SHORT.get(kind, {}),
    )
    trainer_class(
        model=str(tiny_base),
        args=args,
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type=task),
        callbacks=[callback],
        **more,
    ).train()

    assert callback.model is not None
    assert callback.model.card.evaluation.steps == 2
    assert callback.model.card.training.peft["r"] == 4
    assert Merger(registry).plan(callback.model).changes
