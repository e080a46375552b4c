"""The names of an adapter's tensors: as PEFT gives them, and as they are left by what wraps models.

Law: `plain_names(plain_names(names).values())` changes nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator
from functools import partial

from attrs import frozen

from ..errors import MalformedError, listed

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)\.")

_WRAPPERS = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
"""The steps that wrappers leave in the names of what they wrap."""

_FACTOR = re.compile(r".*\.lora_[AB](?:\.([^.]+))?\.weight")
_PRODUCT = re.compile(r"\.lora_(?:[AB]\.weight|E|embedding_[AB])$")


@frozen
class Renaming:
    """What is changed in names, and why.

    `apply` gives the new name; one that stays as it is does not need the change.
    """

    reason: str
    apply: Callable[[str], str]


def plain_names(names: Collection[str], *, prefixed: bool) -> tuple[dict[str, str], list[str]]:
    """The names that PEFT would have given these tensors.

    Args:
        names: As they are in a file.
        prefixed: Whether PEFT puts `PREFIX` before all names of this adapter's type.

    Returns:
        The new names by the old ones, in their order, and what was done, a sentence each.

    Raises:
        MalformedError: Two of them would have the same name.
    """
    renamed, notes = {name: name for name in names}, []
    for renaming in _renamings(names, prefixed):
        changed = {old: renaming.apply(new) for old, new in renamed.items()}
        if count := sum(changed[old] != renamed[old] for old in names):
            notes.append(f"{count} tensors were renamed: {renaming.reason}.")
            renamed = changed
    if twice := [name for name, count in Counter(renamed.values()).items() if count > 1]:
        raise MalformedError(
            f"the adapter has several tensors for {listed(twice)}, under names that differ in what "
            f"wraps the model; save it once more from the unwrapped model"
        )
    return renamed, notes


def _renamings(names: Collection[str], prefixed: bool) -> Iterator[Renaming]:
    for step, by in _WRAPPERS.items():
        yield Renaming(f"{step} of {by} was left in their names", partial(_without, {step}))
    bare = {_without(_WRAPPERS, name) for name in names}
    if bare and all(name.startswith("module.") for name in bare):
        yield Renaming(
            "module. of DistributedDataParallel was left before their names",
            lambda name: name.removeprefix("module."),
        )
        bare = {name.removeprefix("module.") for name in bare}
    if bare and all(name.startswith(PREFIX * 2) for name in bare):
        yield Renaming(f"{PREFIX} stood more than once before their names", _with_one_prefix)
    if prefixed and bare and not any(name.startswith("base_model.") for name in bare):
        yield Renaming(f"{PREFIX} was missing before their names", lambda name: PREFIX + name)
    if (adapter := _adapter_name(bare)) is not None:
        yield Renaming(
            f"the adapter's name {adapter} was left in their names",
            lambda name: _without_adapter_name(name, adapter),
        )


def _without(steps: Container[str], name: str) -> str:
    return ".".join(step for step in name.split(".") if step not in steps)


def _with_one_prefix(name: str) -> str:
    while name.startswith(PREFIX * 2):
        name = name.removeprefix(PREFIX)
    return name


def _adapter_name(names: Collection[str]) -> str | None:
    """The adapter's name, if it is left in: `default` in all, or another in all LoRA factors."""
    if names and all("default" in name.split(".")[-2:] for name in names):
        return "default"
    found = {match[1] or "" for name in names if (match := _FACTOR.fullmatch(name))}
    return found.pop() if len(found) == 1 and found != {""} else None


def _without_adapter_name(name: str, adapter: str) -> str:
    """Source: `get_peft_model_state_dict` in `peft/utils/save_and_load.py`, which takes it out."""
    steps = name.split(".")
    if adapter not in steps[-2:]:
        return name
    place = len(steps) - 1 - steps[::-1].index(adapter)
    del steps[place]
    if steps[place - 1] == "modules_to_save":
        del steps[place - 1]
    elif steps[-2:] == ["lora_magnitude_vector", "weight"]:
        steps.pop()
    return ".".join(steps)


def layer_of(name: str) -> int:
    """The number of the layer that a tensor belongs to; -1 if to none, 10**9 if out of bounds."""
    match = _LAYER.search(name)
    return int(match[1]) if match and len(match[1]) < 10 else (10**9 if match else -1)


def tail(name: str) -> str:
    """From the layer's number on: what stays when a model is nested in another."""
    match = _LAYER.search(name)
    return name[match.start(1) :] if match else name


def module_of(name: str) -> str:
    """The module that a tensor of an adapter is for, by its name."""
    path, _, lora = name.removeprefix(PREFIX).partition(".lora_")
    return path if lora else path.rpartition(".")[0]


def is_factor(name: str) -> bool:
    """Whether a tensor is one of those that a LoRA's change is the product of."""
    return _PRODUCT.search(name) is not None
