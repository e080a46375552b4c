"""The threads that merge, and the memory that each of them reuses.

torch's number of threads is a setting of each thread of ours, and bits may depend on it. So all of
PEFT's arithmetic runs in one thread that has the number of the thread that prepared the merge, and
blocks of rows are merged in threads that have one: they are too small to share out.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class MergeThreads:
    """A thread for PEFT, a thread for blocks, and a workspace for every thread that merges blocks.

    Attributes:
        one_group: Held while tensors are computed that only come all at once.
    """

    def __init__(self) -> None:
        """PEFT's thread gets torch's number of threads of the calling thread."""
        self._peft = ThreadPoolExecutor(1, "peft", set_threads, (torch.get_num_threads(),))
        self._blocks = ThreadPoolExecutor(1, "blocks")
        self._local = threading.local()
        self.one_group = threading.Lock()

    def run_peft(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run PEFT's arithmetic in its thread, and wait for what it returns."""
        return self._peft.submit(work, *args, **kwargs).result()

    def run_in_block_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run work that merges blocks in a thread of its own; the calling thread stays as it is."""
        return self._blocks.submit(work, *args, **kwargs).result()

    def workspace(self) -> Workspace:
        """The calling thread's; from then on torch has one thread there."""
        if not hasattr(self._local, "workspace"):
            self._local.workspace = Workspace()
        workspace: Workspace = self._local.workspace
        return workspace


def set_threads(count: int) -> None:
    """Give the calling thread that number of torch's threads."""
    torch.get_num_threads()  # else torch sets this thread's number itself, at its first work
    torch.set_num_threads(count)


class Workspace:
    """Memory that one thread uses again for every block."""

    _RECENT = 2  # values: a layer has two stacks of experts, whose tensors alternate in a file

    def __init__(self) -> None:
        set_threads(1)
        self._memory: dict[str, torch.Tensor] = {}
        self._turns = cycle(("even", "odd"))
        self._recent: dict[object, object] = {}

    def block(self, use: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without values; its memory is the same at the next call for the same use."""
        size = math.prod(shape) * dtype.itemsize
        if use not in self._memory or self._memory[use].numel() < size:
            self._memory[use] = torch.empty(size, dtype=torch.uint8)
        return self._memory[use][:size].view(dtype).view(*shape)

    def result(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Like `block`, but its memory is only used again at the next call but one."""
        return self.block(next(self._turns), shape, dtype)

    def recent(self, key: object, compute: Callable[[], T]) -> T:
        """What `compute` returned for that key, if it is among the last two that were asked for."""
        if key not in self._recent:
            if len(self._recent) == self._RECENT:
                self._recent.pop(next(iter(self._recent)))
            self._recent[key] = compute()
        value: T = self._recent[key]  # type: ignore[assignment]  # a key has values of one type
        return value
