"""Who gives a name at Ollama its meaning, where several processes want to at once.

Ollama has no request that fails where a name is taken: a copy replaces whatever is there. So
whoever wants to change what a name stands for says so first, by a tag beside it, and goes on only
if nobody else says so at that time. The tag is written before the others are looked for, so that
of two who come at once at least one sees the other.
"""

from __future__ import annotations

import functools
import re
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from ..errors import AlreadyExistsError, ServerAnswerError, ServerUnreachableError, shown
from .http import JSONServer
from .ollama_api import Name, again, delete_model, digest_of, listed_models

_CLAIM = re.compile(r"cm-[0-9a-f]{12}-claim-[0-9a-f]{8}")
_CLAIM_SECONDS = 60.0  # an older claim was left by a process that is gone
_PATIENCE = 2 * _CLAIM_SECONDS  # for how long others are waited for
_POLL_SECONDS = 0.05


def new_version(name: Name) -> Name:
    """A name of its own for a model that is to be called by `name` later; no two are equal."""
    return name.with_tag(f"cm-{uuid.uuid4().hex[:12]}")


def refuse_taken_name(server: JSONServer, name: Name, replaced: Collection[str] | None) -> None:
    """Refuse a name that stands for something whose digest is not among `replaced`, if not None.

    Raises:
        AlreadyExistsError: It does.
    """
    found = digest_of(server, name)
    if replaced is not None and found is not None and found not in replaced:
        raise AlreadyExistsError(
            f"Ollama at {server.url} already serves something under {shown(name)}; choose another "
            f"served_name, or say replace=True"
        )


def give_name(
    server: JSONServer,
    name: Name,
    version: Name,
    digest: str,
    replaced: Collection[str] | None,
) -> None:
    """Let `name` stand for what `version` stands for.

    Args:
        server: Where.
        name: Another tag of the same model, or another model's.
        version: As `new_version` gave it.
        digest: Of the version's manifest.
        replaced: See `refuse_taken_name`.

    Raises:
        AlreadyExistsError: It stands for something else.
        ServerAnswerError: The server did not do it.
    """
    refuse_taken_name(server, name, replaced)
    with _claimed(server, name, version, source=version) as refuse_late:
        refuse_taken_name(server, name, replaced)
        refuse_late()
        _copy(server, version, name, digest)


def take_name(server: JSONServer, name: Name, version: Name, digest: str) -> None:
    """Let `name` stand for nothing, if it stands for the manifest with that digest."""
    if name == version or digest_of(server, name) != digest:
        return
    with _claimed(server, name, version, source=name) as refuse_late:
        refuse_late()
        delete_model(server, name, digest)


@contextmanager
def _claimed(
    server: JSONServer, name: Name, version: Name, *, source: Name
) -> Iterator[Callable[[], None]]:
    """Be the only one who changes what `name` stands for, while the block lasts.

    Args:
        server: Where.
        name: The name.
        version: The claim's own name goes on after this one's, so that it is removed with it.
        source: What the claim is copied from.

    Yields:
        What is to be called right before the change; it raises if that comes too late.
    """
    until = time.monotonic() + _PATIENCE
    _forget_killed(server, name, version)
    while time.monotonic() < until:
        claim = name.with_tag(f"{version.tag}-claim-{uuid.uuid4().hex[:8]}")
        since = time.monotonic()
        try:
            _copy(server, source, claim)
            if _is_left_alone(server, claim, until):
                yield functools.partial(_refuse_late, server, name, since)
                return
        finally:
            delete_model(server, claim)
        while time.monotonic() < until and _claims(server, claim):
            time.sleep(_POLL_SECONDS)
    raise ServerAnswerError(
        f"others keep changing what {shown(name)} stands for at Ollama at {server.url}; try again"
    )


def _forget_killed(server: JSONServer, name: Name, version: Name) -> None:
    """Remove claims for the same version, of which nobody else gives it a name now."""
    for listed in map(Name.of, listed_models(server)):
        if listed.model == name.model and listed.tag.startswith(f"{version.tag}-claim-"):
            delete_model(server, listed)


def _is_left_alone(server: JSONServer, claim: Name, until: float) -> bool:
    """Whether the others step back; False for one that has to do so itself.

    Nobody goes on while there is another's claim; the order only says who waits and who steps back.
    """
    while time.monotonic() < until:
        claims = _claims(server, claim)
        if claims.keys() == {str(claim)}:
            return True
        if min(claims, key=lambda each: (claims[each], each)) != str(claim):
            return False
        time.sleep(_POLL_SECONDS)
    return False


def _refuse_late(server: JSONServer, name: Name, since: float) -> None:
    if time.monotonic() - since > _CLAIM_SECONDS / 2:
        raise ServerUnreachableError(
            f"Ollama at {server.url} was too slow to change what {shown(name)} stands for alone"
        )


def _claims(server: JSONServer, claim: Name) -> dict[str, float]:
    """When each claim on the same name was made, but for forgotten ones, by the server's clock."""
    listed = listed_models(server)
    names = {each: Name.of(each) for each in listed}
    claims = {
        each: _modified(listed[each])
        for each, other in names.items()
        if other.model == claim.model and _CLAIM.fullmatch(other.tag)
    }
    newest = max(claims.values(), default=0.0)
    return {each: made for each, made in claims.items() if newest - made < _CLAIM_SECONDS}


def _modified(entry: Mapping[str, Any]) -> float:
    """When a manifest was written, in seconds; 0 if the server does not say."""
    # Go writes nine digits of a second, and Python reads six.
    text = re.sub(r"(\.\d{6})\d+", r"\1", str(entry.get("modified_at")))
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return 0.0


def _copy(server: JSONServer, source: Name, target: Name, digest: str | None = None) -> None:
    """Let `target` stand for what `source` stands for.

    Raises:
        ServerAnswerError: It was not done, or `target` stands for another digest than this.
    """
    again(lambda: server.send("/api/copy", {"source": str(source), "destination": str(target)}))
    if digest is not None and digest_of(server, target) != digest:
        raise ServerAnswerError(
            f"Ollama at {server.url} does not serve {shown(target)} as it was told to"
        )
