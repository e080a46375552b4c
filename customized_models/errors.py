"""Every exception this library raises on purpose:

* CustomizedModelsError
  x NotFoundError                    (also a LookupError)
  x AlreadyExistsError               (also a FileExistsError)
  x InUseError
  x LeaseLostError
  x NotLocalError
  x DatabaseError
  x StorageError                     (also an OSError)
  x InvalidNameError                 (also a ValueError)
  x MalformedError                   (also a ValueError)
    + UnsafeFileError
  x IntegrityError                   (also an OSError)
  x BaseModelMismatch                (also a ValueError)
  x BaseModelMissingError            (also a FileNotFoundError)
  x UnsupportedError                 (also a ValueError)
    + UnsupportedAdapterError
    + UnsupportedArchitectureError
    + UnsupportedBaseError
    + UnsupportedQuantizationError
    + UnsupportedVersionError
  x MissingDependencyError           (also an ImportError)
  x RegistrationError
  x MergeError
    + UnmergedTensorsError
    + UnchangedTargetsError
    + NonFiniteError
    + NotReproducible
  x JobError
    + JobFailed
    + JobLost
    + JobCancelled
    + JobTimeoutError                (also a TimeoutError)
  x DeploymentError
    + NoEnvironmentError             (also a LookupError)
    + NoTemplateError
    + ServedModelChangedError
    + InvalidTemplateError           (also a ValueError)
    + TemplateMismatchError          (also a ValueError)
    + InvalidOptionError             (also a ValueError)
    + ServerUnreachableError         (also a ConnectionError)
    + ServerAnswerError

Names end in `Error`, except five that state how something came out: `BaseModelMismatch`,
`NotReproducible`, `JobFailed`, `JobLost` and `JobCancelled`.

What an error knows besides its message is in its attributes, which it keeps on its way from a
job's process to the one that waits for it (`to_record`, `from_record`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def shown(value: object, limit: int = 200) -> str:
    """`value` as it may stand in a message: printable, quoted, at most `limit` characters."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = f"<{type(value).__name__}>"
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return ascii(text)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names, shown, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(shown(name) for name in every[:limit]) + more


class CustomizedModelsError(Exception):
    """Base class: catch this to catch everything the library raises on purpose."""


class NotFoundError(CustomizedModelsError, LookupError):
    """No object with this name exists."""


class AlreadyExistsError(CustomizedModelsError, FileExistsError):
    """The name is taken, and what it names never changes."""


class InUseError(CustomizedModelsError):
    """A running job, an open checkout or a dependent model still needs it."""


class LeaseLostError(CustomizedModelsError):
    """This process could not renew its hold on something in time, so it may have been deleted."""


class NotLocalError(CustomizedModelsError):
    """The storage keeps its models on another host, so there is no local path."""


class DatabaseError(CustomizedModelsError):
    """The registry's database is damaged, out of reach, busy for too long or of a newer version.

    Attributes:
        outcome_unknown: Whether the change may have been made all the same.
    """

    def __init__(self, message: str, outcome_unknown: bool = False) -> None:
        super().__init__(message)
        self.outcome_unknown = outcome_unknown


class StorageError(CustomizedModelsError, OSError):
    """A disk or a storage failed or refused: no space, no permission, a failing device.

    Attributes:
        outcome_unknown: Whether the change may have been made all the same.
    """

    def __init__(self, message: str, outcome_unknown: bool = False) -> None:
        super().__init__(message)
        self.outcome_unknown = outcome_unknown


class InvalidNameError(CustomizedModelsError, ValueError):
    """The name does not fit its alphabet or length."""


class MalformedError(CustomizedModelsError, ValueError):
    """A file or value does not parse under the strict rules for its kind."""


class UnsafeFileError(MalformedError):
    """A link, pipe, device or oversized file where a plain file belongs."""


class IntegrityError(CustomizedModelsError, OSError):
    """Stored bytes or rows no longer match the digest they were stored under."""


class BaseModelMismatch(CustomizedModelsError, ValueError):
    """The base model at hand is not the one that was recorded, or the adapter is not for it."""


class BaseModelMissingError(CustomizedModelsError, FileNotFoundError):
    """The base model's directory is gone; `ModelRegistry.relocate_base_model` names a new one."""


class UnsupportedError(CustomizedModelsError, ValueError):
    """Well formed, but not something this library can do exactly; the message says why."""


class UnsupportedAdapterError(UnsupportedError):
    """An adapter type or option that cannot be merged exactly."""


class UnsupportedArchitectureError(UnsupportedError):
    """A model architecture that cannot be merged exactly, or that has no GGUF mapping here."""


class UnsupportedBaseError(UnsupportedError):
    """A base model that cannot be merged into exactly: quantized in a way that cannot be undone."""


class UnsupportedQuantizationError(UnsupportedError):
    """A quantization that does not exist, or not at this step."""


class UnsupportedVersionError(UnsupportedError):
    """An installed package lacks what the library builds on."""


class MissingDependencyError(CustomizedModelsError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class RegistrationError(CustomizedModelsError):
    """A training ended well, but its adapter could not be registered; `directory` has it."""

    def __init__(self, message: str, directory: str = "") -> None:
        super().__init__(message)
        self.directory = directory


class MergeError(CustomizedModelsError):
    """The merge did not keep a promise; nothing was published."""


class UnmergedTensorsError(MergeError):
    """The adapter holds tensors that no module of the base model consumed.

    `names` has all of them, sorted.
    """

    def __init__(self, message: str, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(sorted(names))


class UnchangedTargetsError(MergeError):
    """A tensor that the adapter targets came out equal to the base's."""


class NonFiniteError(MergeError):
    """A merged tensor holds NaN or infinity."""


class NotReproducible(MergeError):
    """Merging again gives other bytes; the message names what differs in the recipes."""


class JobError(CustomizedModelsError):
    """A job ended without a result."""


class JobFailed(JobError):
    """The job's worker met an unexpected error; the message has its traceback."""


class JobLost(JobError):
    """The job's worker is gone: killed, or its machine stopped. Starting again is safe.

    What a lost deployment may have left at a server is named in the message, and
    `ModelRegistry.recover` removes it.
    """


class JobCancelled(JobError):
    """The job was cancelled; nothing was published."""


class JobTimeoutError(JobError, TimeoutError):
    """`timeout` elapsed; the job keeps running."""


class DeploymentError(CustomizedModelsError):
    """The deployment tool refused the model or failed to serve it."""


class NoEnvironmentError(DeploymentError, LookupError):
    """No deployment environment was named, and there is not exactly one to choose."""


class NoTemplateError(DeploymentError):
    """The deployment tool needs a deployment template that the base model lacks."""


class ServedModelChangedError(DeploymentError):
    """What the deployment tool serves under the name is not what was deployed; it is left alone."""


class InvalidTemplateError(DeploymentError, ValueError):
    """The deployment template does not parse, or does not write what it is given."""


class TemplateMismatchError(DeploymentError, ValueError):
    """The deployment template writes another prompt than the model's chat template.

    `kinds` has the kinds of conversations that differ.
    """

    def __init__(self, message: str, kinds: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.kinds = tuple(kinds)


class InvalidOptionError(DeploymentError, ValueError):
    """The backend does not know this option or environment setting."""


class ServerUnreachableError(DeploymentError, ConnectionError):
    """The deployment tool's server does not answer."""


class ServerAnswerError(DeploymentError):
    """The deployment tool's server answered with an error, or not as its API says."""


def to_record(error: BaseException) -> dict[str, Any]:
    """An error as JSON can hold it: the names of its classes, its message, attributes and notes.

    Law: `from_record(to_record(e))` has the class, message, attributes and notes of `e`, if `e` is
    of this tree and its attributes are text, numbers and tuples of these.
    """
    data = {k: v for k, v in vars(error).items() if not k.startswith("_")}
    return {
        "classes": [cls.__name__ for cls in type(error).__mro__],
        "message": str(error),
        "data": {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()},
        "notes": list(getattr(error, "__notes__", ())),
    }


def from_record(record: Mapping[str, Any]) -> CustomizedModelsError:
    """The error that `to_record` was given: of its own class, or the nearest one of this tree.

    An error that is not of this tree becomes `JobFailed`.
    """
    classes = (globals().get(name) for name in record["classes"])
    ours = (c for c in classes if isinstance(c, type) and issubclass(c, CustomizedModelsError))
    error = next(ours, JobFailed)(record["message"])
    for name, value in record["data"].items():
        setattr(error, name, tuple(value) if isinstance(value, list) else value)
    for note in record["notes"]:
        error.add_note(note)
    return error
