"""The shape of the package: what it exports, what it imports, and when."""

from __future__ import annotations

import ast
import graphlib
import importlib
import json
import subprocess
import sys
from pathlib import Path

import customized_models

PACKAGE = Path(customized_models.__file__).parent
HEAVY = {
    "torch", "transformers", "peft", "huggingface_hub", "httpx", "sqlalchemy", "safetensors",
    "gguf", "numpy", "xllamacpp", "tqdm", "yaml",
}  # fmt: skip


def loaded_by(statement: str) -> set[str]:
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return {name.partition(".")[0] for name in json.loads(output)}


def test_importing_the_package_loads_no_heavy_module() -> None:
    everything = "import customized_models; from customized_models import *"
    assert loaded_by(everything) & HEAVY == set()


def test_listing_models_does_not_load_torch(tmp_path: Path) -> None:
    listing = (
        "import customized_models as c; "
        f"list(c.ModelRegistry({str(tmp_path / 'models')!r}).customized_models())"
    )
    assert loaded_by(listing) & HEAVY == {"sqlalchemy"}


def test_public_names_are_sorted_and_exist() -> None:
    names = customized_models.__all__
    assert list(names) == sorted(names)
    for name in names:
        assert getattr(customized_models, name).__module__.startswith("customized_models")


def test_every_public_name_says_what_it_is() -> None:
    undocumented = [
        n for n in customized_models.__all__ if not getattr(customized_models, n).__doc__
    ]
    assert undocumented == []


def test_modules_import_each_other_in_one_direction() -> None:
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and not name.startswith("testing"):
            graph[name] = imported_at_the_top(path) - {name, ""}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def imported_at_the_top(path: Path) -> set[str]:
    """Modules of the package that `path` imports when it is imported itself."""
    package = ".".join(("customized_models", *path.relative_to(PACKAGE).parts[:-1]))
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            origin = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join((*origin, *(node.module or "").split("."))).strip(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found = inner if is_module(inner) else module
                names.add(found.removeprefix("customized_models").lstrip("."))
    return names


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
