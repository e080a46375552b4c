"""Whether a merge changed what it was to change, and kept what was finite so.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import Event

import torch

from ...errors import NonFiniteError, UnchangedTargetsError, shown
from ...files.finite import all_finite


class Outcome:
    """Which tensors of a group came out as they are in the base.

    A stack of experts may have such: experts that were never called in training. Layers that the
    training left at zero are all so, and copies of the base's may be.
    """

    def __init__(self, every: Iterable[str], changed: Event, *, may_stay: bool) -> None:
        """
        Args:
            every: The group's tensors.
            changed: Set once a tensor is seen to change.
            may_stay: Whether all of them may come out as they are.
        """
        self._every = frozenset(every)
        self._changed = changed
        self._same: set[str] = set()
        self.may_stay = may_stay

    def note(self, names: Iterable[str], *, same: bool, where: str) -> None:
        """Note what became of some more tensors.

        Args:
            names: Theirs.
            same: Whether they are as in the base.
            where: What a message calls them.

        Raises:
            UnchangedTargetsError: No tensor of the group is left that may have changed.
        """
        if not same:
            self._changed.set()
            return
        self._same.update(names)
        if not self.may_stay and self._same.issuperset(self._every):
            raise UnchangedTargetsError(
                f"the adapter's values for {shown(where)} are not zero, but all of the change is "
                f"lost to rounding: it comes out as it is in the base. Merge into a base in "
                f"float32, or train longer"
            )


def refuse_non_finite(name: str, merged: torch.Tensor, before: Callable[[], torch.Tensor]) -> None:
    """Raise NonFiniteError if a merged tensor has NaN or infinity where the base has a number.

    `before`: gives the base's values; it is only called if the merged ones are not all finite.
    """
    if all_finite(merged):
        return
    if (torch.isfinite(before()) & ~torch.isfinite(merged)).any():
        raise NonFiniteError(
            f"merging gives NaN or infinity in {shown(name)}: the training diverged, or the "
            f"base's dtype cannot hold the values"
        )
