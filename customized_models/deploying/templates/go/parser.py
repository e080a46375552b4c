"""Tokens to a tree, by the rules of Go's `text/template/parse/parse.go`."""

from __future__ import annotations

from collections.abc import Container

from .errors import GoSyntaxError
from .lexer import Token, number, tokens, unquoted
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

_CONSTANTS = ("bool", "character", "number", "string", "raw")
_OPERANDS = (*_CONSTANTS, "dot", "nil", "field", "variable", "word", "open")
_NO_FIELDS = (Constant, Dot, Nil)


def parsed(template: str, functions: Container[str]) -> Template:
    """The tree of a template that may call `functions`.

    Raises:
        GoSyntaxError: It does not parse.
        GoUnsupportedError: A number in a spelling that is not known here.
    """
    try:
        return _Parser(list(tokens(template)), functions).template()
    except RecursionError as error:
        raise GoSyntaxError("the template nests too deeply") from error


class _Parser:
    def __init__(self, found: list[Token], functions: Container[str]) -> None:
        self.tokens, self.functions, self.at = found, functions, 0
        self.variables = ["$"]
        self.ranges = 0
        self.blocks: dict[str, Block] = {}

    def template(self) -> Template:
        root, end = self.block(top=True)
        if end != "end of file":
            raise GoSyntaxError(f"unexpected {{{{{end}}}}}")
        self.add("", root)
        return Template(self.blocks)

    def add(self, name: str, block: Block) -> None:
        if not _is_empty(self.blocks.get(name, ())):
            if not _is_empty(block):
                raise GoSyntaxError(f"multiple definition of template {name!r}")
            return
        self.blocks[name] = block

    # Tokens

    def peek(self) -> Token:
        return self.tokens[self.at]

    def peek_after_space(self) -> Token:
        if self.peek().kind == "space":
            self.at += 1
        return self.peek()

    def take(self, kind: str, context: str) -> Token:
        token = self.peek_after_space()
        if token.kind != kind:
            raise GoSyntaxError(f"unexpected {_said(token)} in {context}")
        self.at += 1
        return token

    # Blocks

    def block(self, *, top: bool = False) -> tuple[Block, str]:
        """Nodes up to an `end` or `else`, which is taken without what follows its name."""
        nodes: list[Node] = []
        while True:
            token = self.peek()
            self.at += 1
            if token.kind == "text":
                nodes.append(Text(token.text.encode()))
                continue
            if token.kind == "end of file":
                if not top:
                    raise GoSyntaxError("unexpected EOF: an {{end}} is missing")
                return tuple(nodes), token.kind
            keyword = self.peek_after_space().kind
            if keyword in ("end", "else"):
                self.at += 1
                if keyword == "end":
                    self.take("right", "end")
                return tuple(nodes), keyword
            if keyword == "define":
                if not top:
                    raise GoSyntaxError("unexpected {{define}}")
                self.definition()
                continue
            nodes.append(self.action(keyword))

    def action(self, keyword: str) -> Node:
        if keyword in ("if", "with", "range"):
            self.at += 1
            return self.branch(keyword)
        if keyword in ("break", "continue"):
            self.at += 1
            self.take("right", keyword)
            if not self.ranges:
                raise GoSyntaxError(f"{{{{{keyword}}}}} outside {{{{range}}}}")
            return Jump(keyword)
        if keyword == "template":
            self.at += 1
            name = unquoted(self.string("template clause")).decode("utf-8", "replace")
            if self.peek_after_space().kind == "right":
                self.at += 1
                return Call(name, None)
            return Call(name, self.pipe("template clause"))
        if keyword == "block":
            self.at += 1
            name = unquoted(self.string("block clause")).decode("utf-8", "replace")
            pipe = self.pipe("block clause")
            self.body_of(name)
            return Call(name, pipe)
        return Action(self.pipe("command"))

    def definition(self) -> None:
        self.at += 1
        name = unquoted(self.string("define clause")).decode("utf-8", "replace")
        self.take("right", "define clause")
        self.body_of(name)

    def body_of(self, name: str) -> None:
        """A template of its own: it sees no variable of its surroundings."""
        outside, self.variables = (self.variables, self.ranges), ["$"]
        self.ranges = 0
        body, end = self.block()
        if end != "end":
            raise GoSyntaxError(f"unexpected {{{{{end}}}}} in the template {name!r}")
        self.variables, self.ranges = outside
        self.add(name, body)

    def string(self, context: str) -> Token:
        token = self.peek_after_space()
        if token.kind not in ("string", "raw"):
            raise GoSyntaxError(f"unexpected {_said(token)} in {context}")
        self.at += 1
        return token

    def branch(self, kind: str) -> Branch:
        mark = len(self.variables)
        pipe = self.pipe(kind)
        self.ranges += kind == "range"
        body, end = self.block()
        # `break` and `continue` in an {{else}} of a range belong to one further out.
        self.ranges -= kind == "range"
        otherwise: Block | None = None
        if end == "else":
            following = self.peek_after_space().kind
            if following == kind and kind in ("if", "with"):
                self.at += 1
                otherwise = (self.branch(kind),)
            else:
                self.take("right", "else")
                otherwise, end = self.block()
                if end != "end":
                    raise GoSyntaxError("expected {{end}}, found {{else}}")
        del self.variables[mark:]
        return Branch(kind, pipe, body, otherwise)

    # Pipelines

    def pipe(self, context: str, end: str = "right") -> Pipe:
        declares, assigns = self.declarations(context)
        commands: list[tuple[Operand, ...]] = []
        while True:
            token = self.peek_after_space()
            if token.kind == end:
                self.at += 1
                break
            if token.kind not in _OPERANDS:
                raise GoSyntaxError(f"unexpected {_said(token)} in {context}")
            commands.append(self.command())
        if not commands:
            raise GoSyntaxError(f"missing value for {context}")
        for command in commands[1:]:
            if isinstance(command[0], _NO_FIELDS):
                raise GoSyntaxError("a constant or a dot takes no piped value")
        return Pipe(tuple(commands), declares, assigns)

    def declarations(self, context: str) -> tuple[tuple[str, ...], bool]:
        names: list[str] = []
        while True:
            start, token = self.at, self.peek_after_space()
            if token.kind != "variable":
                if names and token.kind not in ("right", "close"):
                    raise GoSyntaxError("range can only initialize variables")
                return tuple(names), False
            self.at += 1
            following = self.peek_after_space().kind
            if following in ("declare", "assign"):
                self.at += 1
                names.append(token.text)
                self.variables += names
                return tuple(names), following == "assign"
            if following != "comma":
                self.at = start
                return tuple(names), False
            self.at += 1
            names.append(token.text)
            if context != "range" or len(names) > 1:
                raise GoSyntaxError(f"too many declarations in {context}")

    def command(self) -> tuple[Operand, ...]:
        operands: list[Operand] = []
        while True:
            if self.peek_after_space().kind in _OPERANDS:
                operands.append(self.operand())
            token = self.peek()
            if token.kind == "space":
                continue
            if token.kind == "pipe":
                self.at += 1
            elif token.kind not in ("right", "close"):
                raise GoSyntaxError(f"unexpected {_said(token)} in operand")
            return tuple(operands)

    def operand(self) -> Operand:
        node = self.term()
        names: list[str] = []
        while self.peek().kind == "field":
            names.append(self.peek().text[1:])
            self.at += 1
        if not names:
            return node
        if isinstance(node, _NO_FIELDS):
            raise GoSyntaxError(f"unexpected . after {node}")
        if isinstance(node, Field):
            return Field((*node.names, *names))
        if isinstance(node, Variable):
            return Variable(node.name, tuple(names))
        return Chain(node, tuple(names))

    def term(self) -> Operand:
        token = self.peek()
        self.at += 1
        if token.kind == "open":
            return self.pipe("parenthesized pipeline", "close")
        if token.kind == "word":
            if token.text not in self.functions:
                raise GoSyntaxError(f"function {token.text!r} not defined")
            return Function(token.text)
        if token.kind == "variable":
            if token.text not in self.variables:
                raise GoSyntaxError(f"undefined variable {token.text!r}")
            return Variable(token.text)
        if token.kind == "field":
            return Field((token.text[1:],))
        if token.kind == "dot":
            return Dot()
        if token.kind == "nil":
            return Nil()
        if token.kind == "bool":
            return Constant(token.text == "true")
        if token.kind in ("string", "raw"):
            return Constant(unquoted(token))
        return Constant(number(token))


def _is_empty(block: Block) -> bool:
    """Whether a template counts as not defined: it has nothing but white space."""
    return all(isinstance(node, Text) and not node.text.strip() for node in block)


def _said(token: Token) -> str:
    return repr(token.text) if token.text else token.kind
