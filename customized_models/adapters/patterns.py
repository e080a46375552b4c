"""Matches regular expressions from an adapter's configuration, within a bounded time.

How long an expression takes cannot be told by looking at it. So all that PEFT would match is
matched once before, in an interpreter that is ended when it takes too long.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MalformedError, UnsupportedAdapterError, shown
from .peft_types import adapter_type

SECONDS = 0.4
"""Of a processor's time for all expressions: PEFT, which matches them again, takes as much."""

_MEGABYTES = 512  # an interpreter alone has about 20
_HUNG_SECONDS = 60  # by the clock, on a machine that hardly gives any time
_MAX_PAIRS = 20_000_000  # names in a list times modules, which PEFT compares: about two seconds
_MAX_KEYS = 2_000_000  # likewise of keys that are patterns
_CACHE_SIZE = "_MAXCACHE"  # of `re`, which does not document it
_EXPRESSIONS = ("exclude_modules", "target_modules", "feedforward_modules", "layers_pattern")
_PLAIN = re.compile(r"(?:[\w.:/-]|\\[.:/-])*", re.ASCII)
"""A name, also as `re.escape` writes it: matched in no time, though a dot is any character."""


def check_patterns(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse expressions that take long to match with the names of modules.

    Args:
        config: An `adapter_config.json` whose values have the types that they must have.
        names: Of the modules that they will be matched with.

    Raises:
        MalformedError: One is no regular expression.
        UnsupportedAdapterError: They take longer than `SECONDS`, or there are too many.
    """
    target = config.get("target_modules")
    lists = sum(len(value) for value in config.values() if isinstance(value, list))
    keys = sum(option.endswith("_pattern") for option, _ in _expressions(config))
    if lists * len(names) > _MAX_PAIRS or keys * len(names) > _MAX_KEYS:
        raise UnsupportedAdapterError(
            f"the adapter's configuration names modules {lists + keys} times, which would take "
            f"PEFT long to find among {len(names)}; name them by what their names end with"
        )
    costly = [pair for pair in _expressions(config) if not _PLAIN.fullmatch(pair[1])]
    if not costly:
        return
    task = {
        "seconds": SECONDS,
        "megabytes": _MEGABYTES,
        "expressions": costly,
        "names": [*names],
        "targets": None if ("target_modules", target) in costly else _targets(target, names),
    }
    program = [sys.executable, "-I", "-S", str(Path(__file__).with_name("matching.py"))]
    try:
        ended = subprocess.run(
            program, input=json.dumps(task).encode(), capture_output=True, timeout=_HUNG_SECONDS
        )
        told, failed = ended.stdout, ended.returncode != 0
    except subprocess.TimeoutExpired as error:
        told, failed = error.stdout or b"", True
    *lines, _ = told.split(b"\n")  # the last may be cut short
    option, expression, *broken = json.loads(lines[-1]) if lines else costly[0]
    if broken:
        raise MalformedError(f"{option} has a broken pattern {shown(expression)}: {broken[0]}")
    if failed:
        raise UnsupportedAdapterError(
            f"{option} has a pattern that takes longer than {SECONDS} seconds to match with the "
            f"names of {len(names)} modules: {shown(expression)}; put the full names of the "
            f"modules in its place, as the names of the adapter's tensors have them"
        )


def _expressions(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of an option and an expression; those that say which modules are targets come first."""
    for option in _EXPRESSIONS:
        value = config.get(option)
        if isinstance(value, str):
            yield option, value
        elif isinstance(value, list) and option == "layers_pattern":
            yield from ((option, item) for item in value)
    tied = "target_modules" if config.get("ensure_weight_tying") else None
    for option in filter(None, ("modules_to_save", tied)):
        value = config.get(option)
        if isinstance(value, list):
            yield from (("modules_to_save", item) for item in value)
    for option in sorted(adapter_type(config).pattern_options):
        value = config.get(option)
        if isinstance(value, dict):
            yield from ((option, key) for key in value)


def _targets(stated: Any, names: Collection[str]) -> list[str]:
    """Those of `names` that a list of names, or of their ends, or one name means."""
    wanted = {stated} if isinstance(stated, str) else {*(stated or ())}
    if stated in (None, "all-linear"):
        return [*names]
    return [name for name in names if any(end in wanted for end in _ends(name))]


def _ends(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


@contextmanager
def many_expressions() -> Iterator[None]:
    """Let Python keep more compiled expressions than it does, where an adapter has hundreds.

    PEFT hands the keys of a pattern as text to `re` for every module; past the 512 that `re` keeps,
    each would be compiled anew each time.
    """
    kept = getattr(re, _CACHE_SIZE, None)
    if kept is None:
        yield
        return
    setattr(re, _CACHE_SIZE, _MAX_KEYS)
    try:
        yield
    finally:
        setattr(re, _CACHE_SIZE, kept)
