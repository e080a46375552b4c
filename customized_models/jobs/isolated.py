"""A function run in a process of its own, while the caller waits.

Merging sets globals of torch, transformers and PEFT, which are the caller's. Jobs take what is
worth a record; this takes the rest.
"""

from __future__ import annotations

import pickle
import socket
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import CustomizedModelsError, JobFailed, UnsupportedError, shown
from .workers import pickled, start_worker

T = TypeVar("T")


def run_isolated(
    task: Callable[..., T], *arguments: Any, seconds: float | None = None, **named: Any
) -> T:
    """`task(...)`, a function of this package, run in a process of its own.

    Args:
        task: The function.
        arguments: Its arguments, which need to pickle.
        seconds: After which it is ended, if not None; from when the process has begun.
        named: Its arguments by name.

    Raises:
        UnsupportedError: It did not end within `seconds`.
        CustomizedModelsError: What the task raised of our errors, as it raised it.
        JobFailed: It met any other error, or was killed; the message ends with its last output.
    """
    with tempfile.TemporaryFile() as output:
        work = pickled(task, arguments, named)
        worker = start_worker("customized_models.jobs.isolated:run_task", work, output)
        try:
            answer = worker.answer(seconds)
        except TimeoutError as late:
            worker.kill()
            raise UnsupportedError(
                f"{task.__name__} did not end within {seconds:g} seconds"
            ) from late
        except BaseException:
            worker.kill()  # whoever interrupts the caller does not want it any more
            raise
        finally:
            worker.close()
        if not answer:
            output.seek(0)
            said = output.read()[-2000:].decode(errors="replace")
            raise JobFailed(f"{task.__name__} ended without an answer: {shown(said, 2000)}")
    result: T
    result, error = pickle.loads(answer)  # from a process of ours
    if error is not None:
        raise error
    return result


def run_task(
    connection: socket.socket,
    task: Callable[..., Any],
    arguments: tuple[Any, ...],
    named: Mapping[str, Any],
) -> None:
    """The worker's part of `run_isolated`."""
    answer: tuple[Any, CustomizedModelsError | None]
    try:
        answer = task(*arguments, **named), None
    except CustomizedModelsError as error:
        answer = None, error
    connection.sendall(pickle.dumps(answer))
