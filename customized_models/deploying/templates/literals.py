"""Text and dates inside a Go template, where braces and white space can mean something else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import date

from ...errors import UnsupportedError, shown
from .chat_template import DATES

_YEAR_MONTH_DAY = {
    "%Y": "slice currentDate 0 4",
    "%m": "slice currentDate 5 7",
    "%d": "slice currentDate 8 10",
}


def literal(text: str, *, trimmed: bool) -> str:
    """Text as it stands in a Go template.

    Args:
        text: What the template is to write, with `DATES` in it.
        trimmed: Whether the next action trims white space to its left.

    Raises:
        UnsupportedError: A date is in a form that Go templates cannot write.
    """
    return "".join(_parts(text, trimmed))


def _parts(text: str, trimmed: bool) -> Iterator[str]:
    position = 0
    for found in DATES.finditer(text):
        yield from _quoted_where_needed(text[position : found.start()])
        yield _date(found[1])
        position = found.end()
    rest = text[position:]
    kept = rest.rstrip(" \t\r\n") if trimmed else rest
    yield from _quoted_where_needed(kept)
    if rest != kept:
        yield _quoted(rest[len(kept) :])


def _quoted_where_needed(text: str) -> Iterator[str]:
    # One brace at the end would be read with those of the action that follows.
    position = 0
    for braces in re.finditer(r"\{{2,}|\{$", text):
        yield text[position : braces.start()]
        yield _quoted(braces[0])
        position = braces.end()
    yield text[position:]


def _quoted(text: str) -> str:
    return "{{ " + json.dumps(text) + " }}"


def _date(form: str) -> str:
    """Actions that write today's date in a form of `strftime`.

    Raises:
        UnsupportedError: The form has more than year, month, day and the month's English name.
    """
    result, position = "", 0
    for directive in re.finditer("%.", form):
        result += form[position : directive.start()]
        position = directive.end()
        if directive[0] in _YEAR_MONTH_DAY:
            result += f"{{{{ {_YEAR_MONTH_DAY[directive[0]]} }}}}"
        elif directive[0] in ("%b", "%B"):
            result += _month(directive[0])
        else:
            raise UnsupportedError(
                f"the chat template writes a date as {shown(form)}; Ollama's templates cannot "
                f"write {directive[0]}"
            )
    return result + form[position:]


def _month(directive: str) -> str:
    names = [date(2000, month, 1).strftime(directive) for month in range(1, 13)]
    arms = (
        f'{{{{ {"else " if number else ""}if eq $month "{number + 1:02d}" }}}}{name}'
        for number, name in enumerate(names)
    )
    return "{{ $month := slice currentDate 5 7 }}" + "".join(arms) + "{{ end }}"
