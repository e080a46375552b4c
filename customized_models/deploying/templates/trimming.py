"""Definitions that strip a content in Go templates, which have no function for it.

They build on `slice` and on templates that call themselves with a shorter text, as Go templates
can write a value but not return one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from .pattern import Edges, Strip

# What Python's `str.strip` takes away, which Jinja's `trim` calls.
_SPACES = [character for character in map(chr, range(0x3001)) if character.isspace()]
_CHARACTERS: Mapping[Strip, list[str]] = {"none": [], "newlines": ["\n"], "spaces": _SPACES}
_BYTES = (1, 2, 3)  # of those characters in UTF-8


def filter_name(edges: Edges) -> str:
    """The name of the template that writes a content with these edges."""
    thinking = f"after thinking {edges.after_thinking}, " if edges.after_thinking else ""
    return f"{thinking}left {edges.left}, right {edges.right}"


def definitions(every: Iterable[Edges]) -> str:
    """The definitions of all these filters, each once, in one order."""
    return "".join(sorted({text for edges in every for text in _definitions(edges)}))


def _definitions(edges: Edges) -> Iterator[str]:
    if edges.right != "none":
        yield _right(edges.right)
    if edges.left != "none":
        yield _left(edges.left, edges.right)
    body = _stripped(edges.left, edges.right, ".")
    if edges.after_thinking is not None:
        if edges.after_thinking != "none":
            yield _left(edges.after_thinking, "none")
        after = _stripped(edges.after_thinking, "none", "$rest")
        body = (
            "{{ $all := . }}{{ $rest := . }}{{ $found := false }}"
            "{{ range $i := len $all }}{{ $tail := slice $all $i }}"
            '{{ if and (ge (len $tail) 8) (eq (slice $tail 0 8) "</think>") }}'
            "{{ $rest = slice $tail 8 }}{{ $found = true }}{{ end }}{{ end }}"
            f"{{{{ if $found }}}}{after}{{{{ else }}}}{body}{{{{ end }}}}"
        )
    yield _definition(filter_name(edges), body)


def _definition(name: str, body: str) -> str:
    return f'{{{{- define "{name}" }}}}{body}{{{{ end }}}}\n'


def _stripped(left: Strip, right: Strip, variable: str) -> str:
    if left != "none":
        return f'{{{{ template "{_left_name(left, right)}" {variable} }}}}'
    if right != "none":
        return f'{{{{ template "{_right_name(right)}" {variable} }}}}'
    return f"{{{{ {variable} }}}}"


def _left_name(strip: Strip, then: Strip) -> str:
    return f"strip {strip} left, then {then} right"


def _right_name(strip: Strip) -> str:
    return f"strip {strip} right"


def _by_length(strip: Strip) -> Iterator[tuple[int, str]]:
    """Lengths in bytes, and the characters of that length as arguments of `eq`."""
    for length in _BYTES:
        of_length = [c for c in _CHARACTERS[strip] if len(c.encode()) == length]
        if of_length:
            yield length, " ".join(f'"\\u{ord(character):04x}"' for character in of_length)


def _left(strip: Strip, then: Strip) -> str:
    name = _left_name(strip, then)
    arms = [
        f"if and (ge (len .) {length}) (eq (slice . 0 {length}) {characters}) }}}}"
        f'{{{{ template "{name}" (slice . {length}) }}}}'
        for length, characters in _by_length(strip)
    ]
    choice = "{{ " + "{{ else ".join(arms) + "{{ else }}"
    return _definition(name, f"{choice}{_stripped('none', then, '.')}{{{{ end }}}}")


def _right(strip: Strip) -> str:
    name = _right_name(strip)
    arms = [
        f"{{{{ if and (ge (len .) {length}) (not $done) }}}}"
        # The length of what is left without its first bytes is that without its last ones.
        f"{{{{ $end := len (slice . {length}) }}}}{{{{ if eq (slice . $end) {characters} }}}}"
        f'{{{{ $done = true }}}}{{{{ template "{name}" (slice . 0 $end) }}}}{{{{ end }}}}'
        f"{{{{ end }}}}"
        for length, characters in _by_length(strip)
    ]
    body = "{{ $done := false }}" + "".join(arms) + "{{ if not $done }}{{ . }}{{ end }}"
    return _definition(name, body)
