"""The proof on a live server: its own renderings, compared with the chat template's.

| server | asked | compared |
|---|---|---|
| Ollama 0.11.5 and later | `POST /api/chat`, `_debug_render_only` | characters |
| older | `POST /api/generate`, `context` | token ids; for a trailing assistant, their number |
| llama.cpp | `POST /apply-template`, `/tokenize` | characters, token ids |
| vLLM | `POST /tokenize` | characters of the token ids |
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from typing import Any, Protocol

from ...errors import ServerAnswerError, shown
from .chat_template import ChatTemplate
from .conversations import BEGINNING, CONVERSATIONS, REQUIRED, USER, Conversation, Message
from .proofs import (
    Accepted,
    Comparison,
    Difference,
    RenderingFailed,
    TemplateProof,
    accepted_by,
    compare,
)

_BEGINNING = Conversation(BEGINNING, CONVERSATIONS[0].messages)
# The date of a server elsewhere may be of the day before or after.
_DAYS = 1
_MOST_RUNS = 3  # of the model for each kind: a prompt of a large one takes seconds
_ONE_TOKEN = {"num_predict": 1, "temperature": 0}


class Server(Protocol):
    """What is asked of a server; errors are `DeploymentError`."""

    def post(
        self, path: str, body: Mapping[str, Any], *, seconds: float | None = None
    ) -> Mapping[str, Any]:
        """The JSON object that answers `body`, within `seconds` if not None."""

    def delete(self, path: str, body: Mapping[str, Any]) -> None:
        """Delete what `body` names."""


class Tokenizer(Protocol):
    """The model's own tokenizer, without tokens of its own at either end."""

    def encode(self, text: str) -> Sequence[int]:
        """The ids of a text; the texts of special tokens in it become those tokens."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""


def prove_on_ollama(
    server: Server,
    model: str,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    conversations: Sequence[Conversation] = CONVERSATIONS,
    today: date | None = None,
) -> TemplateProof:
    """Compare what a live model at Ollama is given with what the chat template writes.

    An Ollama that cannot show a rendering is asked for the ids of a prompt instead. Conversations
    of several turns then need a second model beside `model`, with messages of its own and no
    weights, which is deleted again.

    Raises:
        DeploymentError: The server does not answer as its API says.
    """
    accepted = accepted_by(chat, today or date.today(), days=_DAYS)
    bos = chat.bos if chat.file_adds_bos else ""
    if _ollama_text(server, model, [Message(role=USER, content="x")]) is None:
        return _by_tokens(server, model, accepted, bos, tokenizer, conversations)

    def render(messages: Sequence[Message]) -> str:
        try:
            return bos + str(_ollama_text(server, model, messages))
        except ServerAnswerError as error:
            raise RenderingFailed(shown(error)) from error

    proof = compare("Ollama", accepted, render, conversations)
    counted = _counted(server, model, accepted, tokenizer, _BEGINNING)
    return _joined("Ollama", proof, counted)


def prove_on_llama_cpp(
    server: Server,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    conversations: Sequence[Conversation] = CONVERSATIONS,
    today: date | None = None,
) -> TemplateProof:
    """Compare what llama.cpp makes of the chat template in its file with what transformers does.

    Raises:
        DeploymentError: The server does not answer as its API says.
    """
    accepted = accepted_by(chat, today or date.today(), days=_DAYS, joined=False)
    bos = chat.bos if chat.file_adds_bos else ""

    def render(messages: Sequence[Message]) -> str:
        try:
            answer = server.post("/apply-template", {"messages": list(messages)})
        except ServerAnswerError as error:
            raise RenderingFailed(shown(error)) from error
        return bos + _text(answer, "prompt")

    proof = compare("llama.cpp", accepted, render, conversations)
    messages = _BEGINNING.messages
    # As the server itself does before it answers messages.
    prompt = render(messages).removeprefix(bos)
    body = {"content": prompt, "add_special": True, "parse_special": True}
    found = _ids(server.post("/tokenize", body), "tokens")
    texts = accepted(messages)
    equal = any(list(tokenizer.encode(text)) == found for text in texts)
    counted = _one(BEGINNING, messages, texts, tokenizer.decode(found), equal, "token ids")
    return _joined("llama.cpp", proof, counted)


def prove_on_vllm(
    server: Server,
    model: str,
    chat: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    conversations: Sequence[Conversation] = CONVERSATIONS,
    today: date | None = None,
) -> TemplateProof:
    """Compare what vLLM makes of the served model's chat template with what transformers does.

    Raises:
        DeploymentError: The server does not answer as its API says.
    """
    accepted = accepted_by(chat, today or date.today(), days=_DAYS, joined=False)

    def render(messages: Sequence[Message]) -> str:
        body = {"model": model, "messages": list(messages), "add_generation_prompt": True}
        try:
            answer = server.post("/tokenize", body)
        except ServerAnswerError as error:
            raise RenderingFailed(shown(error)) from error
        return tokenizer.decode(_ids(answer, "tokens"))

    return compare("vLLM", accepted, render, conversations)


def _ollama_text(server: Server, model: str, messages: Sequence[Message]) -> str | None:
    """The rendering; None from a server that does not know the question, and answers instead."""
    body = {
        "model": model,
        "messages": list(messages),
        "stream": False,
        "truncate": False,
        "options": _ONE_TOKEN,
        "_debug_render_only": True,
    }
    information = server.post("/api/chat", body).get("_debug_info")
    if information is None:
        return None
    return _text(information, "rendered_template")


def _counted(
    server: Server,
    model: str,
    accepted: Accepted,
    tokenizer: Tokenizer,
    conversation: Conversation,
) -> TemplateProof:
    """A prompt's number of tokens: one more would be a second beginning of text."""
    messages = conversation.messages
    body = {"model": model, "messages": list(messages), "stream": False, "options": _ONE_TOKEN}
    count = server.post("/api/chat", body).get("prompt_eval_count")
    texts = accepted(messages)
    numbers = [len(tokenizer.encode(text)) for text in texts]
    wanted = tuple(f"{number} tokens" for number in numbers)
    return _one(
        conversation.kind,
        messages,
        wanted,
        f"{count} tokens",
        count in numbers,
        "token count",
    )


def _by_tokens(
    server: Server,
    model: str,
    accepted: Accepted,
    bos: str,
    tokenizer: Tokenizer,
    conversations: Sequence[Conversation],
) -> TemplateProof:
    proofs = []
    asked: Counter[str] = Counter()
    for conversation in conversations:
        messages = conversation.messages
        asked[conversation.kind] += 1
        if conversation.kind not in REQUIRED or asked[conversation.kind] > _MOST_RUNS:
            continue
        texts = accepted(messages)
        if not texts:
            proofs.append(TemplateProof("", (Comparison(conversation.kind, 0, 0, 1),)))
        elif messages[-1]["role"] != USER:
            proofs.append(_counted(server, model, accepted, tokenizer, conversation))
        else:
            ids, answer = _ollama_ids(server, model, messages)
            bare = [text.removeprefix(bos) for text in texts]
            equal = any(_begins(ids, tokenizer, text, answer) for text in bare)
            found = tokenizer.decode(ids)
            proofs.append(_one(conversation.kind, messages, bare, found, equal, "token ids"))
    counted = _counted(server, model, accepted, tokenizer, _BEGINNING)
    return _joined("Ollama", *proofs, counted)


def _ollama_ids(server: Server, model: str, messages: Sequence[Message]) -> tuple[list[int], str]:
    """The ids of a prompt and of the start of its answer, and the answer's text."""
    body = {"prompt": messages[-1]["content"], "stream": False, "options": _ONE_TOKEN}
    with _with_history(server, model, messages[:-1]) as name:
        answer = server.post("/api/generate", {"model": name, **body})
    return _ids(answer, "context"), _text(answer, "response")


def _begins(ids: list[int], tokenizer: Tokenizer, prompt: str, answer: str) -> bool:
    """Whether `ids` are those of a prompt and the start of its answer."""
    if "\ufffd" in answer:  # half a character, whose bytes an answer in JSON does not have
        known = list(tokenizer.encode(prompt))
        return ids[: len(known)] == known
    return list(tokenizer.encode(prompt + answer)) == ids


@contextmanager
def _with_history(server: Server, model: str, history: Sequence[Message]) -> Iterator[str]:
    """A name under which the model has said `history` already, taken for a moment."""
    if not history:
        yield model
        return
    beside = f"{model}-history-{uuid.uuid4().hex[:8]}"  # whoever removes the model removes it
    body = {"model": beside, "from": model, "messages": list(history), "stream": False}
    server.post("/api/create", body)
    try:
        yield beside
    finally:
        server.delete("/api/delete", {"model": beside})


def _one(
    kind: str,
    messages: Sequence[Message],
    expected: Sequence[str],
    found: str,
    equal: bool,
    by: str,
) -> TemplateProof:
    roles = tuple(message["role"] for message in messages)
    differences = () if equal else (Difference(kind, roles, expected[0], found),)
    return TemplateProof("", (Comparison(kind, 1, int(equal), 0, by),), differences)


def _joined(where: str, *proofs: TemplateProof) -> TemplateProof:
    """One record of several, with one line a kind and way of comparing."""
    sums: dict[tuple[str, str], Comparison] = {}
    differences: dict[str, Difference] = {}
    for proof in proofs:
        for c in proof.comparisons:
            before = sums.get((c.kind, c.by), Comparison(c.kind, 0, 0, 0, c.by))
            sums[c.kind, c.by] = Comparison(
                c.kind,
                before.compared + c.compared,
                before.equal + c.equal,
                before.refused + c.refused,
                c.by,
            )
        for difference in proof.differences:
            differences.setdefault(difference.kind, difference)
    return TemplateProof(where, tuple(sums.values()), tuple(differences.values()))


def _text(answer: Any, key: str) -> str:
    value = answer.get(key) if isinstance(answer, Mapping) else None
    if not isinstance(value, str):
        raise ServerAnswerError(f"the server's answer has no text {key!r}: {shown(answer)}")
    return value


def _ids(answer: Mapping[str, Any], key: str) -> list[int]:
    value = answer.get(key)
    if not isinstance(value, list) or not all(type(number) is int for number in value):
        raise ServerAnswerError(f"the server's answer has no token ids {key!r}: {shown(answer)}")
    return value
