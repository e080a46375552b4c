"""`MergeExecution`: base and adapter seen as one checkpoint, its tensors computed when asked for.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from attrs import evolve

from ..adapters.fitting import check_fits
from ..adapters.intake import Adapter
from ..adapters.tensor_names import PREFIX
from ..errors import MergeError, UnchangedTargetsError, UnmergedTensorsError, listed
from ..files.reading import json_object, opened, read_into
from ..files.safetensors import Checkpoint, TensorInfo, torch_dtype
from .groups import NOTHING_CHANGES, TensorGroup, group_tensors
from .injection import inject
from .private_apis import installed
from .skeleton import Skeleton, build_skeleton
from .strategies import MergeContext, ReadNext, Reference, Strategy, choose_strategy
from .strategies.copy import Copy

_OF_TEXT = frozenset({"vocab_size", "tie_word_embeddings"})


def prepare_merge(
    base: Checkpoint, adapter: Adapter, *, trust_remote_code: bool = False
) -> MergeExecution:
    """See `open_merge`, which has refused by configuration what it can."""
    check_fits(adapter, base)
    skeleton = build_skeleton(base, adapter, trust_remote_code=trust_remote_code)
    injected = inject(skeleton, adapter)
    injected.load()
    groups, untied = group_tensors(injected)
    changes = dict(skeleton.config)
    if untied:
        changes["tie_word_embeddings"] = False
    return MergeExecution(
        skeleton,
        groups,
        untied,
        _config_changes(base, changes),
        adapter_in_memory=injected.adapter_in_memory,
    )


def _config_changes(base: Checkpoint, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` must have in place of the base's values; None where nothing is left.

    What is about the language model goes inside, where that has a configuration of its own.
    """
    document = json_object(base.directory / "config.json")
    config = dict(changes)
    if isinstance(inner := document.get("text_config"), dict):
        of_text = {key: changes[key] for key in _OF_TEXT & changes.keys()}
        config = {k: v for k, v in changes.items() if k != "vocab_size" or k in document}
        config |= {"text_config": inner | of_text} if of_text else {}
    return config | dict.fromkeys({"quantization_config"} & document.keys())


class MergeExecution:
    """An adapter merged into its base, seen as a checkpoint; a `TensorSource`.

    Attributes:
        infos: Every tensor; one that is not as in the base's file has no meaningful offsets.
        shards: Names by file, in the base's order. What replaces a tensor takes its place; new
            tensors come last in the last file.
        changed: Names of tensors that the adapter changes, that are dequantized, or that the base
            does not have.
        untrained: Those of `changed` whose layers the training left at zero: they have the base's
            values all the same.
        recipe: What the merged bits depend on.
        config: What must stand in `config.json` in place of the base's values, because the adapter
            unties the output layer, or has another vocabulary or head, or the base is quantized.
        adapter_in_memory: Whether the adapter's values stay in memory; else they are read for each
            tensor.
        max_parallel_files: How many files may be written side by side without more results waiting
            in memory; None if it does not matter.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        groups: list[TensorGroup],
        untied: Mapping[str, str],
        config: Mapping[str, Any],
        *,
        adapter_in_memory: bool,
    ) -> None:
        base, context = skeleton.base, MergeContext(skeleton)
        self._saw_change = context.changed
        self._decisions = context.decisions
        self.config = config
        self.adapter_in_memory = adapter_in_memory
        self._base, self._threads = base, context.threads
        self._groups = {info.name: group for group in groups for info in group.infos}
        if len(self._groups) != sum(len(group.infos) for group in groups):
            raise MergeError("two layers that are merged apart change the same tensor of the base")
        copied = {head: skeleton.conversion(of).tensors[0] for head, of in untied.items()}
        self._copies = {
            h: Copy(base.infos[of]) for h, of in copied.items() if h not in self._groups
        }
        self._starts_from = copied
        # Before anything is read: a product that is computed as a whole to choose by is large.
        self._strategies = {id(group): choose_strategy(group, context) for group in groups}
        together = any(strategy.cost.together for strategy in self._strategies.values())
        self.max_parallel_files = 1 if together else None
        self.changed = frozenset(self._groups.keys() | self._copies.keys())
        self.untrained = frozenset(n for n, group in self._groups.items() if group.untrained)
        self._unread = {*self.changed}
        self.infos: Mapping[str, TensorInfo] = _infos(skeleton, groups, copied)
        self.shards = _shards(base, self.infos)
        self.recipe: Mapping[str, Any] = {
            "base": skeleton.base_description,
            "arithmetic": "peft merge_and_unload, each module by itself",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            **installed(),
        }

    def strategy(self, name: str) -> Strategy:
        """How the changed tensor `name` is merged."""
        if name in self._copies:
            return self._copies[name]
        return self._strategies[id(self._groups[name])]

    @property
    def probe_elements(self) -> int:
        """Of the largest product that was computed as a whole to choose a strategy."""
        return self._decisions.probe_elements

    def sources(self, name: str) -> tuple[str, ...]:
        """The names of the adapter's tensors that the changed tensor `name` is made of.

        Of experts that are merged together, those of this one if the adapter has them singly.
        """
        group = self._groups.get(name)
        return group.adapter_tensors_of(f"{PREFIX}{name.rpartition('.')[0]}.") if group else ()

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that checkpoint name, merged now if it changes.

        Tensors that only come together with it stay in memory until they are read. The calling
        thread's settings stay as they are.

        Raises: as `blocks`.
        """
        if name not in self.changed:
            return self._base.read(name)
        return self._threads.run_in_block_thread(self._whole, name)

    def blocks(self, name: str, read_next: ReadNext | None = None) -> Iterator[torch.Tensor]:
        """The tensor of `read` in pieces, its first rows first: a large one takes little memory.

        Each is valid until the generator has advanced twice. Any number of threads may do this at
        the same time; torch has one thread in each of them from then on.

        Args:
            name: Of the tensor.
            read_next: Reads its bytes in the base; None opens the file for it.

        Raises:
            NonFiniteError: The merged tensor has NaN or infinity where the base has a number.
            UnchangedTargetsError: It, or the stack of experts it belongs to, equals the base's.
            MergeError: PEFT cannot merge these values, or changes what the adapter does not target.
            UnsupportedArchitectureError: transformers does not save what it loads.
        """
        if name not in self.changed:
            return self._base.blocks(name)
        return self._taken(name, self.strategy(name), read_next)

    def reference_blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Like `blocks`, but all is PEFT's own arithmetic, from values that are read again.

        Not while another thread asks for any: PEFT's modules are changed meanwhile.
        """
        if name not in self.changed:
            return iter([self._base.read(name)])
        return self._taken(name, self.strategy(name).reference, None)

    def _taken(
        self, name: str, strategy: Reference, read_next: ReadNext | None
    ) -> Iterator[torch.Tensor]:
        with self._reading(name) as read_file:
            yield from strategy.blocks(name, read_next or read_file)
        self._unread.discard(name)

    def _whole(self, name: str) -> torch.Tensor:
        info, done = self.infos[name], 0
        elements = torch.empty(math.prod(info.shape), dtype=torch_dtype(info.dtype))
        for block in self.blocks(name):
            elements[done : done + block.numel()] = block.reshape(-1)
            done += block.numel()
        return elements.view(info.shape)

    def check(self) -> None:
        """Raise what would be raised if every tensor were taken.

        What is added in blocks is only computed up to the first change, where it is too small to
        overflow. All else is merged, and let go.
        """
        for name in dict.fromkeys(group.infos[0].name for group in self._groups.values()):
            strategy = self.strategy(name)
            self._threads.run_in_block_thread(strategy.check, self._reading)
        self._refuse_no_change()

    @property
    def saw_change(self) -> bool:
        """Whether a tensor that has been taken was seen to differ from the base's."""
        return self._saw_change.is_set()

    def finish(self, elsewhere: Collection[str] = (), *, saw_change: bool = False) -> None:
        """State that every tensor has been taken.

        Args:
            elsewhere: The names of those that another process has taken of the same merge.
            saw_change: Whether it saw one change.

        Raises:
            UnmergedTensorsError: Some that change were never read.
            UnchangedTargetsError: All of them are as they are in the base.
        """
        if left := self._unread.difference(elsewhere):
            raise UnmergedTensorsError(f"never merged: {listed(left)}", left)
        if not saw_change:
            self._refuse_no_change()

    def _refuse_no_change(self) -> None:
        if not self._saw_change.is_set():
            raise UnchangedTargetsError(NOTHING_CHANGES)

    def _reading(self, name: str) -> AbstractContextManager[ReadNext]:
        return _reading(self._base, self._starts_from.get(name, name))


@contextmanager
def _reading(base: Checkpoint, name: str) -> Iterator[ReadNext]:
    """Reads a tensor's bytes from the base's file, if it has the tensor."""
    info = base.infos.get(name)
    if info is None:
        yield _nothing_to_read
        return
    at = info.start

    def read_next(view: memoryview) -> None:
        nonlocal at
        read_into(view, fd, at, info.file)
        at += len(view)

    with opened(base.path_of(info)) as fd:
        yield read_next


def _nothing_to_read(view: memoryview) -> None:
    raise MergeError("a strategy reads a tensor that the base does not have")


def _infos(
    skeleton: Skeleton, groups: list[TensorGroup], copied: Mapping[str, str]
) -> dict[str, TensorInfo]:
    """Every tensor of the merged checkpoint; new ones have no file."""
    base = skeleton.base
    replaced = {name for conversion in skeleton.quantized for name in conversion.tensors}
    kept = {name: info for name, info in base.infos.items() if name not in replaced}
    copies = {head: evolve(base.infos[of], name=head, file="") for head, of in copied.items()}
    return {**kept, **copies, **{i.name: i for group in groups for i in group.infos}}


def _shards(base: Checkpoint, infos: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    shards: dict[str, list[TensorInfo]] = {file: [] for file in base.shards}
    *_, last = shards
    for info in sorted(infos.values(), key=lambda info: (not info.file, info.start)):
        shards[info.file or last].append(info)
    return {file: tuple(info.name for info in found) for file, found in shards.items()}
