"""Go's `text/template` in Python, as far as prompt templates use it.

Where a template needs more, `GoUnsupportedError` says so: what is written here is what Go writes,
or nothing.
"""

from .errors import GoExecutionError, GoSyntaxError, GoTemplateError, GoUnsupportedError
from .execution import executed
from .functions import BUILT_IN, GoFunction
from .parser import parsed

__all__ = [
    "BUILT_IN",
    "GoExecutionError",
    "GoFunction",
    "GoSyntaxError",
    "GoTemplateError",
    "GoUnsupportedError",
    "executed",
    "parsed",
]
