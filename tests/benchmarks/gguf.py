"""From base and adapter to a quantized GGUF file, measured as whole processes: one pass, and three.

    python tests/benchmarks/gguf.py --disk /scratch/gguf [--scale 1b --scale 3b] [--mode q4_K_M]

Ours reads the base once, merges it on the way and writes the small file. What people do otherwise
is PEFT's `merge_and_unload` and `save_pretrained`, upstream's converter and `llama-quantize`: three
full copies of the model. Each is a process of its own, imports included; all take turns. Peak
memory is the largest of the processes that a way takes; for ours also without what the imports
take. "Kernel" is the quantizing of random rows alone, in one thread, against ggml's.

The models are random and made once, on the disk, where there must be room for four times the
largest (6.4 GB). The default is a small one, to see that all of it runs. Upstream's programs are
those that `tests/servers/build_llama_cpp.py` builds.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])  # beside this file it would be the package gguf

SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    },
    "1b": {
        "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    },
    "3b": {
        "vocab_size": 128_256, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "tied": True,
    },
}  # fmt: skip
MODES = ("no_quantization", "q8_0", "q4_K_M", "q4_K_S")


def make(directory: Path) -> None:
    """Base and adapter of the scale that `directory` is named after."""
    from customized_models.testing import tiny_llama, tiny_lora
    from tests.gguf.models import llama_sentencepiece

    shape = SHAPES[directory.name]
    base = directory / "base"
    tiny_llama(base, tokenizer=False, shard_size="1GB", **shape)
    tiny_lora(directory / "adapter", base, r=16, target_modules="all-linear")
    llama_sentencepiece(base)


def ours(directory: Path, mode: str) -> None:
    """One pass; prints the peak of memory after the imports, which are taken first."""
    from customized_models import gguf
    from customized_models.adapters.intake import Adapter
    from customized_models.files.safetensors import Checkpoint, ModelSource
    from customized_models.merging import open_merge

    base = directory / "base"
    if mode == "imports":
        import numba  # noqa: F401
        import peft  # noqa: F401

        return
    files = {path.name: path for path in base.iterdir() if ".safetensors" not in path.name}
    merge = open_merge(Checkpoint.open(base), Adapter.open(directory / "adapter"))
    plan = gguf.plan(ModelSource(files, merge), mode, name="benchmark", chat_template=True)
    plan.write(directory / "ours.gguf", lambda phase, done, total: None)
    merge.finish()


def peft(directory: Path) -> None:
    """What PEFT's documentation says: merge in memory, save."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    merged = PeftModel.from_pretrained(model, directory / "adapter").merge_and_unload()
    merged.save_pretrained(directory / "merged model", max_shard_size="1GB")  # as the base
    for path in (directory / "base").glob("tokenizer*"):
        shutil.copy(path, directory / "merged model")


def kernels(directory: Path) -> None:
    """Millions of weights a second for each type, ours and ggml's; `directory` is not needed."""
    import torch

    from customized_models.gguf.format import Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0
    from customized_models.gguf.kernels.compiled import Compiled
    from customized_models.gguf.kernels.ggml import Ggml

    both = {"ggml": Ggml(), "ours": Compiled()}
    print(f"{'type':6} {'ggml':>8} {'ours':>8}  ratio   blocks compared, different")
    for type_ in (Q4_K, Q5_K, Q6_K, Q8_0, Q5_0, Q5_1):
        rows = torch.randn(512, 2048, generator=torch.Generator().manual_seed(3)) * 0.02
        outputs = {name: bytes(run(rows, type_)) for name, run in both.items()}
        times: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(7):
            for name, run in both.items():
                before = time.process_time()
                run(rows, type_)
                times[name].append(time.process_time() - before)
        speed = {name: rows.numel() / min(took) / 1e6 for name, took in times.items()}
        size, blocks = type_.size, len(outputs["ggml"]) // type_.size
        different = sum(
            outputs["ggml"][i * size : (i + 1) * size] != outputs["ours"][i * size : (i + 1) * size]
            for i in range(blocks)
        )
        print(
            f"{type_.name:6} {speed['ggml']:8.0f} {speed['ours']:8.0f} "
            f"{speed['ours'] / speed['ggml']:6.1f}   {blocks}, {different}",
            flush=True,
        )


def measured(command: list[str | Path]) -> tuple[float, float]:
    """Seconds, and the peak of memory in MB, of a process."""
    before = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    took = time.perf_counter() - before
    if status:
        sys.exit(f"{command} failed: {errors.decode()[-2000:]}")
    return took, used.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def this(step: str, directory: Path, mode: str = "-") -> list[str | Path]:
    return [sys.executable, __file__, "--step", step, "--disk", directory, "--mode", mode]


def one_pass(directory: Path, mode: str) -> tuple[float, float, float]:
    took, peak = measured(this("ours", directory, mode))
    return took, peak, (directory / "ours.gguf").stat().st_size / 1e9


def three_passes(directory: Path, modes: list[str]) -> dict[str, tuple[float, float, float]]:
    """By mode; merging and converting are the same for all and done once."""
    from tests.servers import build_llama_cpp

    upstream, merged = build_llama_cpp.directory(), directory / "merged model"
    plain, small = directory / "plain.gguf", directory / "theirs.gguf"
    convert: list[str | Path] = [sys.executable, upstream / "convert_hf_to_gguf.py", merged]
    convert += ["--outfile", plain, "--outtype", "bf16", "--model-name", "benchmark"]
    steps = [measured(this("peft", directory)), measured(convert)]
    written = plain.stat().st_size + sum(path.stat().st_size for path in merged.iterdir())
    results = {}
    for mode in modes:
        last = []
        size = 0
        if mode != "no_quantization":
            last = [measured([upstream / "llama-quantize", plain, small, mode])]
            size = small.stat().st_size
        took = [*steps, *last]
        results[mode] = (
            sum(seconds for seconds, _ in took), max(peak for _, peak in took),
            (written + size) / 1e9,
        )  # fmt: skip
        one_pass(directory, mode)
        same = filecmp.cmp(small if size else plain, directory / "ours.gguf", shallow=False)
        print(f"  {mode}: the bytes are {'the same' if same else 'DIFFERENT'}", flush=True)
    return results


def main() -> None:
    """Make what is missing, measure, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--disk", type=Path)
    parser.add_argument("--scale", action="append", choices=SHAPES)
    parser.add_argument("--mode", action="append", choices=(*MODES, "imports", "-"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--step", choices=("kernels", "make", "ours", "peft"))
    options = parser.parse_args()
    if options.step:
        steps = {"kernels": kernels, "make": make, "ours": ours, "peft": peft}
        arguments = [options.mode[0]] if options.step == "ours" else []
        steps[options.step](options.disk, *arguments)
    else:  # what this process takes would count as its children's
        subprocess.run(this("kernels", options.disk), check=True)
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """The table of the ways."""
    modes = options.mode or list(MODES)
    print(
        f"{'scale':6} {'mode':16} {'way':7} {'s':>8} {'peak MB':>8} {'over imports':>12} {'GB':>6}"
    )
    for scale in options.scale or ["small"]:
        directory = options.disk / scale
        if not (directory / "adapter").exists():
            measured(this("make", directory))
        _, imports = measured(this("ours", directory, "imports"))
        one_pass(directory, modes[0])  # kernels are compiled, files are in the cache
        theirs = three_passes(directory, modes)
        for mode in modes:
            runs = [one_pass(directory, mode) for _ in range(options.runs)]
            took = statistics.median(seconds for seconds, _, _ in runs)
            peak, size = max(p for _, p, _ in runs), runs[0][2]
            over = f"{peak - imports:12.0f}"
            print(f"{scale:6} {mode:16} {'ours':7} {took:8.1f} {peak:8.0f} {over} {size:6.2f}")
            seconds, peak, size = theirs[mode]
            print(
                f"{scale:6} {mode:16} {'theirs':7} {seconds:8.1f} {peak:8.0f} {'':12} {size:6.2f}"
            )
            print(f"{scale:6} {mode:16} {'ratio':7} {seconds / took:8.1f}", flush=True)


if __name__ == "__main__":
    main()
