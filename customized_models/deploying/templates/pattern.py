"""A chat template as a table: what is written between two contents, by the roles of both."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from attrs import frozen

from .conversations import ASSISTANT, SYSTEM, USER, Message

START, FINAL, END = "", "final", "end"
"""Beside the roles: before the first message, an assistant's last one, and after the last."""

Gap = tuple[str, str]
"""Two roles that follow each other."""


class Placement(enum.Enum):
    """Where a chat template shows a system message."""

    INLINE = "where it stands"
    FRONT = "before everything else"
    LAST = "before the last user message"
    DROPPED = "nowhere"
    REFUSED = "it refuses one"


Strip = Literal["none", "newlines", "spaces"]

_STRIPPED: Mapping[Strip, str | None] = {"none": "", "newlines": "\n", "spaces": None}


@frozen
class Edges:
    """What becomes of a content: how its ends are stripped, and whether its thinking is left out.

    `after_thinking`: how the start of what follows the last `</think>` is stripped; None if a
    content is shown with its thinking.
    """

    left: Strip = "none"
    right: Strip = "none"
    after_thinking: Strip | None = None

    def applied(self, content: str) -> str:
        """The content as it is shown."""
        if self.after_thinking is not None and "</think>" in content:
            return content.split("</think>")[-1].lstrip(_STRIPPED[self.after_thinking])
        return content.lstrip(_STRIPPED[self.left]).rstrip(_STRIPPED[self.right])


@frozen
class Pattern:
    """What a chat template writes, without a beginning-of-text token that the file adds.

    `gaps`: the text between two contents. `edges`: what becomes of the second one's. `vanishing`:
    roles whose messages are left out when they are empty. `continues`: whether an assistant's
    last message is left open. `unthinking`: what `enable_thinking=False` adds to the end.
    """

    placement: Placement
    gaps: Mapping[Gap, str]
    edges: Mapping[Gap, Edges]
    vanishing: frozenset[str] = frozenset()
    continues: bool = True
    unthinking: str = ""

    def shown(self, roles: Sequence[str]) -> list[tuple[int, str]]:
        """Places and roles of the messages, in the order in which they are shown."""
        names = list(roles)
        if self.continues and names and names[-1] == ASSISTANT:
            names[-1] = FINAL
        return [(place, names[place]) for place in self._order(roles)]

    def _order(self, roles: Sequence[str]) -> Iterable[int]:
        systems = [place for place, role in enumerate(roles) if role == SYSTEM]
        others = [place for place, role in enumerate(roles) if role != SYSTEM]
        if self.placement is Placement.DROPPED:
            return others
        if self.placement is Placement.FRONT:
            return systems + others
        if self.placement is Placement.LAST:
            ends_with_user = bool(others) and roles[-1] == USER
            return others[:-1] + systems + others[-1:] if ends_with_user else others
        return range(len(roles))

    def text(self, messages: Sequence[Message]) -> str | None:
        """What is written for `messages`; None if two roles follow each other in a new way."""
        result, previous = "", START
        for place, role in self.shown([message["role"] for message in messages]):
            content = messages[place]["content"]
            if role in self.vanishing and not content:
                continue
            gap = (previous, role)
            if gap not in self.gaps:
                return None
            result += self.gaps[gap] + self.edges.get(gap, Edges()).applied(content)
            previous = role
        end = self.gaps.get((previous, END))
        return None if end is None else result + end
