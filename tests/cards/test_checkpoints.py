"""A card is of the weights that lie beside it, whichever step they are of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from customized_models.cards.checkpoints import checkpoint_step, checkpoints, state_at
from customized_models.cards.reading import evaluation_summary, training_facts

HISTORY = [
    {"step": 10, "epoch": 0.5, "loss": 3.0},
    {"step": 10, "epoch": 0.5, "eval_loss": 2.5},
    {"step": 20, "epoch": 1.0, "loss": 2.0},
    {"step": 20, "epoch": 1.0, "eval_loss": 4.0},
]
END = {"step": 20, "epoch": 1.0, "train_loss": 2.5, "train_runtime": 9.0}
LORA = {"peft_type": "LORA", "r": 4}


def state(step: int, history: list[dict[str, Any]], best: int | None = None) -> dict[str, Any]:
    path = None if best is None else f"/home/someone/out/checkpoint-{best}"
    return {
        "global_step": step,
        "max_steps": 20,
        "epoch": step / 20,
        "best_model_checkpoint": path,
        "log_history": history,
    }


def saved(directory: Path, weights: bytes, told: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_model.safetensors").write_bytes(weights)
    if told is not None:
        (directory / "trainer_state.json").write_text(json.dumps(told))
    return directory


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A Trainer's output directory with its checkpoints, the first of which was the best."""
    saved(tmp_path / "checkpoint-10", b"ten", state(10, HISTORY[:2], best=10))
    saved(tmp_path / "checkpoint-20", b"twenty", state(20, HISTORY, best=10))
    (tmp_path / "checkpoint-3.old").mkdir()
    return tmp_path


def measured(directory: Path) -> tuple[int | None, float | None, dict[str, float]]:
    evaluation = training_facts(directory, LORA).evaluation
    return evaluation.steps, evaluation.last_loss, dict(evaluation.metrics)


def test_checkpoints_are_in_the_order_of_their_steps(output: Path) -> None:
    saved(output / "checkpoint-9", b"nine")
    assert list(checkpoints(output)) == [9, 10, 20]
    assert checkpoint_step(output / "checkpoint-9") == 9
    assert checkpoint_step(output) is None


@pytest.mark.parametrize("own", [None, state(20, [*HISTORY, END], best=10)], ids=["none", "own"])
def test_the_best_checkpoints_weights_have_its_step_and_metrics(
    output: Path, own: dict[str, Any] | None
) -> None:
    saved(output, b"ten", own)
    assert measured(output) == (10, 3.0, {"eval_loss": 2.5})


def test_the_last_checkpoints_weights_have_the_last_metrics(output: Path) -> None:
    saved(output, b"twenty")
    assert measured(output) == (20, 2.0, {"eval_loss": 4.0})
    saved(output, b"twenty", state(20, [*HISTORY, END], best=10))
    assert measured(output) == (20, 2.0, {"eval_loss": 4.0, "train_loss": 2.5})


def test_weights_of_an_unknown_step_have_no_metrics_of_another(output: Path) -> None:
    saved(output, b"neither")
    assert measured(output) == (None, None, {})
    assert training_facts(output, LORA).training.arguments["max_steps"] == 20

    shutil.rmtree(output / "checkpoint-10")  # now these might be the best one's
    saved(output, b"neither", state(20, [*HISTORY, END], best=10))
    assert measured(output) == (None, None, {})


def test_a_checkpoint_has_what_was_known_when_it_was_saved(output: Path) -> None:
    assert measured(output / "checkpoint-10") == (10, 3.0, {"eval_loss": 2.5})
    assert measured(output / "checkpoint-20") == (20, 2.0, {"eval_loss": 4.0})


def test_what_was_evaluated_after_the_training_is_of_the_weights_that_were_loaded() -> None:
    later = {"step": 20, "epoch": 1.0, "eval_loss": 2.25}
    whole = state(20, [*HISTORY, END, later], best=10)
    assert evaluation_summary(state_at(whole, 10)).metrics == {"eval_loss": 2.25}
