"""Byte-level BPE out of `tokenizer.json`, and the name of its pre-tokenizer.

llama.cpp splits text by expressions of its own, chosen by a name in the file; a wrong name gives
plausible but other tokens. So a pre-tokenizer is either recognised or refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from ..errors import MalformedError, UnsupportedError, shown
from .vocabulary import Kind, Token, Vocabulary, added, padding

if TYPE_CHECKING:
    import tokenizers


def read_bpe(document: Mapping[str, Any], tokenizer: tokenizers.Tokenizer, size: int) -> Vocabulary:
    """The vocabulary of `tokenizer`, whose file holds `document`; `size` tokens.

    Raises:
        MalformedError: a token's id is not below `size`.
        UnsupportedError: it is no byte-level BPE, or its pre-tokenizer is not known.
    """
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UnsupportedError(
            "tokenizer.json holds no BPE; llama.cpp needs one for this architecture"
        )
    if model.get("byte_fallback") or (document.get("decoder") or {}).get("type") != "ByteLevel":
        raise UnsupportedError(
            "tokenizer.json holds a SentencePiece BPE without its scores; add tokenizer.model"
        )
    affixes = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if any(affixes) or model.get("dropout"):
        raise UnsupportedError("tokenizer.json: affixes or dropout, which llama.cpp has not")
    pre = pre_tokenizer(document, tokenizer)
    return Vocabulary("gpt2", pre, _tokens(tokenizer, size))


def pre_tokenizer(document: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> str:
    """The name by which llama.cpp splits text as this tokenizer does.

    By what a test text becomes, as upstream's converter has it; else, for vocabularies that
    nobody has listed, by the pre-tokenizer being the very one a name stands for.

    Raises:
        UnsupportedError: neither is known.
    """
    known = json.loads(resources.files(__package__).joinpath("pre_tokenizers.json").read_bytes())
    ids = tokenizer.encode(known["text"]).ids
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    if digest in known["hashes"]:
        return str(known["hashes"][digest])
    structure = _structure(document, document["model"])
    for entry in known["structures"]:
        if structure == _structure(entry, entry):
            return str(entry["pre"])
    raise UnsupportedError(
        f"tokenizer.json has a pre-tokenizer that llama.cpp has no known name for: "
        f"{shown(json.dumps(document.get('pre_tokenizer')))} (test text: sha256 {digest[:16]})"
    )


def _structure(document: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[Any, Any, bool]:
    """All that decides into which pieces a text is cut before pairs are merged."""
    return (
        _canonical(document.get("pre_tokenizer")),
        _canonical(document.get("normalizer")),
        bool(model.get("ignore_merges")),
    )


def _canonical(node: Any) -> Any:
    """`node` without what does not change tokens, and with what old files leave out."""
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _canonical(value) for key, value in node.items() if key != "trim_offsets"}
    if result.get("type") == "ByteLevel":
        result.setdefault("use_regex", True)
    return result


def _tokens(tokenizer: tokenizers.Tokenizer, size: int) -> tuple[Token, ...]:
    """Source: `get_vocab_base` in `conversion/base.py` of llama.cpp b11434."""
    texts = {number: text for text, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    if texts and max(texts) >= size:
        raise MalformedError(f"tokenizer.json has the token id {max(texts)}; the model has {size}")
    additions = tokenizer.get_added_tokens_decoder()
    result = []
    for number in range(size):
        text = texts.get(number)
        if text is None:
            result.append(padding(number))
        elif number in additions:
            if not additions[number].normalized:
                ids = tokenizer.encode(text, add_special_tokens=False).ids
                text = tokenizer.decode(ids, skip_special_tokens=False)
            result.append(added(text, special=additions[number].special))
        else:
            result.append(Token(text.encode(), Kind.NORMAL))
    return tuple(result)


def merges_of(model: Mapping[str, Any]) -> tuple[str, ...]:
    """ "left right" each, first merged first; a space inside becomes byte-level BPE's sign for it.

    Raises:
        MalformedError: one is no pair.
    """
    result = []
    for merge in model.get("merges") or ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2:
            raise MalformedError(f"tokenizer.json: the merge {shown(merge)} is no pair")
        if not all(isinstance(part, str) and part for part in parts):
            raise MalformedError(f"tokenizer.json: the merge {shown(merge)} is no pair of texts")
        result.append(" ".join(part.replace(" ", "\u0120") for part in parts))
    return tuple(result)
