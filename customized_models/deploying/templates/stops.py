"""The strings that end an answer."""

from __future__ import annotations

import re

from .conversations import ASSISTANT, USER
from .end_tokens import EndTokens
from .pattern import END, Pattern

# <|im_end|> and the like, [INST] and the like, or the rest of a line.
_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<\[][^\n<\[]*")
_MARKS = 2  # the end of the answer, and the head of the next turn


def stop_strings(pattern: Pattern, ends: EndTokens, bos: str) -> tuple[str, ...]:
    """The first marks between an answer and the next question, then the special end tokens.

    A model that misses its end token writes the next turn's head, so that one stops it, too.

    Args:
        pattern: What the chat template writes.
        ends: The model's end tokens.
        bos: The beginning-of-text token, which no answer is ended by.
    """
    gap = pattern.gaps.get((ASSISTANT, USER)) or pattern.gaps.get((ASSISTANT, END), "")
    marks = [mark.strip() for mark in _MARK.findall(gap)]
    marks = [mark for mark in dict.fromkeys(marks) if mark and mark != bos]
    return tuple(dict.fromkeys((*marks[:_MARKS], *ends.stop)))
