"""Storages whose workers wait, or are killed."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path

from customized_models import LocalStorage
from tests.waiting import until


class Gated(LocalStorage):
    """Publishes complete models only once there is a file `gate` in its root.

    Until then there is a file `waiting`.
    """

    def publish(self, directory: Path, key: str) -> None:
        if key.startswith("complete/"):
            (self.root / "waiting").touch()
            until((self.root / "gate").exists)
        super().publish(directory, key)


class Deadly(LocalStorage):
    """Whoever saves with it is killed."""

    def staging(self, name: str) -> AbstractContextManager[Path]:
        if name.startswith("save-"):
            print("my last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().staging(name)
