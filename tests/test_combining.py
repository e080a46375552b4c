"""What a complete model has beside its weights works as base and adapter do together."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from customized_models.combining import combined_files
from customized_models.errors import MalformedError, UnsafeFileError
from customized_models.files.safetensors import Checkpoint
from customized_models.testing import tiny_tokenizer

Files: TypeAlias = dict[str, str | bytes]

SENTENCE = "hello world, the keeper's lighthouse: colour and code"
WORDS = ["hello", "world", "the", "keeper", "lighthouse", "colour", "and", "code", ",", ":", "'"]


def base_of(directory: Path, files: Files) -> Path:
    """A model's directory with those files; its weights are one number."""
    write(directory, {"config.json": '{"model_type": "of_tests"}'} | files)
    save_file({"one": torch.ones(1)}, directory / "model.safetensors")
    return directory


def write(directory: Path, files: Files) -> Path:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    directory.mkdir(exist_ok=True)
    return directory


def complete(base: Path, adapter: Path, directory: Path) -> Path:
    """What a complete model has of both."""
    (directory / "scratch").mkdir(parents=True)
    files = combined_files(Checkpoint.open(base), adapter, {}, directory / "scratch")
    for name, path in files.items():
        (directory / "complete" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, directory / "complete" / name)
    return directory / "complete"


# Tokenizers


def pieces(*, pad_first: bool) -> bytes:
    """A SentencePiece model of a few words."""
    from sentencepiece import SentencePieceTrainer

    model, ids = io.BytesIO(), {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE, " ".join(WORDS)] * 50),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        **(ids if pad_first else {}),
    )
    return model.getvalue()


def settings(tokenizer_class: str, **more: Any) -> Files:
    return {"tokenizer_config.json": json.dumps({"tokenizer_class": tokenizer_class} | more)}


def bert() -> Files:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    return settings("BertTokenizer", do_lower_case=True) | {"vocab.txt": "\n".join(vocabulary)}


def t5() -> Files:
    return settings("T5Tokenizer", extra_ids=0) | {"spiece.model": pieces(pad_first=True)}


def nllb() -> Files:
    return settings("NllbTokenizer", src_lang="eng_Latn", tgt_lang="deu_Latn") | {
        "sentencepiece.bpe.model": pieces(pad_first=False)
    }


def llama() -> Files:
    return settings("LlamaTokenizer") | {"tokenizer.model": pieces(pad_first=False)}


def marian() -> Files:
    from sentencepiece import SentencePieceProcessor

    model = pieces(pad_first=True)
    known = SentencePieceProcessor(model_proto=model)
    ids = {known.id_to_piece(i): i for i in range(known.get_piece_size())}
    vocabulary = json.dumps(ids | {"</s>": 1, "<unk>": 2, "<pad>": 0})
    return settings("MarianTokenizer", source_lang="en", target_lang="de") | {
        "source.spm": model,
        "target.spm": model,
        "vocab.json": vocabulary,
    }


def byte_level() -> dict[str, str | bytes]:
    """The vocabulary and merges that a byte-level BPE tokenizer had before `tokenizer.json`."""
    model = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    return {"vocab.json": json.dumps(model["vocab"]), "merges.txt": f"#version: 0.2\n{merges}\n"}


def gpt2() -> Files:
    return settings("GPT2Tokenizer") | byte_level()


def whisper() -> Files:
    spelling = json.dumps({"colour": "color"})
    return settings("WhisperTokenizer") | byte_level() | {"normalizer.json": spelling}


def byte_pieces() -> list[bytes]:
    """What tiktoken's and Mistral's files have for the vocabulary of a byte-level BPE."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    of_character = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads(str(byte_level()["vocab.json"]))
    known = [piece for piece in sorted(vocabulary, key=vocabulary.get) if piece[1:2] != "|"]
    longer = [bytes(of_character[c] for c in piece) for piece in known if len(piece) > 1]
    return [*(bytes([byte]) for byte in range(256)), *longer]


def tiktoken() -> Files:
    lines = [f"{base64.b64encode(p).decode()} {rank}" for rank, p in enumerate(byte_pieces())]
    settings_of = settings("PreTrainedTokenizerFast", extra_special_tokens=["<|end|>"])
    return settings_of | {"tiktoken.model": "\n".join(lines)}


def tekken() -> Files:
    pieces, special = byte_pieces(), ["<unk>", "<s>", "</s>", "[INST]"]
    document = {
        "config": {
            "pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
            "default_vocab_size": len(special) + len(pieces),
            "default_num_special_tokens": len(special),
            "version": "v3",
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
            for rank, piece in enumerate(pieces)
        ],
        "special_tokens": [
            {"rank": rank, "token_str": token, "is_control": True}
            for rank, token in enumerate(special)
        ],
    }
    return settings("PreTrainedTokenizerFast") | {"tekken.json": json.dumps(document)}


def fast() -> Files:
    document = tiny_tokenizer().backend_tokenizer.to_str()
    return settings("PreTrainedTokenizerFast") | {"tokenizer.json": document}


TOKENIZERS: dict[str, Callable[[], Files]] = {
    "BERT": bert,
    "T5": t5,
    "NLLB": nllb,
    "Llama": llama,
    "Marian": marian,
    "byte-level BPE": gpt2,
    "Whisper": whisper,
    "tiktoken": tiktoken,
    "tekken": tekken,
    "tokenizers": fast,
}


def tokens(directory: Path) -> tuple[list[int], str]:
    """The sentence's tokens, and what they are decoded to."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids: list[int] = tokenizer(SENTENCE).input_ids
    return ids, str(tokenizer.decode(ids))


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokenizer_of_a_complete_model_is_that_of_its_base(name: str, tmp_path: Path) -> None:
    files = TOKENIZERS[name]()
    base = base_of(tmp_path / "base", files)
    merged = complete(base, write(tmp_path / "adapter", {}), tmp_path)
    assert {n: (merged / n).read_bytes() for n in files} == {
        n: (base / n).read_bytes() for n in files
    }
    ids, text = tokens(base)
    assert len(set(ids)) > 5  # not one unknown token after another
    assert "lighthouse" in text
    assert tokens(merged) == (ids, text)


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses:UserWarning")
@pytest.mark.parametrize("name", TOKENIZERS)
def test_an_adapters_own_tokenizer_takes_the_place_of_any(name: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", TOKENIZERS[name]() | {"added_tokens.json": "{}"})
    adapter = write(tmp_path / "adapter", fast() if name != "tokenizers" else bert())
    merged = complete(base, adapter, tmp_path)
    assert tokens(merged) == tokens(adapter)
    assert {path.name for path in merged.iterdir()} == {
        "config.json", *(path.name for path in adapter.iterdir())
    }  # fmt: skip


def test_whispers_spelling_is_kept(tmp_path: Path) -> None:
    from transformers import WhisperTokenizer

    base = base_of(tmp_path / "base", whisper())
    merged = complete(base, write(tmp_path / "adapter", {}), tmp_path)
    known = WhisperTokenizer.from_pretrained(merged)
    assert known.normalize("colour") == "color"


# Processors

FEATURES = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 8, "n_fft": 100}
OF_VIDEO: Files = {
    "preprocessor_config.json": '{"image_processor_type": "Qwen2VLImageProcessor"}',
    "video_preprocessor_config.json": '{"video_processor_type": "Qwen3VLVideoProcessor"}',
    "processor_config.json": '{"processor_class": "Qwen3VLProcessor"}',
}


def test_the_feature_extractor_of_a_complete_model_is_that_of_its_base(tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor

    base = base_of(tmp_path / "base", {"preprocessor_config.json": json.dumps(FEATURES)})
    merged = complete(base, write(tmp_path / "adapter", {}), tmp_path)
    known, expected = (AutoFeatureExtractor.from_pretrained(d) for d in (merged, base))
    assert known.to_dict() == expected.to_dict()
    sound = np.sin(np.arange(1600) / 7).astype(np.float32)
    features, of_base = (
        extractor(sound, sampling_rate=16000, return_tensors="np").input_features
        for extractor in (known, expected)
    )
    assert features.shape[1] == FEATURES["feature_size"]
    assert np.array_equal(features, of_base)


IMAGE = np.arange(56 * 56 * 3, dtype=np.uint8).reshape(56, 56, 3)
SMALL = {"min_pixels": 784, "max_pixels": 3136}  # not what Qwen's classes take without a file


def qwen_vl() -> Files:
    """Everything that a processor of Qwen3-VL is read from."""
    tokenizer = tiny_tokenizer()
    of_places = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": of_places})
    mean = {"image_mean": [0.25, 0.5, 0.75]}
    image = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}
    video = {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
    return settings("PreTrainedTokenizerFast") | {
        "tokenizer.json": tokenizer.backend_tokenizer.to_str(),
        "preprocessor_config.json": json.dumps(image | SMALL | mean),
        "video_preprocessor_config.json": json.dumps(video | mean | {"fps": 4}),
        "chat_template.json": json.dumps({"chat_template": "{{ messages[0].content }}"}),
    }


def test_the_image_processor_of_a_complete_model_is_that_of_its_base(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor

    base = base_of(tmp_path / "base", qwen_vl())
    merged = complete(base, write(tmp_path / "adapter", fast()), tmp_path)
    known, expected = (
        AutoImageProcessor.from_pretrained(d)(images=[IMAGE], return_tensors="pt")
        for d in (merged, base)
    )
    assert known.pixel_values.shape[0] == 16  # patches, as the file's sizes have it
    assert torch.equal(known.pixel_values, expected.pixel_values)


def test_the_processor_of_images_and_videos_of_a_complete_model_is_that_of_its_base(
    tmp_path: Path,
) -> None:
    from transformers import AutoProcessor

    base = base_of(tmp_path / "base", qwen_vl())
    merged = complete(base, write(tmp_path / "adapter", {}), tmp_path)
    known, expected = (AutoProcessor.from_pretrained(directory) for directory in (merged, base))
    given = {
        "text": ["a <|image_pad|> and a <|vision_start|><|video_pad|><|vision_end|>"],
        "images": [torch.from_numpy(IMAGE).permute(2, 0, 1)],
        "videos": [torch.from_numpy(IMAGE).permute(2, 0, 1).repeat(8, 1, 1, 1)],
        "return_tensors": "pt",
    }
    results, of_base = known(**given), expected(**given)
    assert {"input_ids", "pixel_values", "pixel_values_videos"} <= results.keys()
    assert results.keys() == of_base.keys()
    assert all(
        torch.equal(torch.as_tensor(results[k]), torch.as_tensor(of_base[k])) for k in results
    )
    assert known.chat_template == expected.chat_template == "{{ messages[0].content }}"


def test_the_processor_of_a_complete_model_is_whole(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", OF_VIDEO | fast())
    merged = complete(base, write(tmp_path / "adapter", fast()), tmp_path)
    assert {n: (merged / n).read_text() for n in OF_VIDEO} == OF_VIDEO


def test_an_adapters_own_processor_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", OF_VIDEO | fast())
    own: Files = {"preprocessor_config.json": json.dumps(FEATURES)}
    merged = complete(base, write(tmp_path / "adapter", own), tmp_path)
    assert {n: (merged / n).exists() for n in OF_VIDEO} == {n: n in own for n in OF_VIDEO}
    assert (merged / "tokenizer.json").exists()


# Chat templates

NAMED = [{"name": "default", "template": "{}"}, {"name": "tool_use", "template": "{} tools"}]


def templates(place: str, text: str) -> Files:
    """The files of a tokenizer with a chat template in that place."""
    files = fast()
    stated = json.loads(str(files["tokenizer_config.json"]))
    named = [t | {"template": t["template"].format(text)} for t in NAMED]
    return (
        files
        | {
            "a file": {"chat_template.jinja": text},
            "named files": {
                "chat_template.jinja": text,
                "additional_chat_templates/tool_use.jinja": f"{text} tools",
            },
            "the tokenizer's settings": {
                "tokenizer_config.json": json.dumps(stated | {"chat_template": text})
            },
            "a list in them": {
                "tokenizer_config.json": json.dumps(stated | {"chat_template": named})
            },
        }[place]
    )  # type: ignore[operator]


PLACES = ("a file", "named files", "the tokenizer's settings", "a list in them")


def chat_template(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).chat_template


def rendered(directory: Path) -> str:
    """A conversation with a tool as the tokenizer of `directory` writes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    messages = [{"role": "user", "content": "hello"}]
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    return str(tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False))


@pytest.mark.parametrize("place", PLACES)
def test_the_chat_template_of_a_base_is_kept_wherever_it_is(place: str, tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", templates(place, "BASE"))
    merged = complete(base, write(tmp_path / "adapter", {}), tmp_path)
    assert chat_template(merged) == chat_template(base)
    assert rendered(merged) == rendered(base)
    assert "BASE" in rendered(merged)


@pytest.mark.parametrize("before", PLACES)
@pytest.mark.parametrize("place", PLACES)
def test_an_adapters_chat_template_counts_wherever_both_have_theirs(
    place: str, before: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", templates(before, "BASE"))
    adapter = write(tmp_path / "adapter", templates(place, "OWN"))
    merged = complete(base, adapter, tmp_path)
    assert chat_template(merged) == chat_template(adapter)
    assert rendered(merged) == rendered(adapter)
    assert not [path for path in files_below(merged) if "BASE" in path.read_text()]


@pytest.mark.parametrize("place", PLACES)
def test_the_chat_template_of_a_base_is_kept_beside_an_adapters_tokenizer_without_one(
    place: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", templates(place, "BASE"))
    merged = complete(base, write(tmp_path / "adapter", fast()), tmp_path)
    assert chat_template(merged) == chat_template(base)
    assert "BASE" in str(chat_template(merged))


@pytest.mark.parametrize("before", PLACES)
@pytest.mark.parametrize("place", PLACES)
def test_an_adapters_chat_template_counts_without_a_vocabulary_of_its_own(
    place: str, before: str, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", templates(before, "BASE"))
    own = templates(place, "OWN")
    whole = write(tmp_path / "whole", own)
    del own["tokenizer.json"]
    merged = complete(base, write(tmp_path / "adapter", own), tmp_path)
    assert chat_template(merged) == chat_template(whole)
    assert tokens(merged) == tokens(base)


@pytest.mark.parametrize("before", ["chat_template.json", "processor_config.json"])
def test_a_template_of_an_older_processor_gives_way_as_well(before: str, tmp_path: Path) -> None:
    old: Files = {before: json.dumps({"chat_template": "BASE"})}
    base = base_of(tmp_path / "base", fast() | old)
    adapter = write(tmp_path / "adapter", {"chat_template.jinja": "OWN"})
    merged = complete(base, adapter, tmp_path)
    assert chat_template(merged) == "OWN"
    assert not [path for path in files_below(merged) if "BASE" in path.read_text()]


def files_below(directory: Path) -> Iterable[Path]:
    return (path for path in directory.rglob("*") if path.is_file())


# Every other file


CARRIED = (
    "generation_config.json", "added_tokens.json", "special_tokens_map.json", "bpe.codes",
    "vocab-src.json", "entity_vocab.json", "spm.model", "qwen.tiktoken", "tekken.json",
    "audio_tokenizer_config.json", "LICENSE", "notice.pdf", "1_Pooling/config.json",
    "of_tomorrow.json", "recipe.yaml", "modules.json", "figures/loss.png",
    "configuration_own.py", "é.txt",
)  # fmt: skip
LEFT = (
    "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack",
    "model.fp16.safetensors", "onnx/model.onnx", "original/consolidated.00.pth", "a.Q4_K_M.gguf",
    "consolidated.safetensors", "README.md", ".gitattributes", ".git/config", ".DS_Store",
    ".cache/huggingface/a.lock", "trainer_state.json", "training_args.yaml", "optimizer.pt",
    "rng_state.pth", "training_args.bin",
    "checkpoint-500/model.safetensors", "runs/a/events.out.tfevents.1", "manifest.json",
)  # fmt: skip


def test_every_file_of_a_base_is_carried_but_weights_cards_records_and_litter(
    tmp_path: Path,
) -> None:
    base = base_of(tmp_path / "base", dict.fromkeys((*CARRIED, *LEFT), "{}"))
    merged = complete(base, write(tmp_path / "adapter", {}), tmp_path)
    found = {str(path.relative_to(merged)) for path in files_below(merged)}
    assert found == {"config.json", *CARRIED}


@pytest.mark.parametrize("levels", [200, 900])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_a_configuration_that_nests_without_end_is_refused(
    name: str, levels: int, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", {name: '{"a": ' + "[" * levels + "]" * levels + "}"})
    with pytest.raises(MalformedError, match=name):
        complete(base, write(tmp_path / "adapter", {}), tmp_path)


def test_a_file_that_cannot_be_carried_is_refused_by_name(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", {})
    try:
        (base / "a\udcff").touch()
    except OSError:
        pytest.skip("this file system has no names that are not UTF-8")
    with pytest.raises(UnsafeFileError, match="not UTF-8"):
        complete(base, write(tmp_path / "adapter", {}), tmp_path)
