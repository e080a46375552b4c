"""What a Trainer trains is registered when, and only when, the training has succeeded."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from customized_models.errors import (
    AlreadyExistsError,
    BaseModelMismatch,
    BaseModelMissingError,
    DatabaseError,
    DeploymentError,
    MalformedError,
    RegistrationError,
    UnsupportedAdapterError,
    UnsupportedError,
)
from customized_models.models import BaseModel, CustomizedModel
from customized_models.registry import ModelRegistry
from customized_models.training import (
    RegisterCallback,
    register_from_model,
    register_from_trainer,
)

FIRST_IS_BEST: dict[str, Any] = {
    "learning_rate": 0.1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
    "greater_is_better": True,  # so that the first step, with the largest loss, is the best
}
EXAMPLES = [{"input_ids": [1, 5 + i, 7, 9, 2], "labels": [1, 5 + i, 7, 9, 2]} for i in range(8)]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def make_trainer(tiny_base: Path, tmp_path: Path) -> MakeTrainer:
    """Trainers of a new LoRA on the tiny base: two steps, nothing saved, nothing reported."""

    def make(*callbacks: TrainerCallback, model: Any = None, **options: Any) -> Trainer:
        set_seed(0)
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        return Trainer(
            model=model if model is not None else peft_model(tiny_base),
            args=TrainingArguments(**(settings | options)),
            train_dataset=EXAMPLES,
            eval_dataset=EXAMPLES[:2],
            processing_class=AutoTokenizer.from_pretrained(tiny_base),
            callbacks=list(callbacks),
        )

    return make


def peft_model(base: Path, name: str = "default") -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(base), config, adapter_name=name)


class Fail(TrainerCallback):
    """Fails a training in its second step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            raise RuntimeError("the training failed")


def test_a_training_that_succeeds_is_registered(
    registry: ModelRegistry, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    training_id = uuid.uuid4()
    callback = RegisterCallback(
        registry, train_name="support", training_id=training_id, datasets=["org/data"]
    )
    trainer = make_trainer(callback)
    trainer.train()

    model = callback.model
    assert model is not None
    assert model.name == callback.name
    assert model.name.startswith("llama-tiny_support_")
    assert model.training_id == training_id
    assert registry.get(CustomizedModel, model.name) == model
    assert list(registry.customized_models()) == [model]
    assert list((tmp_path / "out").iterdir()) == []

    trainer.save_model(str(tmp_path / "saved"))
    with registry.checkout(model) as directory:
        stored = load_file(directory / "adapter_model.safetensors")
        assert (directory / "tokenizer.json").is_file()
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert stored.keys() == saved.keys()
    assert all(stored[name].equal(saved[name]) for name in saved)


def test_the_card_has_the_configuration_and_what_was_measured(
    registry: ModelRegistry, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = RegisterCallback(registry, train_name="support", datasets=["org/data"])
    trainer = make_trainer(callback, eval_strategy="steps", eval_steps=1, learning_rate=0.25)
    trainer.train()

    assert callback.model is not None
    card = callback.model.card
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert card.training.peft["method"] == "LoRA"
    assert card.training.peft["r"] == 4
    assert card.training.arguments["learning_rate"] == 0.25
    assert card.training.arguments["max_steps"] == 2
    assert card.training.datasets == ("org/data",)
    assert card.evaluation.steps == 2
    assert card.evaluation.log_entries == 2
    assert card.evaluation.last_loss == logged["loss"]
    assert card.evaluation.metrics["eval_loss"] == logged["eval_loss"]
    assert str(tmp_path) not in str(card)


def test_a_training_that_fails_registers_nothing(
    registry: ModelRegistry, make_trainer: MakeTrainer
) -> None:
    callback = RegisterCallback(registry, train_name="support")
    with pytest.raises(RuntimeError, match="the training failed"):
        make_trainer(callback, Fail()).train()

    assert callback.model is None
    assert list(registry.customized_models()) == []


def test_a_failed_training_keeps_its_name_when_it_is_run_again(
    registry: ModelRegistry, make_trainer: MakeTrainer
) -> None:
    training_id = uuid.uuid4()
    first = RegisterCallback(registry, train_name="support", training_id=training_id)
    with pytest.raises(RuntimeError):
        make_trainer(first, Fail()).train()

    second = RegisterCallback(registry, train_name="support", training_id=training_id)
    make_trainer(second).train()

    assert second.model is not None
    assert second.model.name == first.name


def test_a_name_that_is_taken_is_refused_before_the_first_step(
    registry: ModelRegistry, make_trainer: MakeTrainer
) -> None:
    one, other = (uuid.UUID(f"abcd{n}000-0000-4000-8000-000000000000") for n in (1, 2))
    registry.reserve(train_name="support", base_model="llama-tiny", training_id=one)

    trainer = make_trainer(RegisterCallback(registry, train_name="support", training_id=other))
    with pytest.raises(AlreadyExistsError):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_base_is_found_by_the_path_it_was_trained_from(
    registry: ModelRegistry, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = RegisterCallback(registry.root, train_name="support")
    make_trainer(callback).train()
    assert callback.model is not None
    assert callback.model.base == "llama-tiny"

    empty = RegisterCallback(tmp_path / "empty", train_name="support")
    with pytest.raises(BaseModelMismatch, match="add_base_model"):
        make_trainer(empty).train()


@pytest.fixture
def losing(tiny_base: Path, tmp_path: Path) -> tuple[ModelRegistry, TrainerCallback]:
    """A registry whose base is moved away in the first step of a training, and what does it."""

    class LoseBase(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if base.exists():
                base.rename(tmp_path / "moved")

    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_base.iterdir():
        os.link(path, base / path.name)
    registry = ModelRegistry(tmp_path / "other")
    registry.add_base_model("copy", base)
    return registry, LoseBase()


def test_a_failed_registration_kills_no_training_and_is_taken_up_later(
    losing: tuple[ModelRegistry, TrainerCallback], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    other, lose_base = losing
    callback = RegisterCallback(other, train_name="support", base_model="copy")
    trainer = make_trainer(callback, lose_base)
    assert trainer.train().global_step == 2

    assert callback.model is None
    assert isinstance(callback.error, RegistrationError)
    assert "recover() registers it" in str(callback.error)
    assert Path(callback.error.directory).is_relative_to(other.root)
    assert list((tmp_path / "out").iterdir()) == []
    assert any("it is kept" in done for done in other.recover())

    other.relocate_base_model("copy", tmp_path / "moved")
    assert any("registered copy_support" in done for done in other.recover())
    (model,) = other.customized_models()
    assert (model.name, model.training_id) == (callback.name, callback.training_id)
    assert model.card.evaluation.steps == 2
    assert model.card.training.base_digest == other.get(BaseModel, "copy").digest
    assert other.recover() == []


def test_what_is_kept_is_moved_and_needs_no_room(
    losing: tuple[ModelRegistry, TrainerCallback],
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    other, lose_base = losing
    callback = RegisterCallback(other, train_name="support", base_model="copy")
    monkeypatch.setattr(shutil, "copytree", full)
    make_trainer(callback, lose_base).train()
    assert isinstance(callback.error, RegistrationError)
    assert Path(callback.error.directory).is_relative_to(other.root)


def test_what_interrupted_trainings_and_downloads_left_is_removed_in_the_end(
    losing: tuple[ModelRegistry, TrainerCallback], make_trainer: MakeTrainer
) -> None:
    other, lose_base = losing
    callback = RegisterCallback(other, train_name="support", base_model="copy")
    make_trainer(callback, lose_base).train()
    assert callback.error is not None
    kept = Path(callback.error.directory)
    for name in (".unregistered/half", ".hub/half"):
        (other.root / name).mkdir(parents=True)
        (other.root / name / "model.safetensors").write_bytes(b"x")

    found = other.gc(grace_seconds=0)
    assert [(one.key, one.removed) for one in found] == [
        (".hub/half", True),
        (".unregistered/half", False),  # all that there is of a training, perhaps
    ]
    for path in (*other.root.glob(".unregistered/**/*"), *other.root.glob(".unregistered/*")):
        os.utime(path, (0, 0))
    assert not any(one.removed for one in other.gc(dry_run=True))
    assert [(one.key, one.removed) for one in other.gc()] == [(".unregistered/half", True)]
    assert other.gc() == []
    assert kept.is_dir()


def test_what_was_kept_is_taken_up_though_a_tool_is_down(
    losing: tuple[ModelRegistry, TrainerCallback],
    make_trainer: MakeTrainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down(*_: object) -> None:
        raise DeploymentError("the tool does not answer")

    other, lose_base = losing
    make_trainer(RegisterCallback(other, train_name="a", base_model="copy"), lose_base).train()
    other.relocate_base_model("copy", tmp_path / "moved")
    monkeypatch.setattr("customized_models.registry.recover_deployments", down)
    with pytest.raises(DeploymentError):
        other.recover()
    assert [model.train_name for model in other.customized_models()] == ["a"]


def test_what_cannot_be_removed_keeps_no_training_from_being_registered(
    registry: ModelRegistry, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def of_nfs(path: Any, ignore_errors: bool = False, **options: Any) -> None:
        if "unregistered-" in str(path) and not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, ignore_errors, **options)

    monkeypatch.setattr(shutil, "rmtree", of_nfs)
    callback = RegisterCallback(registry, train_name="support", strict=True)
    make_trainer(callback).train()
    assert [callback.model] == list(registry.customized_models())


def test_whatever_fails_at_the_end_kills_no_training(
    registry: ModelRegistry, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MalformedError("odd")

    callback = RegisterCallback(registry, train_name="a")
    with monkeypatch.context() as patch:
        patch.setattr("customized_models.trained_models.peft_settings", fails)
        make_trainer(callback).train()
    assert isinstance(callback.error, RegistrationError)
    assert any("registered" in done for done in registry.recover())

    callback = RegisterCallback(registry, train_name="b")
    with monkeypatch.context() as patch:
        patch.setattr("customized_models.training.evaluation_summary", fails)
        make_trainer(callback).train()
    assert isinstance(callback.error, RegistrationError)


def test_a_strict_callback_raises(
    losing: tuple[ModelRegistry, TrainerCallback], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    other, lose_base = losing
    callback = RegisterCallback(other, train_name="support", base_model="copy", strict=True)
    with pytest.raises(RegistrationError, match="relocate_base_model"):
        make_trainer(callback, lose_base).train()


def test_a_base_that_is_gone_is_refused_before_the_first_step(
    losing: tuple[ModelRegistry, TrainerCallback], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    other, _ = losing
    (tmp_path / "base").rename(tmp_path / "moved")
    callback = RegisterCallback(other, train_name="support", base_model="copy")
    trainer = make_trainer(callback)
    with pytest.raises(BaseModelMissingError):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_base_that_changed_since_the_training_began_is_refused(
    registry: ModelRegistry, tiny_adapter: Path
) -> None:
    began = {"base_digest": "blake3:" + "0" * 64}
    with pytest.raises(BaseModelMismatch, match="the training began with"):
        registry.register(
            tiny_adapter, train_name="support", base_model="llama-tiny", training=began
        )


def test_a_resumed_training_is_the_same_model(
    registry: ModelRegistry, make_trainer: MakeTrainer
) -> None:
    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("the machine was taken away")

    training_id = uuid.uuid4()
    first = RegisterCallback(registry, train_name="support", training_id=training_id)
    with pytest.raises(RuntimeError):
        make_trainer(first, Stop(), save_strategy="steps", save_steps=1).train()

    second = RegisterCallback(registry, train_name="support", training_id=training_id)
    trainer = make_trainer(second, save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=True)

    assert second.model is not None
    assert second.model.name == first.name
    assert second.model.card.evaluation.steps == 2
    assert second.model.card.evaluation.log_entries == 2  # one before, one after


def test_a_callback_registers_one_training(
    registry: ModelRegistry, make_trainer: MakeTrainer
) -> None:
    callback = RegisterCallback(registry, train_name="support")
    trainer = make_trainer(callback)
    trainer.train()
    with pytest.raises(AlreadyExistsError, match="another callback"):
        trainer.train()


def test_a_trial_of_a_hyperparameter_search_is_not_registered(
    registry: ModelRegistry, make_trainer: MakeTrainer
) -> None:
    callback = RegisterCallback(registry, train_name="support")
    trainer = make_trainer(callback)
    trainer.state.is_hyper_param_search = True
    callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)

    assert callback.name is None
    assert list(registry.customized_models()) == []


def test_the_best_checkpoint_is_what_is_registered(
    registry: ModelRegistry, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    callback = RegisterCallback(registry, train_name="support")
    trainer = make_trainer(
        callback,
        max_steps=3,
        **FIRST_IS_BEST,
    )
    trainer.train()

    best = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    assert trainer.state.best_global_step == 1
    assert callback.model is not None
    with registry.checkout(callback.model) as directory:
        stored = load_file(directory / "adapter_model.safetensors")
    assert all(stored[name].equal(best[name]) for name in best)
    evaluation = callback.model.card.evaluation
    logged = {e["step"]: e for e in trainer.state.log_history if "eval_loss" in e}
    losses = {e["step"]: e["loss"] for e in trainer.state.log_history if "loss" in e}
    assert (evaluation.steps, evaluation.last_loss) == (1, losses[1])
    assert evaluation.metrics == {"eval_loss": logged[1]["eval_loss"]}
    assert evaluation.best_metric == logged[1]["eval_loss"]

    again = register_from_trainer(registry, trainer, train_name="again")
    assert again is not None
    assert again.card.evaluation == evaluation


def test_the_files_of_a_training_tell_of_the_adapter_that_was_kept(
    registry: ModelRegistry, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer(
        max_steps=3,
        **FIRST_IS_BEST,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    out = tmp_path / "out"
    logged = {e["step"]: e for e in trainer.state.log_history if "eval_loss" in e}

    kept = registry.register(out, train_name="kept")
    last = registry.register(out / "checkpoint-3", train_name="last")

    for model, step in ((kept, 1), (last, 3)):
        evaluation = model.card.evaluation
        assert (evaluation.steps, evaluation.metrics["eval_loss"]) == (
            step,
            logged[step]["eval_loss"],
        )


def test_what_is_evaluated_later_is_added_to_the_card(
    registry: ModelRegistry, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise DatabaseError("the database is busy")

    callback = RegisterCallback(registry, train_name="support")
    trainer = make_trainer(callback, eval_strategy="steps", eval_steps=1)
    trainer.train()
    assert callback.model is not None
    before = callback.model.card.evaluation.metrics

    measured = trainer.evaluate(EXAMPLES[:1], metric_key_prefix="test")

    after = registry.get(CustomizedModel, callback.model.name)
    assert after == callback.model
    assert after.card.evaluation.metrics == {**before, "test_loss": measured["test_loss"]}
    with monkeypatch.context() as patch:
        patch.setattr(ModelRegistry, "add_evaluation", busy)
        trainer.evaluate()  # which is logged
        callback.strict = True
        with pytest.raises(DatabaseError):
            trainer.evaluate()
    registry.delete(after)
    trainer.evaluate()  # which nobody is told of


class StopAfterOne(TrainerCallback):
    """Gives a training up after its first step, as a pruner does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_a_training_that_was_given_up_is_not_registered(
    registry: ModelRegistry, make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RegisterCallback(registry, train_name="pruned")
    trainer = make_trainer(callback, StopAfterOne())
    trainer.train()

    assert callback.model is None
    assert list(registry.customized_models()) == []
    assert "stopped its training at step 1 of 2" in caplog.text
    kept = register_from_trainer(registry, trainer, train_name="kept")
    assert kept is not None
    assert kept.card.evaluation.steps == 1


def test_a_training_that_stopped_for_want_of_progress_is_registered(
    registry: ModelRegistry, make_trainer: MakeTrainer
) -> None:
    callback = RegisterCallback(registry, train_name="early")
    trainer = make_trainer(
        callback,
        EarlyStoppingCallback(early_stopping_patience=1),
        max_steps=6,
        **FIRST_IS_BEST,
    )
    trainer.train()

    assert trainer.state.global_step < 6
    assert callback.model is not None
    assert callback.model.card.evaluation.steps == trainer.state.best_global_step


def test_an_adapter_of_another_name_is_registered_alike(
    registry: ModelRegistry, make_trainer: MakeTrainer, tiny_base: Path
) -> None:
    callback = RegisterCallback(registry, train_name="support")
    trainer = make_trainer(callback, model=peft_model(tiny_base, "mine"))
    trainer.train()
    registered = register_from_trainer(registry, trainer, train_name="again")

    assert callback.model is not None
    assert registered is not None
    with registry.checkout(callback.model) as one, registry.checkout(registered) as other:
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_full_model_is_registered_as_well(
    registry: ModelRegistry, make_trainer: MakeTrainer, tiny_base: Path
) -> None:
    callback = RegisterCallback(registry, train_name="support")
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype="auto")
    trainer = make_trainer(callback, model=model)
    trainer.train()

    assert callback.model is not None
    assert callback.model.kind == "checkpoint"
    assert str(callback.model.card).startswith("full fine-tuning, 2 steps")
    with registry.checkout(callback.model) as directory:
        assert (directory / "tokenizer.json").is_file()
        stored = load_file(directory / "model.safetensors")
    trained = model.state_dict()
    assert all(stored[name].equal(trained[name]) for name in stored)

    again = register_from_trainer(registry, trainer, train_name="again")
    assert again is not None
    assert (again.kind, again.digest) == ("checkpoint", callback.model.digest)


def test_a_model_of_no_known_kind_is_refused_at_the_beginning(registry: ModelRegistry) -> None:
    with pytest.raises(UnsupportedAdapterError, match="Linear"):
        register_from_model(registry, torch.nn.Linear(2, 2), train_name="support")


def test_an_adapter_of_transformers_own_is_refused_with_the_way_out(
    registry: ModelRegistry, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedAdapterError, match="get_peft_model"):
        register_from_model(registry, model, train_name="support", base_model="llama-tiny")


def test_a_loop_without_a_trainer_registers_what_it_has_in_memory(
    registry: ModelRegistry, tiny_base: Path
) -> None:
    accelerator = Accelerator(cpu=True)
    model = peft_model(tiny_base)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    for example in EXAMPLES[:2]:
        batch = {key: torch.tensor([value]) for key, value in example.items()}
        accelerator.backward(model(**batch).loss)
        optimizer.step()

    registered = register_from_model(
        registry,
        model,
        train_name="loop",
        training={"arguments": {"learning_rate": 0.1}},
        evaluation={"eval_loss": 1.5},
        processing_class=AutoTokenizer.from_pretrained(tiny_base),
        accelerator=accelerator,
    )

    assert registered is not None
    assert registered.base == "llama-tiny"
    assert registered.card.training.peft["method"] == "LoRA"
    assert registered.card.training.arguments == {"learning_rate": 0.1}
    assert registered.card.evaluation.metrics == {"eval_loss": 1.5}
    with registry.checkout(registered) as directory:
        stored = load_file(directory / "adapter_model.safetensors")
        assert (directory / "tokenizer.json").is_file()
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert stored.keys() == trained.keys()
    assert all(stored[name].equal(trained[name]) for name in stored)


def test_a_finished_trainer_is_registered(
    registry: ModelRegistry, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.train()
    measured = trainer.evaluate()

    model = register_from_trainer(registry, trainer, train_name="support")

    assert model is not None
    assert registry.get(CustomizedModel, model.name) == model
    assert model.card.evaluation.metrics["eval_loss"] == measured["eval_loss"]
    assert list((tmp_path / "out").iterdir()) == []


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_in_the_directory_is_neither_read_nor_copied(
    registry: ModelRegistry, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    out = tmp_path / "out"
    assert (out / "training_args.bin").is_file()
    for name in ("training_args.bin", "optimizer.pt"):
        (out / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))

    model = registry.register(out, train_name="support", base_model="llama-tiny")

    assert not (tmp_path / "sprung").exists()
    assert model.card.evaluation.steps == 2
    with registry.checkout(model) as directory:
        assert not {"training_args.bin", "optimizer.pt"} & {p.name for p in directory.iterdir()}
        assert str(tmp_path) not in (directory / "README.md").read_text()
        assert str(tmp_path) not in json.dumps(
            json.loads((directory / "manifest.json").read_text())
        )


def test_sharded_weights_are_refused_with_the_way_out(
    registry: ModelRegistry, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = RegisterCallback(registry, train_name="support")
    trainer = make_trainer(callback)
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UnsupportedError, match="register_from_trainer"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_importing_the_library_does_not_import_the_trainer() -> None:
    script = "import customized_models, sys; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
