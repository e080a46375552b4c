"""What has happened in a registry: events, and being told of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from attrs import field, frozen

from .errors import CustomizedModelsError
from .values import Value, checked

if TYPE_CHECKING:
    from .catalog.database import Database

_log = logging.getLogger(__name__)

Action = Literal[
    "created",
    "changed",
    "deleted",
    "reindexed",
    "relocated",
    "tagged",
    "untagged",
    "described",
    "alias set",
    "alias removed",
    "evicted",
    "rebuilt",
]
ACTIONS: tuple[Action, ...] = get_args(Action)


@frozen(field_transformer=checked)
class Event(Value):
    """A change of a registry, recorded in the same transaction.

    Attributes:
        number: Of the event; a later one has a greater number.
        time: When it was recorded, in UTC. Clocks may be set back; numbers tell the order.
        who: The user and the host.
        action: What was done.
        kind: The class of what changed, such as "CustomizedModel".
        name: Its name.
        before: What it was: the fields that changed, and of what was deleted all of them.
        after: What it is: the fields that changed.
    """

    number: int
    time: datetime
    who: str
    action: Action
    kind: str
    name: str
    before: Mapping[str, Any] = field(factory=dict, hash=False)
    after: Mapping[str, Any] = field(factory=dict, hash=False)

    def __str__(self) -> str:
        """One line: when, who, and what was done to what."""
        return f"{self.time:%Y-%m-%d %H:%M:%S} {self.who} {self.action} {self.kind} {self.name}"


class Subscription:
    """Calls a function with every event from now on, one after the other, in a thread of its own.

    It ends with `close`, at the end of a `with` block, and with the process. An error of the
    function is logged, and does not keep later events from it. A fork has no subscription.

    Args:
        database: The registry's.
        newer: Gives the events after that number, oldest first.
        call: Called with each.
        after: The number of the last event that is not told.
    """

    def __init__(
        self,
        database: Database,
        newer: Callable[[int], Sequence[Event]],
        call: Callable[[Event], object],
        after: int,
    ) -> None:
        self._database = database
        self._newer = newer
        self._call = call
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(after,), daemon=True, name="registry events"
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it; a call that is under way is waited for."""
        self._closed.set()
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, told: int) -> None:
        with self._database.telling(self._wake):
            while not self._closed.is_set():
                for event in self._events(told):
                    if self._closed.is_set():
                        return
                    told = event.number
                    try:
                        self._call(event)
                    except Exception:  # somebody's function, which must not end the thread
                        _log.exception("a subscriber failed at event %d: %s", told, event)
                self._wake.wait(self._database.poll_seconds)
                self._wake.clear()

    def _events(self, told: int) -> Sequence[Event]:
        try:
            return self._newer(told)
        except CustomizedModelsError as error:  # busy or out of reach: the next look may succeed
            _log.warning("events cannot be read: %s", error)
            return ()
