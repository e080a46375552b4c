"""The `tokenizer.*` key-values: vocabulary, special tokens, what is added to a text, template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MalformedError, UnsafeFileError, UnsupportedError, shown
from ..files.reading import MAX_JSON, json_object, opened, read_at
from .bpe import read_bpe
from .format import f32s, flag, i32s, text, texts, u32
from .sentencepiece import read_sentencepiece
from .vocabulary import Vocabulary

if TYPE_CHECKING:
    import tokenizers

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # the file format's own spelling


def tokenizer_metadata(
    files: Mapping[str, Path], config: Mapping[str, Any], size: int, *, chat_template: bool
) -> dict[str, bytes]:
    """The key-values of the tokenizer in `files`; `config`: `config.json`; `size`: its tokens.

    Raises:
        MalformedError: there is no tokenizer, no end-of-text token, or a file does not parse.
        UnsupportedError: llama.cpp would split text in another way.
    """
    settings = _object(files, "tokenizer_config.json")
    document = _object(files, "tokenizer.json")
    backend = _backend(files["tokenizer.json"]) if document else None
    vocabulary = _vocabulary(files, settings, document, backend, size)
    special = _special_tokens(vocabulary, settings, config)
    additions = _additions(vocabulary, settings, backend, special)
    space_prefix = settings.get("add_prefix_space", vocabulary.space_prefix)
    values: dict[str, bytes] = {}
    if isinstance(space_prefix, bool):
        values["ggml.add_space_prefix"] = flag(space_prefix)
    values |= {
        "ggml.model": text(vocabulary.model),
        "ggml.pre": text(vocabulary.pre),
        "ggml.tokens": texts([token.text for token in vocabulary.tokens]),
    }
    if vocabulary.model == "llama":
        values["ggml.scores"] = f32s([token.score for token in vocabulary.tokens])
    values["ggml.token_type"] = i32s([token.kind for token in vocabulary.tokens])
    if vocabulary.merges:
        values["ggml.merges"] = texts([merge.encode() for merge in vocabulary.merges])
    for role, number in special.items():
        values[f"ggml.{_KEYS.get(role, role)}_token_id"] = u32(number)
    for role, wanted in additions.items():
        values[f"ggml.add_{role}_token"] = flag(wanted)
    if chat_template:
        values |= _chat_template(files, settings)
    return {f"tokenizer.{key}": value for key, value in values.items()}


def _vocabulary(
    files: Mapping[str, Path],
    settings: Mapping[str, Any],
    document: Mapping[str, Any],
    backend: tokenizers.Tokenizer | None,
    size: int,
) -> Vocabulary:
    """From `tokenizer.model` where there is one, as upstream prefers; else `tokenizer.json`."""
    if "tokenizer.model" in files:
        listed = backend.get_vocab(with_added_tokens=True) if backend else {}
        data = bytes(_content(files, "tokenizer.model"))
        return read_sentencepiece(data, size, _added_tokens(files, settings, document), listed)
    if backend is None:
        raise MalformedError("the model directory has neither tokenizer.json nor tokenizer.model")
    return read_bpe(document, backend, size)


def _added_tokens(
    files: Mapping[str, Path], settings: Mapping[str, Any], document: Mapping[str, Any]
) -> dict[int, tuple[str, bool]]:
    """Text and whether special, by id, from the three places where they have been kept."""
    result: dict[int, tuple[str, bool]] = {}
    try:
        for content, number in _object(files, "added_tokens.json").items():
            result[int(number)] = (content, False)
        entries = list((settings.get("added_tokens_decoder") or {}).items())
        entries += [(entry["id"], entry) for entry in document.get("added_tokens") or ()]
        for number, entry in entries:
            result[int(number)] = (entry["content"], bool(entry.get("special")))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MalformedError(
            f"the tokenizer's added tokens do not parse: {shown(error)}"
        ) from error
    if not all(isinstance(content, str) and content for content, _ in result.values()):
        raise MalformedError("the tokenizer has an added token that is no text")
    return result


def _special_tokens(
    vocabulary: Vocabulary, settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    """Ids by role: by text in `tokenizer_config.json`, else by id in `config.json`.

    llama.cpp takes token 11 or 2 for an end-of-text token that a file does not name, so there
    must be one.
    """
    numbers = {token.text: number for number, token in enumerate(vocabulary.tokens)}
    result = {}
    for role in _SPECIAL:
        named = settings.get(f"{role}_token")
        named = named.get("content") if isinstance(named, dict) else named
        if isinstance(named, str) and named.encode() in numbers:
            result[role] = numbers[named.encode()]
    for role in _SPECIAL:
        number = config.get(f"{role}_token_id")
        if type(number) is int and 0 <= number < len(vocabulary.tokens):
            result.setdefault(role, number)
    if "eos" not in result:
        raise MalformedError(
            "neither tokenizer_config.json nor config.json names one end-of-text token (eos_token)"
        )
    return result


def _additions(
    vocabulary: Vocabulary,
    settings: Mapping[str, Any],
    backend: tokenizers.Tokenizer | None,
    special: Mapping[str, int],
) -> dict[str, bool]:
    """Whether a text gets a beginning and an end token.

    As transformers 5 has it (`TokenizersBackend.update_post_processor`): said in
    `tokenizer_config.json`, else what `tokenizer.json` does. A bare `tokenizer.model` is given a
    beginning and no end.
    """
    said = {role: settings.get(f"add_{role}_token") for role in ("bos", "eos")}
    if any(isinstance(value, bool) for value in said.values()):
        return {role: value is True and role in special for role, value in said.items()}
    if backend is None:
        return {"bos": "bos" in special, "eos": False}
    plain, full = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for bos in (False, True):
        for eos in (False, True):
            head = [special["bos"]] if bos and "bos" in special else []
            tail = [special["eos"]] if eos else []
            if full == head + plain + tail:
                return {"bos": bool(head), "eos": bool(tail)}
    raise UnsupportedError(
        f"tokenizer.json makes {full} of a text whose tokens are {plain}; llama.cpp can add only "
        f"the model's own beginning and end tokens"
    )


def _chat_template(files: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, bytes]:
    """`chat_template.jinja` before `tokenizer_config.json`, as transformers reads them."""
    template = settings.get("chat_template")
    if "chat_template.jinja" in files:
        template = _decoded(_content(files, "chat_template.jinja"), "chat_template.jinja")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"chat_template": text(template)}
    try:
        named = {str(entry["name"]): str(entry["template"]) for entry in template}
    except (KeyError, TypeError) as error:
        raise MalformedError("tokenizer_config.json: chat_template is no text or list") from error
    others = sorted(named.keys() - {"default"})
    if not all(name.isidentifier() and name.isascii() for name in others):
        raise MalformedError("tokenizer_config.json: a chat template has an unusual name")
    values = {f"chat_template.{name}": text(named[name]) for name in others}
    if others:
        values["chat_templates"] = texts([name.encode() for name in others])
    if "default" in named:
        values["chat_template"] = text(named["default"])
    return values


def _backend(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise MalformedError(f"tokenizer.json is no tokenizer: {shown(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _object(files: Mapping[str, Path], name: str) -> dict[str, Any]:
    return json_object(files[name]) if name in files else {}


def _content(files: Mapping[str, Path], name: str) -> bytearray:
    with opened(files[name]) as fd:
        data = read_at(fd, 0, min(files[name].stat().st_size, MAX_JSON + 1), name)
    if len(data) > MAX_JSON:
        raise UnsafeFileError(f"{name} has more than {MAX_JSON} bytes")
    return data


def _decoded(data: bytearray, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedError(f"{name} is not UTF-8") from error
