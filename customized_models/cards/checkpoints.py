"""A Trainer's checkpoints: which are there, and what a Trainer's state says of an adapter.

The last state of a training need not be that of the adapter beside it: with
`load_best_model_at_end` the adapter is that of the best checkpoint. Weights that are equal byte for
byte tell of which step they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..adapters.intake import WEIGHTS
from ..errors import CustomizedModelsError
from ..files.digests import hash_file

_CHECKPOINT = re.compile(r"(?:.*[/\\])?checkpoint-(\d{1,12})[/\\]?", re.ASCII | re.DOTALL)
_LENGTHS = ("max_steps", "num_train_epochs")

State = Mapping[str, Any]
"""The contents of a `trainer_state.json`."""


def checkpoint_step(path: object) -> int | None:
    """The step in the name of a checkpoint's directory; None if it is not one.

    >>> checkpoint_step("out/checkpoint-20")
    20
    """
    match = _CHECKPOINT.fullmatch(str(path))
    return int(match[1]) if match else None


def checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints in a Trainer's output directory that have adapters, by step, in order."""
    found = {checkpoint_step(path.name): path for path in directory.glob("checkpoint-*")}
    return {
        step: found[step]
        for step in sorted(step for step in found if step is not None)
        if (found[step] / WEIGHTS).is_file()
    }


def best_step(state: State) -> int | None:
    """The step of the best checkpoint so far, if the Trainer kept one."""
    return checkpoint_step(state.get("best_model_checkpoint"))


def is_unfinished(state: State, *, stopped: bool) -> bool:
    """Whether steps of a training are left that it would have gone on to.

    A training that was stopped has none where `EarlyStoppingCallback` is among its callbacks; a
    state does not say which of them has stopped it.

    Args:
        state: The Trainer's.
        stopped: Whether one of its callbacks has stopped it.
    """
    done, planned = state.get("global_step"), state.get("max_steps")
    left = isinstance(done, int) and isinstance(planned, int) and done < planned
    watched = "early_stopping_patience_counter" in str(state.get("stateful_callbacks"))
    return left and not (stopped and watched)


def state_of_adapter(directory: Path, read_state: Callable[[Path], State]) -> State:
    """What a Trainer's state says of the adapter in `directory`, and not of other steps.

    Args:
        directory: A Trainer's output directory, or a checkpoint in one.
        read_state: Reads the `trainer_state.json` in a directory; empty if there is none.

    Returns:
        The state when these weights were saved. Where that is not known, only how long the
        training was to be.
    """
    own, saved = read_state(directory), checkpoints(directory)
    last = own or (read_state(saved[max(saved)]) if saved else {})
    best = best_step(last)
    if own and (best in (None, own.get("global_step")) or checkpoint_step(directory) is not None):
        return own
    if best in saved and _same_weights(directory, saved[best]):
        return state_at(last, best)
    if own and best in saved:
        return own  # not the best one
    if not own and saved and _same_weights(directory, saved[max(saved)]):
        return last
    return {key: last[key] for key in _LENGTHS if key in last}


def state_at(state: State, step: int) -> State:
    """A state without what was logged of other steps, after `step` and until the training ended.

    What was evaluated after the training is kept: it is of the weights that were loaded then.
    """
    history = state.get("log_history")
    entries = [e for e in history if isinstance(e, dict)] if isinstance(history, list) else []
    ends = [number for number, entry in enumerate(entries, 1) if "train_runtime" in entry]
    end = ends[-1] if ends else len(entries)
    until = [entry for entry in entries[:end] if _number(entry.get("step"), 1 << 60) <= step]
    epochs = [entry["epoch"] for entry in until if "epoch" in entry]
    return {
        **state,
        "log_history": until + entries[end:],
        "global_step": step,
        "epoch": epochs[-1] if epochs else None,
    }


def _number(value: object, otherwise: int) -> int:
    return value if type(value) is int else otherwise


def _same_weights(one: Path, other: Path) -> bool:
    try:
        first, second = (path / WEIGHTS for path in (one, other))
        same_size = first.stat().st_size == second.stat().st_size
        return same_size and hash_file(first) == hash_file(second)
    except (OSError, CustomizedModelsError):
        return False
