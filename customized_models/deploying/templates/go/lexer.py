"""Text to tokens, by the rules of Go's `text/template/parse/lex.go`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from attrs import frozen

from .errors import GoSyntaxError, GoUnsupportedError

SPACES = " \t\r\n"
KEYWORDS = frozenset(
    ("block", "break", "continue", "define", "else", "end", "if", "range", "nil", "template",
     "with")
)  # fmt: skip

_ACTION = re.compile(
    r"""
    (?P<space>[ \t\r\n]+)
  | (?P<number>[+-]?(?:0[xX][0-9a-fA-F_]+|0[oO][0-7_]+|0[bB][01_]+
      |(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][+-]?[0-9_]+)?))
  | (?P<field>\.[^\W]+)
  | (?P<dot>\.)
  | (?P<variable>\$\w*)
  | (?P<word>\w+)
  | (?P<string>"(?:[^"\\\n]|\\[^\n])*")
  | (?P<raw>`[^`]*`)
  | (?P<character>'(?:[^'\\\n]|\\[^\n])+')
  | (?P<declare>:=)
  | (?P<assign>=)
  | (?P<pipe>\|)
  | (?P<open>\()
  | (?P<close>\))
  | (?P<comma>,)
    """,
    re.VERBOSE,
)
_ENDED_BY_TERMINATOR = ("field", "dot", "variable", "word")
_TERMINATOR = re.compile(r"[ \t\r\n.,|:()]|\}\}|$")
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[0-7]{3}|.)")
_SIMPLE_ESCAPES = {
    "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\",
}  # fmt: skip


@frozen
class Token:
    """`kind`: a group of the pattern above, a keyword, "text", "left", "right" or "end of file"."""

    kind: str
    text: str


def tokens(template: str) -> Iterator[Token]:
    """The tokens of a template, trim markers applied and comments left out.

    Raises:
        GoSyntaxError: An action or comment is not closed, or holds what Go does not know.
    """
    position, trim = 0, False
    while True:
        start = template.find("{{", position)
        text = template[position : start if start >= 0 else len(template)]
        text = text.lstrip(SPACES) if trim else text
        if start < 0:
            if text:
                yield Token("text", text)
            yield Token("end of file", "")
            return
        inner = start + 2
        if template[inner : inner + 1] == "-" and template[inner + 1 : inner + 2] in tuple(SPACES):
            text, inner = text.rstrip(SPACES), inner + 2
        if text:
            yield Token("text", text)
        if template.startswith("/*", inner):
            position, trim = _after_comment(template, inner)
            continue
        yield Token("left", "{{")
        position, trim, found = _action(template, inner)
        yield from found
        yield Token("right", "}}")


def _action(template: str, position: int) -> tuple[int, bool, list[Token]]:
    """Where an action ends, whether it trims what follows, and its tokens."""
    found: list[Token] = []
    while True:
        end = _right(template, position)
        if end is not None:
            return *end, found
        match = _ACTION.match(template, position)
        if match is None or match.lastgroup is None:
            here = template[position : position + 1]
            unclosed = here in ('"', "`", "'") or not here
            raise GoSyntaxError(
                f"unterminated {'quote' if here else 'action'} in {_shown(template, position)}"
                if unclosed
                else f"unexpected {here!r} in action {_shown(template, position)}"
            )
        kind, position = match.lastgroup, match.end()
        if kind in _ENDED_BY_TERMINATOR and not _TERMINATOR.match(template, position):
            raise GoSyntaxError(f"bad character after {match[0]!r} {_shown(template, position)}")
        if kind == "word" and match[0] in KEYWORDS:
            kind = match[0]
        elif kind == "word" and match[0] in ("true", "false"):
            kind = "bool"
        found.append(Token(kind, match[0]))


def _right(template: str, position: int) -> tuple[int, bool] | None:
    """The end of an action that closes here, and whether it trims what follows."""
    if template[position : position + 1] in tuple(SPACES) and template.startswith(
        "-}}", position + 1
    ):
        return position + 4, True
    return (position + 2, False) if template.startswith("}}", position) else None


def _after_comment(template: str, position: int) -> tuple[int, bool]:
    match = _COMMENT.match(template, position)
    end = _right(template, match.end()) if match else None
    if end is None:
        raise GoSyntaxError(f"unclosed comment {_shown(template, position)}")
    return end


def _shown(template: str, position: int) -> str:
    line = template.count("\n", 0, position) + 1
    return f"at line {line}: {template[max(0, position - 20) : position + 20]!r}"


def unquoted(token: Token) -> bytes:
    """The bytes of a string constant.

    Source: `strconv.Unquote` of Go, for strings in double quotes and in back quotes.
    """
    body = token.text[1:-1]
    if token.kind == "raw":
        return body.replace("\r", "").encode()
    parts, position = [], 0
    for match in _ESCAPE.finditer(body):
        parts += [body[position : match.start()].encode(), _escaped(match[1], token)]
        position = match.end()
    return b"".join((*parts, body[position:].encode()))


def _escaped(escape: str, token: Token) -> bytes:
    quote = token.text[0]
    if escape[0] == "x":
        return bytes([int(escape[1:], 16)])
    if escape[0] in "uU":
        number = int(escape[1:], 16)
        if number > 0x10FFFF or 0xD800 <= number < 0xE000:
            raise GoSyntaxError(f"no such character in {token.text}")
        return chr(number).encode()
    if len(escape) == 3:
        if int(escape, 8) > 255:
            raise GoSyntaxError(f"no such byte in {token.text}")
        return bytes([int(escape, 8)])
    if escape == quote:
        return quote.encode()
    if escape not in _SIMPLE_ESCAPES:
        raise GoSyntaxError(f"unknown escape in {token.text}")
    return _SIMPLE_ESCAPES[escape].encode()


def number(token: Token) -> int | float:
    """The value of a number or character constant.

    Raises:
        GoSyntaxError: There is no such number.
        GoUnsupportedError: A number in a spelling that is not known here.
    """
    if token.kind == "character":
        characters = unquoted(token).decode("utf-8", "replace")
        if len(characters) != 1:
            raise GoSyntaxError(f"malformed character constant {token.text}")
        return ord(characters)
    try:
        if re.fullmatch(r"[+-]?0[0-7_]+", token.text):  # octal, as in C
            return int(token.text, 8)
        if re.search(r"[.eE]", token.text) and "x" not in token.text.lower():
            return float(token.text)
        return int(token.text, 0)
    except ValueError as error:
        raise GoUnsupportedError(f"the number {token.text}") from error
