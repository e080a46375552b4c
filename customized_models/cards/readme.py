"""Renders a model's card as `README.md`, in the Hub's format, and reads it back.

Law: `parse_card(render_customized(model, base)) == storable_card(model.card)`, and the same for
complete models. A number that is not finite is left out of a mapping, and is None elsewhere.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import attrs

from ..errors import MalformedError, UnsafeFileError, shown
from ..files.documents import from_document, to_document
from ..files.reading import opened, read_at
from ..models import BaseModel, CompleteModel, CustomizedModel, ModelCard
from ..naming import is_hub_id

MAX_README = 4 << 20  # bytes; cards with thousands of benchmark results have about one million
MAX_DEPTH = 24  # levels of mappings and lists in a README's header

_HEADER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_MARKS = re.compile(r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])")  # within a word, _ marks nothing


def plain_text(path: Path, limit: int) -> str:
    """The text of a UTF-8 file.

    Raises:
        MalformedError: missing, or not UTF-8.
        UnsafeFileError: a link, no regular file, or more than `limit` bytes.
    """
    with opened(path, os.O_NOFOLLOW) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise UnsafeFileError(f"{path.name} has {size} bytes, more than {limit}")
        try:
            return read_at(fd, 0, size, path.name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise MalformedError(f"{path.name} is not UTF-8") from error


def readme_header(text: str) -> dict[str, Any]:
    """The mapping in a README's YAML header; empty if it has no header.

    Aliases are refused, so a header's size bounds the size of its value.

    Raises:
        MalformedError: It does not parse.
    """
    import yaml

    block = _HEADER.match(text)
    if block is None:
        return {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        bounded = _is_bounded(yaml.parse(block[1], Loader=loader))
        header = yaml.load(block[1], Loader=loader) if bounded else None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise MalformedError(f"the header of README.md is not YAML: {shown(error)}") from error
    if not bounded:
        raise MalformedError("the header of README.md has aliases, or is nested too deeply")
    if not isinstance(header, dict):
        raise MalformedError("the header of README.md is not a mapping")
    return header


def _is_bounded(events: Iterable[Any]) -> bool:
    import yaml

    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > MAX_DEPTH:
            return False
    return True


def storable_card(card: ModelCard) -> ModelCard:
    """`card` with values that JSON and YAML have: tuples become lists, and infinity and NaN go.

    Law: `storable_card(storable_card(c)) == storable_card(c)`.

    Raises:
        MalformedError: A value is not JSON, is nested too deeply, or cannot be encoded as UTF-8.
    """
    return from_document(ModelCard, _storable(attrs.asdict(card), depth=1))


def _storable(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise MalformedError(f"a card nests mappings and lists deeper than {MAX_DEPTH} levels")
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


def render_customized(model: CustomizedModel, base: BaseModel) -> str:
    """The `README.md` of a customized model, with the digests of its lineage in the header."""
    facts = {
        "name": model.name,
        "digest": model.digest,
        "base": base.name,
        "base_digest": base.digest,
        "train_name": model.train_name,
        "training_id": str(model.training_id),
    }
    return _render("adapter", facts, base, model.card)


def render_complete(model: CompleteModel, base: BaseModel) -> str:
    """The `README.md` of a complete model, with the digests of its lineage in the header."""
    facts = {
        "name": model.name,
        "digest": model.digest,
        "customized": model.customized,
        "customized_digest": model.customized_digest,
        "base": base.name,
        "base_digest": model.base_digest,
        "train_name": model.train_name,
    }
    return _render("finetune", facts, base, model.card)


def _render(relation: str, facts: dict[str, str], base: BaseModel, card: ModelCard) -> str:
    import yaml

    own = to_document(storable_card(card))
    measured = {key: value for key, value in own["evaluation"].items() if value is not None}
    header: dict[str, Any] = {"library_name": "peft" if relation == "adapter" else "transformers"}
    if is_hub_id(base.model_name):
        header |= {"base_model": base.model_name, "base_model_relation": relation}
    if base.card.license is not None:
        header["license"] = base.card.license
    if on_the_hub := [name for name in card.training.datasets if is_hub_id(name)]:
        header["datasets"] = on_the_hub
    header["tags"] = ["customized-models"]
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
    return "\n".join([f"---\n{front}---\n", title, about, *filter(None, tables)])


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
    return from_document(ModelCard, {key: own[key] for key in ("training", "evaluation")})
