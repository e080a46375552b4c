"""Checks regular expressions from an adapter's configuration: matching must take bounded time."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..errors import MalformedError, UnsupportedAdapterError, shown

_LITERAL = r"(?:[\w/:-]|\\[.\-/])"
_TOKEN = re.compile(
    rf"(?:(?P<literal>{_LITERAL})"
    r"|(?P<any>\.|\\[dw]|\[[\w.\\-]+\])"
    rf"|(?P<choice>\((?:\?:)?{_LITERAL}+(?:\|{_LITERAL}+)+\))"
    r"|(?P<close>\)))"
    r"(?P<repeat>[*+?]\??|\{\d{1,3}(?:,\d{0,3})?\}\??)?"
    r"|(?P<anchor>\^|\$|\\b)|(?P<open>\((?:\?:)?)|(?P<bar>\|)",
    re.ASCII,
)
_MAX_LENGTH = 20_000
_MAX_REPEATS = 8
_MAX_CHOICES = 8


def check_pattern(key: str, pattern: str) -> None:
    """Refuse a regular expression unless the time to match a module's name is bounded.

    Accepted are literals, `.`, classes, anchors, groups, choices between different literals, and
    alternatives of the whole pattern. Only a single character may be repeated, and there must be a
    literal between two repeats, so that a repeat can end only before that literal.

    Raises:
        MalformedError: It is not a regular expression.
        UnsupportedAdapterError: Matching it may take very long.
    """
    costly = UnsupportedAdapterError(
        f"{key} has a pattern that may take very long to match: {shown(pattern)}; "
        f"list the modules' names instead"
    )
    if len(pattern) > _MAX_LENGTH:
        raise costly
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise MalformedError(f"{key} has a broken pattern {shown(pattern)}") from error
    tokens = list(_tokens(pattern, costly))
    repeats = sum(token["repeat"] is not None for token in tokens)
    choices = sum(token["choice"] is not None for token in tokens)
    if repeats > _MAX_REPEATS or choices > _MAX_CHOICES or not _is_bounded(tokens):
        raise costly


def _tokens(pattern: str, otherwise: Exception) -> Iterator[re.Match[str]]:
    position = 0
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            raise otherwise
        yield token
        position = token.end()


def _is_bounded(tokens: list[re.Match[str]]) -> bool:
    separated = True  # a literal stands between here and the last repeat
    groups: list[bool] = []  # of each open group, what `separated` was at its start
    for token in tokens:
        optional = token["repeat"] in ("?", "??")
        if token["open"]:
            groups.append(separated)
        elif token["bar"]:
            if groups:
                return False
            separated = True
        elif token["close"]:
            start = groups.pop()
            separated = separated and (start or not optional)
            if token["repeat"] and not optional:
                return False
        elif token["choice"]:
            alternatives = token["choice"].removeprefix("(").removeprefix("?:")[:-1].split("|")
            if len(set(alternatives)) < len(alternatives) or (token["repeat"] and not optional):
                return False
            separated = separated or not optional
        elif token["repeat"] and not (token["literal"] and optional):
            if not separated:
                return False
            separated = False
        elif token["literal"] and not optional:
            separated = True
    return True
