"""Ollama, over its own HTTP API: our GGUF file as one blob, then a model made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from .._errors import (
    AlreadyExistsError,
    DeploymentError,
    InUseError,
    InvalidOptionError,
    NoTemplateError,
    ServerAnswerError,
    ServerUnreachableError,
    UnsupportedVersionError,
    shown,
)
from .._gguf import GGUFFile
from .._models import DeploymentEnvironment, Progress, Served, Status
from . import Artifact, Plan, checked_options, chosen_served_name
from ._http import JSONServer, answer_timeout, bearer_token

if TYPE_CHECKING:
    import httpx

_CREATE_SECONDS = 900.0  # the server reads the file once and copies nothing
_UNLOAD_SECONDS = 10.0

_WHOLE = (
    "num_keep", "seed", "num_predict", "top_k", "repeat_last_n",
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread",
)  # fmt: skip
_REAL = (
    "top_p", "min_p", "typical_p", "temperature",
    "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
