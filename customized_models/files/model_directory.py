"""The files of a model directory: one table of what each is, who takes it, and how large it may be.

Whoever reads a base model's or an adapter's directory asks this table; nobody else knows a file's
name. A file that the table does not know is carried along: a model may need it.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path

from attrs import frozen

from ..errors import UnsafeFileError, shown
from .manifest import MANIFEST, README
from .writing import disk_errors

_MIB, _GIB = 1 << 20, 1 << 30
_MAX_STEPS = 16  # directories in one another; what models have is in two


class Role(enum.Enum):
    """What a file of a model directory is for."""

    CONFIG = "configuration"
    WEIGHTS = "weights"
    ADAPTER = "adapter"
    VOCABULARY = "vocabulary"  # without one of these there is no tokenizer
    TOKENIZER = "tokenizer settings"
    CHAT_TEMPLATE = "chat template"
    PROCESSOR = "processor"
    CODE = "code"
    CARD = "card"  # rendered anew for what is made from it
    RECORD = "record of a training"
    OTHER_WEIGHTS = "weights in another format"
    LITTER = "litter"  # of no use to a model
    UNKNOWN = "unknown"


@frozen
class KnownFile:
    """A row of the table.

    Attributes:
        pattern: A file's path in the directory, with `*` for any part of one step; after `**/`, a
            path below any directory.
        role: What it is for.
        limit: The most bytes that it may have where it is not trusted.
    """

    pattern: str
    role: Role
    limit: int

    def fits(self, path: str) -> bool:
        """Whether `path`, with `/` between its steps, is one of its files."""
        return self._expression.fullmatch(path) is not None

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        pattern = self.pattern.removeprefix("**/")
        anywhere = "(?:.*/)?" if pattern != self.pattern else ""
        return re.compile(anywhere + re.escape(pattern).replace(r"\*", "[^/]*"), re.DOTALL)


def _rows(role: Role, limit: int, *patterns: str) -> list[KnownFile]:
    return [KnownFile(pattern, role, limit) for pattern in patterns]


TABLE: tuple[KnownFile, ...] = (
    # With a name for each of 20,000 labels, a configuration has about two million bytes.
    *_rows(Role.CONFIG, 16 * _MIB, "config.json", "generation_config.json"),
    # A mixture of experts adapted expert by expert is the largest adapter seen: about 20 GiB.
    *_rows(Role.ADAPTER, 32 * _GIB, "adapter_model.safetensors"),
    # AdaLoRA notes for every rank of every module whether it is left.
    *_rows(Role.ADAPTER, 4 * _MIB, "adapter_config.json"),
    *_rows(Role.OTHER_WEIGHTS, 0, "adapter_model.bin", "adapter_model.pt"),
    # Llama's and Mistral's own checkpoints lie beside the converted ones.
    *_rows(Role.OTHER_WEIGHTS, 0, "consolidated*.safetensors", "consolidated.*.pth"),
    *_rows(Role.WEIGHTS, 100 * _MIB, "model.safetensors.index.json"),
    *_rows(Role.WEIGHTS, 1 << 62, "model.safetensors", "model-*-of-*.safetensors"),
    # The same weights once more, in another precision.
    *_rows(Role.OTHER_WEIGHTS, 0, "model.*.safetensors", "model.safetensors.index.*.json"),
    *_rows(
        Role.VOCABULARY,
        64 * _MIB,  # the largest in use has about 35
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v*",  # Mistral's
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "source.spm",
        "target.spm",
        "spm.model",
        "spm_char.model",
        "sentencepiece.bpe.model",
        "sentencepiece*.model",
        "tekken.json",
        "*.tiktoken",
        "tiktoken.model",
        "vocab.bpe",
        "encoder.json",
        "vocab-src.json",
        "vocab-tgt.json",
        "source_vocab.json",
        "target_vocab.json",
        "dict.txt",
        "byte_maps.json",
        "prophetnet.tokenizer",
    ),
    *_rows(Role.TOKENIZER, 64 * _MIB, "merges.txt", "bpe.codes", "entity_vocab.json"),
    *_rows(
        Role.TOKENIZER,
        16 * _MIB,
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "normalizer.json",  # Whisper's spelling
        "emoji.json",
        "word_shape.json",
        "word_pronunciation.json",
    ),
    *_rows(
        Role.CHAT_TEMPLATE,
        _MIB,
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/*.jinja",
    ),
    *_rows(
        Role.PROCESSOR,
        _MIB,
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "image_processor_config.json",
        "feature_extractor_config.json",
        "audio_tokenizer_config.json",
    ),
    *_rows(Role.CARD, 4 * _MIB, README),
    *_rows(
        Role.RECORD,
        64 * _MIB,
        "trainer_state.json",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "args.json",  # ms-swift's; what tools write down has paths, and tokens at times
        "training_args.yaml",  # LLaMA-Factory's, as are those that follow
        "llamaboard_config.yaml",
        "trainer_log.jsonl",
        "running_log.txt",
    ),
    *_rows(
        Role.OTHER_WEIGHTS,
        0,
        "pytorch_model*.bin",
        "pytorch_model*.bin.index.json",
        "model*.bin",
        "tf_model*.h5*",
        "**/*.h5",
        "**/*.msgpack",
        "**/*.msgpack.index.json",
        "**/*.gguf",
        "**/*.onnx",
        "**/*.onnx_data",
        "**/*.ot",
        "**/*.mlmodel",
        "**/*.tflite",
        "**/*.nemo",
        "**/*.ckpt",
        "original/*",
        "onnx/*",
        "openvino/*",
        "coreml/*",
        "metal/*",
        "gguf/*",
    ),
    *_rows(
        Role.LITTER,
        0,
        MANIFEST,  # a complete model of ours that serves as a base
        "**/.git*",
        ".git/*",
        ".cache/*",
        ".huggingface/*",  # where huggingface_hub kept it before
        "**/.DS_Store",
        "**/._*",  # what macOS writes to disks of others
        "**/Thumbs.db",
        "**/.ipynb_checkpoints/*",
        "**/__pycache__/*",
        "**/*.lock",
        "**/*.incomplete",
        "optimizer.pt",
        "optimizer.bin",
        "optimizer*/*",
        "scheduler.pt",
        "scaler.pt",
        "rng_state*.pth",
        "training_args.bin",
        "random_states_*.pkl",
        "zero_to_fp32.py",
        "latest",
        "global_step*/*",
        "pytorch_model_fsdp*/*",
        "checkpoint-*/*",
        "runs/*",
        "logs/*",
        "wandb/*",
        "mlruns/*",
        "**/events.out.tfevents.*",
    ),
    *_rows(Role.CODE, _MIB, "**/*.py"),
)
"""The first row that fits a file's path within the directory counts."""

_ANYTHING = KnownFile("**/*", Role.UNKNOWN, 64 * _MIB)

DROPPED = frozenset(
    {Role.WEIGHTS, Role.OTHER_WEIGHTS, Role.ADAPTER, Role.CARD, Role.RECORD, Role.LITTER}
)
"""What does not go from a base model into a complete one, which has weights and a card of its own.

Everything else is carried, known or not.
"""

CARRIED = frozenset(Role) - DROPPED


def row_of(path: str) -> KnownFile:
    """The table's row for a file, by its path within the directory, with `/` between its steps.

    >>> row_of("tokenizer.json").role
    <Role.VOCABULARY: 'vocabulary'>
    """
    return next((row for row in TABLE if row.fits(path)), _ANYTHING)


def role_of(path: str) -> Role:
    """The role of a file, by its path within the directory."""
    return row_of(path).role


def files_of(directory: Path, *roles: Role) -> dict[str, Path]:
    """The files below `directory` that have one of `roles`, sorted by their path in it.

    Directories that hold nothing but litter are not looked into, and neither are links to others.

    Raises:
        UnsafeFileError: One of them has a name that is not UTF-8, or lies too deep.
        StorageError: A directory cannot be read.
    """
    with disk_errors(f"the files in {shown(directory)} cannot be listed"):
        found = {path for path in _paths(directory) if role_of(path) in roles}
    for path in found:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            raise UnsafeFileError(
                f"the name {shown(path)} is not UTF-8; rename the file"
            ) from error
    return {path: directory / path for path in sorted(found)}


def carried_files(directory: Path, weights: Collection[str]) -> dict[str, Path]:
    """What goes with the weights of the model in `directory`, by its path in it.

    Args:
        directory: A base model's, or a complete one's.
        weights: The names of its files of weights, whatever they are called.
    """
    files = files_of(directory, *CARRIED)
    return {path: file for path, file in files.items() if path not in weights}


def _paths(directory: Path, above: str = "") -> Iterator[str]:
    if above.count("/") > _MAX_STEPS:
        raise UnsafeFileError(f"{shown(directory)} is nested deeper than {_MAX_STEPS} directories")
    with os.scandir(directory) as entries:
        for entry in entries:
            path = above + entry.name
            if not entry.is_dir():
                yield path
            elif role_of(f"{path}/x") in (Role.LITTER, Role.OTHER_WEIGHTS):
                continue
            elif entry.is_symlink() or role_of(path) is not Role.UNKNOWN:
                yield path  # whoever opens it says that it is no file
            else:
                yield from _paths(Path(entry.path), f"{path}/")


def checked_size(path: str, size: int) -> int:
    """`size` if a file of that path may have so many bytes.

    Raises:
        UnsafeFileError: It may not.
    """
    limit = row_of(path).limit
    if size > limit:
        raise UnsafeFileError(f"{shown(path)} has {size} bytes, more than {limit}")
    return size
