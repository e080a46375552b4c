"""The conversations on which renderings are compared, by what is odd about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TypedDict

from attrs import frozen

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


class Message(TypedDict):
    """`role`: "system", "user" or "assistant"."""

    role: str
    content: str


@frozen
class Conversation:
    """`kind`: one of `REQUIRED` or `FURTHER`."""

    kind: str
    messages: tuple[Message, ...]


REQUIRED = (
    "no system",
    "system",
    "several turns",
    "white space",
    "special characters",
    "trailing assistant",
)
"""What a template must get right."""

BEGINNING = "beginning of text"
"""The kind under which the number or ids of a whole prompt's tokens are recorded, if it is live."""

FURTHER = (
    "empty content",
    "thinking",
    "later system",
    "assistant first",
    "system alone",
    "one role twice",
    "unusual white space",
    "trailing white space",
)
"""What some templates or servers cannot do: a difference is a limit that is told."""

_U, _A, _S = USER, ASSISTANT, SYSTEM
_TURNS: tuple[tuple[str, ...], ...] = (
    (_U, _A, _U), (_S, _U, _A, _U), (_U, _A, _U, _A, _U), (_S, _U, _A, _U, _A, _U),
    (_U, _A, _U, _A, _U, _A, _U),
)  # fmt: skip
_EVERY = ((_U,), (_S, _U), *_TURNS)
_ENDED_BY_ASSISTANT = ((_U, _A), (_S, _U, _A), (_U, _A, _U, _A), (_S, _U, _A, _U, _A))

_SPECIAL = (
    "naïve 日本語 🙂", "a < b && c > d", 'say "x"\n\nand\ty', "{{ .Content }} {% x %} {# y #}",
    "1. one\n2. two", "<b>bold</b> \\n [x] 'y'",
)  # fmt: skip
_EDGES = ((" ", "\n\n"), ("\n", " \n"), ("\t\n ", "\r\n"), ("", "\t"), (" ", ""), ("\n", "\n"))
# Python strips ideographic and no-break spaces, too, and so do chat templates.
_UNUSUAL_EDGES = (("\n", "\u3000"), ("\xa0", "\n"), ("\u2028", ""), ("", "\x1c"))
_THOUGHTS = (
    "<think>\nhm\n</think>\n\n{}", "<think></think>{}", "hm</think>\n{}",
    "<think>a</think>b</think> {}",
)  # fmt: skip


def _conversation(kind: str, roles: tuple[str, ...], words: Sequence[str]) -> Conversation:
    pairs = zip(roles, words, strict=True)
    return Conversation(kind, tuple(Message(role=role, content=text) for role, text in pairs))


def _plain(kind: str, *every: tuple[str, ...]) -> Iterator[Conversation]:
    for roles in every:
        words = [f"The {role}'s words, number {i}." for i, role in enumerate(roles)]
        yield _conversation(kind, roles, words)


def _edged(
    kind: str, every: Sequence[tuple[str, ...]], edges: Sequence[tuple[str, str]]
) -> Iterator[Conversation]:
    following = cycle(edges)
    for roles in every:
        words = [f"x {i}".join(next(following)) for i in range(len(roles))]
        yield _conversation(kind, roles, words)


def _special() -> Iterator[Conversation]:
    following = cycle(_SPECIAL)
    for roles in (*_EVERY, *_EVERY):
        words = [f"{next(following)} {i}" for i in range(len(roles))]
        yield _conversation("special characters", roles, words)


def _empty() -> Iterator[Conversation]:
    for roles in _EVERY:
        for place in range(len(roles)):
            words = ["" if i == place else f"w{i}" for i in range(len(roles))]
            yield _conversation("empty content", roles, words)


def _thinking() -> Iterator[Conversation]:
    for roles in _TURNS[:3]:
        for thought in _THOUGHTS:
            words = [thought.format(i) if role == _A else f"q{i}" for i, role in enumerate(roles)]
            yield _conversation("thinking", roles, words)


CONVERSATIONS: tuple[Conversation, ...] = (
    *_plain("no system", (_U,)),
    *_plain("system", (_S, _U)),
    *_plain("several turns", *_TURNS),
    *_plain("trailing assistant", *_ENDED_BY_ASSISTANT),
    *_edged("white space", (*_EVERY, *_EVERY), _EDGES),
    *_special(),
    *_empty(),
    *_thinking(),
    *_plain("later system", (_U, _S), (_U, _A, _S, _U), (_S, _U, _S, _U), (_S, _U, _A, _S, _U)),
    *_plain("assistant first", (_A, _U), (_S, _A, _U)),
    *_plain("system alone", (_S,)),
    *_edged("unusual white space", _EVERY, _UNUSUAL_EDGES),
    *_edged("trailing white space", _ENDED_BY_ASSISTANT, _EDGES),
    *_plain("one role twice", (_U, _U), (_S, _S, _U), (_U, _A, _A, _U), (_U, _A, _U, _U)),
)
