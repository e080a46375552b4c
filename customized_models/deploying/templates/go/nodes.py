"""The tree of a parsed template, shaped as in Go's `text/template/parse/node.go`."""

from __future__ import annotations

from attrs import define, frozen


@frozen
class Dot:
    """`.`"""


@frozen
class Nil:
    """`nil`"""


@frozen
class Constant:
    """A string (as bytes), number or bool."""

    value: bytes | int | float | bool


@frozen
class Field:
    """`.A.B`"""

    names: tuple[str, ...]


@frozen
class Variable:
    """`$x.A.B`; the name has its `$`."""

    name: str
    names: tuple[str, ...] = ()


@frozen
class Function:
    """The name of a function."""

    name: str


@frozen
class Chain:
    """`(pipeline).A.B`"""

    node: Operand
    names: tuple[str, ...]


@frozen
class Pipe:
    """`$i, $x := command | command`. `assigns`: with `=`, to variables that are there."""

    commands: tuple[tuple[Operand, ...], ...]
    declares: tuple[str, ...] = ()
    assigns: bool = False


Operand = Dot | Nil | Constant | Field | Variable | Function | Chain | Pipe


@frozen
class Text:
    """What stands outside the actions."""

    text: bytes


@frozen
class Action:
    """`{{ pipeline }}`"""

    pipe: Pipe


@frozen
class Branch:
    """`{{ if }}`, `{{ with }}` or `{{ range }}`, by `kind`."""

    kind: str
    pipe: Pipe
    body: Block
    otherwise: Block | None


@frozen
class Call:
    """`{{ template "name" pipeline }}`"""

    name: str
    pipe: Pipe | None


@frozen
class Jump:
    """`{{ break }}` or `{{ continue }}`"""

    kind: str


Node = Text | Action | Branch | Call | Jump
Block = tuple[Node, ...]


@define
class Template:
    """A template and those it defines, by name; the outermost has the name ""."""

    blocks: dict[str, Block]

    @property
    def root(self) -> Block:
        """What stands outside all definitions."""
        return self.blocks[""]
