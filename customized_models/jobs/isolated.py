"""A function run in an interpreter of its own, while the caller waits.

Merging sets globals of torch, transformers and PEFT, which are the caller's. Jobs take what is
worth a record; this takes the rest.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import CustomizedModelsError, JobFailed, UnsupportedError, shown
from .queue import pickled
from .standby import add_search_path, command, environment, search_path

T = TypeVar("T")


def run_isolated(
    task: Callable[..., T], *arguments: Any, seconds: float | None = None, **named: Any
) -> T:
    """`task(...)`, a function of this package, run in an interpreter of its own.

    Args:
        task: The function.
        arguments: Its arguments, which need to pickle.
        seconds: After which it is ended, if not None.
        named: Its arguments by name.

    Raises:
        UnsupportedError: It did not end within `seconds`.
        CustomizedModelsError: What the task raised of our errors, as it raised it.
        JobFailed: It met any other error, or was killed; the message ends with its last output.
    """
    try:
        ended = subprocess.run(  # kills it if the caller is interrupted
            command("isolated"),
            input=pickle.dumps(search_path()) + pickled(task, arguments, named),
            capture_output=True,
            env=environment(),
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as late:
        raise UnsupportedError(f"{task.__name__} did not end in {seconds:g} seconds") from late
    if ended.returncode:
        said = ended.stderr.decode(errors="replace")[-2000:]
        raise JobFailed(f"{task.__name__} ended with {ended.returncode}: {shown(said, 2000)}")
    answer, error = pickle.loads(ended.stdout)  # from the process that we started
    if error is not None:
        raise error
    result: T = answer
    return result


def main() -> None:
    """Read the task from stdin, write the answer to what was stdout, exit."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
    add_search_path(pickle.load(sys.stdin.buffer))
    task, arguments, named = pickle.load(sys.stdin.buffer)
    try:
        answer: tuple[Any, CustomizedModelsError | None] = task(*arguments, **named), None
    except CustomizedModelsError as error:
        answer = None, error
    with answers:
        pickle.dump(answer, answers)
