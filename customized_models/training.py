"""Registers what is trained: a callback for Trainers, and functions for a model in memory.

Unlike the rest of the package, importing this module imports transformers.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import evolve, frozen
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .arguments import instance, texts, truth
from .cards.checkpoints import best_step, is_unfinished, state_at
from .cards.reading import evaluation_summary, metrics_of, training_arguments
from .errors import (
    AlreadyExistsError,
    CustomizedModelsError,
    NotFoundError,
    RegistrationError,
    UnsupportedError,
    shown,
)
from .models import BaseModel, CustomizedModel, EvaluationSummary, TrainingConfiguration
from .outbox import Outbox
from .registering import Training
from .registry import ModelRegistry
from .trained_models import SHARDED, TrainedModel, gather, is_first_rank

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["RegisterCallback", "register_from_model", "register_from_trainer"]

_log = logging.getLogger(__name__)


@frozen
class _Registration:
    """A training whose name is reserved."""

    registry: ModelRegistry
    name: str
    training: Training

    @classmethod
    def reserved(
        cls, registry: ModelRegistry, trained: TrainedModel, wanted: Training
    ) -> _Registration:
        """Reserve the name of a training, and record which base it begins with."""
        base = (
            registry.find_base_model(trained.stated_base)
            if wanted.base_model is None
            else registry.get(BaseModel, wanted.base_model)
        )
        with registry.checkout(base):  # it is there, and as it was added
            reserved = registry.catalog.reservations.reserve(
                train_name=wanted.train_name, training_id=wanted.id, base_model=base.name
            )
        configuration = evolve(
            wanted.configuration or TrainingConfiguration(),
            base_digest=base.digest,
            base_commit=trained.base_commit,
        )
        training = evolve(
            wanted, base_model=base.name, id=reserved.training_id, configuration=configuration
        )
        return cls(registry, reserved.name, training)

    def register(
        self, saved: Path, trained: TrainedModel, evaluation: EvaluationSummary | None
    ) -> CustomizedModel:
        """Register what was saved of a model in a directory.

        Raises:
            RegistrationError: It could not be registered. The cause says why.
        """
        training = evolve(self.training, evaluation=evaluation or EvaluationSummary())
        try:
            known = training.configuration or TrainingConfiguration()
            configuration = evolve(known, peft=trained.settings(saved))
            training = evolve(training, configuration=configuration)
            return self.registry.register(
                saved,
                train_name=training.label,
                base_model=training.base_model,
                training_id=training.id,
                training=training.configuration,
                evaluation=training.evaluation,
            )
        except Exception as error:
            raise self._kept(saved, training, error) from error

    def _kept(self, saved: Path, training: Training, error: Exception) -> RegistrationError:
        """The error that says where what was trained is kept, and how it is registered later."""
        try:
            kept = Outbox(self.registry.root).keep(self.name, saved, training)
            way_out = "ModelRegistry.recover() registers it"
        except Exception:  # the error that there was is the one to tell of
            kept = saved
            way_out = (
                f"retry with register(that directory, train_name={training.label!r}, "
                f"base_model={training.base_model!r}, "
                f"training_id=uuid.UUID({str(training.id)!r}))"
            )
        return RegistrationError(
            f"{self.name} is trained but not registered ({type(error).__name__}: {error}); "
            f"it is kept in {shown(kept)}; {way_out}",
            str(kept),
        )


class RegisterCallback(TrainerCallback):
    """Registers the model that a `Trainer` trains, after the training has succeeded.

    That is the adapter of a `PeftModel`, or a full model of transformers. The name is reserved when
    the training begins, so that a name that is taken is an error at the start and not at the end;
    so is a base model that is gone. When the training ends, what is in memory is registered with
    the tokenizer. This is the best checkpoint if the Trainer has loaded it, and the card has the
    steps, losses and metrics of that one. What `trainer.evaluate()` measures later is added to the
    card.

    Nothing is registered of a training that fails, of a trial of `hyperparameter_search`, and of a
    training that a callback has stopped before its end, as a pruned trial is, unless
    `EarlyStoppingCallback` is among its callbacks. `register_from_trainer` registers any.

    A callback is for one training. If registering fails at the end, the training goes on: the error
    is logged and is the attribute `error`, and what was trained is kept in the registry's
    directory, where `ModelRegistry.recover` registers it.

    Args:
        registry: A registry, or the directory of one.
        train_name: What you call the training; see `ModelRegistry.register`.
        base_model: Its technical name. If None, the registered base model whose name, Hub id or
            path the model states.
        training_id: Drawn when the training begins if None. A resumed training keeps its name with
            the same id.
        datasets: Names of the datasets, for the card.
        strict: Raise if registering fails at the end, instead of going on.

    Attributes:
        name: The reserved name, once the training has begun.
        model: The customized model, once it is registered.
        error: Why it could not be registered.

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
        strict: bool = False,
    ) -> None:
        self.registry = _registry(registry)
        given = Training.given(train_name, base_model, training_id)
        self.train_name = given.label
        self.base_model = given.base_model
        self.training_id = given.id
        self.datasets = texts("datasets", datasets)
        self.strict = truth("strict", strict)
        self.name: str | None = None
        self.model: CustomizedModel | None = None
        self.error: RegistrationError | None = None
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
            BaseModelMismatch: No base model matches, or several do, or it has changed.
            BaseModelMissingError: The base model's files are gone.
            UnsupportedError: The weights are sharded; see `register_from_trainer`.
            UnsupportedAdapterError: The model is neither a `PeftModel` with one active adapter nor
                a model of transformers.
        """
        if state.is_hyper_param_search:
            return
        if self.model is not None:
            raise AlreadyExistsError(
                f"this RegisterCallback has registered {self.model.name}; "
                f"another training needs another callback"
            )
        _refuse_sharded(args)
        trained = TrainedModel.of(kwargs["model"])
        if not state.is_world_process_zero:
            return
        wanted = Training.given(
            self.train_name, self.base_model, self.training_id, _configuration(args, self.datasets)
        )
        self._registration = _Registration.reserved(self.registry, trained, wanted)
        self.training_id = self._registration.training.id
        self.name = self._registration.name

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Save what was trained, and register it.

        Raises:
            RegistrationError: It could not be registered, and the callback is strict.
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
        try:
            with _registering(registration.name):
                self.model = _registered(
                    registration,
                    TrainedModel.of(kwargs["model"]),
                    Path(str(args.output_dir)),
                    kwargs.get("processing_class"),
                    evaluation_summary(_state_of_model(args, state)),
                )
        except RegistrationError as error:
            if self.strict:
                raise
            self.error = error
            _log.error("%s", error)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Add what is measured after the training to the card of what was registered.

        Raises:
            CustomizedModelsError: It could not be added, and the callback is strict.
        """
        measured = metrics_of(kwargs.get("metrics") or {})
        if self.model is not None and measured:
            try:
                self.model = self.registry.add_evaluation(self.model, measured)
            except NotFoundError:  # it has been deleted since
                pass
            except CustomizedModelsError as error:
                if self.strict:
                    raise
                _log.error("what was measured of %s is not in its card: %s", self.name, error)


def register_from_model(
    registry: ModelRegistry | str | os.PathLike[str],
    model: Any,
    *,
    train_name: str,
    base_model: BaseModel | str | None = None,
    training_id: uuid.UUID | str | None = None,
    training: TrainingConfiguration | Mapping[str, Any] | None = None,
    evaluation: EvaluationSummary | Mapping[str, Any] | None = None,
    processing_class: Any = None,
    accelerator: Accelerator | None = None,
) -> CustomizedModel | None:
    """Register a model in memory, as a training loop without a Trainer has it.

    Call it on every rank: weights that lie on several are gathered, by accelerate if `accelerator`
    is given, else by torch. The first rank writes.

    Args:
        registry: A registry, or the directory of one.
        model: A `PeftModel` with one active adapter or a model of transformers, wrapped or not.
        train_name: See `ModelRegistry.register`, as for the following.
        base_model: Its technical name. If None, the registered base model whose name, Hub id or
            path the model states.
        training_id: Drawn if None.
        training: How it was trained; the method's settings are the model's own.
        evaluation: What was measured.
        processing_class: The tokenizer or processor that is kept with it.
        accelerator: The one that has prepared the model, if any.

    Returns:
        The customized model on the first rank, None on the others.

    Raises:
        AlreadyExistsError: The name is taken.
        BaseModelMismatch: No base model matches, or several do, or it has changed.
        UnsupportedAdapterError: It is neither a `PeftModel` with one active adapter nor a model of
            transformers.
        RegistrationError: Registering failed. What was trained is kept.
    """
    wanted = Training.given(train_name, base_model, training_id, training, evaluation)
    trained, found = TrainedModel.of(model), _registry(registry)
    state = gather(model, accelerator)
    if not is_first_rank(accelerator):
        return None
    registration = _Registration.reserved(found, trained, wanted)
    scratch = Outbox(found.root).directory
    return _registered(registration, trained, scratch, processing_class, wanted.evaluation, state)


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

    Weights that FSDP or DeepSpeed have spread over ranks are gathered. Evaluations so far are in
    the card.

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
        AlreadyExistsError, BaseModelMismatch, UnsupportedAdapterError, RegistrationError: See
            `register_from_model`.
    """
    instance("trainer", trainer, Trainer)
    return register_from_model(
        registry,
        trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model,
        train_name=train_name,
        base_model=base_model,
        training_id=training_id,
        training=_configuration(trainer.args, texts("datasets", datasets)),
        evaluation=evaluation_summary(_state_of_model(trainer.args, trainer.state)),
        processing_class=trainer.processing_class,
        accelerator=trainer.accelerator,
    )


def _registered(
    registration: _Registration,
    trained: TrainedModel,
    scratch: Path,
    processing_class: Any,
    evaluation: EvaluationSummary | None,
    state: Mapping[str, Any] | None = None,
) -> CustomizedModel:
    """Save a model below `scratch`, register it, and remove that copy.

    Raises:
        RegistrationError: It could not be saved, or not registered.
    """
    with _registering(registration.name):
        scratch.mkdir(parents=True, exist_ok=True)
        prefix = f"unregistered-{registration.name}-"
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=scratch))
        saved = trained.save(directory, processing_class, state)
    try:
        model = registration.register(saved, trained, evaluation)
    except RegistrationError as error:
        if Path(error.directory) != saved:  # it has been moved
            shutil.rmtree(directory, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)
    return model


@contextmanager
def _registering(name: str) -> Iterator[None]:
    """Turn any error in the block into `RegistrationError`: the training itself has succeeded."""
    try:
        yield
    except RegistrationError:
        raise
    except Exception as error:
        raise RegistrationError(
            f"{name} is trained but not registered ({type(error).__name__}: {error}); the last "
            f"checkpoint of the training can be registered with ModelRegistry.register"
        ) from error


def _registry(given: ModelRegistry | str | os.PathLike[str]) -> ModelRegistry:
    return given if isinstance(given, ModelRegistry) else ModelRegistry(given)


def _configuration(args: TrainingArguments, datasets: Sequence[str]) -> TrainingConfiguration:
    arguments: dict[str, Any] = args.to_dict()  # type: ignore[no-untyped-call]  # theirs
    return TrainingConfiguration(arguments=training_arguments(arguments), datasets=tuple(datasets))


def _state_of_model(args: TrainingArguments, state: TrainerState) -> Mapping[str, Any]:
    """What was logged of the weights that the Trainer has loaded at the end."""
    best = best_step(vars(state)) if args.load_best_model_at_end else None
    return vars(state) if best is None else state_at(vars(state), best)


def _refuse_sharded(args: TrainingArguments) -> None:
    kind = args.distributed_state.distributed_type.value
    if kind in SHARDED:
        raise UnsupportedError(
            f"the weights are sharded ({kind}), and a callback cannot gather them: leave "
            f"RegisterCallback out, and after trainer.train() call "
            f"customized_models.training.register_from_trainer on every rank"
        )
