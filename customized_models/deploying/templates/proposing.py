"""A deployment template made from a model's chat template, and shown to write the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

from attrs import frozen

from ...errors import UnsupportedError, listed
from ...models import DeploymentTemplate
from .chat_template import ChatTemplate
from .end_tokens import EndTokens
from .fitness import compare_template
from .learning import learnt
from .pattern import Pattern, Placement
from .proofs import TemplateProof
from .stops import stop_strings
from .writing import go_template


@frozen
class ProposedTemplate:
    """A deployment template that writes what the chat template writes.

    `file_adds_bos`: what the served file must say of a beginning-of-text token
    (`tokenizer.ggml.add_bos_token`); the template is made for that. `ends`: what it must say of
    end tokens. `proof`: what was compared. `limits`: what the template cannot do, in words.
    """

    template: DeploymentTemplate
    file_adds_bos: bool
    ends: EndTokens
    proof: TemplateProof
    limits: tuple[str, ...] = ()


def propose_deployment_template(files: Mapping[str, Path]) -> ProposedTemplate:
    """Make an Ollama template from the chat template among a model directory's files.

    The chat template is rendered, not read: whatever Jinja it is written in, its output for
    conversations of a system message, a user and an assistant shows what stands between two
    contents, and that is what a Go template can write. Then both are rendered and compared.

    Args:
        files: Paths by name; those in `chat_template.FILES` and `end_tokens.FILES` are read.

    Raises:
        UnsupportedError: The model has no chat template, or one that Go cannot express: it
            refuses every conversation, needs tools, or depends on contents.
        MalformedError: A file does not parse.
    """
    return propose(ChatTemplate.read(files), EndTokens.read(files))


def propose(chat: ChatTemplate, ends: EndTokens) -> ProposedTemplate:
    """Like `propose_deployment_template`, for a chat template and end tokens that were read."""
    pattern = learnt(chat)
    stop = stop_strings(pattern, ends, chat.bos if chat.file_adds_bos else "")
    template = DeploymentTemplate(go_template(pattern), stop)
    proof = compare_template(template, chat, today=date.today())
    if not proof.compared:
        raise UnsupportedError(
            "the chat template refuses a single user message, so there is nothing to make a "
            "deployment template from; perhaps it wants tools or documents"
        )
    if proof.failed:
        raise UnsupportedError(
            f"the chat template cannot be said as a Go template: {proof.differences[0]}. "
            f"Different: {listed(proof.failed)}. Write the deployment template by hand, or use a "
            f"server that takes the chat template itself"
        )
    return ProposedTemplate(
        template, chat.file_adds_bos, ends, proof, tuple(_limits(chat, ends, pattern, proof))
    )


def _limits(
    chat: ChatTemplate,
    ends: EndTokens,
    pattern: Pattern,
    proof: TemplateProof,
) -> Iterator[str]:
    yield "one role twice: Ollama joins neighbours of one role by a blank line before any template"
    if "tools" in chat.text:
        yield "tools: the template does not write them; a model that calls tools needs another way"
    if pattern.placement is Placement.REFUSED:
        yield "system: the chat template refuses it; here it stands before the user's message"
    if "<think>" in chat.text or "</think>" in chat.text:
        yield "thinking: an answer has it in its text, and not apart"
    for kind in proof.limits:
        if kind != "one role twice":
            example = next(d for d in proof.differences if d.kind == kind)
            yield f"{kind}: some conversations differ, such as {', '.join(example.roles)}"
    if chat.adds_bos and not chat.file_adds_bos:
        yield f"beginning: the file must not add {chat.bos!r}, not to other texts either"
    if ends.lost:
        yield f"end tokens: llama.cpp goes on after {listed(map(str, ends.lost))}"
