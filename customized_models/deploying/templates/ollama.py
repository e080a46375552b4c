"""What Ollama makes of a Go template and messages, without an Ollama.

Source: `template/template.go` of Ollama 0.11.4 and 0.34.1 (`Parse`, `Vars`, `Execute`, `collate`,
`deleteNode`), the same in both but for what concerns tools.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, timedelta

from attrs import evolve, frozen

from .conversations import Message
from .go import (
    BUILT_IN,
    GoExecutionError,
    GoFunction,
    GoSyntaxError,
    executed,
    parsed,
)
from .go.functions import json_function
from .go.nodes import Action, Block, Branch, Call, Chain, Field, Node, Operand, Pipe, Template
from .go.values import Map, PrintedSlice, Struct, Value


@frozen
class OllamaTemplate:
    """A parsed template. `uses_messages`: it is given all messages, else one turn at a time."""

    tree: Template
    uses_messages: bool

    @classmethod
    def parsed(cls, text: str) -> OllamaTemplate:
        """The template, with `{{ .Response }}` put behind one that names neither it nor messages.

        Raises:
            GoTemplateError: Ollama would refuse it, or it needs what is not known here.
        """
        tree = parsed(text, {*BUILT_IN, *_functions(date.min)})
        names = {name.lower() for block in tree.blocks.values() for name in _identifiers(block)}
        if not names & {"messages", "response"}:
            response = Action(Pipe(((Field(("Response",)),),)))
            tree = Template({**tree.blocks, "": (*tree.root, response)})
        return cls(tree, "messages" in names)

    def render(self, messages: Sequence[Message], *, today: date, think: bool | None = None) -> str:
        """The prompt for `messages`. `think`: as in a request; None where it says nothing.

        Raises:
            GoTemplateError: Ollama would end with an error, or it needs what is not known here.
        """
        joined = collated(messages)
        common = {"Think": bool(think), "ThinkLevel": b"", "IsThinkSet": think is not None}
        if not self.uses_messages:
            return b"".join(self._turns(joined, common, today)).decode("utf-8", "replace")
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        values: dict[str, Value] = {
            "System": system.encode(),
            "Messages": tuple(_struct(message) for message in joined),
            "Tools": PrintedSlice(),
            "Response": b"",
            **common,
        }
        return executed(self.tree, Map(values), _functions(today)).decode("utf-8", "replace")

    def _turns(
        self, messages: Sequence[Message], common: dict[str, Value], today: date
    ) -> Iterator[bytes]:
        """One execution a turn; the last one ends where it would write the response."""
        turn = {"System": b"", "Prompt": b"", "Response": b""}
        # What a message has to come before; what is there already belongs to a turn of its own.
        later = {"system": ("Prompt", "Response"), "user": ("Response",), "assistant": ()}
        keys = {"system": "System", "user": "Prompt", "assistant": "Response"}
        for message in messages:
            role = message["role"]
            if role not in keys:
                continue
            if any(turn[key] for key in later[role]):
                yield executed(self.tree, Map({**turn, **common}), _functions(today))
                turn = dict.fromkeys(turn, b"")
            turn[keys[role]] = message["content"].encode()
        # Ollama runs what is left as a new template, which has neither its functions nor what
        # the template defines.
        cut = Template({"": _Cut().block(self.tree.root)})
        yield executed(cut, Map({**turn, **common}), {})


def collated(messages: Sequence[Message]) -> list[Message]:
    """Neighbours of one role as one message, joined by a blank line; tools' answers stay apart."""
    result: list[Message] = []
    for message in messages:
        last = result[-1] if result else None
        if last is not None and last["role"] == message["role"] != "tool":
            content = last["content"] + "\n\n" + message["content"]
            result[-1] = {"role": last["role"], "content": content}
        else:
            result.append(message)
    return result


def _functions(today: date) -> dict[str, GoFunction]:
    yesterday = today if today == date.min else today - timedelta(days=1)

    def unknown(_: Value) -> bytes:
        return b"any"  # there are no tools here, whose properties have types

    return {
        "json": GoFunction(json_function, 1, 1),
        "currentDate": GoFunction(lambda *_: today.isoformat().encode()),
        "yesterdayDate": GoFunction(lambda *_: yesterday.isoformat().encode()),
        "toTypeScriptType": GoFunction(unknown, 1, 1),
    }


def _struct(message: Message) -> Struct:
    """`api.Message`, with the fields that both versions have."""
    fields = {
        "Role": message["role"].encode(),
        "Content": message["content"].encode(),
        "Thinking": b"",
        "Images": (),
        "ToolCalls": (),
        "ToolName": b"",
    }
    return Struct("*api.Message", fields)


def _identifiers(block: Block) -> Iterator[str]:
    """`Identifiers`: the names of fields and variables, but for those after parentheses."""
    for node in block:
        if isinstance(node, Call) and node.pipe is None:
            raise GoSyntaxError(f"Ollama takes no {{{{ template {node.name!r} }}}} without a value")
        if isinstance(node, Action | Branch | Call) and node.pipe is not None:
            yield from _names_in(node.pipe)
        if isinstance(node, Branch):
            yield from _identifiers(node.body)
            yield from _identifiers(node.otherwise or ())


def _names_in(node: Operand) -> Iterator[str]:
    if isinstance(node, Pipe):
        for command in node.commands:
            for operand in command:
                yield from _names_in(operand)
    elif not isinstance(node, Chain) and hasattr(node, "names"):
        yield from node.names


class _Cut:
    """`deleteNode`: drops what is visited after a field named `Response`."""

    def __init__(self) -> None:
        self.reached = False

    def block(self, nodes: Block) -> Block:
        return tuple(kept for node in nodes if (kept := self.node(node)) is not None)

    def node(self, node: Node) -> Node | None:
        if self.reached:
            return None
        if isinstance(node, Action):
            pipe = self.pipe(node.pipe)
            return None if pipe is None else Action(pipe)
        if isinstance(node, Branch):
            # Its pipeline is not visited; a list that comes after the cut makes Ollama panic.
            body, otherwise = self.block(node.body), node.otherwise
            if otherwise is not None:
                if self.reached:
                    raise GoExecutionError("{{ else }} after {{ .Response }}")
                otherwise = self.block(otherwise)
            return evolve(node, body=body, otherwise=otherwise)
        return node

    def pipe(self, pipe: Pipe) -> Pipe | None:
        commands = []
        for command in pipe.commands:
            operands = [kept for o in command if (kept := self.operand(o)) is not None]
            if not operands:
                return None
            commands.append(tuple(operands))
        return evolve(pipe, commands=tuple(commands)) if commands else None

    def operand(self, node: Operand) -> Operand | None:
        if isinstance(node, Field) and "Response" in node.names:
            self.reached = True
            return node
        if self.reached:
            return None
        return self.pipe(node) if isinstance(node, Pipe) else node
