"""What a model at Ollama can be given besides weights and template, checked before it is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from attrs import Attribute, field, frozen

from ..errors import InvalidOptionError, UnsupportedVersionError, shown
from .ollama_api import Version


def _whole(value: object) -> bool:
    return type(value) is int and -(1 << 31) <= value < 1 << 31


def _real(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _flag(value: object) -> bool:
    return type(value) is bool


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value)


_PARAMETERS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(
        ("num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "num_predict",
         "repeat_last_n", "seed", "top_k"),
        (_whole, "a whole number"),
    ),
    **dict.fromkeys(
        ("frequency_penalty", "min_p", "presence_penalty", "repeat_penalty", "temperature",
         "top_p", "typical_p"),
        (_real, "a finite number"),
    ),
    "use_mmap": (_flag, "True or False"),
    "stop": (_texts, "a list of strings that are not empty"),
}  # fmt: skip
"""What every Ollama since 0.5.5 knows (`Options` in its api/types.go), and the type of each."""


def _checked_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in parameters.items():
        if name not in _PARAMETERS:
            raise InvalidOptionError(
                f"Ollama has no parameter {shown(name)}; it has {', '.join(sorted(_PARAMETERS))}"
            )
        fits, description = _PARAMETERS[name]
        if not fits(value):
            raise InvalidOptionError(f"{name} must be {description}, not {shown(value)}")
    return dict(parameters)


def _is_flag(_: object, attribute: Attribute[Any], value: object) -> None:
    if not _flag(value):
        raise InvalidOptionError(f"{attribute.name} must be True or False, not {shown(value)}")


@frozen
class OllamaOptions:
    """What a model at Ollama is made with, besides its weights and its template.

    `system`: the system message of conversations that bring none; None for none. `parameters`:
    defaults that a call may override, checked here because the server does not; `stop` adds to
    the template's own. `use_chat_template`: let the server render with the chat template in the
    file, and not with a Go template; servers from 0.30.0 on can, unless their variable
    OLLAMA_GO_TEMPLATE is 1.

    >>> OllamaOptions(parameters={"num_ctx": 4096, "temperature": 0}).parameters["num_ctx"]
    4096

    Raises:
        InvalidOptionError: Ollama has no such parameter, or its value is of another type.
    """

    system: str | None = field(default=None)
    parameters: Mapping[str, Any] = field(
        factory=dict, converter=_checked_parameters, hash=False, kw_only=True
    )
    use_chat_template: bool = field(default=False, validator=_is_flag, kw_only=True)

    def refuse_unfit(self, version: Version) -> None:
        """Refuse what a server of that version cannot do.

        Raises:
            UnsupportedVersionError: It is too old.
        """
        if self.use_chat_template and not version.uses_file_template:
            raise UnsupportedVersionError(
                "this Ollama renders with Go templates only; leave out use_chat_template"
            )

    @system.validator
    def _check_system(self, _: object, value: object) -> None:
        # The server takes an empty one for none.
        if value is not None and not (isinstance(value, str) and value):
            raise InvalidOptionError(f"system must be None or text, not {shown(value)}")
