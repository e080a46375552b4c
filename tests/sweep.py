"""Every class of language model that transformers has, tiny, merged with adapters and compared.

    python -m tests.sweep --log sweep.jsonl [--kind causal] [--sort LoRA] [--only llama]
    python -m tests.sweep --log sweep.jsonl --table docs/reference/architectures.md

For each class of the installed transformers that answers, translates, classifies text or reads
images, it makes a random model of a few thousand parameters and adapters of three sorts: LoRA and
DoRA on all linear layers, and LoRA on experts that are stacked in one parameter. Each is merged,
read back and compared with what PEFT makes of it, bit by bit. What comes out is one of

- exact: the complete model loads as the model that PEFT merges;
- refused: with the reason that a user would read;
- different: a fault of ours, and the reason why the command fails;
- cannot be built: transformers or PEFT make no tiny model or no adapter of it.

Each class is tried in a process of its own, which is ended if it takes more than
`SECONDS` of a processor's time for one adapter. What the log has is not tried again, so a run that
was ended goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

from tests.tiny_configs import tiny_config

SECONDS = 90
_PATIENCE = 20  # as many times as long on a clock: others may need the processors as well
MAX_PARAMETERS = 10_000_000

KINDS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "CAUSAL_LM"),
    "seq2seq": (
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        "SEQ_2_SEQ_LM",
    ),
    "classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        "SEQ_CLS",
    ),
    "vision": (
        "AutoModelForImageTextToText",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "CAUSAL_LM",
    ),
}
"""The Auto class, where transformers lists what it knows, and PEFT's task type."""

SORTS = ("LoRA", "DoRA", "experts")


@frozen
class Outcome:
    """What became of one class and one sort of adapter."""

    kind: str
    model_type: str
    model: str
    sort: str
    result: str
    reason: str = ""


def classes(kind: str) -> Iterator[tuple[str, str]]:
    """Model types and class names that transformers knows for a kind."""
    from transformers.models.auto import modeling_auto

    for model_type, names in getattr(modeling_auto, KINDS[kind][1]).items():
        yield model_type, names if isinstance(names, str) else names[0]


def attempts(
    kind: str, model_type: str, sorts: Sequence[str], directory: Path
) -> Iterator[tuple[str, str, str]]:
    """Sort of adapter, result and reason, for one class."""
    import transformers

    auto, task = getattr(transformers, KINDS[kind][0]), KINDS[kind][2]
    try:
        base = _base(auto, model_type, directory / "base")
    except Exception as error:  # of all kinds, out of any class
        yield from ((sort, "cannot be built", _brief(error)) for sort in sorts)
        return
    for sort in sorts:
        scratch = directory / sort
        try:
            trained = _trained(auto, base, sort, task, scratch / "adapter")
        except Exception as error:
            yield sort, "cannot be built", _brief(error)
            continue
        result = ("none", "") if trained is None else _merged(base, trained, auto, scratch)
        yield sort, *result
        shutil.rmtree(scratch, ignore_errors=True)


def _base(auto: Any, model_type: str, directory: Path) -> Path:
    import torch
    from transformers import CONFIG_MAPPING

    config = tiny_config(CONFIG_MAPPING[model_type])
    with torch.device("meta"):
        count = sum(p.numel() for p in auto.from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"{count:,} parameters with the sizes that are known")
    torch.manual_seed(0)
    auto.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    _, info = auto.from_pretrained(directory, dtype="auto", output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"transformers does not load what it saves: {info['missing_keys']}")
    return directory


def _trained(auto: Any, base: Path, sort: str, task: str, directory: Path) -> Any:
    """A model of PEFT, saved in `directory`; None if the model has no layers of that sort."""
    import torch
    from peft import LoraConfig, get_peft_model

    error: Exception | None = None
    for targets in ("all-linear", _inner_layers):
        model = auto.from_pretrained(base, dtype="auto")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # see `parity.reference`
        options: dict[str, Any] = {"target_modules": targets}
        if callable(targets):
            options = {"target_modules": targets(model)}
        if sort == "experts":
            stacked = [n for n, p in model.named_parameters() if "experts." in n and p.dim() == 3]
            names = sorted({f"experts.{name.rpartition('experts.')[2]}" for name in stacked})
            if not names:
                return None
            options = {"target_modules": [], "target_parameters": names}
        torch.manual_seed(0)
        try:
            lora = LoraConfig(r=2, task_type=task, use_dora=sort == "DoRA", **options)
            adapted = get_peft_model(model, lora)
        except Exception as failed:  # PEFT does not adapt every layer of every model
            error = error or failed
            continue
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
        adapted.save_pretrained(str(directory))
        return adapted
    assert error is not None
    raise error


def _inner_layers(model: Any) -> list[str]:
    """Linear layers that are in a numbered layer, but those of Mamba that PEFT does not adapt."""
    import torch

    return [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and any(step.isdigit() for step in name.split("."))
        and not name.endswith(("out_proj", "conv1d"))
    ]


def _merged(base: Path, trained: Any, auto: Any, directory: Path) -> tuple[str, str]:
    """Result and reason."""
    from customized_models.errors import CustomizedModelsError
    from tests.merging.parity import assert_loads_as, merged_by_peft, opened, write_merged

    adapter, note = directory / "adapter", ""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            expected = merged_by_peft(base, adapter, auto, aligned=True).tensors
        if any("missing adapter keys" in str(warning.message) for warning in caught):
            note = "PEFT does not load all that it saved; compared with the model in memory"
            expected = trained.merge_and_unload().state_dict()
    except Exception as error:
        return "cannot be built", f"PEFT does not merge it: {_brief(error)}"
    try:
        merge = opened(base, adapter, directory / "scratch")
        merged = write_merged(merge, base, directory / "merged")
    except CustomizedModelsError as error:
        return "refused", _brief(error)
    except Exception as error:
        return "different", f"a foreign exception: {_brief(error)}"
    try:
        assert_loads_as(merged, expected, auto)
    except Exception as error:
        return "different", _brief(error)
    return "exact", note


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"


# Each class in a process of its own


def _child(kind: str, model_type: str, sorts: Sequence[str], answers: Connection) -> None:
    import torch
    import transformers

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS * len(sorts),) * 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        for answer in attempts(kind, model_type, sorts, Path(directory)):
            answers.send(answer)


def tried(kind: str, model_type: str, model: str, sorts: Sequence[str]) -> Iterator[Outcome]:
    """The outcomes of one class."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(kind, model_type, sorts, theirs))
    process.start()
    theirs.close()
    missing = list(sorts)
    try:
        while missing and ours.poll(_PATIENCE * SECONDS):
            sort, result, reason = ours.recv()
            missing.remove(sort)
            yield Outcome(kind, model_type, model, sort, result, reason)
    except EOFError:
        pass
    process.kill()
    process.join()
    for sort in missing:
        reason = f"ended, or took {SECONDS} s"
        yield Outcome(kind, model_type, model, sort, "cannot be built", reason)


def recorded(log: Path | None) -> list[Outcome]:
    """The outcomes of earlier runs."""
    lines = log.read_text().splitlines() if log and log.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def main() -> int:
    """Run the sweep; the exit status is 1 if anything came out different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--sort", choices=SORTS, nargs="+", default=SORTS)
    parser.add_argument("--only", default="", help="model types that contain this")
    parser.add_argument(
        "--log", type=Path, help="outcomes as lines of JSON, which are not repeated"
    )
    parser.add_argument("--table", type=Path, help="where to write the log's table; nothing is run")
    arguments = parser.parse_args()
    outcomes = recorded(arguments.log)
    if arguments.table:
        from tests.sweep_table import page

        arguments.table.write_text(page(outcomes))
        return 0
    _preload()
    known = {(outcome.kind, outcome.model_type, outcome.sort) for outcome in outcomes}
    for kind in arguments.kind:
        for model_type, model in classes(kind):
            sorts = [sort for sort in arguments.sort if (kind, model_type, sort) not in known]
            if arguments.only in model_type and sorts:
                for outcome in tried(kind, model_type, model, sorts):
                    outcomes.append(outcome)
                    _show(outcome, arguments.log)
    for (sort, result), count in sorted(Counter((o.sort, o.result) for o in outcomes).items()):
        print(f"{sort}: {count} {result}")
    return int(any(outcome.result == "different" for outcome in outcomes))


def _show(outcome: Outcome, log: Path | None) -> None:
    if outcome.result != "none":
        print(*asdict(outcome).values(), flush=True)
    if log:
        with log.open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")


def _preload() -> None:
    """Import what every child needs, once; nothing is computed before the fork."""
    import peft  # noqa: F401

    from customized_models.merging import preload

    preload()


if __name__ == "__main__":
    raise SystemExit(main())
