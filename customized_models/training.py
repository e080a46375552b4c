"""Registers what a transformers `Trainer` trains: a callback, and a function for sharded weights.

Unlike the rest of the package, importing this module imports transformers.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .arguments import instance, texts
from .cards.checkpoints import best_step, is_unfinished, state_at
from .cards.reading import evaluation_summary, metrics_of, peft_settings, training_arguments
from .errors import (
    AlreadyExistsError,
    NotFoundError,
    RegistrationError,
    UnsupportedAdapterError,
    UnsupportedError,
    listed,
    shown,
)
from .files.reading import json_object
from .models import BaseModel, CustomizedModel, TrainingConfiguration
from .naming import train_name_of
from .registering import Training
from .registry import ModelRegistry

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["RegisterCallback", "register_from_trainer"]

_log = logging.getLogger(__name__)


@frozen
class _Registration:
    """A training whose name is reserved."""

    registry: ModelRegistry
    name: str
    train_name: str
    base_model: str
    training_id: uuid.UUID
    training: TrainingConfiguration

    @classmethod
    def reserved(
        cls,
        registry: ModelRegistry,
        model: PeftModel,
        *,
        train_name: str,
        base_model: str | None,
        training_id: uuid.UUID | None,
        training: TrainingConfiguration,
    ) -> _Registration:
        if base_model is None:
            stated = model.peft_config[_adapter_name(model)].base_model_name_or_path
            base_model = registry.find_base_model(stated).name
        reserved = registry.catalog.reservations.reserve(
            train_name=train_name_of(train_name), training_id=training_id, base_model=base_model
        )
        return cls(registry, reserved.name, train_name, base_model, reserved.training_id, training)

    def register(
        self, directory: Path, args: TrainingArguments, state: TrainerState
    ) -> CustomizedModel:
        """Register the adapter in `directory`, which a Trainer in that state has saved.

        Raises:
            RegistrationError: It could not be registered. The cause says why.
        """
        try:
            settings = peft_settings(json_object(directory / "adapter_config.json"))
            return self.registry.register(
                directory,
                train_name=self.train_name,
                base_model=self.base_model,
                training_id=self.training_id,
                training=evolve(self.training, peft=settings),
                evaluation=evaluation_summary(_state_of_model(args, state)),
            )
        except Exception as error:
            raise RegistrationError(
                f"{self.name} is trained but not registered ({type(error).__name__}: {error}); "
                f"the adapter is kept in {shown(directory)}; retry with register(that directory, "
                f"train_name={self.train_name!r}, base_model={self.base_model!r}, "
                f"training_id=uuid.UUID({str(self.training_id)!r}))",
                str(directory),
            ) from error


class RegisterCallback(TrainerCallback):
    """Registers the PEFT model that a `Trainer` trains, after the training has succeeded.

    The name is reserved when the training begins, so that a name that is taken is an error at the
    start and not at the end. When the training ends, the adapter in memory is registered with the
    tokenizer. This is the best adapter if the Trainer has loaded it, and the card has the steps,
    losses and metrics of that one. What `trainer.evaluate()` measures later is added to the card.

    Nothing is registered of a training that fails, of a trial of `hyperparameter_search`, and of a
    training that a callback has stopped before its end, as a pruned trial is, unless
    `EarlyStoppingCallback` is among its callbacks. `register_from_trainer` registers any.

    A callback is for one training. If registering fails, the adapter is kept in the Trainer's
    output directory, and the `RegistrationError` says where.

    Args:
        registry: A registry, or the directory of one.
        train_name: What the training is called; lower-case letters, digits, `.` and `-`.
        base_model: Its technical name. If None, the registered base model whose name, Hub id or
            path the adapter's configuration states.
        training_id: Drawn when the training begins if None. A resumed training keeps its name with
            the same id.
        datasets: Names of the datasets, for the card.

    Attributes:
        name: The reserved name, once the training has begun.
        model: The customized model, once it is registered.

    >>> trainer.add_callback(RegisterCallback("models", train_name="support"))  # doctest: +SKIP
    """

    def __init__(
        self,
        registry: ModelRegistry | str | os.PathLike[str],
        *,
        train_name: str,
        base_model: BaseModel | str | None = None,
        training_id: uuid.UUID | str | None = None,
        datasets: str | Iterable[str] = (),
    ) -> None:
        self.registry = registry if isinstance(registry, ModelRegistry) else ModelRegistry(registry)
        given = Training.given(train_name, base_model, training_id)
        self.train_name = given.label
        self.base_model = given.base_model
        self.training_id = given.id
        self.datasets = texts("datasets", datasets)
        self.name: str | None = None
        self.model: CustomizedModel | None = None
        self._registration: _Registration | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse a training that could not be registered, and reserve the name.

        Raises:
            AlreadyExistsError: The name is taken, or this callback has registered a training.
            BaseModelMismatch: No base model matches, or several do.
            UnsupportedError: The weights are sharded; see `register_from_trainer`.
            UnsupportedAdapterError: The model is not a `PeftModel` with one active adapter.
        """
        if state.is_hyper_param_search:
            return
        if self.model is not None:
            raise AlreadyExistsError(
                f"this RegisterCallback has registered {self.model.name}; "
                f"another training needs another callback"
            )
        _refuse_sharded(args)
        _adapter_name(kwargs["model"])
        if not state.is_world_process_zero:
            return
        self._registration = _Registration.reserved(
            self.registry,
            kwargs["model"],
            train_name=self.train_name,
            base_model=self.base_model,
            training_id=self.training_id,
            training=_configuration(args, self.datasets),
        )
        self.training_id = self._registration.training_id
        self.name = self._registration.name

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save the adapter in the Trainer's output directory, register it, and remove that copy.

        Raises:
            RegistrationError: Registering failed. The copy is kept.
        """
        registration, self._registration = self._registration, None
        if registration is None:
            return
        if control.should_training_stop and is_unfinished(vars(state), stopped=True):
            _log.warning(
                "%s is not registered: a callback has stopped its training at step %d of %d; "
                "register_from_trainer registers it all the same",
                registration.name,
                state.global_step,
                state.max_steps,
            )
            return
        output = Path(str(args.output_dir))
        output.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix=f"unregistered-{registration.name}-", dir=output))
        model = kwargs["model"]
        saved = _adapter_directory(model, directory)
        model.save_pretrained(str(directory), selected_adapters=[_adapter_name(model)])
        if kwargs.get("processing_class") is not None:
            kwargs["processing_class"].save_pretrained(str(saved))
        self.model = registration.register(saved, args, state)
        shutil.rmtree(directory)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add what is measured after the training to the card of what was registered."""
        measured = metrics_of(kwargs.get("metrics") or {})
        if self.model is not None and measured:
            with suppress(NotFoundError):  # it has been deleted since
                self.model = self.registry.add_evaluation(self.model, measured)


def register_from_trainer(
    registry: ModelRegistry | str | os.PathLike[str],
    trainer: Trainer,
    *,
    train_name: str,
    base_model: BaseModel | str | None = None,
    training_id: uuid.UUID | str | None = None,
    datasets: str | Iterable[str] = (),
) -> CustomizedModel | None:
    """Register what `trainer` has trained, sharded or not. Call it on every rank.

    The adapter is saved by `trainer.save_model`, which gathers sharded weights, in the Trainer's
    output directory. All ranks must share that directory. Evaluations so far are in the card.

    Args:
        registry: A registry, or the directory of one.
        trainer: After its training.
        train_name: See `RegisterCallback`, as for the following.
        base_model: Its technical name.
        training_id: Drawn if None.
        datasets: Names of the datasets.

    Returns:
        The customized model on the first rank, None on the others.

    Raises:
        AlreadyExistsError: The name is taken, or the adapter of a failed call is still there.
        BaseModelMismatch: No base model matches, or several do.
        UnsupportedAdapterError: The model is not a `PeftModel` with one active adapter.
        RegistrationError: Registering failed. The saved adapter is kept.
    """
    registry = registry if isinstance(registry, ModelRegistry) else ModelRegistry(registry)
    given, names = Training.given(train_name, base_model, training_id), texts("datasets", datasets)
    instance("trainer", trainer, Trainer)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    directory = Path(str(trainer.args.output_dir)) / f"unregistered-{given.train_name}"
    saved = _adapter_directory(model, directory)
    registration = None
    if trainer.is_world_process_zero():
        if directory.exists():
            raise AlreadyExistsError(
                f"{shown(directory)} has the adapter of an earlier call; register it or remove it"
            )
        registration = _Registration.reserved(
            registry,
            model,
            train_name=given.label,
            base_model=given.base_model,
            training_id=given.id,
            training=_configuration(trainer.args, names),
        )
    trainer.save_model(str(directory))
    if registration is None:
        return None
    if saved != directory and trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(str(saved))
    registered = registration.register(saved, trainer.args, trainer.state)
    shutil.rmtree(directory)
    return registered


def _configuration(args: TrainingArguments, datasets: Sequence[str]) -> TrainingConfiguration:
    arguments: dict[str, Any] = args.to_dict()  # type: ignore[no-untyped-call]  # theirs
    return TrainingConfiguration(arguments=training_arguments(arguments), datasets=tuple(datasets))


def _state_of_model(args: TrainingArguments, state: TrainerState) -> Mapping[str, Any]:
    """What was logged of the weights that the Trainer has loaded at the end."""
    best = best_step(vars(state)) if args.load_best_model_at_end else None
    return vars(state) if best is None else state_at(vars(state), best)


def _adapter_name(model: Any) -> str:
    """The one adapter being trained; `UnsupportedAdapterError` if there is not exactly one."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise UnsupportedAdapterError(
            f"the Trainer trains a {type(model).__name__}, not a PeftModel: "
            f"only adapters can be registered"
        )
    if len(model.active_adapters) != 1:
        raise UnsupportedAdapterError(
            f"{len(model.active_adapters)} adapters are active ({listed(model.active_adapters)}); "
            f"exactly one can be registered"
        )
    name: str = model.active_adapters[0]
    return name


def _adapter_directory(model: Any, directory: Path) -> Path:
    """Where `save_pretrained(directory)` puts the active adapter."""
    name = _adapter_name(model)
    return directory if name == "default" else directory / name


def _refuse_sharded(args: TrainingArguments) -> None:
    kind = args.distributed_state.distributed_type.value
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise UnsupportedError(
            f"the weights are sharded ({kind}), and a callback cannot gather them: leave "
            f"RegisterCallback out, and after trainer.train() call "
            f"customized_models.training.register_from_trainer on every rank"
        )
