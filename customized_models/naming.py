"""Names: their alphabets, and how a model's name is made from the names of what it came from."""

from __future__ import annotations

import re
import unicodedata
import uuid
from datetime import datetime

from .arguments import text
from .errors import InvalidNameError, shown

TECHNICAL_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,23}", re.ASCII)
TRAIN_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,47}", re.ASCII)
ENVIRONMENT_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,47}", re.ASCII)
ALIAS = re.compile(r"[a-z0-9][a-z0-9.-]{0,47}", re.ASCII)
SERVED_NAME = re.compile(
    r"([a-z0-9_][a-z0-9_-]{0,79}/)?[a-z0-9][a-z0-9._-]{0,79}(:[a-z0-9_][a-z0-9._-]{0,79})?",
    re.ASCII,
)
"""`[namespace/]model[:tag]`, in lower case: `isPartValid` in `types/model/name.go` of Ollama."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


_LONGEST = {TECHNICAL_NAME: 24, TRAIN_NAME: 48, ENVIRONMENT_NAME: 48, ALIAS: 48, SERVED_NAME: 80}
_LONGEST_LABEL = 200  # characters: what a table can still show


def checked_name(kind: str, name: object, pattern: re.Pattern[str]) -> str:
    """`name` if all of it matches `pattern` and it does not contain `..`.

    Raises:
        InvalidArgumentError: It is not text.
        InvalidNameError: It does not match. The message describes and proposes one that does.
    """
    given, longest = text(kind, name), _LONGEST[pattern]
    if _matches(given, pattern):
        return given
    characters = f"1 to {longest} characters of a to z, 0 to 9"
    form = (
        f"'model', 'model:tag' or 'namespace/model:tag', each {characters}, '.', '_' and '-'"
        if pattern is SERVED_NAME
        else f"{characters}, '.' and '-', beginning with a letter or digit, without '..'"
    )
    proposed = _derived(given, longest)
    hint = f"; {shown(proposed)} would do" if proposed else ""
    raise InvalidNameError(f"{kind} {shown(given)} must be {form}{hint}")


def train_name_of(label: object) -> str:
    """The train name for what a person calls a training. A label that is a valid name stays as is.

    Any other label is decomposed (Unicode NFKD), its accents are removed, and it is converted to
    lower case; each run of characters other than a to z, 0 to 9, `.` and `-`, and each run of dots,
    becomes one `-`; dots and dashes at its ends are removed, and it is cut to 48 characters.

    >>> train_name_of("Réseau_v2 (final)")
    'reseau-v2-final'

    Raises:
        InvalidArgumentError: It is not text.
        InvalidNameError: Nothing is left, or the label is not 1 to 200 printable characters.
    """
    given = text("train_name", label)
    if not 0 < len(given) <= _LONGEST_LABEL or not given.isprintable():
        raise InvalidNameError(
            f"train name {shown(given)} must be 1 to {_LONGEST_LABEL} printable characters"
        )
    if _matches(given, TRAIN_NAME):
        return given
    name = _derived(given, _LONGEST[TRAIN_NAME])
    if not name:
        raise InvalidNameError(
            f"train name {shown(given)} has no letter a to z and no digit to make a name from"
        )
    return name


def _matches(name: str, pattern: re.Pattern[str]) -> bool:
    return bool(pattern.fullmatch(name)) and ".." not in name


def _derived(text: str, longest: int) -> str:
    """A name by the rule of `train_name_of`; empty if nothing is left."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    plain = re.sub(r"[^a-z0-9.-]+|\.{2,}", "-", "".join(letters).lower())
    return plain.strip(".-")[:longest].rstrip(".-")


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
