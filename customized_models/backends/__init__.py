"""Deployment tools: what the library asks of one, and how an environment becomes one."""

from ..gguf import GGUFFile
from ..models import Progress, Quantization
from .connection import Secrets, environment_variable
from .opening import (
    BackendFactory,
    Tools,
    check_environment,
    moved_endpoint,
    open_backend,
    served_there,
)
from .protocol import (
    AdapterBesideBase,
    Addressed,
    Artifact,
    Backend,
    Describing,
    Plan,
    Probe,
    Probing,
    Promoting,
    Unloading,
    checked_options,
    chosen_served_name,
)

__all__ = [
    "AdapterBesideBase",
    "Addressed",
    "Artifact",
    "Backend",
    "BackendFactory",
    "Describing",
    "GGUFFile",
    "Plan",
    "Probe",
    "Probing",
    "Progress",
    "Promoting",
    "Quantization",
    "Secrets",
    "Tools",
    "Unloading",
    "check_environment",
    "checked_options",
    "chosen_served_name",
    "environment_variable",
    "moved_endpoint",
    "open_backend",
    "served_there",
]
