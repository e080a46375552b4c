"""Safetensors checkpoints: strict headers, shards and index, tensors read singly.

Nothing here maps a file into memory: a mapped file that shrinks kills the process, and views of
one mapping share what an in-place operation writes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from attrs import field, frozen

from ..errors import MalformedError, UnsafeFileError, listed, shown
from .reading import json_object, opened, read_at, read_into, strict_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK = 8 << 20  # bytes of a tensor that are read at once where it is read in pieces
MAX_HEADER = 100_000_000  # bytes; the format's own cap
MAX_DIMENSIONS = 64  # torch's own: more would take long to multiply and mean nothing

ITEM_SIZE = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of each dtype name in a safetensors header."""

FLOATS = ("F16", "BF16", "F32")
"""The dtypes of models that are not quantized."""

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "I16": "int16", "U16": "uint16",
    "F16": "float16", "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32",
    "I64": "int64", "U64": "uint64", "F64": "float64",
}  # fmt: skip


@frozen
class TensorInfo:
    """Where a tensor lies: `start` to `end` (exclusive) are byte offsets from the file's start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the elements."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


@frozen
class Header:
    """A safetensors header: tensors in file order, the metadata, and where the data begins."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int


class TensorSource(Protocol):
    """Tensors by name, one in memory at a time: a checkpoint, or a merge seen as one."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's dtype and shape, by checkpoint name (offsets only where it has a file)."""

    def read(self, name: str) -> torch.Tensor:
        """A fresh CPU tensor of the stated dtype and shape; the caller may write to it."""


def read_header(path: Path, *, limit: int = MAX_HEADER) -> Header:
    """The header of one safetensors file, checked to cover its data exactly and without overlap.

    `limit`: the most bytes that the header may have.

    Raises:
        MalformedError: anything the format forbids.
    """
    what = shown(path.name)
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        length = int.from_bytes(read_at(fd, 0, 8, what), "little")
        if not 2 <= length <= min(limit, size - 8):
            raise MalformedError(f"{what} states a header of {length} bytes in a file of {size}")
        raw = read_at(fd, 8, length, what)
    document = strict_json(raw, f"the header of {what}")
    if not isinstance(document, dict) or raw[:1] != b"{":
        raise MalformedError(f"the header of {what} is no object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MalformedError(f"the metadata of {what} is not text by text")
    infos = [_tensor_info(path, name, entry, 8 + length) for name, entry in document.items()]
    infos.sort(key=lambda info: (info.start, info.end))
    position = 8 + length
    for info in infos:
        if info.start != position:
            raise MalformedError(f"{what}: tensor {shown(info.name)} leaves a gap or overlaps")
        position = info.end
    if position != size:
        raise MalformedError(f"{what} has {size} bytes; its tensors end at {position}")
    return Header({info.name: info for info in infos}, metadata, 8 + length)


def _tensor_info(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    what = f"{shown(path.name)}: tensor {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedError(f"{what} is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise MalformedError(f"{what} has the unknown dtype {shown(dtype)}")
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    if not numbers or not all(type(n) is int and 0 <= n < 1 << 60 for n in (*shape, *offsets)):
        raise MalformedError(f"{what} has a shape or offsets that are not sizes")
    if len(shape) > MAX_DIMENSIONS:
        raise MalformedError(f"{what} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZE[dtype]:
        raise MalformedError(
            f"{what} has {offsets[1] - offsets[0]} bytes for {dtype} {shown(shape)}"
        )
    return TensorInfo(
        name, dtype, tuple(shape), path.name, data_start + offsets[0], data_start + offsets[1]
    )


def header_bytes(infos: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """A file's first bytes: the header's length in eight bytes, and JSON, padded to eight.

    Args:
        infos: The tensors in the order in which their data follow; their offsets do not matter.
        metadata: Of the file.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for info in infos:
        offsets = [position, position := position + info.size]
        document[info.name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": offsets}
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def is_zero(path: Path, info: TensorInfo) -> bool:
    """Whether all elements of a tensor of floating-point numbers are zero, signs aside."""
    width, step = ITEM_SIZE[info.dtype], BLOCK - BLOCK % ITEM_SIZE[info.dtype]
    with opened(path) as fd:
        for start in range(info.start, info.end, step):
            data = read_at(fd, start, min(step, info.end - start), info.file)
            signs = data[width - 1 :: width].count(0x80)  # the bytes of minus zero: 80, others 00
            if len(data) - data.count(0) != signs:
                return False
    return True


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of that name in a header: `torch_dtype("BF16") == torch.bfloat16`."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The header's name of a torch dtype: `dtype_name(torch.bfloat16) == "BF16"`."""
    wanted = str(dtype).removeprefix("torch.")
    return next(name for name, attribute in _TORCH.items() if attribute == wanted)


def read_tensor(path: Path, info: TensorInfo) -> torch.Tensor:
    """One tensor out of a file; fresh memory that the caller may write to."""
    import torch

    tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
    with opened(path) as fd:
        read_into(tensor_bytes(tensor), fd, info.start, info.file)
    return tensor


@frozen
class Checkpoint:
    """A model directory's weights: one file, or shards under an index.

    The shards' headers say where a tensor is, as they do to transformers; the index only which
    files are shards.

    Law: every tensor that the index names is in exactly one shard.

    Attributes:
        directory: Where it is.
        shards: The header of each of its files, by the file's name.
        infos: Of all tensors.
        read_from: The names of the files from which tensors were read so far, one by one.
    """

    directory: Path
    shards: Mapping[str, Header]
    infos: Mapping[str, TensorInfo] = field(repr=False)
    read_from: set[str] = field(factory=set, init=False, repr=False, eq=False)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read every header under `directory`.

        Raises:
            MalformedError: No weights, a header or index that does not parse, or an index that
                names a tensor that its shards lack.
        """
        if (directory / SINGLE).is_file():  # before the index: so does transformers
            weight_map, files = None, [SINGLE]
        elif (directory / INDEX).is_file():
            weight_map = json_object(directory / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise MalformedError(f"{INDEX} has no weight_map")
            files = sorted(set(map(str, weight_map.values())))
        else:
            raise MalformedError(_no_weights(directory))
        for file in files:
            if file != os.path.basename(file) or not file.endswith(".safetensors"):
                raise UnsafeFileError(f"{INDEX} names {shown(file)}, which is no plain file name")
        shards = {file: read_header(directory / file) for file in files}
        infos: dict[str, TensorInfo] = {}
        for header in shards.values():
            if twice := infos.keys() & header.tensors.keys():
                raise MalformedError(f"tensors stand in two shards: {listed(twice)}")
            infos.update(header.tensors)
        if lost := (weight_map or {}).keys() - infos.keys():
            raise MalformedError(
                f"{INDEX} names tensors that none of its files has: {listed(lost)}; download or "
                f"save the model again"
            )
        return cls(directory, shards, infos)

    def path_of(self, info: TensorInfo) -> Path:
        """The file of a tensor that is now read; it is noted in `read_from`."""
        self.read_from.add(info.file)
        return self.directory / info.file

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that checkpoint name."""
        info = self.infos[name]
        return read_tensor(self.path_of(info), info)

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor of `read` in pieces of some megabytes, its first rows first."""
        import torch

        info = self.infos[name]
        count, *inner = info.shape or (1,)
        row = max(1, info.size // max(1, count))  # bytes
        step = max(1, BLOCK // row)
        with opened(self.path_of(info)) as fd:
            for start in range(0, count, step):
                shape = [min(step, count - start), *inner] if info.shape else []
                block = torch.empty(shape, dtype=torch_dtype(info.dtype))
                read_into(tensor_bytes(block), fd, info.start + start * row, info.file)
                yield block


def _no_weights(directory: Path) -> str:
    """What is missing in a directory without weights, and the way out."""
    missing = f"no {SINGLE} or {INDEX} in the model directory"
    pickled = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    if any((directory / name).exists() for name in pickled):
        return (
            f"{missing}, only a pytorch_model.bin: that is a pickle, which can run code when it is "
            f"read. customized_models.importing.convert_pickle writes a copy with safetensors, and "
            f"reads nothing but tensors out of it"
        )
    return missing


@frozen
class ModelSource:
    """A whole model as its readers need it: small files by name, tensors one at a time.

    `files`: configuration, tokenizer and chat template files, by the name they have in a model
    directory; they may come from several places.
    """

    files: Mapping[str, Path]
    tensors: TensorSource
