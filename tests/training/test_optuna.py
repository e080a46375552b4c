"""Optuna: the trials that end well are registered, those that are pruned are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from customized_models import ModelRegistry
from customized_models.training import RegisterCallback

optuna = pytest.importorskip("optuna")

EXAMPLES = [{"input_ids": [1, 5 + i, 7, 9, 2], "labels": [1, 5 + i, 7, 9, 2]} for i in range(4)]


def test_a_sweep_registers_the_trials_that_were_not_pruned(
    registry: ModelRegistry, tiny_base: Path, tmp_path: Path
) -> None:
    """Trial 1 is pruned by an error out of the training, trial 2 by ending it softly."""

    def objective(trial: Any) -> float:
        class Prune(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if trial.number == 1:
                    raise optuna.TrialPruned
                if trial.number == 2:
                    control.should_training_stop = True

        rank = trial.suggest_int("rank", 2, 8)
        register = RegisterCallback(
            registry, train_name=f"sweep-{trial.number}", base_model="llama-tiny"
        )
        config = LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = Trainer(
            model=get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config),
            args=TrainingArguments(
                str(tmp_path / f"trial-{trial.number}"),
                max_steps=2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=EXAMPLES,
            callbacks=[register, Prune()],
        )
        trainer.train()
        if register.model is None:
            raise optuna.TrialPruned
        trial.set_user_attr("model", register.model.name)
        return float(register.model.card.evaluation.last_loss)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.optimize(objective, n_trials=4)

    assert [trial.state.name for trial in study.trials] == [
        "COMPLETE",
        "PRUNED",
        "PRUNED",
        "COMPLETE",
    ]
    registered = {model.name: model for model in registry.customized_models()}
    assert {model.train_name for model in registered.values()} == {"sweep-0", "sweep-3"}
    best = registered[study.best_trial.user_attrs["model"]]
    assert best.card.training.peft["r"] == study.best_params["rank"]
