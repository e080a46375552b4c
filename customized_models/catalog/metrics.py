"""Metrics of visible values in a table of their own, so that a search finds them by an index."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Table, delete, insert, select

from ..models import EvaluationSummary
from .schema import metrics

_SINGLE = ("best_metric", "steps", "epochs", "first_loss", "last_loss")
"""What was measured once, and is found like a metric."""


def measured(value: Any) -> dict[str, float]:
    """All numbers that a value's card has of its evaluation, by their names."""
    evaluation = getattr(getattr(value, "card", None), "evaluation", None)
    if not isinstance(evaluation, EvaluationSummary):
        return {}
    single = {name: getattr(evaluation, name) for name in _SINGLE}
    return {n: float(v) for n, v in {**single, **evaluation.metrics}.items() if v is not None}


def index_metrics(connection: Connection, table: Table, value: Any) -> None:
    """Let the metrics of the value's row be those of its card."""
    forget_metrics(connection, table, value.name)
    if found := measured(value):
        seq = connection.execute(select(table.c.seq).where(table.c.name == value.name)).scalar()
        rows = [
            {"level": table.name, "name": name, "seq": seq, "value": number}
            for name, number in found.items()
            if number == number  # SQL has no number that is not one
        ]
        if rows:
            connection.execute(insert(metrics), rows)


def forget_metrics(connection: Connection, table: Table, name: str) -> None:
    """Remove the metrics of the row with that name."""
    numbers = select(table.c.seq).where(table.c.name == name)
    mine = delete(metrics).where(metrics.c.level == table.name, metrics.c.seq.in_(numbers))
    connection.execute(mine)
