"""Every exception this library raises on purpose::

    CustomizedModelsError
        NotFoundError                       (also a LookupError)
            EvictedError
        AlreadyExistsError                  (also a FileExistsError)
        InUseError
        LeaseLostError
        NotLocalError
        DatabaseError
        StorageError                        (also an OSError)
        InvalidArgumentError                (also a TypeError)
        InvalidNameError                    (also a ValueError)
        MalformedError                      (also a ValueError)
            UnsafeFileError
        IntegrityError                      (also an OSError)
        BaseModelMismatch                   (also a ValueError)
        BaseModelMissingError               (also a FileNotFoundError)
        UnsupportedError                    (also a ValueError)
            UnsupportedAdapterError
            UnsupportedArchitectureError
            UnsupportedBaseError
            UnsupportedQuantizationError
            UnsupportedVersionError
        MissingDependencyError              (also an ImportError)
        RegistrationError
        HubError                            (also an OSError)
        MergeError
            UnmergedTensorsError
            UnchangedTargetsError
            NonFiniteError
            NotReproducible
        JobError
            JobFailed
            JobLost
            JobCancelled
            JobTimeoutError                 (also a TimeoutError)
        DeploymentError
            NoEnvironmentError              (also a LookupError)
            NoTemplateError
            ServedModelChangedError
            ProofFailedError
            InvalidTemplateError            (also a ValueError)
            TemplateMismatchError           (also a ValueError)
            InvalidOptionError              (also a ValueError)
            ServerUnreachableError          (also a ConnectionError)
            ServerAnswerError

Names end in `Error`, except five that state an outcome: `BaseModelMismatch`, `NotReproducible`,
`JobFailed`, `JobLost` and `JobCancelled`.

Details are attributes. An error that ends a job keeps its class, message and attributes on the way
to whoever calls `Job.result` (`to_record`, `from_record`).

Any call may raise `InvalidArgumentError`, where it is given something of another type; what reads
or writes a registry, `DatabaseError`, `IntegrityError` for a damaged row, and `StorageError`.
Docstrings name these where more is to be said of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def shown(value: object, limit: int = 200) -> str:
    """`value` for a message: printable, quoted, shortened to at most `limit` characters."""
    try:
        text = value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists
        text = f"<{type(value).__name__}>"
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    return ascii(text)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` of the sorted names for a message, and how many more there are."""
    every = sorted(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(shown(name) for name in every[:limit]) + more


class CustomizedModelsError(Exception):
    """Base class: catch this to catch everything the library raises on purpose."""


class NotFoundError(CustomizedModelsError, LookupError):
    """No object with this name exists."""


class EvictedError(NotFoundError):
    """The model's bytes were evicted. `ModelRegistry.rebuild` makes the same ones again."""


class AlreadyExistsError(CustomizedModelsError, FileExistsError):
    """The name is taken. Stored models are never replaced."""


class InUseError(CustomizedModelsError):
    """A running job, an open checkout or a dependent model still needs it."""


class LeaseLostError(CustomizedModelsError):
    """A lease ended before it was renewed, so what it held may have been deleted."""


class NotLocalError(CustomizedModelsError):
    """The storage keeps its models on another host, so there is no local path."""


class DatabaseError(CustomizedModelsError):
    """The database is damaged, unreachable, locked for too long, or of a newer version.

    Attributes:
        outcome_unknown: Whether the change may have been made despite the error.
    """

    def __init__(self, message: str, outcome_unknown: bool = False) -> None:
        super().__init__(message)
        self.outcome_unknown = outcome_unknown


class StorageError(CustomizedModelsError, OSError):
    """A disk or a storage failed: no space, no permission, a broken device or connection.

    Attributes:
        outcome_unknown: Whether the change may have been made despite the error.
    """

    def __init__(self, message: str, outcome_unknown: bool = False) -> None:
        super().__init__(message)
        self.outcome_unknown = outcome_unknown


class InvalidArgumentError(CustomizedModelsError, TypeError):
    """An argument has the wrong type. The message names what to pass, and never has the value."""


class InvalidNameError(CustomizedModelsError, ValueError):
    """The name has a character that is not allowed, or is too long."""


class MalformedError(CustomizedModelsError, ValueError):
    """A file or value is missing, does not parse, or is out of range."""


class UnsafeFileError(MalformedError):
    """A link, pipe, device or oversized file where a regular file is expected."""


class IntegrityError(CustomizedModelsError, OSError):
    """Stored bytes, or a row of the database, do not match their recorded digest."""


class BaseModelMismatch(CustomizedModelsError, ValueError):
    """The base model has changed, or the adapter was not trained on it."""


class BaseModelMissingError(CustomizedModelsError, FileNotFoundError):
    """The base model's files are gone. `ModelRegistry.relocate_base_model` sets a new directory."""


class UnsupportedError(CustomizedModelsError, ValueError):
    """Valid, but not something that this library can do exactly. The message says why."""


class UnsupportedAdapterError(UnsupportedError):
    """The adapter's type, or one of its options, cannot be merged exactly."""


class UnsupportedArchitectureError(UnsupportedError):
    """The model's architecture cannot be merged exactly, or cannot become a GGUF file."""


class UnsupportedBaseError(UnsupportedError):
    """The base model is quantized in a way that cannot be undone exactly."""


class UnsupportedQuantizationError(UnsupportedError):
    """The quantization is unknown, or not possible at this step."""


class UnsupportedVersionError(UnsupportedError):
    """An installed package, or a server, lacks what the library needs."""


class MissingDependencyError(CustomizedModelsError, ImportError):
    """An optional package is not installed. The message says how to install it."""


class RegistrationError(CustomizedModelsError):
    """A training succeeded, but its adapter could not be registered.

    Attributes:
        directory: Where the adapter was kept.
    """

    def __init__(self, message: str, directory: str = "") -> None:
        super().__init__(message)
        self.directory = directory


class HubError(CustomizedModelsError, OSError):
    """The Hub does not answer, does not have it, or refuses; `__cause__` is the client's error."""


class MergeError(CustomizedModelsError):
    """A check of the merged model failed. Nothing was published."""


class UnmergedTensorsError(MergeError):
    """Tensors of the adapter were not used by any module of the base model.

    Attributes:
        names: Those tensors, sorted.
    """

    def __init__(self, message: str, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(sorted(names))


class UnchangedTargetsError(MergeError):
    """A tensor that the adapter targets is unchanged after the merge."""


class NonFiniteError(MergeError):
    """A tensor of an adapter or of what is merged contains NaN or infinity."""


class NotReproducible(MergeError):
    """Merging again gives other bytes. The message names what differs in the recipes."""


class JobError(CustomizedModelsError):
    """A job ended without a result."""


class JobFailed(JobError):
    """The job failed with an unexpected error. The message contains its traceback."""


class JobLost(JobError):
    """The job's worker was killed, or its machine stopped. Starting the job again is safe.

    The message names what a lost deployment may have left at a server. `ModelRegistry.recover`
    removes it.
    """


class JobCancelled(JobError):
    """The job was cancelled. Nothing was published."""


class JobTimeoutError(JobError, TimeoutError):
    """`timeout` elapsed. The job keeps running."""


class DeploymentError(CustomizedModelsError):
    """The model could not be deployed or undeployed."""


class NoEnvironmentError(DeploymentError, LookupError):
    """The environment does not exist, or none was given and there is not exactly one."""


class NoTemplateError(DeploymentError):
    """The base model has no deployment template, and the deployment tool needs one."""


class ServedModelChangedError(DeploymentError):
    """The tool serves another model under this name than was deployed. It is left alone."""


class ProofFailedError(DeploymentError):
    """A deployed model failed a proof that it is what was trained. It did not get its served name.

    Attributes:
        proofs: Names of the proofs that failed.
    """

    def __init__(self, message: str, proofs: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.proofs = tuple(proofs)


class InvalidTemplateError(DeploymentError, ValueError):
    """The deployment template does not parse, or leaves out a message or its role."""


class TemplateMismatchError(DeploymentError, ValueError):
    """The deployment template gives other prompts than the model's chat template.

    Attributes:
        kinds: The kinds of conversations for which they differ.
    """

    def __init__(self, message: str, kinds: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.kinds = tuple(kinds)


class InvalidOptionError(DeploymentError, ValueError):
    """An option or a setting of an environment is unknown, or has a wrong value."""


class ServerUnreachableError(DeploymentError, ConnectionError):
    """The server does not answer in time, or cannot be connected to."""


class ServerAnswerError(DeploymentError):
    """The server answered with an error, or in a way that its API does not allow.

    Attributes:
        status: The HTTP status, if that was the error.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def to_record(error: BaseException) -> dict[str, Any]:
    """An error as a JSON object: the names of its classes, its message, attributes and notes.

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
    """The error that `to_record` was given.

    Returns:
        An error of the same class if it is of this tree, else of its nearest base class that is;
        `JobFailed` if none is.
    """
    classes = (globals().get(name) for name in record["classes"])
    ours = (c for c in classes if isinstance(c, type) and issubclass(c, CustomizedModelsError))
    error = next(ours, JobFailed)(record["message"])
    for name, value in record["data"].items():
        setattr(error, name, tuple(value) if isinstance(value, list) else value)
    for note in record["notes"]:
        error.add_note(note)
    return error
