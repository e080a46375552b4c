"""Code that came with a model: transformers runs it where it is told to trust it.

Nothing is run here. A model whose files name code is kept with all of it, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import MalformedError, UnsupportedBaseError, listed
from .model_directory import Role, role_of
from .reading import content, json_object

_KEY = "auto_map"
_MAX_CODE = 16 << 20  # bytes of a file; the largest on the Hub have a few hundred thousand
_NAMING = (Role.CONFIG, Role.TOKENIZER, Role.PROCESSOR)
_RELATIVE_IMPORT = re.compile(r"^[ \t]*from[ \t]+\.(\w[\w.]*)[ \t]+import", re.MULTILINE)


def check_remote_code(files: Mapping[str, Path], *, trusted: bool) -> None:
    """Check that code which a model's files name may be kept, and is there.

    Names of code that was not downloaded at all are left as they are: transformers loads such
    models by its own classes.

    Args:
        files: Of the model's directory, by their path in it.
        trusted: Whether the user allows the model's code by `trust_remote_code`.

    Raises:
        UnsupportedBaseError: The model has code of its own, and is not trusted.
        MalformedError: Some of it is missing, or a file that names it does not parse.
    """
    named = {f"{module}.py" for module in _named_modules(files)}
    here = named & files.keys()
    if here and not trusted:
        raise UnsupportedBaseError(
            f"the model has code of its own ({listed(here)}), which transformers runs with "
            f"trust_remote_code=True: allow it with add_base_model(..., trust_remote_code=True) "
            f"once you have read it, or add a copy without {_KEY} in its JSON files and without "
            f"the code, if transformers knows the model itself"
        )
    if here and (missing := _imported(named, files) - files.keys()):
        raise MalformedError(
            f"the model's own code is not all there: {listed(missing)} missing; download it again"
        )


def _named_modules(files: Mapping[str, Path]) -> set[str]:
    """The modules in the model's own directory that its JSON files name."""
    found = set()
    for name, path in files.items():
        if role_of(name) in _NAMING and name.endswith(".json"):
            for reference in _references(json_object(path).get(_KEY)):
                if "--" not in reference:  # else it is of another repository
                    found.add(reference.rpartition(".")[0].replace(".", "/"))
    return found - {""}


def _references(auto_map: Any) -> Iterator[str]:
    """What an `auto_map` names: texts, or lists of a slow and a fast tokenizer's."""
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield text


def _imported(modules: set[str], files: Mapping[str, Path]) -> set[str]:
    """Files of code, and those that they import from beside them, as transformers looks for them.

    Source: `transformers/dynamic_module_utils.py`, `get_relative_imports`.
    """
    found, new = set(modules), set(modules)
    while new:
        name = new.pop()
        if name not in files:
            continue
        text = content(files[name].resolve(), _MAX_CODE).decode("utf-8", "replace")
        below = name.rpartition("/")[0]
        for module in _RELATIVE_IMPORT.findall(text):
            other = f"{below}/{module.replace('.', '/')}.py".removeprefix("/")
            if other not in found:
                found.add(other)
                new.add(other)
    return found
