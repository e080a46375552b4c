"""Renders a model's card as `README.md`, in the Hub's format, and reads it back.

Law: `parse_card(render(model, base)) == storable_card(model.card)`. A number that is not finite
is left out of a mapping, and is None elsewhere.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from ..errors import MalformedError, shown
from ..files.documents import from_document, to_document
from ..files.reading import plain_text
from ..models import BaseModel, CompleteModel, CustomizedModel, ModelCard, is_adapter
from ..naming import is_hub_id

MAX_README = 4 << 20  # bytes; cards with thousands of benchmark results have about one million
MAX_DEPTH = 24  # levels of mappings and lists in a README's header
MAX_VALUES = 5000  # in a card: a metric for each of a thousand classes, several times over
MAX_TEXT = 1 << 20  # characters in a card
_MAX_EVENTS = 50_000  # of YAML, which takes about 10 microseconds each; a card of ours has 15,000

_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # within a word, _ marks nothing


def readme_header(text: str) -> dict[str, Any]:
    """The mapping in a README's YAML header; empty if it has no header.

    Aliases are refused, so a header's size bounds the size of its value.

    Raises:
        MalformedError: It does not parse.
    """
    block = _HEADER.match(text)
    return {} if block is None else yaml_mapping(block[1], "the header of README.md")


def yaml_mapping(text: str, what: str) -> dict[str, Any]:
    """The mapping that a YAML text is, read as `readme_header` reads.

    Raises:
        MalformedError: It does not parse; `what` names it.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        bounded = _is_bounded(yaml.parse(text, Loader=loader))
        mapping = yaml.load(text, Loader=loader) if bounded else None
    except Exception as error:  # PyYAML raises of all kinds at odd values
        raise MalformedError(f"{what} is not YAML: {shown(error)}") from error
    if not bounded:
        raise MalformedError(f"{what} has aliases, or is too large or too deep")
    if not isinstance(mapping, dict):
        raise MalformedError(f"{what} is not a mapping")
    return mapping


def _is_bounded(events: Iterable[Any]) -> bool:
    import yaml

    depth = 0
    for count, event in enumerate(events):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH or count > _MAX_EVENTS:
            return False
    return True


def storable_card(card: ModelCard) -> ModelCard:
    """`card` with values that JSON and YAML have: tuples become lists, and infinity and NaN go.

    Law: `storable_card(storable_card(c)) == storable_card(c)`.

    Raises:
        MalformedError: A value is not JSON, is nested too deeply or cannot be encoded as UTF-8, or
            there are more than `MAX_VALUES` values or `MAX_TEXT` characters.
    """
    return from_document(ModelCard, storable(card))


def storable(value: Any) -> Any:
    """Data as JSON and YAML can hold it, of a size that a card may have; raises likewise."""
    plain = _storable(value, depth=1)
    values, characters = _size(plain)
    if values > MAX_VALUES or characters > MAX_TEXT:
        raise MalformedError(
            f"a card has {values} values and {characters} characters, more than {MAX_VALUES} "
            f"and {MAX_TEXT}; pass fewer metrics or settings"
        )
    return plain


def _size(value: Any) -> tuple[int, int]:
    """How many values are in it, and how many characters."""
    if isinstance(value, str):
        return 1, len(value)
    if not isinstance(value, dict | list):
        return 1, 0
    inside = [*value, *value.values()] if isinstance(value, dict) else value
    sizes = [_size(item) for item in inside]
    return 1 + sum(count for count, _ in sizes), sum(length for _, length in sizes)


def _storable(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise MalformedError(f"a card nests mappings and lists deeper than {MAX_DEPTH} levels")
    if attrs.has(type(value)):
        value = attrs.asdict(value, recurse=False)
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise MalformedError(
                f"a card has a mapping with keys that are not strings: {shown(value)}"
            )
        plain = {_storable(key, depth): _storable(v, depth + 1) for key, v in value.items()}
        return {key: v for key, v in plain.items() if v is not None or value[key] is None}
    if isinstance(value, list | tuple):
        return [_storable(item, depth + 1) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise MalformedError(
                f"a card has text that cannot be encoded as UTF-8: {shown(value)}"
            ) from error
        return str.__str__(value)  # of an enum that is a string: its value, not its name
    if value is not None and type(value) not in (bool, int):
        raise MalformedError(
            f"a card has {shown(value)}, a {type(value).__name__}, which JSON does not have"
        )
    return value


def render(model: CustomizedModel | CompleteModel, base: BaseModel) -> str:
    """A model's `README.md`, with the digests of its lineage in the header."""
    facts = {"name": model.name, "digest": model.digest}
    relation = "finetune"
    if isinstance(model, CompleteModel):
        facts |= {"customized": model.customized, "customized_digest": model.customized_digest}
        digest = model.base_digest
    else:
        facts["training_id"] = str(model.training_id)
        digest = base.digest
        if is_adapter(model):
            relation = "adapter"
    facts |= {"base": base.name, "base_digest": digest, "train_name": model.train_name}
    return _render(relation, facts, base, model.card)


def _render(relation: str, facts: dict[str, str], base: BaseModel, card: ModelCard) -> str:
    import yaml

    card = storable_card(card)
    own = to_document(card)
    measured = {key: value for key, value in own["evaluation"].items() if value is not None}
    header: dict[str, Any] = {"library_name": "peft" if relation == "adapter" else "transformers"}
    if is_hub_id(base.model_name):
        header |= {"base_model": base.model_name, "base_model_relation": relation}
    if base.card.license is not None:
        header["license"] = base.card.license
    if on_the_hub := [name for name in card.training.datasets if is_hub_id(name)]:
        header["datasets"] = on_the_hub
    if (task := _task(base, card)) is not None:
        header["pipeline_tag"] = task
    if index := _model_index(facts["name"], task or _TASKS["CAUSAL_LM"], on_the_hub, card):
        header["model-index"] = index
    header["tags"] = ["customized-models"]
    notes = own.pop("notes")
    own |= {"notes": notes} if notes else {}
    header["customized_models"] = facts | own | {"evaluation": measured}
    # PyYAML would write Unicode's own line breaks as they are, and read them back as others.
    breaks = re.search("[\x85\u2028\u2029]", json.dumps(header, ensure_ascii=False)) is not None
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=not breaks, width=math.inf)
    title = f"# {_escaped(facts['name'])}\n"
    kind = "An adapter for" if relation == "adapter" else "A complete model made from"
    about = f"{kind} the base model {_escaped(base.model_name)}.\n"
    tables = [
        _table("Method", own["training"]["peft"]),
        _table("Training arguments", own["training"]["arguments"]),
        _table("Datasets", dict.fromkeys(own["training"]["datasets"], "")),
        _table("Evaluation", measured.pop("metrics") | measured),
    ]
    if notes:
        tables.append("\n".join(["## Notes\n", *(f"- {_escaped(note)}" for note in notes), ""]))
    return "\n".join([f"---\n{front}---\n", title, about, *filter(None, tables)])


_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""The Hub's name of a task, by PEFT's."""


_ARCHITECTURES = {
    "ForCausalLM": "text-generation",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
}
"""The Hub's name of a task, by how a base model's class ends."""


def _task(base: BaseModel, card: ModelCard) -> str | None:
    stated = _TASKS.get(str(card.training.peft.get("task_type")))
    ends = (task for end, task in _ARCHITECTURES.items() if base.card.architecture.endswith(end))
    return stated or next(ends, None)


def _model_index(
    name: str, task: str, datasets: Sequence[str], card: ModelCard
) -> list[dict[str, Any]]:
    """What was measured, as the Hub reads it; empty if nothing was, besides the training loss.

    The Hub wants the data set to be named: where the card names several or none, it is not known.
    """
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import eval_results_to_model_index

    results = [
        EvalResult(
            task_type=task,
            dataset_type=datasets[0] if len(datasets) == 1 else "unknown",
            dataset_name=datasets[0] if len(datasets) == 1 else "not stated",
            metric_type=metric.removeprefix("eval_") or metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in card.evaluation.metrics.items()
        if not metric.startswith("train_")
    ]
    return eval_results_to_model_index(name, results) if results else []


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {_escaped(k)} | {_escaped(v)} |" for k, v in values.items()]
    return "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows, ""]) if rows else ""


def _escaped(value: object) -> str:
    """`value` on one line, escaped for Markdown and HTML."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = html.escape(" ".join(text.split()), quote=False).replace("://", "&#58;//")
    return _MARKS.sub(r"\\\g<0>", text)


def parse_card(source: str | Path) -> ModelCard:
    """The card in a `README.md` that this library wrote.

    Args:
        source: The text of the file, or its path.

    Raises:
        MalformedError: It does not have such a card.
    """
    text = source if isinstance(source, str) else plain_text(source, MAX_README)
    own = readme_header(text).get("customized_models")
    if not isinstance(own, dict) or not {"training", "evaluation"} <= own.keys():
        raise MalformedError("the header of README.md does not have a card that this library wrote")
    fields = {field.name for field in attrs.fields(ModelCard)}
    return from_document(ModelCard, {key: own[key] for key in own.keys() & fields})
