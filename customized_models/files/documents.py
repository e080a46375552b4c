"""The library's values as JSON, and back."""

from __future__ import annotations

import functools
import uuid
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import MalformedError, shown

if TYPE_CHECKING:
    from cattrs import Converter

T = TypeVar("T")


@functools.cache
def _converter() -> Converter:
    from cattrs.preconf.json import make_converter

    converter = make_converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(uuid.UUID, str)
    converter.register_structure_hook(uuid.UUID, lambda text, _: uuid.UUID(text))
    return converter


def to_document(value: Any) -> Any:
    """A value of this library as data that JSON can hold; `from_document` reads it back equal."""
    return _converter().unstructure(value)


def from_document(cls: type[T], document: Any) -> T:
    """The value of class `cls` that `to_document` made `document` from.

    Raises:
        MalformedError: The document does not fit the class.
    """
    from cattrs.errors import (
        BaseValidationError,
        ForbiddenExtraKeysError,
        StructureHandlerNotFoundError,
    )

    try:
        return _converter().structure(document, cls)
    except (
        BaseValidationError,
        ForbiddenExtraKeysError,
        StructureHandlerNotFoundError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise MalformedError(f"not a {cls.__name__}: {shown(error)}") from error
