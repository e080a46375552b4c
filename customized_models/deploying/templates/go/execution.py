"""Executes a parsed template, by the rules of Go's `text/template/exec.go`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import GoExecutionError, GoUnsupportedError
from .functions import BUILT_IN, GoFunction
from .nodes import (
    Action,
    Block,
    Branch,
    Call,
    Chain,
    Constant,
    Dot,
    Field,
    Function,
    Jump,
    Nil,
    Node,
    Operand,
    Pipe,
    Template,
    Text,
    Variable,
)
from .values import Map, Value, is_true, items_of, member, printed, type_name

_MISSING: Any = object()
_MOST_ROUNDS = 1 << 20  # of a range over a number: no prompt has as many bytes


def executed(template: Template, data: Value, functions: Mapping[str, GoFunction]) -> bytes:
    """What a template writes for `data`; `functions`: besides those that every template has.

    Raises:
        GoExecutionError: The template ends with an error.
        GoUnsupportedError: It needs something that is not known here.
    """
    run = _Run(template.blocks, {**BUILT_IN, **functions})
    try:
        run.template("", data)
    except RecursionError as error:
        raise GoUnsupportedError("this depth of templates in templates") from error
    return b"".join(run.written)


class _Jumped(Exception):
    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Run:
    """One execution: what is written, and the variables of the template that is running."""

    def __init__(self, blocks: Mapping[str, Block], functions: Mapping[str, GoFunction]) -> None:
        self.blocks, self.functions = blocks, functions
        self.written: list[bytes] = []
        self.variables: list[tuple[str, Value]] = []

    def template(self, name: str, data: Value) -> None:
        if name not in self.blocks:
            raise GoExecutionError(f"template {name!r} not defined")
        outside, self.variables = self.variables, [("$", data)]
        self.block(self.blocks[name], data)
        self.variables = outside

    def block(self, nodes: Block, dot: Value) -> None:
        for node in nodes:
            self.node(node, dot)

    def node(self, node: Node, dot: Value) -> None:
        if isinstance(node, Text):
            self.written.append(node.text)
        elif isinstance(node, Action):
            value = self.pipe(node.pipe, dot)
            if not node.pipe.declares:
                self.written.append(printed(value))
        elif isinstance(node, Branch):
            mark = len(self.variables)
            (self.range if node.kind == "range" else self.choose)(node, dot)
            del self.variables[mark:]
        elif isinstance(node, Call):
            self.template(node.name, None if node.pipe is None else self.pipe(node.pipe, dot))
        elif isinstance(node, Jump):
            raise _Jumped(node.kind)

    def choose(self, node: Branch, dot: Value) -> None:
        value = self.pipe(node.pipe, dot)
        if is_true(value):
            self.block(node.body, value if node.kind == "with" else dot)
        elif node.otherwise is not None:
            self.block(node.otherwise, dot)

    def range(self, node: Branch, dot: Value) -> None:
        pairs = _pairs(self.pipe(node.pipe, dot), len(node.pipe.declares))
        if not pairs and node.otherwise is not None:
            self.block(node.otherwise, dot)
        mark = len(self.variables)
        for key, item in pairs:
            self.count(node.pipe, key, item)
            try:
                self.block(node.body, item)
            except _Jumped as jumped:
                if jumped.kind == "break":
                    break
            finally:
                del self.variables[mark:]

    def count(self, pipe: Pipe, key: Value, item: Value) -> None:
        """Give the variables of a `range` their next values: the element, or key and element."""
        values = (item,) if len(pipe.declares) == 1 else (key, item)
        for place, (name, value) in enumerate(zip(pipe.declares, values, strict=False)):
            if pipe.assigns:
                self.assign(name, value)
            else:
                self.variables[len(self.variables) - len(pipe.declares) + place] = (name, value)

    def assign(self, name: str, value: Value) -> None:
        for place in range(len(self.variables) - 1, -1, -1):
            if self.variables[place][0] == name:
                self.variables[place] = (name, value)
                return
        raise GoExecutionError(f"undefined variable: {name}")

    # Pipelines

    def pipe(self, pipe: Pipe, dot: Value) -> Value:
        value = _MISSING
        for command in pipe.commands:
            value = self.command(command, dot, value)
        for name in pipe.declares:
            if pipe.assigns:
                self.assign(name, value)
            else:
                self.variables.append((name, value))
        return value

    def command(self, command: tuple[Operand, ...], dot: Value, final: Value) -> Value:
        first = command[0]
        if isinstance(first, Function):
            return self.call(first.name, command[1:], dot, final)
        if len(command) > 1 or final is not _MISSING:
            raise GoExecutionError(f"can't give argument to non-function {_named(first)}")
        if isinstance(first, Nil):
            raise GoExecutionError("nil is not a command")
        return self.operand(first, dot)

    def call(
        self, name: str, operands: tuple[Operand, ...], dot: Value, final: Value = _MISSING
    ) -> Value:
        function = self.functions.get(name)
        if function is None:
            raise GoExecutionError(f"{name!r} is not a defined function")
        count = len(operands) + (final is not _MISSING)
        if count < function.least or (function.most is not None and count > function.most):
            raise GoExecutionError(f"wrong number of args for {name}: got {count}")
        if name in ("and", "or"):
            return self.decide(name == "or", operands, dot, final)
        values = [self.operand(operand, dot) for operand in operands]
        return function.call(*values, *(() if final is _MISSING else (final,)))

    def decide(
        self, wanted: bool, operands: tuple[Operand, ...], dot: Value, final: Value
    ) -> Value:
        """`and`, `or`: the first value that decides, else the last one."""
        value = None
        for operand in operands:
            value = self.operand(operand, dot)
            if is_true(value) == wanted:
                return value
        return value if final is _MISSING else final

    def operand(self, node: Operand, dot: Value) -> Value:
        if isinstance(node, Constant):
            return node.value
        if isinstance(node, Dot):
            return dot
        if isinstance(node, Nil):
            return None
        if isinstance(node, Function):
            return self.call(node.name, (), dot)
        if isinstance(node, Pipe):
            return self.pipe(node, dot)
        if isinstance(node, Field):
            return _followed(dot, node.names)
        if isinstance(node, Chain):
            return _followed(self.operand(node.node, dot), node.names)
        for name, value in reversed(self.variables):
            if name == node.name:
                return _followed(value, node.names)
        raise GoExecutionError(f"undefined variable: {node.name}")


def _followed(value: Value, names: tuple[str, ...]) -> Value:
    for name in names:
        value = member(value, name)
    return value


def _pairs(value: Value, variables: int) -> list[tuple[Value, Value]]:
    """Keys and elements of what `range` goes over, in its order."""
    items = items_of(value)
    if value is None:
        return []
    if isinstance(value, int) and not isinstance(value, bool):
        if value > _MOST_ROUNDS:
            raise GoUnsupportedError(f"a range over {value}")
        if variables > 1:
            raise GoExecutionError(f"can't use {value} to iterate over more than one variable")
        return [(number, number) for number in range(value)]
    if items is not None:
        return list(enumerate(items))
    if isinstance(value, Map):
        return [(key.encode(), value.values[key]) for key in sorted(value.values)]
    raise GoExecutionError(f"range can't iterate over {type_name(value)}")


def _named(node: Operand) -> str:
    if isinstance(node, Field):
        return "." + ".".join(node.names)
    return node.name if isinstance(node, Variable) else type(node).__name__.lower()
