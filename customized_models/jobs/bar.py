"""A progress bar for whoever waits."""

from __future__ import annotations

from typing import Any


class Bar:
    """A progress bar that changes its total with the phase; silent if not `shown`."""

    def __init__(self, title: str, *, shown: bool) -> None:
        self._title = title
        self._shown = shown
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is None:
            return
        if kind is None:
            self._bar.update(self._bar.total - self._bar.n)
        self._bar.close()

    def update(self, phase: str, done: int, total: int) -> None:
        """Show how much of how much is done, in bytes."""
        if not self._shown or not total:
            return
        if self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(unit="B", unit_scale=True, desc=self._title)
        if self._bar.total != total:
            self._bar.reset(total)
        self._bar.set_postfix_str(phase, refresh=False)
        self._bar.update(done - self._bar.n)
