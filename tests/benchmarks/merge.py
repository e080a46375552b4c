"""Saving measured as whole processes, side by side: ours, `cp -r`, and PEFT in memory.

    python tests/benchmarks/merge.py --disk /scratch/merge --tmpfs /dev/shm/merge

Ours is what a user calls, `Merger(registry).save(customized).result()`, from the call to the
published model: it runs in an interpreter of its own, hashes what it reads and writes, fsyncs that,
and proves it. It is measured twice: cold, and with `Merger.warm_up()` called before, so that the
interpreter has imported torch, transformers and PEFT. The others are whole processes. On tmpfs it
is compared with `cp -r` of the base; on the disk with `cp -r` and an fsync of every file, and with
PEFT's `merge_and_unload` and `save_pretrained`, which hashes and fsyncs nothing. "Hashes" is a copy
with the SHA-256 of what is read and of what is written that a save takes, and nothing else. All
take turns, and before each there is a rest: a virtual machine may give memory that was freed back
to its host meanwhile, and whoever is first to write to it again takes longer.

The models are random and made once, on the disk; there must be room for three times the largest,
which has 6.4 GB. The peak over the imports, and where the time goes, come from a run of their own
that does the job in one process.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

REST = 1.5  # seconds; an interpreter that is warmed up has four times as many
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


def make(directory: Path) -> None:
    """The model that `directory` is named after."""
    from customized_models.testing import tiny_llama, tiny_lora

    base_options, options = MODELS[directory.name]
    if "num_local_experts" in base_options:
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        model = MixtralForCausalLM(MixtralConfig(**base_options)).to(torch.bfloat16)
        model.save_pretrained(directory / "base", max_shard_size="1GB")
    else:
        tiny_llama(directory / "base", tokenizer=False, shard_size="1GB", **base_options)
    tiny_lora(directory / "adapter", directory / "base", r=16, **options)


def register(directory: Path) -> None:
    from customized_models import ModelRegistry

    registry = ModelRegistry(directory / "registry")
    registry.add_base_model("base", directory / "base")
    registry.register(directory / "adapter", train_name="benchmark", base_model="base")


def save(directory: Path) -> None:
    from customized_models import Merger, ModelRegistry

    registry = ModelRegistry(directory / "registry")
    customized = next(iter(registry.customized_models()))
    started = time.perf_counter()
    Merger(registry).save(customized).result(progress=False)
    print(time.perf_counter() - started)


def save_warm(directory: Path) -> None:
    from customized_models import Merger, ModelRegistry

    Merger(ModelRegistry(directory / "registry")).warm_up()
    time.sleep(4 * REST)
    save(directory)


def forget(directory: Path) -> None:
    """Delete what was saved, outside of what is measured."""
    from customized_models import ModelRegistry

    registry = ModelRegistry(directory / "registry")
    for complete in registry.complete_models():
        registry.delete(complete)


def merge_with_peft(directory: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    merged = PeftModel.from_pretrained(base, directory / "adapter").merge_and_unload()
    merged.save_pretrained(directory / "out", max_shard_size="1GB")


def copy_and_hash(directory: Path) -> None:
    """A copy with a save's hashes, of what is read and of what is written, and its fsync."""
    import hashlib
    import os
    from concurrent.futures import ThreadPoolExecutor

    def hash_one(path: Path, copy: Path | None) -> None:
        sha256, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
        with path.open("rb", 0) as file, open(copy or os.devnull, "wb", 0) as output:
            while count := file.readinto(buffer):
                sha256.update(buffer[:count])
                if copy:
                    output.write(buffer[:count])
            if copy:
                os.fsync(output.fileno())

    (directory / "out").mkdir()
    files = sorted((directory / "base").iterdir(), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [pool.submit(hash_one, path, directory / "out" / path.name) for path in files]
        work += [pool.submit(hash_one, path, None) for path in files]
    for one in work:
        one.result()


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
    import hashlib
    import os
    from types import SimpleNamespace

    from customized_models import Merger, ModelRegistry, base_models, merging
    from customized_models.jobs import job, worker
    from customized_models.merging import merger, writing
    from customized_models.storage import local

    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import customized_models.jobs.worker"], check=True)
    start = time.perf_counter() - started
    started = time.perf_counter()
    merging.preload()
    imported = time.perf_counter() - started
    from customized_models.merging import execution

    split, before = Split(), memory()
    split.watch("plan", merging, "open_merge")
    split.watch("reading", execution, "read_into")
    split.watch("reading", writing, "read_into")
    split.watch_steps("kernel and reading", execution.MergeExecution, "blocks")
    split.watch("hashing and writing", writing._Output, "write")

    def watch_hash(what: str, owner: Any) -> None:
        def sha256() -> SimpleNamespace:
            one = hashlib.sha256()
            return SimpleNamespace(update=split.timed(what, one.update), hexdigest=one.hexdigest)

        owner.hashlib = SimpleNamespace(sha256=sha256)

    watch_hash("hashing the base", base_models)
    watch_hash("of which hashing", writing)
    split.watch("fsync", os, "fsync")
    split.watch("all shards", merger, "write_checkpoint")
    split.watch("proof", merger, "prove")
    split.watch("publishing", local.LocalStorage, "publish")
    job._start_worker = lambda registry, id, payload: worker.run(registry, id)
    registry = ModelRegistry(directory / "registry")
    customized = next(iter(registry.customized_models()))
    started = time.perf_counter()
    split.timed("everything but imports", Merger(registry).save)(customized).result(progress=False)
    print(f"  {'':24}{'wall s':>8}{'CPU s':>8}  (threads together)")
    print(f"  {'starting an interpreter':24}{start:8.2f}")
    print(f"  {'imports':24}{imported:8.2f}")
    for what, (wall, cpu) in split.seconds.items():
        print(f"  {what:24}{wall:8.2f}{cpu:8.2f}")
    peak = [(now - then) / 1e6 for now, then in zip(memory(), before, strict=True)]
    print(f"  peak over the imports {peak[0]:.0f} MB; at the end {peak[1]:.0f} MB without files")


def memory() -> tuple[int, int]:
    """Bytes: the most that was resident, and what is now that is no file's. Linux alone has it."""
    status = Path("/proc/self/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "RssAnon"))  # type: ignore[return-value]


# Side by side


def cold(directory: Path) -> list[str]:
    return [sys.executable, __file__, "--step", "save", "--disk", str(directory)]


def warm(directory: Path) -> list[str]:
    return [sys.executable, __file__, "--step", "save_warm", "--disk", str(directory)]


def cp(directory: Path) -> list[str]:
    return ["cp", "-r", str(directory / "base"), str(directory / "out")]


def cp_and_fsync(directory: Path) -> list[str]:
    copy = 'cp -r "$0/base" "$0/out" && sync "$0"/out/* "$0/out"'
    return ["sh", "-c", copy, str(directory)]


def hashes(directory: Path) -> list[str]:
    return [sys.executable, __file__, "--step", "copy_and_hash", "--disk", str(directory)]


def peft(directory: Path) -> list[str]:
    return [sys.executable, __file__, "--step", "merge_with_peft", "--disk", str(directory)]


def seconds(command: list[str], directory: Path) -> float:
    """What a process prints that it took, else its wall time; what it made is removed."""
    time.sleep(REST)
    started = time.perf_counter()
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    taken = float(ended.stdout or time.perf_counter() - started)
    shutil.rmtree(directory / "out", ignore_errors=True)
    forget(directory)
    subprocess.run(["sync"], check=True)
    return taken


def compare(others: Mapping[str, Callable[[Path], list[str]]], directory: Path, repeat: int) -> str:
    """Rows: the medians of ours, cold and warm, of another's, and of the ratios in each turn."""
    seconds(cp(directory), directory)  # all find the base in the page cache
    turns = [
        [seconds(command(directory), directory) for command in (cold, warm, *others.values())]
        for _ in range(repeat)
    ]
    mine = [statistics.median(turn[column] for turn in turns) for column in (0, 1)]
    rows = []
    for column, what in enumerate(others, start=2):
        theirs = statistics.median(turn[column] for turn in turns)
        ratios = [sorted(turn[own] / turn[column] for turn in turns) for own in (0, 1)]
        cells = "".join(
            f"{value:8.2f}" for value in (*mine, theirs, *map(statistics.median, ratios))
        )
        spread = ", ".join(f"{own[0]:.2f} to {own[-1]:.2f}" for own in ratios)
        rows.append(f"{'':16}{what:16}{cells}   {spread}")
    return "\n".join(rows)


def step(name: str, directory: Path) -> None:
    """Do it in a process of its own: this one stays small, and imports nothing."""
    command = [sys.executable, __file__, "--step", name, "--disk", str(directory)]
    from customized_models.jobs.workers import environment

    output = None if name == "profile" else subprocess.DEVNULL
    subprocess.run(command, check=True, stderr=output, env=environment())


def benchmark(name: str, disk: Path, tmpfs: Path, repeat: int) -> None:
    titles = ("cold s", "warm s", "it s", "cold/it", "warm/it")
    print(f"{name:32}{''.join(map('{:>8}'.format, titles))}   least and most", flush=True)
    here, there = disk / name, tmpfs / name
    if not (here / "adapter").is_dir():
        step("make", here)
    if not (here / "registry").is_dir():
        step("register", here)
    shutil.copytree(here / "base", there / "base", dirs_exist_ok=True)
    shutil.copytree(here / "adapter", there / "adapter", dirs_exist_ok=True)
    step("register", there)
    print(compare({"tmpfs, cp -r": cp, "tmpfs, hashes": hashes}, there, repeat), flush=True)
    step("profile", there)
    shutil.rmtree(there)  # its memory is needed
    others = {"disk, cp, fsync": cp_and_fsync, "disk, PEFT": peft}
    print(compare(others, here, repeat), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--disk", type=Path, required=True)
    parser.add_argument("--tmpfs", type=Path, default=Path("/dev/shm/merge-benchmark"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--step", help="do this with the model in --disk, and measure nothing")
    arguments = parser.parse_args()
    if arguments.step:
        globals()[arguments.step](arguments.disk)
        return
    for name in arguments.models:
        try:
            benchmark(name, arguments.disk, arguments.tmpfs, arguments.repeat)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().rpartition("\n")[2]
            print(f"{'':16}failed: {' '.join(error.cmd[-4:])}: {said}", flush=True)
        finally:
            shutil.rmtree(arguments.tmpfs / name, ignore_errors=True)


if __name__ == "__main__":
    main()
