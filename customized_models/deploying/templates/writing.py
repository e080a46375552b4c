"""A `Pattern` as an Ollama Go template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from attrs import frozen

from .conversations import ASSISTANT, SYSTEM, USER
from .literals import literal
from .pattern import END, FINAL, Edges, Gap, Pattern, Placement
from .trimming import definitions, filter_name


@frozen
class Code:
    """An action of Go. `new_line`: put on a line of its own, for whoever reads the template."""

    go: str
    new_line: bool = False


Segments = list[str | Code]
"""Text as it is, and actions."""


def go_template(pattern: Pattern) -> str:
    """The Go template that writes what the pattern says.

    Raises:
        UnsupportedError: The pattern has a date in a form that Go templates cannot write.
    """
    body = _Body(pattern)
    text = _written(body.segments())
    return definitions(body.filters) + text


class _Body:
    """The parts of the template; `filters`: what they need defined."""

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.filters: set[Edges] = set()

    def segments(self) -> Segments:
        """Everything but definitions."""
        arms = {SYSTEM: self.system(), USER: self.user(), ASSISTANT: self.assistant()}
        given = {role: arm for role, arm in arms.items() if arm}
        segments: Segments = [Code('$previous := ""', True)]
        if self.pattern.placement is Placement.LAST:
            segments.append(Code("$system := false"))
        if self.pattern.placement is Placement.FRONT:
            front = self.message(SYSTEM, "$.System")
            segments += [Code("if .System", True), *front, Code("end")]
        segments.append(Code("range $i, $message := .Messages", True))
        segments.append(Code("$last := eq (len (slice $.Messages $i)) 1"))
        for place, (role, arm) in enumerate(given.items()):
            segments += [Code(f'{"else " if place else ""}if eq .Role "{role}"', True), *arm]
        return [*segments, Code("end", True), Code("end", True), *self.end()]

    def system(self) -> Segments:
        if self.pattern.placement in (Placement.INLINE, Placement.REFUSED):
            return self.unless_empty(SYSTEM, self.message(SYSTEM))
        if self.pattern.placement is Placement.LAST:
            return [Code("$system = true")]
        return []

    def user(self) -> Segments:
        before: Segments = []
        if self.pattern.placement is Placement.LAST:
            system = self.message(SYSTEM, "$.System")
            before = [Code("if and $last $system"), *system, Code("end")]
        return self.unless_empty(USER, [*before, *self.message(USER)])

    def assistant(self) -> Segments:
        plain = self.message(ASSISTANT)
        if not self.pattern.continues:
            return self.unless_empty(ASSISTANT, plain)
        final = self.message(FINAL)
        if plain[:-1] == final[:-1]:
            segments = [*plain, Code("if $last"), final[-1], Code("end")]
        else:
            segments = [Code("if $last"), *final, Code("else"), *plain, Code("end")]
        return self.unless_empty(ASSISTANT, segments)

    def message(self, role: str, content: str = ".Content") -> Segments:
        """The text before a content, the content, and the note that its role was the last."""
        before = {gap[0]: text for gap, text in self.pattern.gaps.items() if gap[1] == role}
        same = _common_end(before.values())
        heads: dict[str, Segments] = {
            previous: [text.removesuffix(same)] for previous, text in before.items()
        }
        shown: dict[str, Segments] = {
            previous: [self.filtered((previous, role), content)] for previous in before
        }
        if not shown:  # the template never showed this role
            shown = {"": [Code(content)]}
        return [*_chosen(heads), same, *_chosen(shown), Code(f'$previous = "{role}"')]

    def filtered(self, gap: Gap, content: str) -> Code:
        edges = self.pattern.edges.get(gap, Edges())
        if edges == Edges():
            return Code(content)
        self.filters.add(edges)
        return Code(f'template "{filter_name(edges)}" {content}')

    def unless_empty(self, role: str, segments: Segments) -> Segments:
        if role in self.pattern.vanishing:
            return [Code("if .Content"), *segments, Code("end")]
        return segments

    def end(self) -> Segments:
        ends: dict[str, Segments] = {
            gap[0]: [text] for gap, text in self.pattern.gaps.items() if gap[1] == END
        }
        segments = _chosen(ends)
        if self.pattern.unthinking:
            condition = f'and .IsThinkSet (not .Think) (ne $previous "{FINAL}")'
            segments += [Code(f"if {condition}"), self.pattern.unthinking, Code("end")]
        return segments


def _chosen(by_previous: Mapping[str, Segments]) -> Segments:
    """Segments by the role before; the most frequent ones for all others."""
    groups: list[tuple[Segments, list[str]]] = []
    for previous, segments in by_previous.items():
        same = next((names for known, names in groups if known == segments), None)
        if same is None:
            groups.append((segments, same := []))
        same.append(previous)
    if not groups:
        return []
    # Not those before the first message: that comes once, and others may be new.
    others = max(groups, key=lambda group: (len(group[1]), "" not in group[1]))
    result: Segments = []
    for segments, names in groups:
        if names is not others[1]:
            result += [Code(f"{'else ' if result else ''}if {_one_of(names)}"), *segments]
    if not result:
        return others[0]
    if len(groups) == 2 and not any(result[1:]):
        names = next(names for _, names in groups if names is not others[1])
        return [Code(f"if not ({_one_of(names)})"), *others[0], Code("end")]
    if any(others[0]):
        result += [Code("else"), *others[0]]
    return [*result, Code("end")]


def _one_of(names: Iterable[str]) -> str:
    return "eq $previous " + " ".join(f'"{name}"' for name in names)


def _common_end(texts: Iterable[str]) -> str:
    """The longest text that all end with, and that a date is not cut by."""
    every = list(texts)
    if not every:
        return ""
    shortest = min(every, key=len)
    length = 0
    while length < len(shortest) and len({text[-1 - length] for text in every}) == 1:
        length += 1
    same = shortest[len(shortest) - length :]
    # A mark, such as <|user|>, is easier to read in one piece.
    if len(set(every)) > 1:
        same = re.sub(r"^[^<\[]*[>\]]", "", same) if _cuts_mark(every, same) else same
    cut = max((match.end() for match in re.finditer("[\ue000\ue001]", same)), default=0)
    return same[cut:] if len(set(every)) > 1 else same


def _cuts_mark(texts: Sequence[str], same: str) -> bool:
    heads = [text.removesuffix(same) for text in texts]
    return any(re.search(r"[<\[][^>\]\s]*$", head) for head in heads)


def _written(segments: Segments) -> str:
    """The text of a template: what must not be trimmed or taken for an action is put in quotes."""
    joined: Segments = []
    for segment in segments:
        if isinstance(segment, str) and joined and isinstance(joined[-1], str):
            joined[-1] += segment
        elif segment != "":
            joined.append(segment)
    result = ""
    for place, segment in enumerate(joined):
        if isinstance(segment, Code):
            line = "\n" if place else ""
            result += (f"{line}{{{{- " if segment.new_line else "{{ ") + segment.go + " }}"
        else:
            following = joined[place + 1] if place + 1 < len(joined) else None
            trimmed = isinstance(following, Code) and following.new_line
            result += literal(segment, trimmed=trimmed)
    return result
