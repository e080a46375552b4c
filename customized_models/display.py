"""How notebooks display values: as small HTML tables with every cell escaped."""

from __future__ import annotations

import html
from typing import Any

from attrs import Attribute, fields


def html_table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """An HTML table with every cell escaped."""

    def line(cells: tuple[object, ...], tag: str) -> str:
        inner = "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells)
        return f"<tr>{inner}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table>"


class Shown:
    """Displays an attrs value in a notebook as a table of the fields that its `repr` has."""

    def _repr_html_(self) -> str:
        rows: list[tuple[object, ...]] = [
            (a.name, getattr(self, a.name)) for a in _shown_fields(type(self))
        ]
        return html_table(("field", "value"), rows)


def _shown_fields(cls: type) -> list[Attribute[Any]]:
    return [a for a in fields(cls) if a.repr]
