"""Renderings compared with a chat template's, and the record of it."""

from __future__ import annotations

import html
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import date, timedelta

from attrs import frozen

from ...errors import InvalidOptionError, TemplateMismatchError, listed
from .chat_template import ChatTemplate
from .conversations import (
    BEGINNING,
    CONVERSATIONS,
    FURTHER,
    REQUIRED,
    Conversation,
    Message,
)
from .ollama import collated

_AROUND = 30  # characters that are shown before and after a difference


class RenderingFailed(Exception):
    """There is no rendering; the message says why."""


@frozen
class Difference:
    """A conversation that is rendered in another way than by the chat template.

    `found`: what was rendered; None if that ended with `error`.
    """

    kind: str
    roles: tuple[str, ...]
    expected: str
    found: str | None
    error: str = ""

    @property
    def position(self) -> int:
        """The number of the first character that differs, counted from 0."""
        found = self.found or ""
        pairs = zip(self.expected, found, strict=False)
        equal = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
        return min(len(self.expected), len(found)) if equal is None else equal

    def __str__(self) -> str:
        """One sentence with the characters around the first difference."""
        start = max(0, self.position - _AROUND)
        end = self.position + _AROUND

        def part(text: str) -> str:
            head = "..." if start else ""
            return ascii(head + text[start:end] + ("..." if len(text) > end else ""))

        where = f"{self.kind} ({', '.join(self.roles)})"
        if self.found is None:
            return f"{where}: rendering ends with an error: {self.error}"
        return (
            f"{where}: from character {self.position} on, the chat template writes "
            f"{part(self.expected)} and the deployment {part(self.found)}"
        )


@frozen
class Comparison:
    """How conversations of one kind came out.

    `by`: what was compared: "characters", "token ids" or "token count". `refused`: conversations
    that the chat template does not take, which were not compared.
    """

    kind: str
    compared: int
    equal: int
    refused: int = 0
    by: str = "characters"


@frozen
class TemplateProof:
    """What was compared with the chat template.

    `where`: what rendered, such as "here" or "Ollama". `differences`: the first of each kind.
    """

    where: str
    comparisons: tuple[Comparison, ...]
    differences: tuple[Difference, ...] = ()

    @property
    def failed(self) -> tuple[str, ...]:
        """The kinds that must be equal and are not."""
        return tuple(kind for kind in self._unequal if kind not in FURTHER)

    @property
    def limits(self) -> tuple[str, ...]:
        """Further kinds that are not equal."""
        return tuple(kind for kind in self._unequal if kind in FURTHER)

    @property
    def compared(self) -> int:
        """The number of conversations of kinds that must be equal."""
        return sum(c.compared for c in self.comparisons if c.kind in REQUIRED)

    @property
    def _unequal(self) -> Iterable[str]:
        return dict.fromkeys(c.kind for c in self.comparisons if c.equal < c.compared)

    def require(self, accept: Collection[str] = (), *, hint: str = "") -> None:
        """Raise unless every kind that must be equal is, but for those in `accept`.

        Raises:
            TemplateMismatchError: Some are not; the message has the first difference.
            InvalidOptionError: There is no such kind in `accept`.
        """
        unknown = set(accept) - {*REQUIRED, BEGINNING}
        if unknown:
            raise InvalidOptionError(
                f"no kind of conversation is called {listed(unknown)}; there are "
                f"{', '.join((*REQUIRED, BEGINNING))}"
            )
        failed = [kind for kind in self.failed if kind not in accept]
        if not failed:
            return
        first = next(d for d in self.differences if d.kind == failed[0])
        raise TemplateMismatchError(
            f"the deployment template does not write what the model was trained with: {first}"
            f"{hint}. Different: {', '.join(failed)}. Deployer.propose_template makes one "
            f"from the chat template",
            tuple(failed),
        )

    def __str__(self) -> str:
        """A table of lines."""
        return "\n".join(
            f"{kind:20} {compared:>9} {by:12} {result}"
            for kind, compared, by, result in self._rows()
        )

    def _repr_html_(self) -> str:
        cells = (
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        return f"<table><caption>{html.escape(self.where)}</caption>{''.join(cells)}</table>"

    def _rows(self) -> Iterable[tuple[str, str, str, str]]:
        for c in self.comparisons:
            result = "equal" if c.equal == c.compared else f"{c.compared - c.equal} different"
            if not c.compared:
                result = "refused by the chat template"
            yield c.kind, f"{c.equal}/{c.compared}", c.by, result


Accepted = Callable[[Sequence[Message]], Sequence[str]]
"""The texts that may be written for messages; none where the chat template refuses them."""


def accepted_by(chat: ChatTemplate, today: date, *, days: int = 0, joined: bool = True) -> Accepted:
    """What a chat template writes for messages.

    Args:
        chat: The template.
        today: The day for its dates.
        days: How many days another machine's calendar may be off.
        joined: Whether the server joins neighbours of one role first, as Ollama does.
    """
    shifts = range(-days, days + 1) if chat.has_dates else range(1)
    dates = sorted((today + timedelta(days=shift) for shift in shifts), key=lambda d: d != today)

    def accepted(messages: Sequence[Message]) -> Sequence[str]:
        given = collated(messages) if joined else messages
        return chat.accepted(given, dates=dates)

    return accepted


def compare(
    where: str,
    accepted: Accepted,
    render: Callable[[Sequence[Message]], str],
    conversations: Sequence[Conversation] = CONVERSATIONS,
) -> TemplateProof:
    """Compare what `render` writes with what is accepted, character by character.

    Args:
        where: What renders, for the record.
        accepted: See `accepted_by`.
        render: The whole text for messages, with a beginning-of-text token that is added to it;
            raises RenderingFailed.
        conversations: What to render.
    """
    counts: dict[str, list[int]] = {}
    differences: dict[str, Difference] = {}
    for conversation in conversations:
        count = counts.setdefault(conversation.kind, [0, 0, 0])
        texts = accepted(conversation.messages)
        if not texts:
            count[2] += 1
            continue
        found, error = None, ""
        try:
            found = render(conversation.messages)
        except RenderingFailed as failure:
            error = str(failure)
        count[0] += 1
        count[1] += found in texts
        if found not in texts:
            roles = tuple(message["role"] for message in conversation.messages)
            difference = Difference(conversation.kind, roles, texts[0], found, error)
            differences.setdefault(conversation.kind, difference)
    return TemplateProof(where, _comparisons(counts), tuple(differences.values()))


def _comparisons(counts: Mapping[str, Sequence[int]]) -> tuple[Comparison, ...]:
    return tuple(
        Comparison(kind, compared, equal, refused)
        for kind, (compared, equal, refused) in counts.items()
    )
