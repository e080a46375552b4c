"""How the tensors of a group get their merged values: one strategy a file, one protocol.

To add a strategy, write its file and put its class into `STRATEGIES` in `choice.py`.

This module is only imported when a merge is prepared.
"""

from .choice import choose_strategy
from .protocol import Cost, MergeContext, ReadNext, Reference, Strategy

__all__ = ["Cost", "MergeContext", "ReadNext", "Reference", "Strategy", "choose_strategy"]
