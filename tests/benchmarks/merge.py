"""Saving measured side by side with `cp -r`, PEFT and tinker-cookbook, in turns.

    python -m tests.benchmarks.merge --disk /scratch/merge --tmpfs /dev/shm/merge

Ours is what a user calls, `Merger(registry).save(customized).result()`, from the call to the
published model: everything that is read and written is hashed, compared, synced and proven. "Cold"
is the first job of a process, which waits for the imports; "warm" is its second. On the disk it is
compared with `cp -r` and an fsync of every file, with PEFT's `merge_and_unload` and
`save_pretrained`, and with tinker-cookbook's `build_hf_model` where that is installed, as whole
processes; none of these hashes or syncs anything. On tmpfs it is compared with `cp -r` alone. All
take turns, so that a machine that is busy is so for all, and rest before: a virtual machine may
give memory that was freed back to its host, and whoever writes to it next takes longer.

The models are random and made once, on the disk; there must be room for three times the largest,
which has 6.4 GB. Where the time goes comes from a save within one process.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REST = 1.5  # seconds
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LLAMA_1B = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_3B = {
    "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "tied": True,
}  # fmt: skip
MIXTRAL = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "num_local_experts": 8,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "1b-all-linear": (LLAMA_1B, {"target_modules": "all-linear"}),
    "1b-attention": (LLAMA_1B, {"target_modules": ATTENTION}),
    "3b-all-linear": (LLAMA_3B, {"target_modules": "all-linear"}),
    "mixtral-experts": (MIXTRAL, {"target_modules": [], "target_parameters": EXPERTS}),
}
BARS = {
    "1b-all-linear": {"disk, cp": 1.5, "disk, PEFT": 1 / 6.5, "tmpfs, cp": 2.5},
    "1b-attention": {"disk, cp": 1.3, "disk, PEFT": 1 / 4, "tmpfs, cp": 2.5},
    "3b-all-linear": {"disk, cp": 1.25, "disk, PEFT": 1 / 6, "tmpfs, cp": 2.5},
    "mixtral-experts": {"disk, cp": 2.0, "disk, PEFT": 1 / 4, "tmpfs, cp": 2.5},
}
"""What a warm save may take, as a share of another's time."""

ADAPTERS = 10
"""Of the fleet on one base."""


# Steps, each a process of its own


def make(directory: Path) -> None:
    """The model that `directory` is named after, and its adapter."""
    from customized_models.testing import tiny_llama, tiny_lora, tiny_tokenizer

    base_options, options = MODELS[directory.name]
    if "num_local_experts" in base_options:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        model = MixtralForCausalLM(MixtralConfig(**base_options)).to(torch.bfloat16)
        model.save_pretrained(directory / "base", max_shard_size="1GB")
    else:
        tiny_llama(directory / "base", tokenizer=False, shard_size="1GB", **base_options)
    tiny_tokenizer().save_pretrained(directory / "base")
    tiny_lora(directory / "adapter", directory / "base", r=16, **options)


def register(directory: Path) -> None:
    """Prints how long adding the base took, and how many bytes it has."""
    from customized_models import ModelRegistry

    registry = ModelRegistry(directory / "registry")
    started = time.perf_counter()
    registry.add_base_model("base", directory / "base")
    taken = time.perf_counter() - started
    size = sum(path.stat().st_size for path in (directory / "base").iterdir())
    print(f"adding the base: {taken:.2f} s, {size / taken / 1e9:.2f} GB/s")
    registry.register(directory / "adapter", train_name="benchmark", base_model="base")


def save(directory: Path) -> None:
    """Prints the seconds of two saves, cold and warm."""
    from customized_models import Merger, ModelRegistry

    registry = ModelRegistry(directory / "registry")
    customized = next(iter(registry.customized_models()))
    for _ in range(2):
        started = time.perf_counter()
        complete = Merger(registry).save(customized).result(progress=False)
        print(time.perf_counter() - started)
        registry.delete(complete)
        settle()


def fleet(directory: Path) -> None:
    """Prints what a save takes of each of some adapters of one base, one after another."""
    from customized_models import Merger, ModelRegistry
    from customized_models.testing import tiny_lora

    registry = ModelRegistry(directory / "registry")
    known = list(registry.customized_models())
    for number in range(len(known), ADAPTERS):
        adapter = directory / f"adapter-{number}"
        tiny_lora(adapter, directory / "base", r=16, **MODELS[directory.name][1])
        known.append(registry.register(adapter, train_name=f"fleet{number}", base_model="base"))
        shutil.rmtree(adapter)
    merger = Merger(registry)
    registry.delete(merger.save(known[0]).result(progress=False))
    size = sum(path.stat().st_size for path in (directory / "base").iterdir())
    seconds = []
    for customized in known[:ADAPTERS]:
        settle()
        started = time.perf_counter()
        complete = merger.save(customized).result(progress=False)
        seconds.append(time.perf_counter() - started)
        registry.delete(complete)
    print(
        f"a fleet of {ADAPTERS}: {statistics.median(seconds):.2f} s an adapter "
        f"({min(seconds):.2f} to {max(seconds):.2f}), {size / 1e9:.2f} GB of the base read for each"
    )


def tiny_twice(directory: Path) -> None:
    """Prints the seconds of a first and a second save of a tiny model, as in the quickstart."""
    from customized_models import Merger, ModelRegistry
    from customized_models.testing import tiny_llama, tiny_lora

    registry = ModelRegistry(directory / "registry")
    base = tiny_llama(directory / "base")
    registry.add_base_model("tiny", base)
    customized = registry.register(tiny_lora(directory / "adapter", base), train_name="quick")
    for _ in range(2):
        started = time.perf_counter()
        Merger(registry).save(customized).result(progress=False)
        print(time.perf_counter() - started)


def merge_with_peft(directory: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    merged = PeftModel.from_pretrained(base, directory / "adapter").merge_and_unload()
    merged.save_pretrained(directory / "out", max_shard_size="1GB")


def merge_with_tinker(directory: Path) -> None:
    from tinker_cookbook.weights import build_hf_model

    build_hf_model(
        base_model=str(directory / "base"),
        adapter_path=str(directory / "adapter"),
        output_path=str(directory / "out"),
    )


def settle() -> None:
    """Let nothing that was written or freed be left for whoever is measured next."""
    subprocess.run(["sync"], check=True)
    time.sleep(REST)


# Where the time goes


class Split:
    """Wall and CPU seconds by what was done; several threads may add to one."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def timed(self, what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return work(*arguments, **named)
            finally:
                self.seconds[what][0] += time.perf_counter() - wall
                self.seconds[what][1] += time.thread_time() - cpu

        return run

    def watch(self, what: str, owner: Any, name: str) -> None:
        setattr(owner, name, self.timed(what, getattr(owner, name)))

    def watch_steps(self, what: str, owner: Any, name: str) -> None:
        """Of a method that returns an iterator."""
        method = getattr(owner, name)

        def steps(*arguments: Any) -> Iterator[Any]:
            end = object()
            step = self.timed(what, next)
            iterator = self.timed(what, method)(*arguments)
            while (item := step(iterator, end)) is not end:
                yield item

        setattr(owner, name, steps)


def profile(directory: Path) -> None:
    """A save within this process, and what each part of it took."""
    import pickle
    from types import SimpleNamespace

    from customized_models import Merger, ModelRegistry, merging, shelf
    from customized_models.files import checking, streams
    from customized_models.jobs import queue, worker
    from customized_models.jobs.isolated import run_isolated
    from customized_models.merging import merger

    run_isolated(os.getpid)
    started = time.perf_counter()
    run_isolated(os.getpid)
    start = time.perf_counter() - started
    started = time.perf_counter()
    merging.preload()
    imported = time.perf_counter() - started
    from customized_models import sources
    from customized_models.merging.execution import MergeExecution
    from customized_models.merging.strategies.rows import LoraFactors

    split, before = Split(), memory()
    split.watch("plan", sources, "open_merge")
    split.watch("all shards", merger, "write_checkpoint")
    split.watch("  read and hash", streams.FileReader, "read_into")
    split.watch("  copy: read and hash", streams.FileReader, "copy_to")
    split.watch_steps("  blocks: read, hash, sum", MergeExecution, "blocks")
    split.watch("    of which products", LoraFactors, "product")
    split.watch("  hand over to the writer", streams.FileWriter, "write")
    split.watch("  wait for the writer", streams.FileWriter, "finish")
    split.watch("proof", merger, "prove")
    split.watch("rest of the base", checking.FileCheck, "finish")
    split.watch("publishing", shelf.Shelf, "publish")

    def run_here(function: str, arguments: bytes, output: Any) -> Any:
        worker.run(None, *pickle.loads(arguments))  # type: ignore[arg-type]
        return SimpleNamespace(has_ended=False)

    queue.start_worker = run_here
    registry = ModelRegistry(directory / "registry")
    customized = next(iter(registry.customized_models()))
    job = split.timed("all but start", Merger(registry).save)(customized)
    registry.delete(job.result(progress=False))
    print(f"  {'':28}{'wall s':>8}{'CPU s':>8}  (threads together)")
    print(f"  {'starting a worker':28}{start:8.2f}")
    print(f"  {'imports':28}{imported:8.2f}")
    for what, (wall, cpu) in split.seconds.items():
        print(f"  {what:28}{wall:8.2f}{cpu:8.2f}")
    peak = [(now - then) / 1e6 for now, then in zip(memory(), before, strict=True)]
    print(f"  peak over the imports {peak[0]:.0f} MB; at the end {peak[1]:.0f} MB without files")


def memory() -> tuple[int, int]:
    """Bytes: the most that was resident, and what is now that is no file's. Linux alone has it."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    hwm, anonymous = (int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))
    return hwm, anonymous


# Side by side


def step(name: str, directory: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "tests.benchmarks.merge",
        "--step",
        name,
        "--disk",
        str(directory),
    ]


def cp(directory: Path) -> list[str]:
    return ["cp", "-r", str(directory / "base"), str(directory / "out")]


def cp_and_fsync(directory: Path) -> list[str]:
    copy = 'cp -r "$0/base" "$0/out" && sync "$0"/out/* "$0/out"'
    return ["sh", "-c", copy, str(directory)]


OTHERS: dict[str, Callable[[Path], list[str]]] = {
    "disk, cp": cp_and_fsync,
    "disk, PEFT": lambda directory: step("merge_with_peft", directory),
}
if importlib.util.find_spec("tinker_cookbook"):
    OTHERS["disk, tinker"] = lambda directory: step("merge_with_tinker", directory)


def run(command: list[str]) -> list[str]:
    """The lines that a process prints."""
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return ended.stdout.splitlines()


def seconds(command: list[str], directory: Path) -> float:
    """The wall time of a process; what it made is removed."""
    settle()
    started = time.perf_counter()
    run(command)
    taken = time.perf_counter() - started
    shutil.rmtree(directory / "out", ignore_errors=True)
    return taken


def compare(
    name: str, directory: Path, others: dict[str, Callable[[Path], list[str]]], repeat: int
) -> None:
    """Print medians of ours, cold and warm, of others, and of the ratios in each turn."""
    seconds(cp(directory), directory)  # all find the base in the page cache
    ours, theirs = list[list[float]](), defaultdict[str, list[float]](list)
    for _ in range(repeat):
        ours.append([float(line) for line in run(step("save", directory))])
        for what, command in others.items():
            theirs[what].append(seconds(command(directory), directory))
    cold, warm = (statistics.median(column) for column in zip(*ours, strict=True))
    for what, taken in theirs.items():
        ratios = sorted(mine[1] / other for mine, other in zip(ours, taken, strict=True))
        ratio, bar = statistics.median(ratios), BARS[name].get(what)
        verdict = (
            "" if bar is None else f"  at most {bar:.2f}: {'ok' if ratio <= bar else 'MISSED'}"
        )
        cells = "".join(f"{value:8.2f}" for value in (cold, warm, statistics.median(taken), ratio))
        print(f"  {what:14}{cells}   {ratios[0]:.2f} to {ratios[-1]:.2f}{verdict}", flush=True)


def benchmark(name: str, disk: Path, tmpfs: Path, repeat: int) -> None:
    here, there = disk / name, tmpfs / name
    print(f"\n{name} (load {os.getloadavg()[0]:.1f})", flush=True)
    if not (here / "adapter").is_dir():
        run(step("make", here))
    shutil.rmtree(here / "registry", ignore_errors=True)
    print(f"  disk: {run(step('register', here))[0]}")
    print(f"  {'':14}{''.join(map('{:>8}'.format, ('cold', 'warm', 'it', 'ratio')))}   spread")
    compare(name, here, OTHERS, repeat)
    shutil.copytree(here / "base", there / "base", dirs_exist_ok=True)
    shutil.copytree(here / "adapter", there / "adapter", dirs_exist_ok=True)
    try:
        run(step("register", there))
        compare(name, there, {"tmpfs, cp": cp}, repeat)
        print("\n".join(run(step("profile", there))), flush=True)
    finally:
        shutil.rmtree(there)  # its memory is needed
    if name == "1b-all-linear":
        print(f"  {run(step('fleet', here))[0]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--disk", type=Path, required=True)
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm/merge-benchmark"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--step", help="do this with the model in --disk, and measure nothing")
    arguments = parser.parse_args()
    if arguments.step:
        globals()[arguments.step](arguments.disk)
        return
    quick = arguments.disk / "tiny"
    shutil.rmtree(quick, ignore_errors=True)
    first, second = map(float, run(step("tiny_twice", quick)))
    print(f"a tiny model: first save {first:.2f} s, second {second:.2f} s (at most 1)")
    for name in arguments.models:
        try:
            benchmark(name, arguments.disk, arguments.tmpfs, arguments.repeat)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().rpartition("\n")[2]
            print(f"  failed: {' '.join(error.cmd[-4:])}: {said}", flush=True)


if __name__ == "__main__":
    main()
