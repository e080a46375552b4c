"""Time of `import customized_models` beside an empty interpreter: `python import_time.py`."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 11


def seconds(statement: str) -> float:
    """Wall time of a fresh interpreter that runs `statement`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Paired runs, medians."""
    pairs = [(seconds("pass"), seconds("import customized_models")) for _ in range(RUNS)]
    empty, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    added = statistics.median(b - a for a, b in pairs)
    print(f"empty interpreter          {empty:6.3f} s")
    print(f"import customized_models   {ours:6.3f} s  (+{added:.3f} s, median of {RUNS} pairs)")


if __name__ == "__main__":
    main()
