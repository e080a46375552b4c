"""Carries a trained PEFT adapter to a live model: register it, save it, deploy it, delete it."""

from typing import TYPE_CHECKING

from .catalog.listing import Listing
from .catalog.model_listing import ModelListing
from .deploying.deployer import Deployer
from .errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    BaseModelMissingError,
    CustomizedModelsError,
    DatabaseError,
    DeploymentError,
    EvictedError,
    HubError,
    IntegrityError,
    InUseError,
    InvalidArgumentError,
    InvalidNameError,
    InvalidOptionError,
    InvalidTemplateError,
    JobCancelled,
    JobError,
    JobFailed,
    JobLost,
    JobTimeoutError,
    LeaseLostError,
    MalformedError,
    MergeError,
    MissingDependencyError,
    NoEnvironmentError,
    NonFiniteError,
    NoTemplateError,
    NotFoundError,
    NotLocalError,
    NotReproducible,
    ProofFailedError,
    RegistrationError,
    ServedModelChangedError,
    ServerAnswerError,
    ServerUnreachableError,
    StorageError,
    TemplateMismatchError,
    UnchangedTargetsError,
    UnmergedTensorsError,
    UnsafeFileError,
    UnsupportedAdapterError,
    UnsupportedArchitectureError,
    UnsupportedBaseError,
    UnsupportedError,
    UnsupportedQuantizationError,
    UnsupportedVersionError,
)
from .history import Event, Subscription
from .hub import HubCommit
from .jobs.job import Job, as_completed
from .labels import Labels
from .lineage import Lineage, Link
from .merging.merger import Merger
from .merging.plan import MergePlan
from .models import (
    BaseModel,
    BaseModelCard,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    DeploymentTemplate,
    EvaluationSummary,
    LiveModel,
    ModelCard,
    Served,
    Status,
    ThirdPartyModel,
    TrainingConfiguration,
)
from .registry import ModelRegistry
from .search import metric, tag
from .storage import FsspecStorage, LocalStorage, Storage
from .usage import DeletionPlan, Usage

__all__ = [
    "AlreadyExistsError",
    "BaseModel",
    "BaseModelCard",
    "BaseModelMismatch",
    "BaseModelMissingError",
    "CompleteModel",
    "CustomizedModel",
    "CustomizedModelsError",
    "DatabaseError",
    "DeletionPlan",
    "Deployer",
    "DeploymentEnvironment",
    "DeploymentError",
    "DeploymentTemplate",
    "EvaluationSummary",
    "Event",
    "EvictedError",
    "FsspecStorage",
    "HubCommit",
    "HubError",
    "InUseError",
    "IntegrityError",
    "InvalidArgumentError",
    "InvalidNameError",
    "InvalidOptionError",
    "InvalidTemplateError",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobLost",
    "JobTimeoutError",
    "Labels",
    "LeaseLostError",
    "Lineage",
    "Link",
    "Listing",
    "LiveModel",
    "LocalStorage",
    "MalformedError",
    "MergeError",
    "MergePlan",
    "Merger",
    "MissingDependencyError",
    "ModelCard",
    "ModelListing",
    "ModelRegistry",
    "NoEnvironmentError",
    "NoTemplateError",
    "NonFiniteError",
    "NotFoundError",
    "NotLocalError",
    "NotReproducible",
    "ProofFailedError",
    "RegistrationError",
    "Served",
    "ServedModelChangedError",
    "ServerAnswerError",
    "ServerUnreachableError",
    "Status",
    "Storage",
    "StorageError",
    "Subscription",
    "TemplateMismatchError",
    "ThirdPartyModel",
    "TrainingConfiguration",
    "UnchangedTargetsError",
    "UnmergedTensorsError",
    "UnsafeFileError",
    "UnsupportedAdapterError",
    "UnsupportedArchitectureError",
    "UnsupportedBaseError",
    "UnsupportedError",
    "UnsupportedQuantizationError",
    "UnsupportedVersionError",
    "Usage",
    "as_completed",
    "metric",
    "tag",
]

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """`__version__`: that of the installed package, looked up when it is asked for."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        return version("customized-models")
