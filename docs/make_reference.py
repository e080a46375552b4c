"""Writes docs/reference.md from the docstrings of the public names."""

from __future__ import annotations

import enum
import importlib
import inspect
from pathlib import Path

from customized_models.gguf.family import registered

MODULES = (
    "customized_models",
    "customized_models.training",
    "customized_models.backends",
    "customized_models.backends.ollama",
    "customized_models.backends.llama_cpp",
    "customized_models.testing",
)


def reference() -> str:
    """The whole page."""
    parts = ["# Reference", "Generated from the docstrings by `docs/make_reference.py`."]
    for name in MODULES:
        module = importlib.import_module(name)
        parts += [f"## `{name}`", inspect.getdoc(module) or ""]
        for public in module.__all__:
            parts += entry(public, getattr(module, public))
    parts += architectures()
    return "\n\n".join(part for part in parts if part) + "\n"


def architectures() -> list[str]:
    """The table of what becomes a GGUF file, from the families that are registered."""
    families = registered()
    rows = [f"| `{name}` | `{families[name].architecture}` |" for name in sorted(families)]
    table = "\n".join(
        ["| class in `config.json` | architecture in llama.cpp |", "|---|---|", *rows]
    )
    return ["## Architectures that become GGUF files", table]


def entry(name: str, item: object) -> list[str]:
    """A heading, the docstring, and for a class its public methods."""
    parts = [f"### `{name}{signature(item)}`", inspect.getdoc(item) or ""]
    if inspect.isclass(item):
        for method, value in vars(item).items():
            if not method.startswith("_") and (doc := inspect.getdoc(value)):
                parts += [f"#### `{name}.{method}{signature(value)}`", doc]
    return parts


def signature(item: object) -> str:
    """The call signature as it is written, or nothing for what is not called."""
    if isinstance(item, classmethod | staticmethod):
        item = item.__func__
    if not callable(item) or (inspect.isclass(item) and issubclass(item, Exception | enum.Enum)):
        return ""
    try:
        return str(inspect.signature(item)).replace("'", "")
    except ValueError:
        return ""


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(reference())
