"""Every class of language model that transformers has, tiny, merged with adapters and compared.

    python -m tests.sweep [--kind causal] [--only llama] [--table docs/reference/architectures.md]

For each class of the installed transformers that answers, translates, classifies text or reads
images, it makes a random model of a few thousand parameters and adapters of three sorts: LoRA and
DoRA on all linear layers, and LoRA on experts that are stacked in one parameter. Each is merged,
read back and compared with what PEFT makes of it, bit by bit. What comes out is one of

- exact: the complete model loads as the model that PEFT merges;
- refused: with the reason that a user would read;
- different: a fault of ours, and the reason why the command fails;
- cannot be built: transformers or PEFT make no tiny model or no adapter of it.

Each class is tried in a process of its own, which is ended if it takes more than
`SECONDS` for one adapter.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

SECONDS = 90.0
MAX_PARAMETERS = 5_000_000

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

_SIZES = {
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embed_dim": 32, "width": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "hidden_dim": 32, "model_dim": 32,
    "output_hidden_size": 32, "out_hidden_size": 32, "projection_dim": 32, "qk_hidden_size": 32,
    "intermediate_size": 48, "d_ff": 48, "n_inner": 48, "encoder_ffn_dim": 48, "ffn_dim": 48,
    "decoder_ffn_dim": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "mlp_dim": 48,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2,
    "decoder_layers": 2, "num_decoder_layers": 2, "num_encoder_layers": 2, "depth": 2,
    "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "n_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "kv_channels": 8,
    "vocab_size": 96, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "top_k_experts": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "state_size": 8, "ssm_state_size": 8, "mamba_n_heads": 8,
    "mamba_d_head": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "mamba_n_groups": 1,
    "n_groups": 1, "time_step_rank": 4, "lru_width": 32, "attention_window_size": 16,
    "sliding_window": 16, "image_size": 16, "patch_size": 8, "window_size": 8,
}  # fmt: skip
"""Of a tiny model, by the names that configurations have for them."""


@frozen
class Outcome:
    """What became of one class and one sort of adapter."""

    kind: str
    model: str
    sort: str
    result: str
    reason: str = ""


def classes(kind: str) -> Iterator[tuple[str, str]]:
    """Model types and class names that transformers knows for a kind."""
    from transformers.models.auto import modeling_auto

    for model_type, names in getattr(modeling_auto, KINDS[kind][1]).items():
        yield model_type, names if isinstance(names, str) else names[0]


def tiny_config(config_class: Any) -> Any:
    """A configuration of that class with small sizes, in the ones inside it as well."""
    default = config_class()
    inside = {
        name: _small(getattr(default, name))
        for name in getattr(config_class, "sub_configs", {})
        if getattr(default, name, None) is not None
    }
    try:
        return config_class(**_small(default), **inside)
    except Exception:  # of all kinds: a class may not take what it gives
        return default


def _small(config: Any) -> dict[str, Any]:
    """The arguments that make a configuration of that class small."""
    stated = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    small = {
        name: size
        for name, size in _SIZES.items()
        if isinstance(stated.get(name), int) and stated[name] > size
    }
    layers = min([2, *(v for k, v in stated.items() if k in ("num_hidden_layers", "num_layers"))])
    for name, value in stated.items():
        if name.startswith("layer") and isinstance(value, list) and len(value) > layers:
            small[name] = value[:1] + value[-1:]  # one of each sort, mostly
        if isinstance(value, int) and name.endswith("_token_id") and value >= _SIZES["vocab_size"]:
            small[name] = _SIZES["vocab_size"] - 1 - len(small) % 16
    return small


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
            adapter = _adapter(auto, base, sort, task, scratch / "adapter")
        except Exception as error:
            yield sort, "cannot be built", _brief(error)
            continue
        result = ("none", "") if adapter is None else _merged(base, adapter, auto, scratch)
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
    return directory


def _adapter(auto: Any, base: Path, sort: str, task: str, directory: Path) -> Path | None:
    """None if the model has no layers of that sort."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = auto.from_pretrained(base, dtype="auto")
    options: dict[str, Any] = {"target_modules": "all-linear"}
    if sort == "experts":
        stacked = [n for n, p in model.named_parameters() if "experts." in n and p.dim() == 3]
        names = sorted({f"experts.{name.rpartition('experts.')[2]}" for name in stacked})
        if not names:
            return None
        options = {"target_modules": [], "target_parameters": names}
    torch.manual_seed(0)
    lora = LoraConfig(r=2, task_type=task, use_dora=sort == "DoRA", **options)
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(str(directory))
    return directory


def _merged(base: Path, adapter: Path, auto: Any, directory: Path) -> tuple[str, str]:
    from customized_models.errors import CustomizedModelsError
    from tests.merging.parity import assert_loads_as, merged_by_peft, opened, write_merged

    try:
        expected = merged_by_peft(base, adapter, auto, aligned=True)
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
        assert_loads_as(merged, expected.tensors, auto)
    except Exception as error:
        return "different", _brief(error)
    return "exact", ""


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# Each class in a process of its own


def _child(kind: str, model_type: str, sorts: Sequence[str], answers: Connection) -> None:
    import torch
    import transformers

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
        while missing and ours.poll(SECONDS):
            sort, result, reason = ours.recv()
            missing.remove(sort)
            yield Outcome(kind, model, sort, result, reason)
    except EOFError:
        pass
    process.kill()
    process.join()
    for sort in missing:
        yield Outcome(kind, model, sort, "cannot be built", f"ended, or took {SECONDS:.0f} s")


def table(outcomes: list[Outcome]) -> str:
    """The outcomes as a table in Markdown: a row for each class, a column for each sort."""
    cells: dict[tuple[str, str], dict[str, Outcome]] = {}
    for outcome in outcomes:
        cells.setdefault((outcome.kind, outcome.model), {})[outcome.sort] = outcome
    rows = [("Class", *SORTS, "Reason"), ("---",) * (len(SORTS) + 2)]
    for (_, model), found in cells.items():
        results = [_cell(found[sort]) if sort in found else "" for sort in SORTS]
        reasons = dict.fromkeys(o.reason for o in found.values() if o.result == "refused")
        rows.append((f"`{model}`", *results, "; ".join(reasons).replace("|", "\\|")))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _cell(outcome: Outcome) -> str:
    return {"none": "-", "cannot be built": "not built"}.get(outcome.result, outcome.result)


def main() -> int:
    """Run the sweep; the exit status is 1 if anything came out different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=KINDS)
    parser.add_argument("--sort", choices=SORTS, nargs="+", default=SORTS)
    parser.add_argument("--only", help="model types that contain this")
    parser.add_argument("--log", type=Path, help="where to write outcomes as lines of JSON")
    parser.add_argument("--table", type=Path, help="where to write the table")
    arguments = parser.parse_args()
    _preload()
    outcomes = []
    for kind in [arguments.kind] if arguments.kind else KINDS:
        for model_type, model in classes(kind):
            if arguments.only and arguments.only not in model_type:
                continue
            for outcome in tried(kind, model_type, model, arguments.sort):
                outcomes.append(outcome)
                _show(outcome, arguments.log)
    counts = Counter((outcome.sort, outcome.result) for outcome in outcomes)
    for (sort, result), count in sorted(counts.items()):
        print(f"{sort}: {count} {result}")
    if arguments.table:
        arguments.table.write_text(table(outcomes))
    return int(any(outcome.result == "different" for outcome in outcomes))


def _show(outcome: Outcome, log: Path | None) -> None:
    if outcome.result != "none":
        print(outcome.kind, outcome.model, outcome.sort, outcome.result, outcome.reason, flush=True)
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
