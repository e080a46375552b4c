"""Merging measured as whole processes, side by side: `cp -r`, PEFT in memory, and ours.

    python tests/benchmarks/merge.py --directory /scratch/merge

Makes a random Llama of 1.1 billion parameters in bfloat16 (2.2 GB) and a LoRA of rank 16 on all
its linear layers there, once. Ours hashes and fsyncs every file it writes; the others do neither.
The peak is the kernel's `ru_maxrss`, which also counts pages of mapped files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("cp", "peft", "ours")


def make_models(directory: Path) -> None:
    from customized_models.testing import tiny_llama, tiny_lora

    tiny_llama(
        directory / "base",
        tokenizer=False,
        shard_size="1GB",
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    tiny_lora(directory / "adapter", directory / "base", r=16, target_modules="all-linear")
    (directory / "checked").mkdir()
    from customized_models._adapters import copy_adapter

    copy_adapter(directory / "adapter", directory / "checked")


def merge_with_peft(directory: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    merged = PeftModel.from_pretrained(base, directory / "adapter").merge_and_unload()
    merged.save_pretrained(directory / "out", max_shard_size="1GB")


def merge_with_ours(directory: Path) -> None:
    from customized_models._adapters import Adapter
    from customized_models._checkpoints import Checkpoint
    from customized_models._merging import open_merge
    from customized_models._writer import write_checkpoint

    base = Checkpoint.open(directory / "base")
    merge = open_merge(base, Adapter.open(directory / "checked"))
    (directory / "out").mkdir()
    write_checkpoint(merge, base, directory / "out", lambda *_: None, merge.changed)
    merge.finish()


def command_for(way: str, directory: Path) -> list[str]:
    if way == "cp":
        return ["cp", "-r", str(directory / "base"), str(directory / "out")]
    return [sys.executable, __file__, "--directory", str(directory), "--only", way]


def measure(way: str, directory: Path) -> tuple[float, float, float]:
    """Seconds, seconds of CPU and megabytes of a process that does it, out of nothing."""
    shutil.rmtree(directory / "out", ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command_for(way, directory), stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{way} failed with {process.returncode}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes here
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=1, help="take the fastest of this many")
    parser.add_argument("--only", choices=("models", *WAYS[1:]), help="do this and measure nothing")
    arguments = parser.parse_args()
    if arguments.only:
        steps = {"models": make_models, "peft": merge_with_peft, "ours": merge_with_ours}
        steps[arguments.only](arguments.directory)
        return
    if not (arguments.directory / "checked").exists():
        # A child's peak starts at that of the process that forks it, so this one stays small.
        subprocess.run(command_for("models", arguments.directory), check=True)
    measure("cp", arguments.directory)  # so that all find the base in the page cache
    results = {way: [] for way in WAYS}
    for _ in range(arguments.repeat):
        for way in WAYS:
            results[way].append(measure(way, arguments.directory))
    shutil.rmtree(arguments.directory / "out")
    cp, peft = min(results["cp"]), min(results["peft"])
    print(f"{'':6}{'seconds':>9}{'of cp':>8}{'of peft':>9}{'CPU s':>8}{'peak MB':>9}{'of peft':>9}")
    for way in WAYS:
        seconds, cpu, peak = min(results[way])
        times = f"{seconds:9.2f}{seconds / cp[0]:8.2f}{seconds / peft[0]:9.2f}{cpu:8.2f}"
        print(f"{way:6}{times}{peak:9.0f}{peak / peft[2]:9.2f}")


if __name__ == "__main__":
    main()
