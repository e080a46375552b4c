"""Small pictures for notebooks, as SVG: no package is needed, and every text is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence

from attrs import frozen

_FONT = 'font-family="sans-serif" font-size="12"'
_WIDTH, _HEIGHT = 210, 58  # of a box: a name of thirty characters, and three lines
_GAP_X, _GAP_Y = 36, 14
_LETTERS = 30  # of a line in a box


@frozen
class Box:
    """A box of a graph.

    Attributes:
        lines: What is written in it; the first is bold.
        color: Of its border, as CSS.
        column: Its place from the left, beginning with 0.
        row: Its place from the top; halves are between rows.
        title: What is shown when the pointer is over it.
    """

    lines: tuple[str, ...]
    color: str
    column: int
    row: float
    title: str


def graph_svg(boxes: Sequence[Box], lines: Sequence[tuple[int, int]]) -> str:
    """Boxes in columns, and lines from the right of one to the left of another."""
    width = (max(box.column for box in boxes) + 1) * (_WIDTH + _GAP_X)
    height = (max(box.row for box in boxes) + 1) * (_HEIGHT + _GAP_Y)
    drawn = [_line(boxes[left], boxes[right]) for left, right in lines]
    return _svg(width, height, "".join([*drawn, *map(_box, boxes)]))


def _corner(box: Box) -> tuple[float, float]:
    return box.column * (_WIDTH + _GAP_X) + 4, box.row * (_HEIGHT + _GAP_Y) + 4


def _box(box: Box) -> str:
    x, y = _corner(box)
    texts = "".join(
        f'<text x="{x + 8}" y="{y + 17 + 16 * n:g}" {_FONT} fill="currentColor" '
        f'font-weight="{400 if n else 600}">{html.escape(_shortened(line))}</text>'
        for n, line in enumerate(box.lines)
    )
    return (
        f"<g><title>{html.escape(box.title)}</title>"
        f'<rect x="{x}" y="{y:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="none" '
        f'stroke="{box.color}" stroke-width="2"/>{texts}</g>'
    )


def _line(left: Box, right: Box) -> str:
    (x1, y1), (x2, y2) = _corner(left), _corner(right)
    x1, y1, y2 = x1 + _WIDTH, y1 + _HEIGHT / 2, y2 + _HEIGHT / 2
    middle = (x1 + x2) / 2
    return (
        f'<path d="M{x1},{y1:g} C{middle},{y1:g} {middle},{y2:g} {x2},{y2:g}" fill="none" '
        f'stroke="gray"/>'
    )


def _shortened(text: str) -> str:
    """Its ends: a model's name begins with its base, and ends with what tells it from others."""
    if len(text) <= _LETTERS:
        return text
    half = (_LETTERS - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


_PLOT_WIDTH, _PLOT_HEIGHT = 560, 240
_LEFT, _BOTTOM, _TOP = 64, 28, 24


def scatter_svg(title: str, points: Sequence[tuple[str, float]]) -> str:
    """Named numbers from left to right, joined by a line."""
    values = [value for _, value in points]
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or 1.0

    def place(number: int, value: float) -> tuple[float, float]:
        across = number / max(1, len(points) - 1)
        x = _LEFT + across * (_PLOT_WIDTH - _LEFT - 16)
        y = _TOP + (high - value) / span * (_PLOT_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    places = [place(n, value) for n, value in enumerate(values)]
    path = " ".join(f"{x},{y}" for x, y in places)
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="4" fill="steelblue">'
        f"<title>{html.escape(name)}: {value:g}</title></circle>"
        for (name, value), (x, y) in zip(points, places, strict=True)
    )
    ends = "".join(
        f'<text x="{_LEFT - 8}" y="{place(0, value)[1] + 4}" text-anchor="end" {_FONT} '
        f'fill="currentColor">{value:.4g}</text>'
        for value in sorted({low, high})
    )
    heading = f'<text x="{_LEFT}" y="14" {_FONT} fill="currentColor">{html.escape(title)}</text>'
    line = f'<polyline points="{path}" fill="none" stroke="lightsteelblue"/>'
    return _svg(_PLOT_WIDTH, _PLOT_HEIGHT, heading + ends + line + dots)


def _svg(width: float, height: float, inner: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'style="max-width:100%;width:{width:g}px">{inner}</svg>'
    )
