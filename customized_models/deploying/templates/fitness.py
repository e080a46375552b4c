"""Whether a deployment template is right for a model, known before anything is sent.

The template is rendered here as Ollama renders it, and compared with the chat template.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date
from pathlib import Path

from ...errors import InvalidTemplateError, UnsupportedError, shown
from ...models import DeploymentTemplate
from .chat_template import ChatTemplate
from .conversations import USER, Message
from .go import GoExecutionError, GoSyntaxError, GoUnsupportedError
from .ollama import OllamaTemplate
from .proofs import RenderingFailed, TemplateProof, accepted_by, compare


def check_template(
    template: DeploymentTemplate,
    chat: ChatTemplate,
    *,
    accept: Collection[str] = (),
    today: date | None = None,
) -> TemplateProof:
    """Render conversations with both templates and compare them, character by character.

    Args:
        template: What would be sent.
        chat: What the model was trained with.
        accept: Kinds of conversations that may differ; see `REQUIRED` in `conversations`.
        today: The day of both; the system's if None.

    Returns:
        What was compared, with the differences in what need not be equal.

    Raises:
        InvalidTemplateError: It does not parse.
        TemplateMismatchError: A prompt differs; the message shows where.
        UnsupportedError: It uses something of Go's templates that is not known here.
    """
    proof = compare_template(template, chat, today=today or date.today())
    proof.require(accept, hint=_hint(template, chat, proof))
    return proof


def check_fitness(template: DeploymentTemplate, files: Mapping[str, Path]) -> None:
    """Check a template for the model with these files, whether it knows conversations or not.

    Raises:
        InvalidTemplateError, TemplateMismatchError, UnsupportedError: As `check_template` and
            `check_completion_template`.
    """
    try:
        chat = ChatTemplate.read(files)
    except UnsupportedError:
        check_completion_template(template)
    else:
        check_template(template, chat)


def compare_template(
    template: DeploymentTemplate, chat: ChatTemplate, *, today: date
) -> TemplateProof:
    """Like `check_template`, but whatever differs is only recorded."""
    parsed = parsed_template(template)
    bos = chat.bos if chat.file_adds_bos else ""

    def render(messages: Sequence[Message]) -> str:
        try:
            return bos + parsed.render(messages, today=today)
        except GoUnsupportedError as error:
            raise _unsupported(error) from error
        except GoExecutionError as error:
            raise RenderingFailed(shown(error)) from error

    return compare("here", accepted_by(chat, today), render)


def check_completion_template(template: DeploymentTemplate) -> None:
    """Check a template for a model that continues text and knows no conversations.

    Raises:
        InvalidTemplateError: It does not parse, or does not write the prompt and nothing else.
        UnsupportedError: It uses something of Go's templates that is not known here.
    """
    text = "Once upon a time"
    try:
        found = parsed_template(template).render(
            [Message(role=USER, content=text)], today=date.today()
        )
    except GoUnsupportedError as error:
        raise _unsupported(error) from error
    except GoExecutionError as error:
        raise InvalidTemplateError(f"the deployment template fails: {shown(error)}") from error
    if found != text:
        raise InvalidTemplateError(
            f"the model has no chat template, so it continues text, and the deployment template "
            f"makes {shown(found)} of {shown(text)}; '{{{{ .Prompt }}}}' leaves it as it is"
        )


def parsed_template(template: DeploymentTemplate) -> OllamaTemplate:
    """The template as Ollama parses it.

    Raises:
        InvalidTemplateError: It does not parse.
        UnsupportedError: It uses something of Go's templates that is not known here.
    """
    try:
        return OllamaTemplate.parsed(template.text)
    except GoUnsupportedError as error:
        raise _unsupported(error) from error
    except GoSyntaxError as error:
        raise InvalidTemplateError(
            f"the deployment template is no template of Go: {shown(error)}. Ollama takes Go's "
            f"templates, not Jinja; Deployer.propose_template makes one from the chat template"
        ) from error


def _unsupported(error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"the deployment template uses what cannot be checked before it is sent: {shown(error)}"
    )


def _hint(template: DeploymentTemplate, chat: ChatTemplate, proof: TemplateProof) -> str:
    if not proof.differences:
        return ""
    first = proof.differences[0]
    if chat.file_adds_bos and (first.found or "").startswith(chat.bos * 2):
        return f" (the served file adds {shown(chat.bos)} by itself, so the template must not)"
    if not parsed_template(template).uses_messages and proof.failed[:1] == ("several turns",):
        return " (a template without .Messages is written once for each turn)"
    return ""
