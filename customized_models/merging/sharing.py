"""A save that several workers share: each makes shards, and the one that does the job publishes.

Every worker writes into a directory of its own and notes in a journal there what is complete, and
was made of files of the base that it has itself compared with their digests: all of them, if a
shard has bytes of several. The one that does the job moves in what the others have noted, makes
what nobody has taken, and goes on as if it had made it all.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from attrs import define, field

from ..errors import DatabaseError, JobLost, listed
from ..files.checking import FileCheck
from ..files.digests import FileDigest
from ..files.streams import parallel_files
from ..jobs.work import Work
from ..models import Progress
from ..sources import CompletedSource
from .journal import Journal
from .writing import write_shards

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5  # between two looks at what other workers do


@define
class Portion:
    """What one worker makes of a merge.

    Attributes:
        merged: The merge.
        check: Compares its base, or the full model, with what was recorded.
        directory: Where the shards are written.
        journal: Has the shards that are complete.
        metadata: What the header of each says besides the base's.
        progress: Told how many bytes have been merged.
        made: The names of the shards that are made here, or were.
    """

    merged: CompletedSource
    check: FileCheck
    directory: Path
    journal: Journal
    metadata: Mapping[str, str]
    progress: Progress
    made: set[str] = field(factory=set, init=False)
    _unnoted: list[tuple[frozenset[str], Mapping[str, FileDigest]]] = field(
        factory=list, init=False
    )

    @property
    def complete(self) -> dict[str, FileDigest]:
        """The digests of all shards that are complete, whether noted or not."""
        unnoted = {file: digest for _, made in self._unnoted for file, digest in made.items()}
        return {**self.journal.shards, **unnoted}

    def left(self, number: int, count: int) -> list[str]:
        """The shards that are neither taken over nor made here, in the order to take them.

        Neighbours have tensors that are merged together, such as those of a layer's experts. So
        each worker goes on where it began, and they begin far from each other.

        Args:
            number: Of this worker, from 0.
            count: How many workers there are.
        """
        files = sorted(self.merged.merge.shards)
        start = len(files) * (number % count) // count
        there = self.journal.shards.keys() | self.made
        return [file for file in (*files[start:], *files[:start]) if file not in there]

    def most(self, count: int) -> int:
        """How many shards to take at a time: made side by side, and others' share is left."""
        limit = self.merged.merge.max_parallel_files or parallel_files()
        return max(1, min(limit, len(self.left(0, 1)) // count))

    def make(self, files: Collection[str]) -> None:
        """Make shards; they are noted once all that they were made of is compared.

        Raises: as `write_checkpoint`.
        """
        self.made.update(files)
        merge, layout = self.merged.merge, self.merged.layout
        digests = write_shards(
            files,
            merge,
            layout,
            self.directory,
            self.progress,
            changed=merge.changed,
            check=self.check,
            complete=self.complete,
            metadata=self.metadata,
        )
        self._unnoted.append((frozenset(layout.read_from), digests))
        self._note(self.check.compared())

    def finish(self) -> frozenset[str]:
        """Compare what has been read of the base and was not compared yet, and note the rest.

        Returns:
            The files of which nothing was read here, so that others compare them.

        Raises:
            CustomizedModelsError: Of `check`: the base holds something else.
        """
        layout = self.merged.layout
        others = frozenset(layout.shards.keys() - layout.read_from - self.check.compared())
        self.check.finish(self.progress, but=others)
        self._note(layout.read_from)
        return others

    def _note(self, compared: Collection[str]) -> None:
        unnoted, self._unnoted = self._unnoted, []
        for read_from, digests in unnoted:
            if not read_from.issubset(compared):
                self._unnoted.append((read_from, digests))
                continue
            for file, digest in digests.items():
                self.journal.add(file, digest, saw_change=self.merged.merge.saw_change)


def share_out(portion: Portion, work: Work) -> frozenset[str]:
    """Make all shards, together with whoever helps.

    Returns:
        The files of the base that others have compared, and of which nothing was read here.

    Raises:
        JobLost: The lease has ended.
        CustomizedModelsError: As `Portion.make` and `Portion.finish`.
    """
    count, merge = work.arguments["workers"], portion.merged.merge
    _compare_small_files(portion)
    sizes = {f: sum(merge.infos[n].size for n in names) for f, names in merge.shards.items()}
    with ExitStack() as opened:
        helpers = _Helpers(portion, work, opened)
        portion.progress = helpers.progress
        while True:
            helpers.look()
            if not portion.left(0, count):
                return portion.finish()
            if mine := _claimed(portion, work, 0):
                portion.make(mine)
                continue
            portion.finish()
            done = sum(sizes[file] for file in portion.complete)
            work.progress("merging", done, sum(sizes.values()))
            time.sleep(_LOOK_SECONDS)


def _compare_small_files(portion: Portion) -> None:
    """Those that every shard depends on, as the configuration."""
    portion.check.finish(portion.progress, but=portion.merged.layout.shards.keys())


def _claimed(portion: Portion, work: Work, number: int) -> list[str]:
    """The shards that this worker makes next; `number` is its own."""
    id, count, shares = str(work.id), work.arguments["workers"], work.catalog.shares
    left, most = portion.left(number, count), portion.most(count)
    return _patiently(work, lambda: shares.claim(id, left, most, work.lease))


def _patiently(work: Work, ask: Callable[[], T]) -> T:
    """What the database answers, once it does; the shards that are complete are worth waiting.

    Raises:
        JobLost: The lease has ended meanwhile.
    """
    while True:
        try:
            return ask()
        except DatabaseError as error:
            if work.lease.lost.is_set():
                raise JobLost("the lease ended while the database was away") from error
            _log.warning("job %s: %s", work.id, error)
            time.sleep(_LOOK_SECONDS)


@define
class _Helpers:
    """Those who help with a job, as the worker that does it sees them."""

    portion: Portion
    work: Work
    opened: ExitStack
    _directories: dict[str, Path] = field(factory=dict, init=False)
    _welcome: set[str] = field(factory=set, init=False)
    _kept: set[str] = field(factory=set, init=False)
    _next: float = field(default=0.0, init=False)

    def progress(self, phase: str, done: int, total: int) -> None:
        """As the work's, and a look now and then."""
        self.work.progress(phase, done, total)
        if time.monotonic() > self._next:
            self.look()

    def look(self) -> None:
        """Let new ones take part, and take over what they have noted."""
        _patiently(self.work, self._look)
        self._next = time.monotonic() + _LOOK_SECONDS

    def _look(self) -> None:
        id, shares, lease = str(self.work.id), self.work.catalog.shares, self.work.lease
        journal = self.portion.journal
        others = self.portion.merged.merge.shards.keys() - self.portion.made
        for helper, lives in self.work.catalog.jobs.helpers(id).items():
            if helper not in self._directories:
                staging = self.work.shelf.storage.staging(f"save-{helper}")
                self._directories[helper] = self.opened.enter_context(staging)
            directory = self._directories[helper]
            journal.take_over(directory, others, self.work.progress, is_gone=not lives)
            if lives and helper not in self._welcome and journal.is_shared_by(directory):
                shares.welcome(id, helper, lease)
                self._welcome.add(helper)
        if new := journal.shards.keys() - self._kept:  # nobody need make them again
            shares.keep(id, new, lease)
            self._kept |= new


def take_part(portion: Portion, work: Work) -> None:
    """Make shards that nobody has taken, until there are none, and all are taken over.

    Where the worker that does the job goes, so does this process, as if it had been killed: what
    it has made stays for the next one.

    Raises:
        JobCancelled: The job has ended, or is to stop.
        CustomizedModelsError: As `Portion.make` and `Portion.finish`.
    """
    try:
        _take_part(portion, work)
    except JobLost as error:
        _log.warning("job %s: helper %s goes: %s", work.id, work.lease.owner, error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _take_part(portion: Portion, work: Work) -> None:
    owner = work.lease.owner
    number = work.catalog.jobs.helper_number(owner)
    _compare_small_files(portion)
    while not _is_welcome(work):
        time.sleep(_LOOK_SECONDS)
    while files := _claimed(portion, work, number):
        _log.info("job %s: helper %s makes %s", work.id, owner, listed(files))
        portion.make(files)
        _stay(work)
    portion.finish()
    while any((portion.directory / file).exists() for file in portion.journal.shards):
        _stay(work)
        time.sleep(_LOOK_SECONDS)


def _is_welcome(work: Work) -> bool:
    """Whether the worker that does the job lets this one take part; it raises if there is none."""
    id, owner, catalog = str(work.id), work.lease.owner, work.catalog
    if not _patiently(work, lambda: catalog.jobs.follow(id)):
        raise JobLost("no worker does the job")
    return _patiently(work, lambda: catalog.shares.is_welcome(id, owner))


def _stay(work: Work) -> None:
    """Raise if another worker does the job than when this one was let take part."""
    if not _is_welcome(work):
        raise JobLost("the worker that did the job has gone")
