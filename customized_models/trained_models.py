"""Models in memory, as trainings have them: what can be registered of them, and saving it.

This module is only imported where transformers is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import frozen
from peft import PeftModel
from transformers import PreTrainedModel

from .adapters.settings import CONFIG
from .cards.reading import FULL, peft_settings
from .errors import UnsupportedAdapterError, listed
from .files.reading import json_object

if TYPE_CHECKING:
    from accelerate import Accelerator

    State: TypeAlias = Mapping[str, Any] | None

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""The kinds of distribution, as accelerate calls them, whose weights lie on several ranks."""


@frozen
class TrainedModel:
    """A model that is trained, without what wraps it to spread it over ranks.

    Attributes:
        model: The adapter with its base, or the full model.
        adapter: The name of the adapter that is trained; None for a full model.
    """

    model: Any
    adapter: str | None

    @classmethod
    def of(cls, model: object) -> TrainedModel:
        """The model in what a training has of it.

        Raises:
            UnsupportedAdapterError: It is neither a `PeftModel` with one active adapter nor a model
                of transformers.
        """
        model = _unwrapped(model)
        if isinstance(model, PreTrainedModel) and not isinstance(model, PeftModel):
            if getattr(model, "_hf_peft_config_loaded", False):
                raise UnsupportedAdapterError(
                    "the model has an adapter of model.add_adapter, which transformers saves in "
                    "its own way; train peft.get_peft_model(model, config) instead"
                )
            return cls(model, None)
        if not isinstance(model, PeftModel):
            raise UnsupportedAdapterError(
                f"a {type(model).__name__} is trained, which is neither a PeftModel nor a model of "
                f"transformers, so it cannot be registered"
            )
        if len(model.active_adapters) != 1:
            raise UnsupportedAdapterError(
                f"{len(model.active_adapters)} adapters are active "
                f"({listed(model.active_adapters)}); exactly one can be registered"
            )
        return cls(model, model.active_adapters[0])

    @property
    def stated_base(self) -> str:
        """What it was loaded from: a path or a Hub id."""
        if self.adapter is not None:
            return str(self.model.peft_config[self.adapter].base_model_name_or_path)
        return str(self.model.config.name_or_path)

    @property
    def base_commit(self) -> str | None:
        """The commit on the Hub that the base was loaded from, if it was."""
        commit = getattr(getattr(self.model, "config", None), "_commit_hash", None)
        return commit if isinstance(commit, str) else None

    def settings(self, saved: Path) -> dict[str, Any]:
        """For the card: those of the method, as they were saved."""
        return dict(FULL) if self.adapter is None else peft_settings(json_object(saved / CONFIG))

    def save(self, directory: Path, processing_class: Any = None, state: State = None) -> Path:
        """Save the adapter or the full model, with its tokenizer or processor.

        Args:
            directory: Where to.
            processing_class: The tokenizer or processor, if there is one.
            state: Its tensors, if they were gathered from several ranks.

        Returns:
            What can be registered.
        """
        only = {} if self.adapter is None else {"selected_adapters": [self.adapter]}
        self.model.save_pretrained(str(directory), state_dict=state, **only)
        # PEFT saves an adapter of another name than this one below the directory.
        saved = directory if self.adapter in (None, "default") else directory / str(self.adapter)
        if processing_class is not None:
            processing_class.save_pretrained(str(saved))
        return saved


def gather(model: Any, accelerator: Accelerator | None) -> State:
    """The tensors of a model that lie on several ranks, together; None if each rank has them.

    Every rank has to call this. Without an accelerator, the first one gets them.
    """
    if accelerator is not None:
        sharded = accelerator.distributed_type.value in SHARDED
        return accelerator.get_state_dict(model) if sharded else None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    if not _is_sharded(model):
        return None
    options = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=_is_adapter(model)
    )
    return get_model_state_dict(model, options=options)


def _is_sharded(model: Any) -> bool:
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    return flat or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _is_adapter(model: Any) -> bool:
    return isinstance(_unwrapped(model), PeftModel)


def _unwrapped(model: Any) -> Any:
    """What DistributedDataParallel, FSDP and `torch.compile` wrap."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in _WRAPPERS:
            inner = model.module
        if inner is None:
            return model
        model = inner


_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


def is_first_rank(accelerator: Accelerator | None) -> bool:
    """Whether this process is the one of a training that writes."""
    if accelerator is not None:
        return bool(accelerator.is_main_process)
    from torch import distributed

    ranks = distributed.is_available() and distributed.is_initialized()
    return not ranks or distributed.get_rank() == 0
