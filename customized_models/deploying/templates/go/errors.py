"""What can go wrong with a Go template, before it is known which template that was."""

from __future__ import annotations


class GoTemplateError(Exception):
    """Base class; callers of this package translate it into an error of the library's tree."""


class GoSyntaxError(GoTemplateError):
    """The template does not parse; Go would refuse it as well."""


class GoExecutionError(GoTemplateError):
    """The template parses, but ends with an error for these values, as it would in Go."""


class GoUnsupportedError(GoTemplateError):
    """Valid in Go, perhaps, but not known here, so that what it gives cannot be told."""
