"""The page of the documentation that shows what `tests.sweep` found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version

from tests.sweep import KINDS, SORTS, Outcome

_TITLES = {
    "causal": "Language models",
    "seq2seq": "Encoders with a decoder",
    "classification": "Classification of sequences",
    "vision": "Models that read images, video or sound",
}
_RESULTS = ("exact", "refused", "different", "cannot be built", "none")
_CELLS = {"none": "-", "cannot be built": "not built"}

_INTRODUCTION = """# Architectures

Which classes of models are merged with the bits of PEFT: every class of transformers
{transformers} that answers, translates, classifies or reads images, as a random model of a few
thousand parameters, with three sorts of adapters of PEFT {peft}: LoRA and DoRA on all linear
layers, and LoRA on experts that are stacked in one parameter. Each complete model is loaded by
transformers and compared with what `merge_and_unload` gives, tensor by tensor and bit by bit.

**exact**: the complete model is the model that PEFT merges. **refused**: with the reason that is
given below. **not built**: transformers or PEFT make no tiny model or no adapter of it here, so
nothing is known. **-**: the model has no stacked experts. An empty cell: not tried.

A class that is not in the table, of your own or of a later transformers, is merged as well where
its layers are of a known kind. What cannot be merged is refused by name, in `Merger.plan` as in
`Merger.save`.

The page is made by two commands in a checkout of the repository. The first takes an hour or two,
goes on where it was ended, and fails if anything is different:

    python -m tests.sweep --log sweep.jsonl
    python -m tests.sweep --log sweep.jsonl --table docs/reference/architectures.md
"""


def page(outcomes: Iterable[Outcome]) -> str:
    """The outcomes as a page in Markdown: counts, notes, and a table for each kind of model."""
    every = sorted(outcomes, key=lambda o: (o.model.casefold(), o.model_type, o.sort))
    versions = {name: version(name) for name in ("transformers", "peft")}
    parts = [_INTRODUCTION.format(**versions), _counts(every)]
    parts += _notes("Refused", [o for o in every if o.result == "refused"])
    parts += _notes(
        "Compared with more than PEFT", [o for o in every if o.reason and o.result == "exact"]
    )
    for kind in KINDS:
        if of_kind := [outcome for outcome in every if outcome.kind == kind]:
            parts += [f"## {_TITLES[kind]}\n", _classes(of_kind)]
    parts += _notes("Not built", [o for o in every if o.result == "cannot be built"])
    return "\n".join(parts)


def _counts(outcomes: list[Outcome]) -> str:
    counts = Counter((outcome.sort, outcome.result) for outcome in outcomes)
    known = [result for result in _RESULTS if any(counts[sort, result] for sort in SORTS)]
    rows = [[sort, *(str(counts[sort, result]) for result in known)] for sort in SORTS]
    return _table(["", *(_CELLS.get(result, result) for result in known)], rows)


def _classes(outcomes: list[Outcome]) -> str:
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for outcome in outcomes:
        row = cells.setdefault((outcome.model, outcome.model_type), {})
        row[outcome.sort] = _CELLS.get(outcome.result, outcome.result)
    rows = [
        [f"`{model}`", f"`{model_type}`", *(found.get(sort, "") for sort in SORTS)]
        for (model, model_type), found in cells.items()
    ]
    return _table(["Class", "`model_type`", *SORTS], rows)


def _notes(title: str, outcomes: list[Outcome]) -> list[str]:
    """Each reason once, with the classes and sorts that it holds for."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for outcome in outcomes:
        models = by_reason.setdefault(outcome.reason, {})
        models.setdefault(outcome.model, []).append(outcome.sort)
    rows = [
        [", ".join(f"`{model}`" for model in models), _sorts(models.values()), _escaped(reason)]
        for reason, models in by_reason.items()
    ]
    return [f"## {title}\n", _table(["Class", "Adapter", "Reason"], rows)] if rows else []


def _sorts(found: Iterable[list[str]]) -> str:
    return ", ".join(dict.fromkeys(sort for sorts in found for sort in sorts))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
