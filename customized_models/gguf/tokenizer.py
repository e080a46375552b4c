"""The `tokenizer.*` key-values: vocabulary, special tokens, what is added to a text, template."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MalformedError, UnsafeFileError, shown
from ..files.reading import MAX_JSON, json_object, opened, read_at
from .bpe import merges_of, read_bpe
from .format import f32s, flag, i32s, text, texts, u32
from .sentencepiece import read_sentencepiece
from .special_tokens import SpecialTokens, special_tokens
from .vocabulary import Kind, Token, Vocabulary, added

if TYPE_CHECKING:
    import tokenizers

_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # the file format's own spelling

_BEGINS = {"llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
           "tekken", "chameleon"}  # fmt: skip
"""Pre-tokenizers with which llama.cpp begins a text with a token unless the file says otherwise.

Source: `llama_vocab::impl::load` in `src/llama-vocab.cpp` of llama.cpp b11434.
"""

Values = dict[str, bytes]


class TokenizerFiles:
    """The tokenizer in a model's small files; families choose how it is told.

    `files`: by the name they have in a model directory. `config`: `config.json` as it is.
    """

    def __init__(self, files: Mapping[str, Path], config: Mapping[str, Any]) -> None:
        self.files = files
        self.config = config

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """`tokenizer_config.json`; empty without one."""
        return self._object("tokenizer_config.json")

    @cached_property
    def document(self) -> Mapping[str, Any]:
        """`tokenizer.json`; empty without one."""
        return self._object("tokenizer.json")

    @cached_property
    def backend(self) -> tokenizers.Tokenizer | None:
        """The tokenizer that `tokenizer.json` describes."""
        import tokenizers

        if not self.document:
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(self.files["tokenizer.json"]))
        except Exception as error:  # the library raises no class of its own
            raise MalformedError(f"tokenizer.json is no tokenizer: {shown(error)}") from error
        backend.no_truncation()
        backend.no_padding()
        return backend

    @property
    def is_sentencepiece(self) -> bool:
        """Whether `tokenizer.json` has what was made from a SentencePiece model."""
        return bool((self.document.get("model") or {}).get("byte_fallback"))

    def bpe(self, size: int, *, named: Mapping[str, str] | None = None) -> Values:
        """Byte-level BPE of `size` tokens: upstream's `_set_vocab_gpt2`.

        `named`: special tokens by role that the family has where no file names others.

        Raises:
            MalformedError: there is no tokenizer, or it does not parse or fit.
            UnsupportedError: llama.cpp would split text in another way.
        """
        if self.backend is None:
            raise MalformedError("the model directory has no tokenizer.json or tokenizer.model")
        vocabulary = read_bpe(self.document, self.backend, size)
        values = _vocabulary(vocabulary)
        if merges := merges_of(self.document["model"]):
            values["ggml.merges"] = texts([merge.encode() for merge in merges])
        special = self.special(size, named or {})
        if vocabulary.pre in _BEGINS and "ggml.add_bos_token" not in special:
            plain, full = (
                self.backend.encode("a", add_special_tokens=x).ids for x in (False, True)
            )
            special |= {"ggml.add_bos_token": flag(False)} if plain == full else {}
        return values | special

    def sentencepiece(self, size: int, *, all_added: bool = False) -> Values:
        """`tokenizer.model`, padded to `size` tokens: upstream's `_set_vocab_sentencepiece`.

        `all_added`: as `Phi3MiniModel.set_vocab` has it, where tokens keep their text, are control
        tokens only if they say so, and are read from `tokenizer.json` too.

        Raises:
            MalformedError: there is no such file, or it does not parse, or disagrees with others.
            UnsupportedError: it is no BPE, or normalizes text in ways that llama.cpp does not.
        """
        if "tokenizer.model" not in self.files:
            raise MalformedError("the model directory has no tokenizer.model")
        listed = self.backend.get_vocab(with_added_tokens=True) if self.backend else {}
        data = bytes(self._content("tokenizer.model"))
        vocabulary = read_sentencepiece(data, size, self._added_tokens(all_added), listed)
        # llama.cpp puts a space before a text unless the file says otherwise.
        prefix = {} if vocabulary.space_prefix else {"ggml.add_space_prefix": flag(False)}
        return prefix | _vocabulary(vocabulary) | self.special(size)

    def special(self, size: int, named: Mapping[str, str] | None = None) -> Values:
        """The special tokens' ids, what is added to a text, and the chat template.

        `named`: see `bpe`.

        Raises:
            MalformedError: no end-of-text token is named.
        """
        special = special_tokens(self.document, self.settings, self.config, size)
        for role, content in (named or {}).items():
            special.name(role, self.added_id(content), size)
        if "eos" not in special.ids:
            # llama.cpp takes token 11 or 2 for one that a file does not name.
            raise MalformedError(
                "neither tokenizer_config.json nor config.json names one end-of-text token "
                "(eos_token)"
            )
        return special_values(special) | self._chat_template()

    def added_id(self, content: str) -> int:
        """The id of the added token `content`.

        Raises:
            MalformedError: there is no such token.
        """
        for number, token in (
            self.backend.get_added_tokens_decoder() if self.backend else {}
        ).items():
            if token.content == content:
                return number
        raise MalformedError(f"the tokenizer lacks the token {shown(content)}")

    def space_prefix(self) -> Values:
        """Whether a space is put before a text, if `tokenizer_config.json` says it."""
        said = self.settings.get("add_prefix_space")
        return {"ggml.add_space_prefix": flag(said)} if isinstance(said, bool) else {}

    def _added_tokens(self, all_added: bool) -> dict[int, Token]:
        """The added tokens by id, from the places where they have been kept."""
        tokens: dict[int, Token] = {}
        try:
            for content, number in self._object("added_tokens.json").items():
                tokens[int(number)] = Token(content.encode(), Kind.USER_DEFINED, -1000.0)
            entries = list((self.settings.get("added_tokens_decoder") or {}).items())
            listed = [(entry["id"], entry) for entry in self.document.get("added_tokens") or ()]
            for number, entry in entries + (listed if all_added else []):
                content, special = entry["content"], bool(entry.get("special"))
                tokens[int(number)] = added(content, special=special, as_it_is=all_added)
            # Since version 5, transformers keeps added tokens in tokenizer.json alone.
            for number, entry in listed:
                token = added(entry["content"], special=bool(entry.get("special")), unlisted=True)
                tokens.setdefault(int(number), token)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MalformedError(
                f"the tokenizer's added tokens do not parse: {shown(error)}"
            ) from error
        return tokens

    def _chat_template(self) -> Values:
        """`chat_template.jinja` before the other places, as transformers reads them."""
        if not self.settings:
            return {}
        template = self.settings.get("chat_template")
        if "chat_template.jinja" in self.files:
            template = _decoded(self._content("chat_template.jinja"), "chat_template.jinja")
        elif template is None:
            template = self._object("chat_template.json").get("chat_template")
        if template is None:
            return {}
        if isinstance(template, str):
            return {"chat_template": text(template)}
        try:
            named = {str(entry["name"]): str(entry["template"]) for entry in template}
        except (KeyError, TypeError) as error:
            raise MalformedError("the chat template is no text or list of named ones") from error
        others = sorted(named.keys() - {"default"})
        if not all(name.isidentifier() and name.isascii() for name in others):
            raise MalformedError("tokenizer_config.json: a chat template has an unusual name")
        values = {f"chat_template.{name}": text(named[name]) for name in others}
        if others:
            values["chat_templates"] = texts([name.encode() for name in others])
        if "default" in named:
            values["chat_template"] = text(named["default"])
        return values

    def _object(self, name: str) -> dict[str, Any]:
        return json_object(self.files[name]) if name in self.files else {}

    def _content(self, name: str) -> bytearray:
        with opened(self.files[name]) as fd:
            data = read_at(fd, 0, min(self.files[name].stat().st_size, MAX_JSON + 1), name)
        if len(data) > MAX_JSON:
            raise UnsafeFileError(f"{name} has more than {MAX_JSON} bytes")
        return data


def _vocabulary(vocabulary: Vocabulary) -> Values:
    values = {
        "ggml.model": text(vocabulary.model),
        "ggml.pre": text(vocabulary.pre),
        "ggml.tokens": texts([token.text for token in vocabulary.tokens]),
    }
    if vocabulary.model == "llama":
        values["ggml.scores"] = f32s([token.score for token in vocabulary.tokens])
    return values | {"ggml.token_type": i32s([token.kind for token in vocabulary.tokens])}


def special_values(special: SpecialTokens) -> Values:
    """The keys for special tokens' ids, and for what is added to a text."""
    values = {f"ggml.{_KEYS.get(role, role)}_token_id": u32(i) for role, i in special.ids.items()}
    added_keys = {f"ggml.add_{role}_token": flag(said) for role, said in special.added.items()}
    return values | added_keys


def _decoded(data: bytearray, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"{name} is not UTF-8") from error
