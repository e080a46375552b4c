"""Trees as a Trainer, and the tools on top of it, leave them: planned, imported, imported again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from customized_models import (
    AlreadyExistsError,
    CustomizedModel,
    InvalidArgumentError,
    MalformedError,
    ModelRegistry,
    NotFoundError,
    UnsafeFileError,
    UnsupportedAdapterError,
)
from customized_models.importing import ImportPlan, convert_pickle, plan_import, run_import
from customized_models.testing import tiny_lora

EXAMPLES = [{"input_ids": [1, 5 + i, 7, 9, 2], "labels": [1, 5 + i, 7, 9, 2]} for i in range(8)]
TRAINED = datetime(2025, 9, 26, 12, 34, 56, tzinfo=UTC)
HISTORY = [{"loss": 2.0, "step": 10}, {"eval_loss": 1.5, "step": 10}, {"loss": 1.0, "step": 20}]


def state(step: int, planned: int = 20, **more: Any) -> dict[str, Any]:
    history = [entry for entry in HISTORY if entry["step"] <= step]
    return {"global_step": step, "max_steps": planned, "log_history": history, **more}


@pytest.fixture(scope="session")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a Trainer has left: checkpoints, and the best adapter, which is not the last."""
    set_seed(0)
    output = tmp_path_factory.mktemp("trained") / "run_1"
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), lora),
        args=TrainingArguments(
            output_dir=str(output),
            max_steps=3,
            learning_rate=0.1,
            per_device_train_batch_size=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,  # so that the first step, with the largest loss, is the best
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=EXAMPLES,
        eval_dataset=EXAMPLES[:2],
    )
    trainer.train()
    trainer.save_model()
    return output


@pytest.fixture
def make(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes an adapter at a path of the tree, with further files as text or as JSON."""
    seeds: dict[str, int] = {}

    def adapter(path: str, *, base: str | None = "tests/llama-tiny", **files: object) -> Path:
        seed = seeds.setdefault(path, len(seeds))
        directory = tiny_lora(tmp_path / "runs" / path, tiny_base, seed=seed)
        config = json.loads((directory / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = base
        write(directory, adapter_config=config, **files)
        os.utime(directory / "adapter_model.safetensors", (TRAINED.timestamp(),) * 2)
        return directory

    return adapter


def write(directory: Path, **files: object) -> None:
    for name, text in files.items():
        name, _, ending = name.partition("__")
        path = directory / f"{name}.{ending or 'json'}"
        path.write_text(text if isinstance(text, str) else json.dumps(text))


def actions(plan: ImportPlan) -> dict[str, str]:
    return {entry.directory: entry.action for entry in plan.entries}


def test_a_tree_is_planned_imported_and_not_imported_again(
    registry: ModelRegistry, make: Callable[..., Path], trained: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "trainer" / "run_1")
    make("trl/sft_final", README__md="---\ndatasets: [org/chats]\n---\n")
    make("axolotl/out", config={}, axolotl_config__yaml=AXOLOTL)
    make("axolotl/out/checkpoint-20", trainer_state=state(20))
    make("llamafactory/Lora_SFT", training_args__yaml=LLAMA_FACTORY, trainer_state=state(20))
    swift = "swift/v0-20250926-123456"
    make(f"{swift}/checkpoint-10", args=SWIFT, trainer_state=state(10))
    make(f"{swift}/checkpoint-20", args=SWIFT, trainer_state=state(20))
    make("unsloth/lora_model", base="unsloth/llama-tiny-bnb-4bit")

    plan = plan_import(registry, runs, base_models={"unsloth/llama-tiny-bnb-4bit": "llama-tiny"})

    assert list(registry.customized_models()) == []
    assert actions(plan) == {
        "axolotl/out": "register",
        "axolotl/out/checkpoint-20": "leave",
        "llamafactory/Lora_SFT": "register",
        f"{swift}/checkpoint-10": "leave",
        f"{swift}/checkpoint-20": "register",
        "trainer/run_1": "register",
        "trainer/run_1/checkpoint-1": "leave",
        "trainer/run_1/checkpoint-2": "leave",
        "trainer/run_1/checkpoint-3": "leave",
        "trl/sft_final": "register",
        "unsloth/lora_model": "register",
    }

    done = run_import(registry, plan)

    assert [e.action for e in done.entries].count("registered") == 6
    models = {e.directory: registry.get(CustomizedModel, e.model) for e in done.entries if e.model}
    assert {m.name for m in registry.customized_models()} == {m.name for m in models.values()}
    assert models["axolotl/out"].card.training.arguments["num_train_epochs"] == 3
    assert models["llamafactory/Lora_SFT"].card.training.datasets == ("identity",)
    assert models["trl/sft_final"].card.training.datasets == ("org/chats",)
    best = models["trainer/run_1"].card.evaluation
    last = json.loads((trained / "checkpoint-3" / "trainer_state.json").read_text())
    assert best.steps == last["best_global_step"] < 3
    assert best.metrics["eval_loss"] == best.best_metric
    of_swift = models[f"{swift}/checkpoint-20"]
    assert (of_swift.label, of_swift.created) == (swift, TRAINED)
    assert of_swift.name.startswith("llama-tiny_swift-v0-20250926-123456_20250926_")
    assert of_swift.card.training.arguments["learning_rate"] == 1e-4
    assert of_swift.card.evaluation.last_loss == 1.0

    again = plan_import(registry, runs / "swift")
    assert [(e.directory, e.action) for e in again.entries] == [
        ("v0-20250926-123456/checkpoint-10", "leave"),
        ("v0-20250926-123456/checkpoint-20", "registered"),
    ]
    assert run_import(registry, again) == again
    assert run_import(registry, plan) == done
    assert len(registry.customized_models()) == 6


AXOLOTL = "base_model: llama\nadapter: lora\nnum_epochs: 3\nlearning_rate: 2e-4\n"
LLAMA_FACTORY = "model_name_or_path: llama\nfinetuning_type: lora\ndataset: identity\n"
SWIFT = {"model": "llama", "train_type": "lora", "learning_rate": 1e-4}


def test_what_cannot_be_imported_says_why(
    registry: ModelRegistry, make: Callable[..., Path], tiny_base: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(tiny_base, runs / "merged")
    (runs / "empty").mkdir()
    pickled = make("pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    (make("lost") / "adapter_model.safetensors").unlink()
    make("elsewhere", base="org/other")
    make("broken", trainer_state="{")
    make("silent", base=None)
    linked = make("linked") / "adapter_model.safetensors"
    linked.rename(tmp_path / "weights")
    linked.symlink_to(tmp_path / "weights")
    make("\N{CJK UNIFIED IDEOGRAPH-4E2D}")

    plan = plan_import(registry, runs)

    assert set(actions(plan).values()) == {"refuse"}
    reasons = {entry.directory: entry.reason for entry in plan.entries}
    assert "empty" not in reasons
    assert "not an adapter" in reasons["merged"]
    assert "convert_pickle" in reasons["pickled"]
    assert reasons["lost"] == "adapter_model.safetensors is missing"
    assert "base_models={'org/other': ...}" in reasons["elsewhere"]
    assert "'llama-tiny'" in reasons["elsewhere"]
    assert "base_models={'': ...}" in reasons["silent"]
    assert "adapter_model.safetensors" in reasons["linked"]
    assert "trainer_state.json" in reasons["broken"]
    assert "move it out of the directory" in reasons["broken"]
    assert "no letter" in reasons["\N{CJK UNIFIED IDEOGRAPH-4E2D}"]
    table = str(plan)
    assert (
        table.splitlines()[0] == "<0 adapters registered, 0 to register, 0 to leave, 8 to refuse>"
    )
    assert all(f"\n{entry.directory} " in table for entry in plan.entries)
    assert "&#x27;org/other&#x27;" in plan._repr_html_()
    assert json.loads(json.dumps(plan.to_dict()))["entries"][0]["directory"] == "broken"
    assert run_import(registry, plan) == plan


STOPS = {
    "TrainerControl": {"args": {"should_training_stop": True}},
    "EarlyStoppingCallback": {"attributes": {"early_stopping_patience_counter": 1}},
}


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (state(20), "checkpoint-20"),
        (state(20, best_model_checkpoint="/gone/checkpoint-10"), "checkpoint-10"),
        (state(20, best_model_checkpoint="/gone/checkpoint-5"), "checkpoint-20"),
        (state(20, planned=100, stateful_callbacks=STOPS), "checkpoint-20"),
        (state(20, planned=100), None),
    ],
    ids=["last", "best", "best removed", "stopped early", "unfinished"],
)
def test_of_checkpoints_alone_the_best_or_last_of_a_finished_training_is_taken(
    registry: ModelRegistry,
    make: Callable[..., Path],
    tmp_path: Path,
    told: dict[str, Any],
    kept: str | None,
) -> None:
    make("run/checkpoint-10", trainer_state=state(10))
    make("run/checkpoint-20", trainer_state=told)

    plan = plan_import(registry, tmp_path / "runs")

    taken = [entry.directory for entry in plan.having("register")]
    assert taken == ([] if kept is None else [f"run/{kept}"])
    if kept is None:
        assert "step 20 of 100" in plan.entries[-1].reason


def test_adapters_of_another_name_are_compared_with_their_own_checkpoints(
    registry: ModelRegistry, make: Callable[..., Path], tmp_path: Path
) -> None:
    """PEFT saves one that is called "mine" in a directory of that name."""
    runs = tmp_path / "runs"
    for run, step in ("ended", 10), ("ended", 20), ("running", 10), ("running", 20):
        make(f"{run}/checkpoint-{step}/mine")
        planned = 100 if run == "running" else 20
        write(runs / run / f"checkpoint-{step}", trainer_state=state(step, planned))
    make("saved/mine")
    make("saved/checkpoint-20/mine")
    make("saved/checkpoint-20/other")

    plan = plan_import(registry, runs)

    assert actions(plan) == {
        "ended/checkpoint-10/mine": "leave",
        "ended/checkpoint-20/mine": "register",
        "running/checkpoint-10/mine": "leave",
        "running/checkpoint-20/mine": "leave",
        "saved/checkpoint-20/mine": "leave",
        "saved/checkpoint-20/other": "register",
        "saved/mine": "register",
    }
    entries = {entry.directory: entry for entry in plan.entries}
    assert entries["ended/checkpoint-20/mine"].label == "ended/mine"
    assert entries["saved/checkpoint-20/mine"].reason == "a checkpoint of mine"
    assert "step 20 of 100" in entries["running/checkpoint-20/mine"].reason


def test_an_adapter_in_a_checkpoint_that_is_named_itself_is_taken(
    registry: ModelRegistry, make: Callable[..., Path], tmp_path: Path
) -> None:
    make("run/mine")
    make("run/checkpoint-10/mine")
    plan = plan_import(registry, tmp_path / "runs" / "run" / "checkpoint-10")
    assert actions(plan) == {"mine": "register"}


def test_directories_that_cannot_be_read_or_named_do_not_keep_the_others_back(
    registry: ModelRegistry,
    make: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make("sound")
    closed, hidden = make("closed"), make("hidden/run").parent
    odd = make("odd/run").parent
    try:
        odd.rename(odd.with_name("odd\udcff"))
    except OSError:
        pytest.skip("this file system has no names that are not UTF-8")
    scan, lstat, status = os.scandir, os.lstat, os.stat

    def refuse(path: Any, *refused: Path) -> None:
        if isinstance(path, str | Path) and Path(path) in refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    def scanning(path: Any = ".") -> Any:
        refuse(path, hidden)
        return scan(path)

    inside = [closed / "adapter_config.json", closed / "adapter_model.safetensors"]

    def of_links(path: Any, **more: Any) -> os.stat_result:
        refuse(path, *inside)
        return lstat(path, **more)

    def of_files(path: Any, **more: Any) -> os.stat_result:
        refuse(path, *inside)
        return status(path, **more)

    monkeypatch.setattr(os, "scandir", scanning)
    monkeypatch.setattr(os, "lstat", of_links)
    monkeypatch.setattr(os, "stat", of_files)
    plan = plan_import(registry, tmp_path / "runs")

    assert actions(plan) == {
        "closed": "refuse",
        "hidden": "refuse",
        "odd\\udcff/run": "refuse",
        "sound": "register",
    }
    reasons = {entry.directory: entry.reason for entry in plan.entries}
    assert "Permission denied" in reasons["closed"]
    assert reasons["hidden"] == "it cannot be listed: Permission denied"
    assert "not UTF-8" in reasons["odd\\udcff/run"]
    assert actions(run_import(registry, plan))["sound"] == "registered"


def test_what_is_registered_after_the_plan_is_not_registered_again(
    registry: ModelRegistry, make: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = make("support")
    plan = plan_import(registry, tmp_path / "runs")
    model = registry.register(adapter, train_name="by hand")

    done = run_import(registry, plan)

    assert [(e.action, e.model) for e in done.entries] == [("registered", model.name)]
    assert [m.name for m in registry.customized_models()] == [model.name]


def test_a_checkpoint_that_is_named_itself_is_taken(
    registry: ModelRegistry, make: Callable[..., Path]
) -> None:
    make("run")
    plan = plan_import(registry, make("run/checkpoint-10", trainer_state=state(10, 100)))
    assert actions(plan) == {".": "register"}
    assert plan.entries[0].label == "checkpoint-10"


def test_of_equal_adapters_the_one_that_tells_more_is_registered(
    registry: ModelRegistry, make: Callable[..., Path], tmp_path: Path
) -> None:
    first = make("lora_model")
    shutil.copytree(first, tmp_path / "runs" / "outputs" / "checkpoint-20")
    write(tmp_path / "runs" / "outputs" / "checkpoint-20", trainer_state=state(20))

    plan = plan_import(registry, tmp_path / "runs")

    assert actions(plan) == {"lora_model": "leave", "outputs/checkpoint-20": "register"}
    assert plan.entries[0].reason == "the same adapter as outputs/checkpoint-20"


def test_what_is_registered_under_another_name_is_known(
    registry: ModelRegistry, make: Callable[..., Path], tmp_path: Path
) -> None:
    model = registry.register(make("support"), train_name="by hand")
    plan = plan_import(registry, tmp_path / "runs")
    assert [(e.action, e.model) for e in plan.entries] == [("registered", model.name)]


def test_an_adapter_that_spoils_after_the_plan_does_not_keep_the_others_back(
    registry: ModelRegistry, make: Callable[..., Path], tmp_path: Path
) -> None:
    spoilt, sound = make("a"), make("b")
    plan = plan_import(registry, tmp_path / "runs")
    (spoilt / "adapter_model.safetensors").write_bytes(b"")

    done = run_import(registry, plan)

    assert actions(done) == {"a": "refuse", "b": "registered"}
    assert "adapter_model.safetensors" in done.entries[0].reason
    assert sound.is_dir()


def test_arguments_of_other_types_are_refused(registry: ModelRegistry, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="registry takes"):
        plan_import(str(registry.root), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="directory takes"):
        plan_import(registry, 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="base_models"):
        plan_import(registry, tmp_path, base_models={"org/x": 3})  # type: ignore[dict-item]
    with pytest.raises(NotFoundError, match="llama-tinny"):
        plan_import(registry, tmp_path, base_models={"org/x": "llama-tinny"})
    with pytest.raises(MalformedError, match="does not exist"):
        plan_import(registry, tmp_path / "missing")
    with pytest.raises(InvalidArgumentError, match="plan takes"):
        run_import(registry, tmp_path)  # type: ignore[arg-type]


# Pickled weights


@pytest.fixture
def pickled(tiny_adapter: Path, tmp_path: Path) -> Path:
    """The tiny adapter as older versions of PEFT saved it."""
    directory = Path(shutil.copytree(tiny_adapter, tmp_path / "pickled"))
    weights = directory / "adapter_model.safetensors"
    torch.save(load_file(weights), directory / "adapter_model.bin")
    weights.unlink()
    (directory / "optimizer.pt").write_bytes(b"x")
    (directory / "trainer_state.json").write_text(json.dumps(state(20)))
    os.utime(directory / "adapter_model.bin", (TRAINED.timestamp(),) * 2)
    return directory


def test_a_pickled_adapter_is_converted_and_is_the_same(
    registry: ModelRegistry, pickled: Path, tiny_adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    copy = convert_pickle(pickled, tmp_path / "deep" / "converted")

    assert (copy / "adapter_model.safetensors").stat().st_mtime == TRAINED.timestamp()
    assert not {"adapter_model.bin", "optimizer.pt"} & {path.name for path in copy.iterdir()}
    assert (pickled / "adapter_model.bin").is_file()
    assert [path.name for path in copy.parent.iterdir()] == ["converted"]
    model = registry.register(copy, train_name="converted", base_model="llama-tiny")
    assert model.card.evaluation.steps == 20
    expected = load_file(tiny_adapter / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    with registry.checkout(model) as directory:
        stored = load_file(directory / "adapter_model.safetensors")
        PeftModel.from_pretrained(base, str(directory))
    assert stored.keys() == expected.keys()
    assert all(stored[name].equal(expected[name]) for name in expected)


def test_a_pickled_adapter_is_converted_where_the_hubs_cache_has_it(
    pickled: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--me--lora" / "snapshots" / "revision"
    blobs = snapshot.parent.parent / "blobs"
    shutil.copytree(pickled, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    (tmp_path / "named").symlink_to(snapshot)

    copy = convert_pickle(tmp_path / "named", tmp_path / "converted")

    assert {path.name for path in copy.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "trainer_state.json"
    }  # fmt: skip
    assert not any(path.is_symlink() for path in copy.iterdir())
    (snapshot / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(UnsafeFileError, match=r"tokenizer\.json"):
        convert_pickle(snapshot, tmp_path / "other")


def test_a_whole_model_beside_a_pickled_adapter_is_not_copied(
    pickled: Path, tmp_path: Path
) -> None:
    (pickled / "model.safetensors").write_bytes(b"x")
    (pickled / "model.safetensors.index.json").write_text("{}")
    (pickled / "notes.txt").write_text("kept")

    copy = convert_pickle(pickled, tmp_path / "converted")

    assert (copy / "notes.txt").read_text() == "kept"
    assert not [path.name for path in copy.iterdir() if path.name.startswith("model")]


class Trap:
    """Unpickled, it makes a directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_more_than_tensors_is_refused(pickled: Path, tmp_path: Path) -> None:
    torch.save({"a": Trap(tmp_path / "sprung")}, pickled / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapterError, match="more than tensors"):
        convert_pickle(pickled, tmp_path / "converted")
    assert not (tmp_path / "sprung").exists()
    assert not (tmp_path / "converted").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    "found",
    [{}, [torch.zeros(2)], {"a": "text"}, {3: torch.zeros(2)}, {"a": torch.eye(2).to_sparse()}],
    ids=["empty", "list", "text", "number", "sparse"],
)
def test_a_pickle_that_is_no_mapping_of_tensors_is_refused(
    pickled: Path, tmp_path: Path, found: Any
) -> None:
    torch.save(found, pickled / "adapter_model.bin")
    with pytest.raises(MalformedError, match=r"adapter_model\.bin"):
        convert_pickle(pickled, tmp_path / "converted")


def test_tensors_that_share_memory_are_written_apart(pickled: Path, tmp_path: Path) -> None:
    whole = torch.arange(8.0).reshape(2, 4)
    torch.save({"a": whole, "b": whole[0], "c": whole.T}, pickled / "adapter_model.bin")
    found = load_file(convert_pickle(pickled, tmp_path / "converted") / "adapter_model.safetensors")
    assert found["a"].equal(whole)
    assert found["b"].equal(whole[0])
    assert found["c"].equal(whole.T)


def test_nothing_is_overwritten_and_nothing_sound_is_converted(
    pickled: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(AlreadyExistsError):
        convert_pickle(pickled, pickled)
    with pytest.raises(UnsupportedAdapterError, match="as it is"):
        convert_pickle(tiny_adapter, tmp_path / "converted")
    with pytest.raises(MalformedError, match="has none of"):
        convert_pickle(tmp_path, tmp_path / "converted")
