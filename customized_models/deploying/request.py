"""What a deployment was asked to be, on its way to the process that does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from attrs import frozen

from ..models import CompleteModel, CustomizedModel, DeploymentTemplate, Quantization

KINDS: Mapping[str, type[CustomizedModel | CompleteModel]] = {
    "customized": CustomizedModel,
    "complete": CompleteModel,
}


@frozen
class DeployRequest:
    """A deployment, as `Deployer.deploy` was called; options are the backend's own document."""

    kind: Literal["customized", "complete"]
    model: str
    environment: str
    quantization: Quantization
    served_name: str | None
    options: Any
    template: DeploymentTemplate | None
    gguf: str | None
    replace: bool
    proofs: tuple[str, ...]
    accept_failed: tuple[str, ...]
