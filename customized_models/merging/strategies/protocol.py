"""What every strategy is, and what each of them is given."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias, TypeVar

import torch
from attrs import field, frozen

from ...files.safetensors import TensorInfo
from ..skeleton import Skeleton
from ..threads import MergeThreads

T = TypeVar("T")

ReadNext: TypeAlias = Callable[[memoryview], None]
"""Fills a view with the next bytes that the base's file has of a tensor, from its first byte on."""


@frozen
class Cost:
    """Memory that a strategy takes, in bytes, besides the blocks that it gives.

    Attributes:
        working: At most, while it computes.
        waiting: Results that wait for their place in a file.
        together: Whether several tensors are computed at once. Files are then written one after
            another, so that no more than one such group waits.
    """

    working: int
    waiting: int = 0
    together: bool = False

    @classmethod
    def of_whole(cls, infos: Iterable[TensorInfo], before: Iterable[TensorInfo]) -> Cost:
        """For tensors that are computed as a whole.

        Args:
            infos: What comes out.
            before: What is read for it.
        """
        infos = tuple(infos)
        elements = sum(math.prod(info.shape) for info in infos)
        size = sum(info.size for info in infos)
        # In float32: the product, what it is multiplied by, and up to three operands of the sum,
        # of which DoRA's norm is the last.
        working = sum(info.size for info in before) + size + 5 * elements * torch.float32.itemsize
        return cls(working, 2 * size, len(infos) > 1)  # a result, and the one put out before it


Reading: TypeAlias = Callable[[str], AbstractContextManager[ReadNext]]
"""Opens what the base's file has of a tensor, by the tensor's name."""


class Reference(Protocol):
    """Computes the tensors of one group; any thread may ask for any of them, any number of times.

    `name` is what a plan calls it.
    """

    name: str

    @property
    def cost(self) -> Cost:
        """The memory that it takes."""

    def blocks(self, tensor: str, read_next: ReadNext) -> Iterator[torch.Tensor]:
        """The merged tensor in pieces, its first rows first.

        Each piece is valid until the generator has advanced twice. With `read_next` it reads all
        bytes of the tensor in the base, or of the one that a new tensor starts from; or none.

        Raises:
            NonFiniteError: It has NaN or infinity where the base has a number.
            UnchangedTargetsError: It, or the stack of experts it belongs to, equals the base's.
            MergeError, UnsupportedArchitectureError: PEFT or transformers cannot handle the values.
        """


class Strategy(Reference, Protocol):
    """How a group is merged."""

    @property
    def reference(self) -> Reference:
        """Computes the same by PEFT's own arithmetic, from values that are read again."""

    def check(self, reading: Reading) -> None:
        """Raise what `blocks` of any of the tensors would, with as little reading as will tell."""


class Decisions:
    """Answers that hold for every layer of one shape, each found out once.

    Attributes:
        probe_elements: Of the largest product that was computed as a whole to find one out.
    """

    def __init__(self) -> None:
        self.probe_elements = 0
        self._answers: dict[object, object] = {}
        self._lock = threading.Lock()

    def saw_product(self, elements: int) -> None:
        """Note the size of a product that was computed as a whole."""
        self.probe_elements = max(self.probe_elements, elements)

    def once(self, key: object, decide: Callable[[], T]) -> T:
        """What `decide` returned when this key was first asked for."""
        with self._lock:
            if key not in self._answers:
                self._answers[key] = decide()
            answer: T = self._answers[key]  # type: ignore[assignment]  # one type a key
            return answer


@frozen
class MergeContext:
    """What the strategies of one merge share.

    Attributes:
        skeleton: The base.
        threads: Where they compute.
        changed: Set once any tensor is seen to change.
        decisions: What was found out about shapes.
    """

    skeleton: Skeleton = field(repr=False)
    threads: MergeThreads = field(factory=MergeThreads, repr=False)
    changed: threading.Event = field(factory=threading.Event, repr=False)
    decisions: Decisions = field(factory=Decisions, repr=False)
