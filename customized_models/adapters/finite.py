"""Finds NaN and infinity in an adapter's tensors, which a training that diverged leaves there."""

from __future__ import annotations

from ..errors import NonFiniteError, listed
from ..files.finite import non_finite
from .intake import WEIGHTS, Adapter


def refuse_non_finite(adapter: Adapter) -> None:
    """Raise `NonFiniteError` if a tensor has NaN or infinity. Reads the weights once."""
    if wrong := set(non_finite(adapter.directory / WEIGHTS, adapter.tensors.values())):
        raise NonFiniteError(
            f"the adapter has NaN or infinity in {listed(wrong)}: its training has diverged; "
            f"register an earlier checkpoint, or train again with a smaller learning rate"
        )
