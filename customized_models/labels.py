"""What people say of models beside what they are: tags, aliases, a description."""

from __future__ import annotations

from attrs import field, frozen

from . import arguments
from .errors import InvalidNameError, shown
from .naming import ALIAS, checked_name, train_name_of
from .values import Value, checked

_LONGEST_TAG = 100  # characters: what a table can still show
_LONGEST_DESCRIPTION = 10_000  # characters; longer texts have a card of their own


@frozen(field_transformer=checked)
class Labels(Value):
    """What was said of a model. None of it is part of its digest.

    Attributes:
        tags: Sorted.
        aliases: The references that mean it now, such as "champion@support", sorted.
        description: Any text.
    """

    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    description: str = field(default="")


@frozen
class Reference:
    """An alias of a training's models: `champion@support`."""

    alias: str
    train_name: str

    def __str__(self) -> str:
        return f"{self.alias}@{self.train_name}"

    @classmethod
    def parse(cls, name: str) -> Reference | None:
        """The reference that a name is; None if it is the name of a model, which has no `@`.

        Raises:
            InvalidNameError: The alias or the train name cannot be one.
        """
        alias, at, train_name = name.partition("@")
        return cls(checked_alias(alias), train_name_of(train_name)) if at else None


def checked_alias(given: object) -> str:
    """An alias, if it is one: of lower-case letters, digits, `.` and `-`."""
    return checked_name("alias", given, ALIAS)


def checked_tags(given: object) -> tuple[str, ...]:
    """Tags, each once.

    Raises:
        InvalidNameError: One is empty, too long, or has what a pattern is made of.
    """
    tags = tuple(dict.fromkeys(arguments.texts("tags", given)))
    for tag in tags:
        fits = 0 < len(tag) <= _LONGEST_TAG and tag.isprintable() and not set("*?") & set(tag)
        if not fits:
            raise InvalidNameError(
                f"tag {shown(tag)} must be 1 to {_LONGEST_TAG} printable characters without '*' "
                f"and '?'"
            )
    return tags


def checked_description(given: object) -> str:
    """A description, if it is not too long.

    Raises:
        InvalidNameError: It is too long, or has half a character.
    """
    text = arguments.text("description", given)
    if len(text) > _LONGEST_DESCRIPTION or any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise InvalidNameError(f"a description has up to {_LONGEST_DESCRIPTION} characters")
    return text
