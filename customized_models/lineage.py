"""Where a model comes from, and what was made of it: links with their digests.

A link is claimed by what was recorded, verified once its bytes were read, and missing where the
model is gone. What was deleted keeps its facts in the event log, so that its own links stay known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from attrs import evolve, field, frozen

from .backends import open_backend, served_there
from .errors import (
    BaseModelMismatch,
    BaseModelMissingError,
    CustomizedModelsError,
    DeploymentError,
    EvictedError,
    IntegrityError,
    MalformedError,
    NotFoundError,
)
from .files.documents import from_document
from .models import (
    BaseModel,
    CompleteModel,
    CustomizedModel,
    DeploymentEnvironment,
    LiveModel,
    Status,
    no_progress,
)
from .pictures import Box, graph_svg
from .shelf import Shelf
from .values import Value, checked

if TYPE_CHECKING:
    from .catalog.catalog import Catalog

Level = Literal["base", "training", "customized", "complete", "live"]
LinkState = Literal["claimed", "verified", "missing", "damaged"]
Model: TypeAlias = BaseModel | CustomizedModel | CompleteModel | LiveModel

CHILDREN = 20  # of one model that are shown: a base may have a hundred thousand

_COLORS = {"claimed": "gray", "verified": "seagreen", "missing": "darkorange", "damaged": "crimson"}
_LEVELS: dict[type[Any], Level] = {
    BaseModel: "base",
    CustomizedModel: "customized",
    CompleteModel: "complete",
    LiveModel: "live",
}


@frozen(field_transformer=checked)
class Link(Value):
    """A model of a lineage.

    Attributes:
        level: "base", "training", "customized", "complete" or "live".
        name: Its name; of a training, its id.
        digest: As what was made of it says, or its own; "" if none is known.
        state: "claimed" by records; "verified" by its bytes; "missing" if it was deleted, or is
            another one now; "damaged" if its bytes are not what was recorded.
        note: More about it, in words.
        parents: What it was made of.
        children: What was made of it, newest first, at most 20.
    """

    level: Level
    name: str
    digest: str
    state: LinkState = "claimed"
    note: str = ""
    parents: tuple[Link, ...] = ()
    children: tuple[Link, ...] = ()

    def __str__(self) -> str:
        """One line."""
        facts = [self.level, self.name, short(self.digest), self.state]
        return "  ".join(filter(None, facts)) + (f" ({self.note})" if self.note else "")


def short(digest: str) -> str:
    """The beginning of a digest, as people compare it."""
    algorithm, _, value = digest.partition(":")
    return f"{algorithm}:{value[:8]}" if value else ""


AskStatus: TypeAlias = Callable[[LiveModel], Status]
Verify: TypeAlias = Callable[[Link, AskStatus | None], Link]


@frozen
class Lineage:
    """A model, what it was made of, and what was made of it; printed as a tree, drawn in notebooks.

    It belongs to the registry that it was asked of, as a `Job` does; `model.to_dict()` is data.

    Attributes:
        model: The model, with its parents and children.
    """

    model: Link
    _verify: Verify = field(eq=False, repr=False)

    def verify(self, status: AskStatus | None = None) -> Lineage:
        """Read every byte of the model and of what it was made of, and ask the tool that serves it.

        Nothing is raised for what is wrong: the links of the result say it. What was made of the
        model stays claimed. It takes as long as reading the files.

        Args:
            status: What tells the status of a live model: `deployer.status`, where the deployer was
                given the backend or the secrets. By default its environment alone is used.
        """
        return evolve(self, model=_verified(self.model, self._verify, status))

    @property
    def links(self) -> tuple[Link, ...]:
        """The model and all that it was made of, nearest first."""
        return tuple(_upwards(self.model))

    def __str__(self) -> str:
        parts = [
            (title, links)
            for title, links in (
                ("made of", self.model.parents),
                ("made into", self.model.children),
            )
            if links
        ]
        lines = [str(self.model)]
        for number, (title, links) in enumerate(parts):
            is_last = number == len(parts) - 1
            lines.append(("└─ " if is_last else "├─ ") + title)
            lines += _tree(links, "   " if is_last else "│  ")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return _drawn(self.model)


def lineage_of(catalog: Catalog, shelf: Shelf, model: Model) -> Lineage:
    """See `ModelRegistry.lineage`."""
    tracing = _Tracing(catalog, shelf)
    link = evolve(tracing.upwards(model), children=tracing.children(model))
    return Lineage(link, partial(_checked_bytes, catalog, shelf))


@frozen
class _Tracing:
    """Follows what rows, tombstones and manifests say."""

    catalog: Catalog
    shelf: Shelf

    def upwards(self, model: Model, base_digest: str = "") -> Link:
        """The link of a model that is known, with its parents.

        Args:
            model: It, as it is or was.
            base_digest: Of its base, as what was made of it says.
        """
        link = Link(_LEVELS[type(model)], model.name, model.digest)
        match model:
            case LiveModel():
                source = self._named(
                    (CompleteModel, CustomizedModel), model.source, model.source_digest
                )
                return evolve(link, parents=(source,), note=model.state)
            case CompleteModel():
                source = self._named(
                    (CustomizedModel,), model.customized, model.customized_digest, model.base_digest
                )
                parents = [source]
                if not source.parents:  # nothing is known of it, but of the base something is
                    parents.append(self._named((BaseModel,), model.base, model.base_digest))
                note = "evicted" if model.evicted else ""
                return evolve(link, parents=tuple(parents), note=note)
            case CustomizedModel():
                training = Link("training", str(model.training_id), "", note=model.label)
                stated = base_digest or self._base_digest(model)
                base = self._named((BaseModel,), model.base, stated)
                return evolve(link, parents=(training, base))
        return link

    def _named(
        self, kinds: Sequence[type[Any]], name: str, digest: str, base_digest: str = ""
    ) -> Link:
        """The link of a model that another one says it was made of."""
        for kind in kinds:
            known = self._known(kind, name)
            if known is not None and digest in ("", known.digest):
                return self.upwards(known, base_digest)
        for kind in kinds:
            was = self.catalog.events.tombstone(kind, name, digest)
            if was is not None:
                document = dict(was.before)
                if kind is CustomizedModel:  # the log has this besides its fields
                    stated = document.pop("base_digest", "")
                    base_digest = base_digest or stated
                try:
                    link = self.upwards(from_document(kind, document), base_digest)
                except MalformedError:  # it was written by another version
                    continue
                note = f"deleted {was.time:%Y-%m-%d} by {was.who}"
                return evolve(link, state="missing", note=note)
        others = [known for kind in kinds if (known := self._known(kind, name)) is not None]
        note = f"another one has its name: {short(others[0].digest)}" if others else "not here"
        return Link(_LEVELS[kinds[0]], name, digest, "missing", note)

    def _known(self, kind: type[Any], name: str) -> Any | None:
        try:
            return self.catalog.levels.get(kind, name)
        except CustomizedModelsError:  # it is not there, or its row is damaged
            return None

    def _base_digest(self, model: CustomizedModel) -> str:
        """That of the base which an adapter was registered for, by its manifest."""
        try:
            return self.shelf.manifest(model.key).parents.get("base", "")
        except CustomizedModelsError:
            return ""

    def children(self, model: Model) -> tuple[Link, ...]:
        """The links of what was made of a model, with their own children."""
        made: list[CustomizedModel | CompleteModel | LiveModel] = []
        newest = self.catalog.levels.newest
        if isinstance(model, BaseModel):
            made += newest(CustomizedModel, CHILDREN, base=model.name)
        if isinstance(model, CustomizedModel):
            complete = newest(CompleteModel, CHILDREN, customized=model.name)
            made += [one for one in complete if one.customized_digest == model.digest]
        if isinstance(model, CustomizedModel | CompleteModel):
            live = newest(LiveModel, CHILDREN, source=model.name)
            made += [one for one in live if one.source_digest == model.digest]
        return tuple(
            Link(
                _LEVELS[type(one)],
                one.name,
                one.digest,
                note=getattr(one, "state", ""),
                children=self.children(one),
            )
            for one in made
        )


def _checked_bytes(catalog: Catalog, shelf: Shelf, link: Link, status: AskStatus | None) -> Link:
    """A claimed link, as its bytes or its tool say it is."""
    try:
        match link.level:
            case "base":
                base = catalog.levels.get(BaseModel, link.name)
                with shelf.checkout(base), shelf.checked(base) as (_, check):
                    check.finish(no_progress)
            case "customized":
                shelf.verify(catalog.levels.get(CustomizedModel, link.name))
            case "complete":
                shelf.verify(catalog.levels.get(CompleteModel, link.name))
            case "live":
                return _asked(catalog, link, status)
            case "training":
                return link
    except EvictedError:  # its note says so; it can be made again, to this digest or not at all
        return link
    except (NotFoundError, BaseModelMissingError) as error:
        return evolve(link, state="missing", note=str(error))
    except (IntegrityError, BaseModelMismatch, MalformedError) as error:
        return evolve(link, state="damaged", note=str(error))
    except CustomizedModelsError as error:  # a disk, the database or a package: nothing is known
        return evolve(link, note=f"it cannot be read now: {error}")
    return evolve(link, state="verified")


def _asked(catalog: Catalog, link: Link, status: AskStatus | None) -> Link:
    live = catalog.levels.get(LiveModel, link.name)
    if live.state == "undeployed":
        return link
    try:
        found = (status or partial(_status, catalog))(live)
    except (DeploymentError, NotFoundError) as error:
        return evolve(link, note=f"{live.environment} cannot be asked: {error}")
    state: LinkState = {
        Status.LIVE: "verified",
        Status.LOADED: "verified",
        Status.ABSENT: "missing",
        Status.CHANGED: "damaged",
    }.get(found, "claimed")  # type: ignore[assignment]  # of mypy: the values are text
    return evolve(link, state=state, note=f"{found.value} at {live.environment}")


def _status(catalog: Catalog, live: LiveModel) -> Status:
    """What an environment's tool says, where the environment tells all that it takes to ask."""
    backend = open_backend(catalog.levels.get(DeploymentEnvironment, live.environment))
    return backend.status(served_there(live, backend))


def _verified(link: Link, verify: Verify, status: AskStatus | None) -> Link:
    parents = tuple(_verified(parent, verify, status) for parent in link.parents)
    checked = verify(link, status) if link.state == "claimed" else link
    return evolve(checked, parents=parents)


def _upwards(link: Link) -> Iterator[Link]:
    yield link
    for parent in link.parents:
        yield from _upwards(parent)


def _tree(links: Sequence[Link], before: str) -> list[str]:
    """Lines of a tree; each link is followed by those that it leads to."""
    lines = []
    for number, link in enumerate(links):
        is_last = number == len(links) - 1
        lines.append(f"{before}{'└─' if is_last else '├─'} {link}")
        lines += _tree(link.parents or link.children, before + ("   " if is_last else "│  "))
    return lines


def _drawn(model: Link) -> str:
    """What it was made of to the left, and what was made of it to the right."""
    boxes: list[Box] = []
    lines: list[tuple[int, int]] = []
    depth = _depth(model)

    def put(link: Link, column: int, row: float, step: int) -> tuple[int, float]:
        """Draw a link and what it leads to; its number, and how many rows that takes."""
        number, taken = len(boxes), 0.0
        title = f"{link} {link.digest}"
        texts = (link.level, link.name, f"{short(link.digest)} {link.state}".strip())
        boxes.append(Box(texts, _COLORS[link.state], column, row, title))
        for other in link.parents if step < 0 else link.children:
            place, rows = put(other, column + step, row + taken, step)
            lines.append((place, number) if step < 0 else (number, place))
            taken += rows
        return number, max(1.0, taken)

    put(model, depth, 0, -1)
    middle, row = 0, 0.0
    for child in model.children:
        place, rows = put(child, depth + 1, row, 1)
        lines.append((middle, place))
        row += rows
    return graph_svg(boxes, lines)


def _depth(link: Link) -> int:
    return max((1 + _depth(parent) for parent in link.parents), default=0)
