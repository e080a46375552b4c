"""Names: their alphabets, and how a model's name is made from the names of what it came from."""

from __future__ import annotations

import re
import uuid
from datetime import datetime

from .errors import InvalidNameError, shown

TECHNICAL_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,23}", re.ASCII)
TRAIN_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,47}", re.ASCII)
ENVIRONMENT_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,47}", re.ASCII)
SERVED_NAME = re.compile(
    r"([a-z0-9_][a-z0-9_-]{0,79}/)?[a-z0-9][a-z0-9._-]{0,79}(:[a-z0-9_][a-z0-9._-]{0,79})?",
    re.ASCII,
)
"""`[namespace/]model[:tag]`, in lower case: `isPartValid` in `types/model/name.go` of Ollama."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def checked_name(kind: str, name: str, pattern: re.Pattern[str]) -> str:
    """`name` if all of it matches `pattern` and it does not contain `..`.

    Raises:
        InvalidNameError: It does not match. The message has the pattern.
    """
    if not isinstance(name, str) or not pattern.fullmatch(name) or ".." in name:
        raise InvalidNameError(f"{kind} {shown(name)} must match {pattern.pattern}, without '..'")
    return name


def customized_name(base: str, train_name: str, created: datetime, training_id: uuid.UUID) -> str:
    """`[base]_[train name]_[YYYYMMDD]_[first 4 digits of the training id]`; the date is in UTC."""
    return f"{base}_{train_name}_{created:%Y%m%d}_{training_id.hex[:4]}"


def complete_name(customized: str, saving_id: uuid.UUID) -> str:
    """`[customized]_s_[first 4 digits of the saving id]`."""
    return f"{customized}_s_{saving_id.hex[:4]}"


def live_name(source: str, deploying_id: uuid.UUID, quantization: str) -> str:
    """`[complete or customized]_d_[first 4 digits of the deploying id]_[quantization]`."""
    return f"{source}_d_{deploying_id.hex[:4]}_{quantization}"


def is_hub_id(name: str | None) -> bool:
    """Whether `name` has the form of a Hub id, `owner/repository`, and not of a path or a title."""
    return bool(name and len(name) <= 96 and _HUB_ID.fullmatch(name) and ".." not in name)
