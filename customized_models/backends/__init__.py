"""Deployment tools: what the library asks of one, and how an environment becomes one."""

from ..gguf import GGUFFile
from ..models import Progress, Quantization
from .opening import BackendFactory, check_environment, open_backend
from .protocol import (
    AdapterBesideBase,
    Artifact,
    Backend,
    Plan,
    checked_options,
    chosen_served_name,
)

__all__ = [
    "AdapterBesideBase",
    "Artifact",
    "Backend",
    "BackendFactory",
    "GGUFFile",
    "Plan",
    "Progress",
    "Quantization",
    "check_environment",
    "checked_options",
    "chosen_served_name",
    "open_backend",
]
