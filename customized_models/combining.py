"""The files beside the weights of a merged model: the base's, and in their place the adapter's.

Three things are each taken whole from one side, because their files belong together: the tokenizer,
the processor and the chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files.model_directory import Role, carried_files, files_of, role_of
from .files.paths import may_state_paths, without_paths
from .files.reading import json_object
from .files.safetensors import Checkpoint

_TOKENIZER = {Role.VOCABULARY, Role.TOKENIZER}
_TEMPLATE = "chat_template"  # the key of it in JSON files
_TEMPLATE_FILE, _FOLDER = "chat_template.jinja", "additional_chat_templates"
_TEMPLATE_KEYS = ("chat_template.json", "tokenizer_config.json", "processor_config.json")
"""Where templates were kept before they had files of their own."""


def combined_files(
    base: Checkpoint, adapter: Path, config: Mapping[str, Any], scratch: Path
) -> dict[str, Path]:
    """Everything that a merged model has beside its weights, by its path in the directory.

    The adapter's tokenizer counts if it has a vocabulary, its processor if it has a file of one,
    and its chat templates if it has any, wherever it keeps them; else the base's do. Configurations
    state no path of the host that wrote them.

    Args:
        base: What was merged into.
        adapter: The adapter's directory.
        config: Values of `config.json` in place of the base's; None removes one.
        scratch: An empty directory, for files that neither has as they must be.

    Raises:
        MalformedError: A JSON file does not parse.
    """
    files = carried_files(base.directory, base.shards)
    own = files_of(adapter, Role.PROCESSOR)
    templates = _templates(own | files_of(adapter, Role.TOKENIZER, Role.CHAT_TEMPLATE), scratch)
    own |= templates
    if files_of(adapter, Role.VOCABULARY):
        own |= files_of(adapter, *_TOKENIZER, Role.CODE)
        if not templates and not any(role_of(name) is Role.CHAT_TEMPLATE for name in files):
            # The base's are in the settings of its tokenizer, which give way.
            own |= _templates({n: p for n, p in files.items() if role_of(n) in _TOKENIZER}, scratch)
    replaced = {role_of(name) for name in own} - {Role.CODE}
    replaced |= _TOKENIZER if replaced & _TOKENIZER else set()
    files = {name: path for name, path in files.items() if role_of(name) not in replaced} | own
    changes = {"config.json": dict(config)}
    if templates and "processor_config.json" in files:
        changes["processor_config.json"] = {_TEMPLATE: None}  # it would count for more than a file
    for name in filter(may_state_paths, [*files]):
        document, values = json_object(files[name]), changes.get(name, {})
        changed = without_paths(document | values)
        changed = {key: value for key, value in changed.items() if values.get(key, 0) is not None}
        if changed != document:
            files[name] = _written(scratch / name, json.dumps(changed, indent=2, sort_keys=True))
    return files


def completed_files(base: Checkpoint, checkpoint: Path, scratch: Path) -> dict[str, Path]:
    """The files of a full model beside its weights, and from its base what it lacks.

    As in `combined_files`, but configurations are the full model's own.
    """
    own = files_of(checkpoint, Role.CONFIG, Role.CODE, Role.UNKNOWN)
    return combined_files(base, checkpoint, {}, scratch) | own


def _templates(files: Mapping[str, Path], scratch: Path) -> dict[str, Path]:
    """The chat templates among an adapter's files, as files of their own.

    Source: `transformers/tokenization_utils_base.py` and `processing_utils.py`, which prefer them.
    """
    found = {name: path for name, path in files.items() if role_of(name) is Role.CHAT_TEMPLATE}
    if any(name.endswith(".jinja") for name in found):
        return {name: path for name, path in found.items() if name.endswith(".jinja")}
    for name in _TEMPLATE_KEYS:
        stated = json_object(files[name]).get(_TEMPLATE) if name in files else None
        if texts := _by_name(stated):
            return {
                file: _written(scratch / file, text)
                for file, text in sorted((_file_of(name), text) for name, text in texts.items())
            }
    return found


def _by_name(stated: Any) -> dict[str, str]:
    """Templates as JSON files have them: one text, or a list of names and texts."""
    if isinstance(stated, str):
        return {"default": stated}
    pairs = stated if isinstance(stated, list) else []
    named = [(p.get("name"), p.get("template")) for p in pairs if isinstance(p, dict)]
    return {
        n: t for n, t in named if isinstance(n, str) and n.isidentifier() and isinstance(t, str)
    }


def _file_of(name: str) -> str:
    return _TEMPLATE_FILE if name == "default" else f"{_FOLDER}/{name}.jinja"


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
