"""A GGUF file that somebody else made: whether it is one of a given model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import BaseModelMismatch, MalformedError, listed, shown
from ..files.reading import opened
from ..files.safetensors import ModelSource
from ..models import Progress
from . import GGUFFile
from .planning import planned
from .quantization import dimensions
from .reading import Preamble, read_preamble

_CHUNK = 8 << 20  # bytes that are hashed at once
_MAY_BE_TIED = {"output.weight"}  # left out where it is the embedding, or written twice


def check_finished(
    path: Path, source: ModelSource, progress: Progress, *, llama_cpp: Path | None = None
) -> GGUFFile:
    """The file at `path`, once it is seen to be of the model in `source`.

    Architecture, vocabulary, number of layers, and every tensor's name and shape must be those that
    a conversion of the model has; types may be any. Values are not compared. Then the file is
    hashed, with `progress("hashing", bytes done, bytes in all)`.

    Raises:
        BaseModelMismatch: it is of another model; the message says in what.
        MalformedError: it is no GGUF file, or ends early.
        UnsupportedError: as `gguf.plan`.
    """
    found = read_preamble(path)
    metadata, tensors = planned(source, None, name="", chat_template=False, llama_cpp=llama_cpp)
    shapes = {tensor.name: dimensions(tensor.shape) for tensor in tensors}
    _compare(path, found, metadata, shapes)
    with opened(path) as fd, os.fdopen(os.dup(fd), "rb", buffering=0) as file:
        size = os.fstat(fd).st_size
        if size <= found.last:
            raise MalformedError(f"{shown(path.name)} ends at byte {size}, before its last tensor")
        digest, done = hashlib.sha256(), 0
        while data := file.read(_CHUNK):
            digest.update(data)
            done += len(data)
            progress("hashing", done, size)
    return GGUFFile(path, done, f"sha256:{digest.hexdigest()}")


def _compare(
    path: Path, found: Preamble, metadata: dict[str, bytes], shapes: dict[str, tuple[int, ...]]
) -> None:
    architecture = metadata["general.architecture"][12:].decode()  # behind type and length
    keys = {
        "general.architecture": "architecture",
        "tokenizer.ggml.tokens": "vocabulary",
        f"{architecture}.block_count": "number of layers",
        f"{architecture}.embedding_length": "width",
    }
    for key, what in keys.items():
        if found.metadata.get(key) != metadata[key]:
            raise BaseModelMismatch(f"{shown(path.name)} has another {what} than the model ({key})")
    there = {name: dimensions(shape) for name, shape in found.shapes.items()}
    if missing := shapes.keys() - there.keys() - _MAY_BE_TIED:
        raise BaseModelMismatch(f"{shown(path.name)} lacks the tensors {listed(missing)}")
    if further := there.keys() - shapes.keys() - _MAY_BE_TIED:
        raise BaseModelMismatch(
            f"{shown(path.name)} has tensors that the model has not: {listed(further)}"
        )
    for name in shapes.keys() & there.keys():
        if shapes[name] != there[name]:
            raise BaseModelMismatch(
                f"{shown(path.name)}: tensor {shown(name)} has shape {there[name]}, the model's "
                f"has {shapes[name]}"
            )
