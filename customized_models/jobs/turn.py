"""A place in the queue for a processor."""

from __future__ import annotations

import select
from collections.abc import Callable

from attrs import frozen


@frozen
class Turn:
    """A child's place in the queue: as many work at a time as there are processors."""

    fd: int | None

    def wait(self, told: Callable[[], None]) -> None:
        """Wait until the server says that it is this child's turn, or is gone.

        Args:
            told: Called now and then meanwhile; it may raise.
        """
        if self.fd is None:
            return
        while not select.select([self.fd], [], [], 1.0)[0]:
            told()
