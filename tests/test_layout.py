"""The shape of the package: what it exports, what it imports, and when."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from attrs import frozen

import customized_models

PACKAGE = Path(customized_models.__file__).parent
HEAVY = {
    "torch", "transformers", "peft", "huggingface_hub", "httpx", "sqlalchemy", "safetensors",
    "gguf", "numba", "numpy", "psycopg", "xllamacpp", "tqdm", "yaml", "fsspec", "s3fs", "botocore",
}  # fmt: skip
THEIRS = {
    "_exit",  # os
    "_parameters", "_modules", "_buffers",  # torch.nn.Module
    "_weight_conversions", "_keys_to_ignore_on_save", "_model_mapping", "_get_dtype_plan",
    "_from_config",
}  # fmt: skip
"""Private names of other packages that are used here."""


def loaded_by(statement: str) -> set[str]:
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    return {name.partition(".")[0] for name in json.loads(output)}


def test_importing_the_package_loads_no_heavy_module() -> None:
    everything = "import customized_models; from customized_models import *"
    assert loaded_by(everything) & HEAVY == set()


def test_the_package_can_be_imported_where_there_is_no_fork_and_no_fcntl() -> None:
    """As on Windows; a registry says there that it does not work."""
    without = (
        "import os, psutil; "
        "sys.modules.update(dict.fromkeys(['fcntl', 'resource', 'grp', 'pwd', 'termios'])); "
        "del os.fork, os.register_at_fork, os.O_NOFOLLOW; "
        "import customized_models as c; import customized_models.importing; "
        "from customized_models import *"
    )
    assert "customized_models" in loaded_by(without)


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


def test_the_version_is_that_of_the_package() -> None:
    assert customized_models.__version__ == version("customized-models")
    with pytest.raises(AttributeError, match="no_such_name"):
        customized_models.no_such_name  # noqa: B018


def test_every_public_name_says_what_it_is() -> None:
    undocumented = [
        n for n in customized_models.__all__ if not getattr(customized_models, n).__doc__
    ]
    assert undocumented == []


# Rooms


@frozen
class Import:
    """An import of a module of the package, by a module of the package.

    `inside`: the function that it stands in, or ""; `typing`: under `if TYPE_CHECKING`.
    """

    importer: str
    imported: str
    inside: str
    typing: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports_of(name: str) -> Iterator[Import]:
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, inside: str, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.level:
                origin = package.split(".")[: len(package.split(".")) - child.level + 1]
                module = ".".join((*origin, *filter(None, [child.module])))
                for alias in child.names:
                    inner = f"{module}.{alias.name}"
                    yield Import(name, inner if inner in MODULES else module, inside, typing)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from visit(child, child.name if function else inside, typing or checked)

    return visit(ast.parse(path.read_text()), "", False)


IMPORTS = [one for name in MODULES for one in imports_of(name) if one.importer != one.imported]


def test_modules_import_each_other_in_one_direction() -> None:
    """Counted with imports inside functions and under TYPE_CHECKING."""
    graph: dict[str, set[str]] = {name: set() for name in MODULES if name != "customized_models"}
    for one in IMPORTS:
        if one.importer in graph:
            graph[one.importer].add(one.imported)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def heavy_modules() -> set[str]:
    """Those of the package that import a heavy one at their top, or a module that does."""
    heavy = set()
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                named = [str(node.module)]
            if {module.partition(".")[0] for module in named} & HEAVY:
                heavy.add(name)
    while True:
        more = {
            i.importer for i in IMPORTS if not i.inside and not i.typing and i.imported in heavy
        }
        if more <= heavy:
            return heavy
        heavy |= more


def test_an_import_inside_a_function_keeps_something_heavy_out_of_the_package() -> None:
    heavy = heavy_modules()
    assert "customized_models" not in heavy
    needless = {i for i in IMPORTS if i.inside and i.imported not in heavy}
    assert needless == set()


def test_no_module_uses_what_is_private_to_another() -> None:
    """A private name is used on `self` and `cls`, or within the module that has it."""
    reached = []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if hasattr(node, "name") and node.name}
        own |= {node.attr for node in ast.walk(tree) if _is_own(node)}
        own |= {n.target.id for n in ast.walk(tree) if _is_field(n)}
        reached += [
            f"{name}:{node.lineno} {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and re.fullmatch("_[a-z]+[a-z_]*", node.attr)
            and node.attr not in own | THEIRS
        ]
    assert reached == []


def _is_own(node: ast.AST) -> bool:
    owner = node.value if isinstance(node, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls")


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
