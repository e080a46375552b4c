"""Files that nobody meant well, made by changing what good ones are built of.

    python -m tests.fuzz --cases 200000

A case takes an adapter or a base model, changes some of the structures in its files
(configurations, headers of weights, indexes, cards, states of trainings, settings of tokenizers) or
some of their bytes, and hands it to what a registry does with it. It may be accepted, or refused by
an error of this library; any other exception is a fault, and so is a case that takes more than a
second of a processor's time. A case is drawn from its number alone, so each can be run by itself:

    python -m tests.fuzz --first 1234 --cases 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

from attrs import frozen

from customized_models.adapters.fitting import check_fits
from customized_models.adapters.intake import take_in
from customized_models.base_models import check_files, hash_base_model
from customized_models.cards.reading import read_base_card, training_facts
from customized_models.cards.readme import parse_card, storable_card
from customized_models.combining import combined_files
from customized_models.errors import CustomizedModelsError
from customized_models.files.model_directory import CARRIED, files_of
from customized_models.files.remote_code import check_remote_code
from customized_models.files.safetensors import Checkpoint
from customized_models.merging.adapter_refusals import refuse_adapter
from customized_models.models import ModelCard
from customized_models.testing import tiny_llama, tiny_lora

SECONDS = 1.0
"""Of a processor's time that a case may take."""

_ENDLESS = 20  # seconds after which a case is ended

Files: TypeAlias = dict[str, bytes]
Draw: TypeAlias = random.Random


# Values


def _deep(depth: int, *, mapping: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if mapping else [value]
    return value


_TEXTS = (
    "", "a", "default", "\0", "a\0b", "\ud800", "x" * 300, "x" * 70_000, "../../etc/passwd",
    "/etc/passwd", "/dev/zero", "org/name", "a/b/c", ".", "..", "http://host/x", "é\u2028\x85",
    "{{ ''.__class__ }}", "!!python/object/apply:os.system", "os", "builtins", "torch.nn",
    "all-linear", "q_proj", "LORA", "LILY", "ADALORA", "X_LORA", "1e400", "NaN", "-", "%s%s",
    "\u202e",
)  # fmt: skip
_PATTERNS = (
    "[", "(", ".*", "(a+)+$", "(.*a){25}", "^(?!.*visual).*(q_proj|v_proj)$", "(?P<x>a)(?P=x)",
    "((((((((((.*)*)*)*)*)*)*)*)*)*)*x", "(?:" * 90 + ")" * 90, "\\", "a{1,99999}", "(?i)Q_PROJ",
)  # fmt: skip
_NUMBERS = (
    0, 1, -1, 2, 8, 255, 1 << 31, (1 << 60) - 1, 1 << 63, 10**30, 10**400, 0.5, -0.0, 1e308, 5e-324,
    float("inf"), float("-inf"), float("nan"), True, False,
)  # fmt: skip


def value(draw: Draw) -> Any:
    """Anything that JSON, as Python writes it, can hold."""
    kind = draw.randrange(12)
    if kind < 4:
        return draw.choice(_TEXTS)
    if kind < 8:
        return draw.choice(_NUMBERS)
    if kind == 8:
        return None
    if kind == 9:
        return draw.choice(([], {}, [[]], {"": {}}, [None], {"a": [1, "b"]}))
    if kind == 10 and draw.random() < 0.2:
        return _deep(draw.choice((20, 90, 600, 900)), mapping=draw.random() < 0.5)
    size = draw.choice((1, 3, 40, 2_000)) if draw.random() < 0.2 else 2
    return [draw.choice(_NUMBERS + _TEXTS[:9]) for _ in range(size)]


# Structures


def changed(document: Any, draw: Draw) -> Any:
    """`document` with one thing in it changed, at any depth."""
    if not isinstance(document, dict | list) or not document or draw.random() < 0.15:
        return value(draw)
    if isinstance(document, list):
        items = [*document]
        place = draw.randrange(len(items))
        match draw.randrange(4):
            case 0:
                del items[place]
            case 1:
                items.append(draw.choice((items[place], value(draw))))
            case _:
                items[place] = changed(items[place], draw)
        return items
    fields, key = dict(document), draw.choice([*document])
    match draw.randrange(8):
        case 0:
            del fields[key]
        case 1:
            fields[draw.choice(_TEXTS)] = fields.pop(key)
        case 2:
            fields[draw.choice(_TEXTS)] = value(draw)
        case 3:
            fields[key] = fields[draw.choice([*document])]
        case _:
            fields[key] = changed(fields[key], draw)
    return fields


_MORE_KEYS: Mapping[str, Callable[[Draw], Any]] = {
    "target_modules": lambda draw: draw.choice((*_PATTERNS, [*_PATTERNS[:3]], "all-linear")),
    "rank_pattern": lambda draw: {draw.choice(_PATTERNS): draw.choice(_NUMBERS)},
    "alpha_pattern": lambda draw: {draw.choice(_PATTERNS): draw.choice(_NUMBERS)},
    "exclude_modules": lambda draw: draw.choice(_PATTERNS),
    "modules_to_save": lambda draw: [draw.choice(_PATTERNS)],
    "auto_mapping": lambda draw: {
        "base_model_class": draw.choice(_TEXTS), "parent_library": draw.choice(_TEXTS)
    },
    "auto_map": lambda draw: {"AutoModel": draw.choice(("a.B", "x--a.B", ".", "a", "../a.B"))},
    "architectures": lambda draw: [value(draw)],
    "text_config": lambda draw: {"vocab_size": value(draw), "model_type": value(draw)},
    "chat_template": lambda draw: draw.choice(
        ("{{", "{% for %}", [{"name": draw.choice(_TEXTS), "template": draw.choice(_TEXTS)}])
    ),
    "peft_type": lambda draw: draw.choice(
        ("LORA", "ADALORA", "IA3", "OFT", "VERA", "LN_TUNING", "PREFIX_TUNING", "FOURIERFT", "XY")
    ),
}  # fmt: skip


def changed_json(data: bytes, draw: Draw) -> bytes:
    """A JSON file with up to three changes of what it says, or one of its text."""
    document = json.loads(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if isinstance(document, dict) and draw.random() < 0.3:
            key = draw.choice([*_MORE_KEYS])
            document = document | {key: _MORE_KEYS[key](draw)}
        else:
            document = changed(document, draw)
    return changed_text(json.dumps(document, ensure_ascii=draw.random() < 0.5), draw)


def changed_text(text: str, draw: Draw) -> bytes:
    """Mostly as it is; else with a key that stands twice, cut short, or with odd bytes."""
    data = text.encode("utf-8", "surrogatepass")
    match draw.randrange(20):
        case 0:
            return data.replace(b"{", b'{"r": 1, "r": 2, ', 1)
        case 1:
            return changed_bytes(data, draw)
        case 2:
            return b"\xef\xbb\xbf" + data
    return data


def changed_bytes(data: bytes, draw: Draw) -> bytes:
    """Bytes cut short, flipped, repeated or put in."""
    place = draw.randrange(len(data) + 1)
    match draw.randrange(4):
        case 0:
            return data[:place]
        case 1:
            return data[:place] + bytes(draw.randrange(256) for _ in range(3)) + data[place + 3 :]
        case 2:
            return data[:place] + data[place // 2 :]
        case _:
            return (
                data[:place]
                + draw.choice((b"\0", b"[" * 2000, b"NaN", b'"', b"\xff"))
                + data[place:]
            )


def changed_weights(data: bytes, draw: Draw) -> bytes:
    """A safetensors file whose header says something else, or whose length does."""
    length = int.from_bytes(data[:8], "little")
    try:
        header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    except ValueError:  # it was changed before
        return changed_bytes(data, draw)
    if not isinstance(header, dict) or not header:
        return changed_bytes(data, draw)
    match draw.randrange(10):
        case 0:
            return changed_bytes(data, draw)
        case 1:
            stated = draw.choice((0, 1, len(data), 1 << 20, 1 << 40, (1 << 64) - 1))
            return stated.to_bytes(8, "little") + data[8:]
        case 2:
            name = draw.choice([*header])
            shape = [draw.choice((1, 1, 1, (1 << 60) - 1))] * draw.choice((1, 64, 65, 5_000))
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}
        case 3:
            old = draw.choice([*header])
            header = {
                _renamed(name, draw) if name == old else name: v for name, v in header.items()
            }
        case _:
            header = changed(header, draw)
    raw = json.dumps(header).encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + rest


def _renamed(name: str, draw: Draw) -> str:
    other = draw.choice(
        ("_orig_mod.", "module.", "base_model.model.", "default.", "layers.99.", "\0")
    )
    steps = name.split(".")
    steps.insert(draw.randrange(len(steps)), other.rstrip("."))
    return ".".join(steps)


_YAML = (
    "x: !!bool a", "x: !!int ''", "x: !!timestamp a", "x: &a [*a]", "a: &a {b: *a}", "? [a]\n: b",
    "license: [mit]", "license: \ud800", "datasets: {a: b}", "x: 1e999", "x: 0x" + "f" * 5000,
    "x: !!python/object:os.system ls", "<<: 1", "x: 2026-99-99", "- a\n- b", "x: .nan", "a: b: c",
    "customized_models: {training: 1, evaluation: []}", "x: " + "[" * 500, "%TAG ! x", "\t- a",
    "x: |\n  a", "x: 1:1:1:1", "x: !!binary '*'", "x: !!set {a}", "x: !!pairs [a]", "= : a",
)  # fmt: skip


def changed_card(data: bytes, draw: Draw) -> bytes:
    """A README with lines of YAML that few parsers like, or a card of this library, changed."""
    text = data.decode()
    for _ in range(draw.choice((1, 1, 2))):
        text = text.replace("---\n", f"---\n{draw.choice(_YAML)}\n", 1)
    return changed_text(text, draw)


# Cases


@frozen
class Good:
    """What is changed: the files of an adapter, of its base, and cards."""

    adapter: Files
    base: Files
    base_directory: Path


def good(directory: Path) -> Good:
    """A small base and an adapter of it, with all that a training leaves beside it."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 320}
    base = tiny_llama(directory / "base", shard_size="15KB", **sizes)
    adapter = tiny_lora(directory / "adapter", base, r=2)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, adapter / name)
    entry = {"loss": 2.0, "step": 1, "grad_norm": float("inf"), "eval_loss": 1.0}
    state = {"global_step": 5, "epoch": 1.5, "best_metric": float("nan"), "log_history": [entry]}
    (adapter / "trainer_state.json").write_text(json.dumps(state))
    (adapter / "eval_results.json").write_text(json.dumps({"eval_loss": 1.0, "epoch": 2}))
    card = (
        "---\nlicense: mit\ndatasets: [org/data]\ncustomized_models:\n  training: {peft: {}}\n"
        "  evaluation: {metrics: {a: 1.0}}\n---\n# Card\n"
    )
    for where in (adapter, base):
        (where / "README.md").write_text(card)
    (base / "configuration_own.py").write_text("from .other import x\n")
    (base / "preprocessor_config.json").write_text('{"size": 1}')
    (base / "tokenizer.json").write_text('{"model": {"vocab": {}}}')  # else most of a case's time
    return Good(_files(adapter), _files(base), base)


def _files(directory: Path) -> Files:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def _spoilt(files: Files, draw: Draw) -> Files:
    names = [name for name in files if not name.endswith((".py", ".jinja"))]
    configurations = [name for name in names if name.endswith("config.json")]
    for _ in range(draw.choice((1, 1, 1, 2))):
        name = draw.choice(configurations if draw.random() < 0.3 else names)
        files = files | {name: _changed(name, files[name], draw)}
    if draw.random() < 0.05:
        other = draw.choice(("extra.bin", "é.json", "a\udcff", "chat_template.json", "x.tiktoken"))
        files = files | {other: b'{"chat_template": "a"}'}
    if draw.random() < 0.05:
        files = {name: data for name, data in files.items() if name != draw.choice(names)}
    return files


def _changed(name: str, data: bytes, draw: Draw) -> bytes:
    try:
        if name.endswith(".json"):
            return changed_json(data, draw)
        if name.endswith(".safetensors"):
            return changed_weights(data, draw)
        return changed_card(data, draw)
    except (ValueError, RecursionError):  # it was changed before, and is no longer what it was
        return changed_bytes(data, draw)


def _written(files: Files, directory: Path) -> Path:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def try_adapter(known: Good, draw: Draw, scratch: Path) -> None:
    """What `ModelRegistry.register` and a plan do by names and headers."""
    source = _written(_spoilt(known.adapter, draw), scratch / "adapter")
    (scratch / "copy").mkdir()
    adapter = take_in(source, scratch / "copy").adapter
    facts = training_facts(source, adapter.config)
    assert storable_card(facts) == facts
    base = Checkpoint.open(known.base_directory)
    check_remote_code(files_of(adapter.directory, *CARRIED), trusted=draw.random() < 0.5)
    check_fits(adapter, base)
    refuse_adapter(adapter.config)
    (scratch / "files").mkdir()
    combined_files(base, adapter.directory, {"vocab_size": 1}, scratch / "files")


def try_base(known: Good, draw: Draw, scratch: Path) -> None:
    """What `ModelRegistry.add_base_model` does."""
    directory = _written(_spoilt(known.base, draw), scratch / "base")
    weights = Checkpoint.open(directory)
    check_remote_code(check_files(directory, weights), trusted=draw.random() < 0.5)
    read_base_card(directory, weights)
    hash_base_model(directory, lambda *_: None)
    (scratch / "files").mkdir()
    combined_files(weights, _written({}, scratch / "empty"), {}, scratch / "files")


def try_card(known: Good, draw: Draw, scratch: Path) -> None:
    """What is read of cards, and what a caller may put into one."""
    if draw.random() < 0.5:
        parse_card(changed_card(known.adapter["README.md"], draw).decode("utf-8", "replace"))
    else:
        storable_card(ModelCard(notes=(value(draw),)))


_TRIES = (try_adapter, try_adapter, try_adapter, try_base, try_base, try_card)


class TooLong(BaseException):
    """A case does not end."""


@contextmanager
def _ended_in_time() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, _ENDLESS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _processor_seconds() -> float:
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def outcome(known: Good, number: int, scratch: Path) -> tuple[str, str]:
    """What became of a case: "accepted", "refused", or "fault" with what is wrong."""
    draw, started = random.Random(number), _processor_seconds()
    attempt = draw.choice(_TRIES)
    result, told = "accepted", ""
    try:
        with _ended_in_time():
            attempt(known, draw, scratch)
    except CustomizedModelsError as error:
        result, told = "refused", str(error)
        if len(told) > 10_000:
            return "fault", f"case {number}: a message of {len(told)} characters: {told[:200]}"
    except (Exception, TooLong):
        return "fault", f"case {number}, {attempt.__name__}:\n{traceback.format_exc(limit=-3)}"
    seconds = _processor_seconds() - started
    if seconds > SECONDS:
        return "fault", f"case {number}, {attempt.__name__}: {seconds:.1f} s; {result} {told[:200]}"
    return result, told


def run(first: int, cases: int, directory: Path) -> tuple[Counter[str], list[str], float]:
    """Counts of outcomes, the faults, and the longest case in seconds."""
    known, counts, faults, longest = good(directory), Counter[str](), list[str](), 0.0
    for number in range(first, first + cases):
        scratch = directory / "scratch"
        scratch.mkdir()
        started = _processor_seconds()
        result, told = outcome(known, number, scratch)
        longest = max(longest, _processor_seconds() - started)
        counts[result] += 1
        if result == "fault":
            faults.append(told)
        shutil.rmtree(scratch)
    return counts, faults, longest


def main() -> int:
    """Run the cases; the exit status is 1 if there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    arguments = parser.parse_args()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # every case writes twenty files
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        counts, faults, longest = run(arguments.first, arguments.cases, Path(directory))
    for fault in faults:
        print(fault)
    told = ", ".join(f"{count} {result}" for result, count in sorted(counts.items()))
    print(
        f"{arguments.cases} cases from {arguments.first}: {told}; the longest took {longest:.2f} s"
    )
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
