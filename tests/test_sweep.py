"""The sweep over all classes of models tells what became of one, and goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def sweep(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.sweep", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_class_is_tried_once_and_shown_in_the_table(tmp_path: Path) -> None:
    log, page = tmp_path / "log.jsonl", tmp_path / "page.md"
    before = {
        "kind": "causal", "model_type": "arcee", "model": "ArceeForCausalLM", "sort": "DoRA",
        "result": "refused", "reason": "for a test",
    }  # fmt: skip
    log.write_text(json.dumps(before) + "\n")

    sweep("--kind", "causal", "--only", "arcee", "--sort", "LoRA", "DoRA", "--log", log)
    sweep("--log", log, "--table", page)

    assert len(log.read_text().splitlines()) == 2
    assert "| `ArceeForCausalLM` | `arcee` | exact | refused |  |" in page.read_text()
    assert "| `ArceeForCausalLM` | DoRA | for a test |" in page.read_text()
