"""The file of presets that a llama.cpp router reads: what models there are, and of which files.

An INI file with a section for each model. Sections of others, and comments, stay as they are.

Source: `common_preset_context::load_from_ini` in `common/preset.cpp` of llama.cpp b11434.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import MalformedError

FILE = "customized-models.ini"

_HEADER = re.compile(r"[ \t]*\[[ \t]*(.*?)[ \t]*\][ \t]*(?:[;#].*)?")
_OPTION = re.compile(r"[ \t]*([A-Za-z_][\w.-]*)[ \t]*=[ \t]*(.*?)[ \t]*", re.ASCII)
VALUE = re.compile(r"[\w./@+-](?:[\w ./@+-]*[\w./@+-])?", re.ASCII)
"""Values without what ends one, `;` and `#`, or separates several, `,`."""


def sections(text: str) -> dict[str, dict[str, str]]:
    """The options of each model."""
    found: dict[str, dict[str, str]] = {}
    options: dict[str, str] = {}
    for line in text.splitlines():
        if header := _HEADER.fullmatch(line):
            options = found.setdefault(header[1], {})
        elif option := _OPTION.fullmatch(line):
            options[option[1]] = option[2]
    return found


def with_section(text: str, name: str, options: Mapping[str, str]) -> str:
    """The file with that section, in place of what it had under the name.

    Law: `sections(with_section(text, name, options))[name] == options`.

    Raises:
        MalformedError: A value cannot stand in such a file.
    """
    for key, value in options.items():
        if not VALUE.fullmatch(value):
            raise MalformedError(f"{key} cannot be {value!r} in {FILE}")
    lines = [f"[{name}]", *(f"{key} = {value}" for key, value in options.items())]
    rest = without_section(text, name).rstrip("\n")
    return "\n".join([rest, "", *lines, ""] if rest else [*lines, ""])


def without_section(text: str, name: str) -> str:
    """The file without that section; as it is if there is none."""
    kept, inside = [], False
    for line in text.splitlines(keepends=True):
        if header := _HEADER.fullmatch(line.rstrip("\r\n")):
            inside = header[1] == name
        if not inside:
            kept.append(line)
    return "".join(kept)
