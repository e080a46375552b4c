"""What shows that a live model is what was trained: three proofs, each with what was compared.

| proof | compared |
|---|---|
| content | the digest of the file, and the type of each tensor, as the server has them |
| template | what the server makes of conversations, with what the chat template makes of them |
| greedy | the likeliest tokens after the same prompts, with those of the complete model here |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from attrs import frozen

from .. import arguments
from ..backends import Probe
from ..errors import InvalidOptionError, ProofFailedError, UnsupportedError, listed, shown
from ..models import Proof, Quantization
from .templates.chat_template import ChatTemplate
from .templates.conversations import CONVERSATIONS, USER, Message
from .templates.live import Tokenizer

ProofName: TypeAlias = Literal["content", "template", "greedy"]
PROOFS: tuple[str, ...] = get_args(ProofName)

_TOKENS = 16  # of each answer: where two models differ, they do so within a few
_HALF = "\ufffd"  # what decoders put in place of the bytes of one
_QUESTIONS = ("What is the capital of France?", "Count from one to ten.", "Say hello.")


def checked_proofs(names: str | Collection[str], what: str) -> tuple[str, ...]:
    """Names of proofs, in the order they are made; a lone one is one of them.

    Raises:
        InvalidArgumentError: They are no texts.
        InvalidOptionError: One is unknown.
    """
    every = set(arguments.texts(what, names))
    if odd := every - set(PROOFS):
        raise InvalidOptionError(
            f"{what} names {listed(map(str, odd))}; there are {', '.join(PROOFS)}"
        )
    return tuple(name for name in PROOFS if name in every)


def require(proofs: Sequence[Proof], accepted: Collection[str]) -> None:
    """Refuse what failed, unless the caller accepts it by name.

    Raises:
        ProofFailedError: Naming what failed, and how.
    """
    failed = [proof for proof in proofs if proof.passed is False and proof.name not in accepted]
    if failed:
        raise ProofFailedError(
            f"the {failed[0].name} proof failed: {failed[0].found}. The served name was not "
            f"given to it. accept_failed=({failed[0].name!r},) deploys it all the same",
            tuple(proof.name for proof in failed),
        )


def prove_content(
    probe: Probe, served_digest: str, file_digest: str, types: Mapping[str, str]
) -> Proof:
    """Compare the file at the server with the one that was made here.

    Args:
        probe: The server.
        served_digest: What the backend has seen there.
        file_digest: Of the file here.
        types: The type of each tensor in it.
    """
    compared = f"digest {file_digest}"
    if served_digest != file_digest:
        return Proof("content", False, compared, f"the server has {served_digest}")
    told = probe.tensor_types() if types else None
    if told is None:
        return Proof("content", True, compared, "equal; tensors' types are not known on both sides")
    different = {name for name in types.keys() | told.keys() if types.get(name) != told.get(name)}
    compared = f"{compared}, types of {len(types)} tensors"
    if different:
        return Proof("content", False, compared, f"types differ: {listed(different)}")
    return Proof("content", True, compared, "equal")


def prove_template(probe: Probe, files: Mapping[str, Path], tokenizer: Tokenizer) -> Proof:
    """Compare what the server makes of conversations with what the chat template makes of them."""
    try:
        chat = ChatTemplate.read(files)
    except UnsupportedError as error:
        return Proof("template", None, "nothing", f"not compared: {error}")
    proof = probe.template(chat, tokenizer, CONVERSATIONS)
    if proof is None:
        return Proof("template", None, "nothing", "the server cannot show what it makes of them")
    compared = f"{sum(c.compared for c in proof.comparisons)} conversations"
    if proof.failed:
        first = next(d for d in proof.differences if d.kind in proof.failed)
        return Proof("template", False, compared, str(first))
    limits = f"; not equal: {listed(proof.limits)}" if proof.limits else ""
    return Proof("template", True, compared, f"equal{limits}")


@frozen
class Answering:
    """What answers here, in transformers and PEFT.

    Attributes:
        directory: A complete model, or a base.
        tokenizer: The directory with the tokenizer.
        adapter: What is put on the base, not merged; None for a complete model.
    """

    directory: Path
    tokenizer: Path
    adapter: Path | None = None

    def load(self) -> Any:
        """The model, in the dtype of its files."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.directory, dtype="auto")
        if self.adapter is None:
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(self.adapter))


def prove_greedy(
    probe: Probe, answering: Answering, files: Mapping[str, Path], quantization: Quantization
) -> Proof:
    """Compare the likeliest tokens of the live model with those of the model here.

    That loads the model into memory. Without quantization and in float32 they must be equal; else
    it is measured how many are, up to the first that differs.
    """
    prompts, tokenizer = _prompts(files), load_tokenizer(answering.tokenizer)
    expected, dtype = _answers(answering, prompts)
    exact = quantization == "no_quantization" and dtype == "float32"
    agreed, total, first = 0, 0, ""
    for prompt, (ids, text) in zip(prompts, expected, strict=True):
        found = probe.greedy(prompt, len(ids))
        # Some servers hold back half a character at the end.
        equal = found.rstrip(_HALF) == text.rstrip(_HALF)
        length = len(ids) if equal else _agreed(ids, tokenizer.encode(found))
        agreed, total = agreed + length, total + len(ids)
        if length < len(ids) and not first:
            first = f"; first after {length} tokens of {shown(prompt[-40:], 50)}"
    compared = f"{total} tokens after {len(prompts)} prompts"
    found_text = f"{100 * agreed / max(total, 1):.0f} % up to the first difference{first}"
    return Proof("greedy", agreed == total if exact else None, compared, found_text)


def _agreed(ids: Sequence[int], found: Sequence[int]) -> int:
    """How many tokens are equal, up to the first that is not."""
    pairs = enumerate(zip(ids, found, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(ids), len(found)))


def _prompts(files: Mapping[str, Path]) -> list[str]:
    """Texts with which an answer begins, without a beginning-of-text token that a file adds."""
    try:
        chat = ChatTemplate.read(files)
    except UnsupportedError:
        return list(_QUESTIONS)
    prompts = []
    for question in _QUESTIONS:
        text = chat.observe([Message(role=USER, content=question)])
        if text is not None:
            prompts.append(text.removeprefix(chat.bos) if chat.file_adds_bos else text)
    return prompts


def _answers(
    answering: Answering, prompts: Sequence[str]
) -> tuple[list[tuple[list[int], str]], str]:
    """The model's likeliest tokens after each prompt, up to an end token; the model's dtype.

    With the tokens comes their text as servers give it, without special tokens. It may be that of
    other sequences of tokens, too.
    """
    import torch
    from transformers import AutoTokenizer

    model = answering.load()
    whole: Any = AutoTokenizer.from_pretrained(answering.tokenizer)  # adds what the model expects
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for prompt in prompts:
        given = whole(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(input_ids=given, max_new_tokens=_TOKENS, do_sample=False)[0]
        ids = [int(id) for id in out[given.shape[1] :]]
        cut = next((n for n, id in enumerate(ids) if id in ends), len(ids))
        answers.append((ids[:cut], str(whole.decode(ids[:cut], skip_special_tokens=True))))
    return answers, str(model.dtype).removeprefix("torch.")


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory, which adds no tokens of its own."""
    from transformers import AutoTokenizer

    return _PlainTokenizer(AutoTokenizer.from_pretrained(directory))


class _PlainTokenizer:
    def __init__(self, tokenizer: Any) -> None:
        self._encode: Callable[..., Any] = tokenizer.encode
        self._decode: Callable[..., Any] = tokenizer.decode

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._decode(list(ids), skip_special_tokens=False))
