"""Learns a chat template's `Pattern` from what it renders, without reading its Jinja.

Sequences of roles are rendered with marks for contents, and cut at the marks. Then contents with
odd edges, with thinking and without anything show what becomes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from typing import Any, get_args

from attrs import evolve

from .chat_template import ChatTemplate
from .conversations import ASSISTANT, SYSTEM, USER, Message
from .pattern import END, FINAL, START, Edges, Gap, Pattern, Placement, Strip

_LONGEST = 5  # messages: system, user, assistant, user, assistant has every pair of roles
_EDGES = "\n \tX y\t \n"
_THOUGHT = "<think>\nR\n</think>\n\n X"
_STRIPS: tuple[Strip, ...] = get_args(Strip)


def learnt(chat: ChatTemplate) -> Pattern:
    """The pattern of a chat template, as far as it has one; only a comparison shows how far."""
    observed = _Observed(chat)
    pattern = Pattern(_placement(observed), {}, {}, continues=observed.continues)
    pattern, explained = _with_gaps(pattern, observed)
    for gap in [gap for gap in pattern.gaps if gap[1] != END]:
        pattern = _with_edges(pattern, gap, _shortest(pattern, gap, explained), observed)
    if pattern.placement is Placement.REFUSED:
        pattern = evolve(pattern, gaps=_with_system_before_user(pattern.gaps))
    return evolve(pattern, unthinking=_unthinking(observed))


class _Observed:
    """Renderings without the beginning-of-text token that a served file adds."""

    def __init__(self, chat: ChatTemplate) -> None:
        self._chat = chat
        self._bos = chat.bos if chat.file_adds_bos else ""
        self.continues = True
        self.continues = self.sequence((USER, ASSISTANT)) is not None

    def __call__(self, messages: Sequence[Message], **variables: Any) -> str | None:
        open_end = self.continues and messages[-1]["role"] == ASSISTANT
        text = self._chat.observe(messages, open_end=open_end, **variables)
        return None if text is None else text.removeprefix(self._bos)

    def sequence(self, roles: Sequence[str]) -> str | None:
        """The rendering of messages that have marks for contents."""
        return self(_marked(roles))

    def order(self, roles: Sequence[str]) -> list[int] | None:
        """The places of the messages that are shown, in the order in which they are."""
        text = self.sequence(roles)
        if text is None:
            return None
        places = [place for place in range(len(roles)) if _mark(place) in text]
        return sorted(places, key=lambda place: text.index(_mark(place)))


def _mark(place: int) -> str:
    return f"Qz{place}zQ"


def _marked(roles: Sequence[str]) -> list[Message]:
    return [Message(role=role, content=_mark(place)) for place, role in enumerate(roles)]


def _placement(observed: _Observed) -> Placement:
    alone, between = observed.order((SYSTEM, USER)), observed.order((SYSTEM, USER, ASSISTANT, USER))
    later = observed.order((USER, ASSISTANT, SYSTEM, USER))
    if alone is None:
        return Placement.REFUSED
    if 0 not in alone:
        return Placement.DROPPED
    if between and 0 in between and between.index(0) > 1:
        return Placement.LAST
    return Placement.FRONT if later and later[0] == 2 else Placement.INLINE


def _sequences() -> list[tuple[str, ...]]:
    """Roles without equal neighbours, which Ollama joins; ordinary conversations first."""
    every = [
        roles
        for length in range(1, _LONGEST + 1)
        for roles in product((SYSTEM, USER, ASSISTANT), repeat=length)
        if all(first != second for first, second in pairwise(roles))
    ]
    return sorted(every, key=lambda roles: (not _is_ordinary(roles), len(roles)))


def _is_ordinary(roles: Sequence[str]) -> bool:
    """Whether a conversation is of user and assistant in turn, with a system message at most."""
    turns = tuple(roles[1:] if roles[0] == SYSTEM else roles)
    return turns[:1] == (USER,) and SYSTEM not in turns


def _with_gaps(pattern: Pattern, observed: _Observed) -> tuple[Pattern, list[tuple[str, ...]]]:
    """The pattern with its gaps, and the sequences that it explains."""
    gaps: dict[Gap, str] = {}
    explained = []
    for roles in _sequences():
        text = observed.sequence(roles)
        new = None if text is None else _cut(text, pattern.shown(roles))
        # What an ordinary conversation has shown stands.
        if new is not None and all(gaps.get(gap, found) == found for gap, found in new.items()):
            gaps |= new
            explained.append(roles)
    return evolve(pattern, gaps=gaps), explained


def _cut(text: str, shown: Sequence[tuple[int, str]]) -> dict[Gap, str] | None:
    """The text between the marks; None if they do not stand once each, in that order."""
    gaps: dict[Gap, str] = {}
    previous = START
    for place, role in shown:
        before, found, text = text.partition(_mark(place))
        if not found or gaps.setdefault((previous, role), before) != before:
            return None
        previous = role
    gaps[previous, END] = text
    return None if any("Qz" in gap for gap in gaps.values()) else gaps


def _shortest(
    pattern: Pattern, gap: Gap, explained: Sequence[tuple[str, ...]]
) -> tuple[tuple[str, ...], int]:
    """The shortest sequence with a gap, and the place of the message after it."""
    found = []
    for roles in explained:
        shown = [(-1, START), *pattern.shown(roles)]
        for (_, previous), (place, role) in pairwise(shown):
            if (previous, role) == gap:
                found.append((roles, place))
    # Some show a system message that comes last in another way.
    at_end = [gap[1] == SYSTEM and place == len(roles) - 1 for roles, place in found]
    return min(zip(at_end, found, strict=True), key=lambda item: (item[0], len(item[1][0])))[1]


def _with_edges(
    pattern: Pattern, gap: Gap, example: tuple[tuple[str, ...], int], observed: _Observed
) -> Pattern:
    """The pattern with what becomes of the content after a gap."""
    (roles, place), role = example, gap[1]

    def fits(tried: Pattern, content: str) -> bool:
        messages = _marked(roles)
        messages[place] = Message(role=roles[place], content=content)
        return tried.text(messages) == observed(messages)

    def having(edges: Edges) -> Pattern:
        return evolve(pattern, edges={**pattern.edges, gap: edges})

    every = (Edges(left, right) for left, right in product(_STRIPS, _STRIPS))
    edges = next((edges for edges in every if fits(having(edges), _EDGES)), Edges())
    if role in (ASSISTANT, FINAL) and not fits(having(edges), _THOUGHT):
        without = (evolve(edges, after_thinking=strip) for strip in _STRIPS)
        edges = next((edges for edges in without if fits(having(edges), _THOUGHT)), edges)
    pattern = having(edges)
    if role == FINAL or role in pattern.vanishing or fits(pattern, ""):
        return pattern
    vanishing = evolve(pattern, vanishing=pattern.vanishing | {role})
    return vanishing if fits(vanishing, "") else pattern


def _with_system_before_user(gaps: Mapping[Gap, str]) -> dict[Gap, str]:
    """Gaps that put a system message where the user's begins, with a blank line between."""
    result: dict[Gap, str] = {(SYSTEM, USER): "\n\n", (SYSTEM, END): ""}
    for previous in (START, USER, ASSISTANT):
        before = ASSISTANT if previous == USER else previous
        result[previous, SYSTEM] = gaps.get((before, USER), "")
    return {**result, **gaps}


def _unthinking(observed: _Observed) -> str:
    question = _marked((USER,))
    plain, without = observed(question), observed(question, enable_thinking=False)
    if plain is None or without is None or not without.startswith(plain):
        return ""
    return without[len(plain) :]
