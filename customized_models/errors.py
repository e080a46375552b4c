"""Every exception this library raises on purpose:

* CustomizedModelsError
  x NotFoundError                    (also a LookupError)
  x AlreadyExistsError               (also a FileExistsError)
  x InUseError
  x NotLocalError
  x DatabaseError
  x InvalidNameError                 (also a ValueError)
  x MalformedError                   (also a ValueError)
    + UnsafeFileError
  x IntegrityError                   (also an OSError)
  x BaseModelMismatch                (also a ValueError)
  x BaseModelMissingError            (also a FileNotFoundError)
  x UnsupportedError                 (also a ValueError)
    + UnsupportedAdapterError
    + UnsupportedArchitectureError
    + UnsupportedQuantizationError
    + UnsupportedVersionError
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
    + InvalidOptionError             (also a ValueError)
    + ServerUnreachableError         (also a ConnectionError)
    + ServerAnswerError
"""

from __future__ import annotations

from collections.abc import Iterable


def shown(value: object, limit: int = 200) -> str:
    """`value` as it may stand in a message: printable, quoted, at most `limit` characters."""
    text = value if isinstance(value, str) else str(value)
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
    """Nothing goes by that name."""


class AlreadyExistsError(CustomizedModelsError, FileExistsError):
    """The name is taken, and what it names never changes."""


class InUseError(CustomizedModelsError):
    """A running job, an open checkout or a dependent model still needs it."""


class NotLocalError(CustomizedModelsError):
    """The storage keeps its models elsewhere; there is no local path to give."""


class DatabaseError(CustomizedModelsError):
    """The registry's database is damaged, out of reach, busy for too long or of a newer version."""


class InvalidNameError(CustomizedModelsError, ValueError):
    """The name does not fit its alphabet or length."""


class MalformedError(CustomizedModelsError, ValueError):
    """A file or value does not parse under the strict rules for its kind."""


class UnsafeFileError(MalformedError):
    """A link, pipe, device or oversized file where a plain file belongs."""


class IntegrityError(CustomizedModelsError, OSError):
    """Stored bytes no longer match the digest they were stored under."""


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


class UnsupportedQuantizationError(UnsupportedError):
    """A quantization that does not exist, or not at this step."""


class UnsupportedVersionError(UnsupportedError):
    """An installed package lacks what the library builds on."""


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
    """The job's worker is gone: killed, or its machine stopped. Starting again is safe."""


class JobCancelled(JobError):
    """The job was cancelled; nothing was published."""


class JobTimeoutError(JobError, TimeoutError):
    """The job was still running when the caller's patience ended. It goes on."""


class DeploymentError(CustomizedModelsError):
    """The deployment tool refused the model or failed to serve it."""


class NoEnvironmentError(DeploymentError, LookupError):
    """No deployment environment was named, and there is not exactly one to choose."""


class NoTemplateError(DeploymentError):
    """The deployment tool needs a deployment template that the base model lacks."""


class InvalidOptionError(DeploymentError, ValueError):
    """The backend does not know this option or environment setting."""


class ServerUnreachableError(DeploymentError, ConnectionError):
    """The deployment tool's server does not answer."""


class ServerAnswerError(DeploymentError):
    """The deployment tool's server answered with an error, or not as its API says."""
