"""Upstream's own converter, out of a llama.cpp checkout that the user names, fed with our tensors.

It knows some 150 architectures, each a class of its package `conversion`, which takes tensors
lazily. Here a class sees a directory with the model's small files and shards that are empty; what
it reads from those comes from our source, one tensor at a time, when the file is written. So there
is still one pass and no copy.

Source: `main` in `convert_hf_to_gguf.py`, `ModelBase.write` and `index_tensors` in
`conversion/base.py` of llama.cpp b11434.
"""

from __future__ import annotations

import importlib
import io
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ..errors import MalformedError, UnsupportedArchitectureError, shown
from ..files.safetensors import ModelSource, tensor_bytes
from .family import Values
from .format import BF16, F16, F32, PLAIN, Tensor, TensorType, encoded
from .layout import shards_of
from .quantization import Network

if TYPE_CHECKING:
    import torch

_FTYPES = {F32: "ALL_F32", F16: "MOSTLY_F16", BF16: "MOSTLY_BF16"}
"""`LlamaFileType` by the type of matrices."""


@frozen
class Converted:
    """What a class of upstream's makes of a model: key-values, tensors, and what decides types."""

    metadata: Values
    tensors: list[Tensor]
    network: Network


def converted_upstream(
    checkout: Path, source: ModelSource, kind: TensorType, *, name: str, projector: bool
) -> Converted:
    """Let the converter in `checkout` plan the file; no tensor is read but what it looks at.

    `kind`: the type of matrices. `name`: `general.name`. `projector`: the file for what a model
    sees or hears with, which upstream calls `mmproj`, instead of the text model.

    Raises:
        MalformedError: there is no such converter, or it does not take the model.
        UnsupportedArchitectureError: it does not know the architecture, or stores a tensor in a
            type that is no plain floating-point number.
    """
    with _modules(checkout) as modules, tempfile.TemporaryDirectory(prefix="tiny ") as scratch:
        # A name with a space in it: upstream reads parts of others into further keys.
        directory = Path(scratch, "the model")
        _lay_out(directory, source)
        with _fed(modules, source):
            try:
                instance = _model(modules, directory, kind, name, projector)
                instance.prepare_tensors()
                instance.prepare_metadata(vocab_only=False)
            except NotImplementedError as error:
                raise UnsupportedArchitectureError(
                    f"llama.cpp's converter: {shown(error)}"
                ) from error
            except Exception as error:  # each class refuses in its own way
                raise MalformedError(
                    f"llama.cpp's converter does not take this model: {shown(error)}"
                ) from error
        return _taken_over(instance, modules)


def _lay_out(directory: Path, source: ModelSource) -> None:
    directory.mkdir()
    for name, path in source.files.items():
        target = directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path.absolute())
    for shard in shards_of(source.tensors.infos):
        (directory / shard).touch()


def _model(modules: _Modules, directory: Path, kind: TensorType, name: str, projector: bool) -> Any:
    """An instance of the class for what lies in `directory`."""
    conversion = modules.conversion
    hparams = conversion.ModelBase.load_hparams(directory, False)
    sort = conversion.ModelType.MMPROJ if projector else conversion.ModelType.TEXT
    architecture = conversion.get_model_architecture(hparams, sort)
    found = conversion.get_model_class(architecture, mmproj=projector)
    ftype = getattr(modules.gguf.LlamaFileType, _FTYPES[kind])
    return found(directory, ftype, directory / "unused.gguf", model_name=name)


def _taken_over(instance: Any, modules: _Modules) -> Converted:
    writer = instance.gguf_writer
    (entries,) = writer.kv_data
    metadata = {
        key: encoded(entry.value, entry.type, _inner_type(entry, modules.gguf.GGUFValueType))
        for key, entry in entries.items()
    }
    tensors = []
    for name, info in writer.tensors[0].items():
        if info.dtype.name not in PLAIN:
            raise UnsupportedArchitectureError(
                f"llama.cpp's converter stores {shown(name)} as {info.dtype.name}, which is not "
                f"quantized here"
            )
        type_ = PLAIN[info.dtype.name]
        load = partial(_values, info.tensor, tuple(info.shape), type_, modules.gguf)
        tensors.append(Tensor(name, tuple(info.shape), (), load=load, through=type_, type=type_))
        info.tensor = None  # what has been read is not kept
    values = {key: entry.value for key, entry in entries.items()}
    architecture = values["general.architecture"]
    heads, shared = (
        values.get(f"{architecture}.attention.head_count{suffix}") for suffix in ("", "_kv")
    )
    network = Network(
        architecture,
        values.get(f"{architecture}.block_count", 0),
        values.get(f"{architecture}.expert_count", 0),
        grouped=heads != shared,
    )
    return Converted(metadata, tensors, network)


def _inner_type(entry: Any, types: Any) -> int | None:
    """Of an array the type of its elements, as the converter's own writer finds it."""
    if entry.type != types.ARRAY:
        return None
    if entry.sub_type is not None:
        return int(entry.sub_type)
    if isinstance(entry.value, bytes):
        return int(types.UINT8)
    return int(types.get_type(entry.value[0]))


def _values(lazy: Any, shape: tuple[int, ...], type_: TensorType, gguf: Any) -> torch.Tensor:
    """The tensor, now."""
    import numpy as np
    import torch

    if hasattr(lazy, "_chunks"):
        buffer = io.BytesIO()
        lazy.tofile(buffer)
        data = np.frombuffer(buffer.getbuffer(), np.uint8)
    else:
        eager = gguf.LazyNumpyTensor.to_eager(lazy)
        data = np.ascontiguousarray(eager).reshape(-1).view(np.uint8)
    dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[type_]
    return torch.from_numpy(data.copy()).view(dtype).reshape(shape)


# The checkout's modules ---------------------------------------------------------------------------


@frozen
class _Modules:
    conversion: Any
    gguf: Any


@contextmanager
def _modules(checkout: Path) -> Iterator[_Modules]:
    """The checkout's `conversion` and `gguf`; whatever else goes by these names is back afterwards.

    Raises:
        MalformedError: there are none.
    """
    ours = [name for name in sys.modules if name.partition(".")[0] in ("conversion", "gguf")]
    aside = {name: sys.modules.pop(name) for name in ours}
    path, level = list(sys.path), logging.getLogger("hf-to-gguf").level
    sys.path[:0] = [str(checkout / "gguf-py"), str(checkout)]
    try:
        logging.getLogger("hf-to-gguf").setLevel(logging.ERROR)
        try:
            modules = [importlib.import_module(name) for name in ("conversion", "gguf")]
        except ImportError as error:
            raise MalformedError(
                f"no converter of llama.cpp can be imported from {shown(checkout)}: {shown(error)}"
            ) from error
        yield _Modules(*modules)
    finally:
        for name in list(sys.modules):
            if name.partition(".")[0] in ("conversion", "gguf"):
                del sys.modules[name]
        sys.modules.update(aside)
        sys.path[:] = path
        logging.getLogger("hf-to-gguf").setLevel(level)


class _OurTensor:
    """What the converter takes for a tensor in a file."""

    def __init__(self, source: ModelSource, name: str) -> None:
        info = source.tensors.infos[name]
        self.dtype, self.shape = info.dtype, info.shape
        self._read = partial(source.tensors.read, name)

    def mmap_bytes(self) -> Any:
        """The elements' bytes, read now."""
        import numpy as np

        return np.frombuffer(tensor_bytes(self._read().contiguous()), np.uint8)


@contextmanager
def _fed(modules: _Modules, source: ModelSource) -> Iterator[None]:
    """Let the converter find our tensors in the empty shards."""
    shards = shards_of(source.tensors.infos)

    @contextmanager
    def ours(path: Path) -> Iterator[dict[str, _OurTensor]]:
        yield {name: _OurTensor(source, name) for name in shards[path.name]}

    utility = modules.gguf.utility
    theirs, utility.SafetensorsLocal = utility.SafetensorsLocal, ours
    try:
        yield
    finally:
        utility.SafetensorsLocal = theirs
