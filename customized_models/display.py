"""How values are displayed: as small tables, in a notebook with every cell escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import datetime


def html_table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    """An HTML table with every cell escaped."""

    def line(cells: tuple[object, ...], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(_cell(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


def text_table(rows: Sequence[tuple[object, ...]]) -> str:
    """Lines with columns under each other."""
    cells = [tuple(map(_cell, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat(" ", "minutes")
    return str(value)
