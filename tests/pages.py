"""Runs the Python of a Markdown page as its reader would: block by block, in an empty directory.

A ```text block after a ```python block says what that prints, or the last line of its traceback.
In it `...` stands for anything, and a run of spaces or line breaks for any other.
"""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_FENCE = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

_RUN = """
import contextlib, io, json, sys, traceback
sys.path.insert(0, "")  # as for whoever types it in
page, names, outputs = json.load(sys.stdin), {"__name__": "__main__"}, []
for number, (line, block) in enumerate(page["blocks"]):
    printed = io.StringIO()
    failed = None
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile("\\n" * line + block, page["name"], "exec"), names)
        except Exception as error:
            printed.write(traceback.format_exception_only(error)[-1])
            failed = traceback.format_exc()
    outputs.append((printed.getvalue(), failed))
    if failed and number not in page["may_fail"]:
        break
json.dump(outputs, sys.stdout)
"""


def blocks_of(text: str) -> list[tuple[int, str, str | None]]:
    """Each Python block of a page: the line it begins on, its code, and what it prints if said."""
    found: list[tuple[int, str, str | None]] = []
    for fence in _FENCE.finditer(text):
        if fence[1] == "python":
            found.append((text[: fence.start(2)].count("\n"), fence[2], None))
        elif found:
            found[-1] = (*found[-1][:2], fence[2])
    return found


def run_page(
    page: Path,
    directory: Path,
    environment: Mapping[str, str],
    replaced: Mapping[str, str] | None = None,
) -> None:
    """Run a page in the empty `directory`; an AssertionError says which block did otherwise.

    Args:
        page: The Markdown file.
        directory: Where the code runs.
        environment: Its variables.
        replaced: What a text on the page is replaced by first, such as a port.
    """
    text = page.read_text()
    for old, new in (replaced or {}).items():
        text = text.replace(old, new)
    blocks = blocks_of(text)
    asked = {
        "name": str(page),
        "blocks": [(line, code) for line, code, _ in blocks],
        "may_fail": [n for n, (_, _, expected) in enumerate(blocks) if expected is not None],
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        cwd=directory,
        env=dict(environment),
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    checker = doctest.OutputChecker()
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    outputs = json.loads(done.stdout)
    for (line, code, expected), (printed, failed) in zip(blocks, outputs, strict=False):
        where = f"{page.name}, line {line + 1}"
        assert expected is not None or failed is None, f"{where}:\n{failed}{done.stderr}"
        if expected is not None:
            example = doctest.Example(code, expected)
            same = checker.check_output(expected, printed, options)
            difference = "" if same else checker.output_difference(example, printed, options)
            assert same, f"{where}: {difference}{failed or ''}"
    assert len(outputs) == len(blocks)
