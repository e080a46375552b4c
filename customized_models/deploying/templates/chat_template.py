"""The chat template that a model was trained with: read from its files, rendered by transformers.

It is what a deployment is compared with. Where conversations are tokenized, transformers adds no
beginning-of-text token to what a chat template has written, so the text says all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from attrs import field, frozen

from ...errors import MalformedError, UnsupportedError, listed, shown
from ...files.reading import MAX_JSON, content, json_object
from .conversations import ASSISTANT, USER, Message

FILES = (
    "chat_template.jinja",
    "tokenizer_config.json",
    "chat_template.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
"""The files of a model directory that are read here."""

MAX_TEMPLATE = 1 << 20  # bytes: the longest in use have about a hundredth of that

_CONFIG = "tokenizer_config.json"
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_DATE_START, _DATE_END = "\ue000", "\ue001"
DATES = re.compile(f"{_DATE_START}(.*?){_DATE_END}")
"""What `ChatTemplate.observe` writes for a date: the form that the template asks for."""

# A macro shadows the function that transformers gives to templates.
_MARK_DATES = (
    f"{{%- macro strftime_now(form) -%}}{_DATE_START}{{{{ form }}}}{_DATE_END}{{%- endmacro -%}}"
)


@frozen
class ChatTemplate:
    """A chat template in Jinja, and what it needs of its tokenizer.

    `special_tokens`: text by name, such as "bos_token". `adds_bos`: whether the tokenizer puts a
    beginning-of-text token before a plain text.
    """

    text: str
    special_tokens: Mapping[str, str] = field(factory=dict, hash=False)
    adds_bos: bool = False

    @classmethod
    def read(cls, files: Mapping[str, Path]) -> ChatTemplate:
        """The chat template of a model directory, given its files by name.

        Raises:
            UnsupportedError: There is none, or more than one and none called "default".
            MalformedError: A file does not parse.
        """
        settings = json_object(files[_CONFIG]) if _CONFIG in files else {}
        text = _text(files, settings)
        tokens = _special_tokens(files, settings)
        _compiled(text)
        _refuse_unknown_tokens(text, tokens)
        given = {name: token for name, token in tokens.items() if token is not None}
        return cls(text, given, _adds_bos(files, settings, given.get("bos_token")))

    @property
    def bos(self) -> str:
        """The text of the beginning-of-text token; empty if there is none."""
        return self.special_tokens.get("bos_token", "")

    @property
    def has_dates(self) -> bool:
        """Whether a rendering may depend on the day."""
        return "strftime_now" in self.text

    @property
    def file_adds_bos(self) -> bool:
        """Whether a file that is served must ask for a beginning-of-text token.

        Without it in the text of a conversation, none may be added to conversations, whatever the
        tokenizer adds to other texts. With it, a file that adds one must not be given another.
        """
        text = self.observe([Message(role=USER, content="x")]) or ""
        return self.adds_bos and bool(self.bos) and text.startswith(self.bos)

    def observe(
        self, messages: Sequence[Message], *, open_end: bool = False, **variables: Any
    ) -> str | None:
        """The rendering with `DATES` for dates; None where the template refuses `messages`.

        Args:
            open_end: End with the last message, to be continued, and not with the start of the
                next answer.
            variables: Further variables of the template, such as `enable_thinking`.

        Source: `apply_chat_template` in `tokenization_utils_base.py` of transformers 5.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        given: dict[str, Any] = {**self.special_tokens, **variables}
        try:
            texts: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=(_MARK_DATES if self.has_dates else "") + self.text,
                continue_final_message=open_end,
                add_generation_prompt=not open_end,
                **given,
            )
        except ImportError:
            raise
        # Besides Jinja's errors, whatever an expression on unexpected messages raises.
        except Exception:
            return None
        return str(texts[0][0])

    def render(
        self,
        messages: Sequence[Message],
        *,
        today: date,
        open_end: bool = False,
        **variables: Any,
    ) -> str | None:
        """The rendering on a day; None where the template refuses `messages`."""
        text = self.observe(messages, open_end=open_end, **variables)
        return None if text is None else _dated(text, today)

    def accepted(self, messages: Sequence[Message], *, dates: Sequence[date]) -> tuple[str, ...]:
        """The renderings that a server may give on `dates`; none where the template refuses.

        A last message of the assistant may be continued or answered.
        """
        endings = (True, False) if messages[-1]["role"] == ASSISTANT else (False,)
        texts = [self.observe(messages, open_end=ending) for ending in endings]
        every = (_dated(text, day) for day in dates for text in texts if text is not None)
        return tuple(dict.fromkeys(every))


def _dated(text: str, day: date) -> str:
    return DATES.sub(lambda form: day.strftime(form[1]), text)


def _text(files: Mapping[str, Path], settings: Mapping[str, Any]) -> str:
    if "chat_template.jinja" in files:
        return _decoded(files["chat_template.jinja"])
    found = settings.get("chat_template")
    if found is None and "chat_template.json" in files:  # a processor's, in older directories
        found = json_object(files["chat_template.json"]).get("chat_template")
    if isinstance(found, list):
        try:
            named = {entry["name"]: entry["template"] for entry in found}
        except (KeyError, TypeError) as error:
            raise MalformedError(f"{_CONFIG}: chat_template is no text or list") from error
        if "default" not in named:
            raise UnsupportedError(
                f"{_CONFIG} has the chat templates {listed(map(str, named))} and none called "
                f"'default': put the one that was trained with into chat_template.jinja"
            )
        found = named["default"]
    if found is None:
        raise UnsupportedError(
            "the model has no chat template: neither chat_template.jinja nor tokenizer_config.json "
            "has one, so it can only continue text; for that, deploy with the template "
            "'{{ .Prompt }}' and call /api/generate"
        )
    if not isinstance(found, str):
        raise MalformedError(f"{_CONFIG}: chat_template is no text or list")
    return found


def _decoded(path: Path) -> str:
    try:
        return content(path, MAX_TEMPLATE).decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"{path.name} is not UTF-8") from error


def _special_tokens(files: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Texts by name; None where a file says that there is no such token."""
    names = [f"{role}_token" for role in _ROLES]
    tokens: dict[str, Any] = {}
    if "special_tokens_map.json" in files:
        tokens |= json_object(files["special_tokens_map.json"])
    extra = settings.get("extra_special_tokens")
    tokens |= extra if isinstance(extra, dict) else {}
    tokens |= {name: settings[name] for name in names if name in settings}
    texts = {
        name: token.get("content") if isinstance(token, dict) else token
        for name, token in tokens.items()
        if name.endswith("_token")
    }
    if not all(text is None or isinstance(text, str) for text in texts.values()):
        raise MalformedError("tokenizer_config.json has a special token that is no text")
    return texts


def _compiled(text: str) -> None:
    """Raises `MalformedError` if the template does not parse."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)
    except jinja2.TemplateSyntaxError as error:
        raise MalformedError(
            f"the chat template does not parse: {shown(error.message)}, line {error.lineno}"
        ) from error


def _refuse_unknown_tokens(text: str, tokens: Mapping[str, Any]) -> None:
    """A class of tokenizers may have a default for a token that no file names."""
    for name in ("bos_token", "eos_token"):
        if name not in tokens and re.search(rf"\b{name}\b", text):
            raise UnsupportedError(
                f"the chat template writes {name}, and tokenizer_config.json does not name it: "
                f"save the tokenizer again with transformers 5, which writes it down"
            )


def _adds_bos(files: Mapping[str, Path], settings: Mapping[str, Any], bos: str | None) -> bool:
    """Whether a text gets a beginning-of-text token.

    Source: `TokenizersBackend.update_post_processor` of transformers 5; `tokenizer.json` decides
    where `tokenizer_config.json` says nothing. A bare `tokenizer.model` is given one.
    """
    said = [settings.get(f"add_{role}_token") for role in ("bos", "eos")]
    if bos is None:
        return False
    if any(isinstance(value, bool) for value in said):
        return said[0] is True
    if "tokenizer.json" not in files:
        return "tokenizer.model" in files
    import tokenizers

    if files["tokenizer.json"].stat().st_size > MAX_JSON:
        raise MalformedError(f"tokenizer.json has more than {MAX_JSON} bytes")
    try:
        backend = tokenizers.Tokenizer.from_file(str(files["tokenizer.json"]))
    except Exception as error:  # the library raises no class of its own
        raise MalformedError(f"tokenizer.json is no tokenizer: {shown(error)}") from error
    return bool(backend.encode("a").tokens[:1] == [bos])
