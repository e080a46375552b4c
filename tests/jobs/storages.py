"""Storages whose workers wait, or are killed, or count what they read."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
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


class Shared(LocalStorage):
    """The worker that does a save begins once there is a helper, and makes no second shard before.

    What the helpers of this class do when they begin a shard is for those derived from it.
    """

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """See `Storage.staging`."""
        if name.startswith("save-") and not hasattr(self, "begun"):
            self.begun: list[Path] = []
            sys.addaudithook(self._hook)  # a worker's process ends with its work, and this too
        with super().staging(name) as directory:
            if name.startswith("save-") and not is_helpers(directory):
                until(self._has_helper)
            yield directory

    def _has_helper(self) -> bool:
        journals = (self.root / ".staging").glob("save-*/shards.jsonl")
        return any(is_helpers(path.parent) for path in journals)

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | Path):
            return
        path, flags = Path(arguments[0]), arguments[2]
        if path.suffix == ".safetensors" and isinstance(flags, int) and flags & os.O_CREAT:
            self.begun.append(path)
            self.begin(path, is_helper=is_helpers(path.parent))

    def begin(self, shard: Path, *, is_helper: bool) -> None:
        """Called before a shard is created."""
        if not is_helper and len(self.begun) > 1 and not (self.root / "helped").exists():
            until(self._has_help)
            (self.root / "helped").touch()

    def _has_help(self) -> bool:
        journals = (self.root / ".staging").glob("save-*/shards.jsonl")
        return any(is_helpers(p.parent) and b"digest" in p.read_bytes() for p in journals)


def is_helpers(staging: Path) -> bool:
    """Whether a helper writes into that directory."""
    return re.search(r"\.h\d+$", staging.name) is not None


class DeadlyToHelpers(Shared):
    """The first helper is killed when it begins another shard after one that it has noted."""

    def begin(self, shard: Path, *, is_helper: bool) -> None:
        """See `Shared`."""
        if shard.parent.name.endswith(".h1") and self._has_help():
            os.kill(os.getpid(), signal.SIGKILL)
        super().begin(shard, is_helper=is_helper)


class DeadlyToWorkers(Shared):
    """The first worker that does a save is killed once a helper has made a shard."""

    def begin(self, shard: Path, *, is_helper: bool) -> None:
        """See `Shared`."""
        super().begin(shard, is_helper=is_helper)
        if shard.parent.name.endswith(".1") and len(self.begun) > 1:
            os.kill(os.getpid(), signal.SIGKILL)


class DeadlyShard(Shared):
    """Whoever begins one of the shards is killed."""

    def begin(self, shard: Path, *, is_helper: bool) -> None:
        """See `Shared`."""
        if shard.name.startswith("model-00003"):
            print(f"{shard.name} is deadly", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


class GatedShards(Shared):
    """Makes the second shard of each worker once there is a file `gate` in its root."""

    def begin(self, shard: Path, *, is_helper: bool) -> None:
        """See `Shared`."""
        if len(self.begun) > 1:
            (self.root / f"waiting-{is_helper}").touch()
            until((self.root / "gate").exists)


class Apart(Shared):
    """The directories of helpers are seen by themselves alone, as on hosts that share no disk."""

    def staging(self, name: str) -> AbstractContextManager[Path]:
        """See `Storage.staging`."""
        if re.search(r"\.h\d+$", name) and not hasattr(self, "begun"):
            (self.root / "helper").touch()
            return LocalStorage(self.root / "elsewhere").staging(name)
        return super().staging(name)

    def _has_helper(self) -> bool:
        return (self.root / "helper").exists()

    def begin(self, shard: Path, *, is_helper: bool) -> None:
        """See `Shared`."""


class Counting(Shared):
    """Each worker of a save leaves in `reads/<process>` how many bytes it has read."""

    @contextmanager
    def staging(self, name: str) -> Iterator[Path]:
        """See `Storage.staging`."""
        with super().staging(name) as directory:
            yield directory
            if name.startswith("save-"):
                said = Path("/proc/self/io").read_text()
                (self.root / "reads").mkdir(exist_ok=True)
                count = said.split()[1]  # rchar
                (self.root / "reads" / str(os.getpid())).write_text(count)
