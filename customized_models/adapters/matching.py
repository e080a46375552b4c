"""Matches the expressions of an adapter's configuration with names, as PEFT would: a program.

`patterns.py` runs it as a file, in an interpreter of its own that ends when it has computed for too
long. So it imports nothing but the standard library.

Before each expression it prints the expression's option and the expression, as a line of JSON: so
whoever waits knows which one was too much. One that does not compile is printed with the reason.

Source: `check_target_module_exists` in `peft/tuners/tuners_utils.py`, `get_pattern_key` in
`peft/utils/other.py`, and the places in `peft/tuners/*/model.py` that look into a `*_pattern`.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import sys
from collections.abc import Iterable

_FORMS = {
    "target_modules": ("fullmatch", "{}"),
    "exclude_modules": ("fullmatch", "{}"),
    "feedforward_modules": ("fullmatch", "{}"),
    "modules_to_save": ("match", r"(^|.*\.){}($|\..*)"),
    "layers_pattern": ("match", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."),
}
"""The function that PEFT calls, and what it makes of an option's expressions before."""

_KEY_FORMS = (("match", r"(.*\.)?({})$"), ("match", r".*\.{}$"), ("search", "{}"))
"""Likewise of the keys of an option that ends in `_pattern`: each for some adapter types."""


def run(
    seconds: float,
    megabytes: int,
    expressions: Iterable[tuple[str, str]],
    names: list[str],
    targets: list[str] | None,
) -> None:
    """Match each expression with all names; keys of patterns only with those of targets.

    Args:
        seconds: Of a processor's time, after which a signal ends the process.
        megabytes: Of memory.
        expressions: Pairs of an option and an expression.
        names: Of modules.
        targets: Those that the adapter targets; None if `target_modules` is an expression.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    if sys.platform == "linux":  # elsewhere the limit is not kept, or not even taken
        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    for option, expression in expressions:
        print(json.dumps([option, expression]), flush=True)
        known = option in _FORMS
        for function, form in (_FORMS[option],) if known else _KEY_FORMS:
            try:
                compiled = re.compile(form.replace("{}", expression))
            except (re.error, RecursionError, OverflowError) as error:
                print(json.dumps([option, expression, str(error)]), flush=True)
                return
            match = getattr(compiled, function)
            found = [name for name in (names if known else targets or ()) if match(name)]
            if option == "target_modules":
                targets = found


if __name__ == "__main__":
    run(**json.load(sys.stdin))
