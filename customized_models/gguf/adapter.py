"""A LoRA adapter as a GGUF file, which llama.cpp adds to a base model's file while it runs.

llama.cpp computes `base @ x + alpha / rank * (b @ (a @ x))` for each matrix that has a pair, and
asks for the matrix's name in its own file. So each pair goes the way of the matrix: it gets the
name that the base's family gives, and the rows of `b` go through what the family does to the rows
of the matrix, such as their order for rotary embeddings. What PEFT multiplies by besides, which
depends on rank-stabilised scaling and on patterns, is folded in.

Before a finished file may be used, each pair in it is tried with random numbers against PEFT's.

Source: `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` of llama.cpp b11434. Upstream writes
`lora_alpha` for every adapter, which is right for those without rsLoRA and patterns alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import field, frozen

from ..adapters.intake import Adapter
from ..adapters.plain_lora import refuse_unless_plain
from ..errors import MergeError, UnsupportedAdapterError, UnsupportedArchitectureError, shown
from ..files.reading import json_object, opened, read_at
from ..files.safetensors import Checkpoint, ModelSource
from ..models import Progress
from . import GGUFFile, GGUFPlan
from .family import Family, Part, family_of
from .format import Tensor, f32, padded, preamble, text
from .settings import Settings

if TYPE_CHECKING:
    import torch

    from ..merging.layers import AdaptedLayer

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EMBEDDING = "token_embd.weight"
_TOLERANCE = 1e-5  # of the largest number: products are summed up in float32, in another order


@frozen
class _Pair:
    """What becomes `lora_a` and `lora_b` of one matrix in the base's file.

    `rows`: what the rows of the product go through. `factor`: what `b` is multiplied by because
    the file's scaling is not this layer's.
    """

    name: str
    layer: AdaptedLayer
    rows: Callable[[torch.Tensor], torch.Tensor]
    rank: int
    shape: tuple[int, int]
    factor: float = 1.0

    @property
    def is_embedding(self) -> bool:
        return self.name == _EMBEDDING

    def a(self) -> torch.Tensor:
        """(rank, in); for the embedding (tokens, rank), from which rows are taken."""
        _, down = _factors(self.layer)
        return (down.T if self.is_embedding else down).float().contiguous()

    def b(self) -> torch.Tensor:
        """(out, rank)."""
        up, _ = _factors(self.layer)
        values = self.rows(up.float())
        return (values * self.factor if self.factor != 1.0 else values).contiguous()

    def tensors(self) -> Iterator[Tensor]:
        """Both, as the file has them."""
        out, into = self.shape
        a_shape = (into, self.rank) if self.is_embedding else (self.rank, into)
        yield Tensor(f"{self.name}.lora_a", a_shape, (), load=self.a)
        yield Tensor(f"{self.name}.lora_b", (out, self.rank), (), load=self.b)


@frozen
class AdapterPlan:
    """An adapter's file that can be written."""

    _plan: GGUFPlan = field(repr=False)
    _tensors: tuple[Tensor, ...] = field(repr=False)
    _pairs: tuple[_Pair, ...] = field(repr=False)
    _alpha: float = field(repr=False)

    def write(self, path: Path, progress: Progress) -> GGUFFile:
        """Write the file, flushed to the disk, and try it; replaces what is there.

        What is raised leaves no file behind.

        Raises:
            NonFiniteError: A factor holds NaN or infinity.
            MergeError: What the file adds to a matrix is not what PEFT adds.
            OSError: The disk refused it.
        """
        file = self._plan.write(path, progress)
        try:
            self._check(file)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return file

    def _check(self, file: GGUFFile) -> None:
        """Multiply a random vector by each pair in the file, and by PEFT's own factors."""
        import torch

        generator = torch.Generator().manual_seed(0)
        read = _reader(file, self._tensors)
        for pair in self._pairs:
            a, b = (read(f"{pair.name}.lora_{part}").double() for part in "ab")
            up, down = (factor.double() for factor in _factors(pair.layer))
            if pair.is_embedding:
                token = int(torch.randint(len(a), (1,), generator=generator))
                found, expected = b @ a[token], pair.rows(up @ down[:, token : token + 1])
            else:
                x = torch.randn(a.shape[1], generator=generator, dtype=torch.float64)
                found, expected = b @ (a @ x), pair.rows((up @ (down @ x))[:, None])
            expected = expected[:, 0] * pair.layer.scaling
            error = (found * (self._alpha / pair.rank) - expected).abs().max()
            if not error <= _TOLERANCE * expected.abs().max():
                raise MergeError(
                    f"what the adapter's file adds to {shown(pair.name)} is not what PEFT adds"
                )


def plan_adapter(base: ModelSource, adapter: Adapter, *, name: str) -> AdapterPlan:
    """Plan the file from configurations and headers; no value is read.

    Args:
        base: The base model, whose file the adapter goes with.
        adapter: The adapter.
        name: `general.name` in the file.

    Raises:
        UnsupportedAdapterError: It is more than pairs of factors, or one that llama.cpp does not
            apply; the message names it.
        UnsupportedArchitectureError: The base has no family here, or has no place for a matrix
            that the adapter changes.
        BaseModelMismatch, UnmergedTensorsError, MalformedError: The adapter is not for this base,
            or does not hold what its configuration calls for.
    """
    refuse_unless_plain(adapter.config)
    config = json_object(base.files["config.json"])
    family = family_of(config)(Settings(config))
    pairs = list(_pairs(family, base, adapter))
    if not pairs:
        raise UnsupportedAdapterError("the adapter changes no matrix")
    alpha = _common_alpha(pairs)
    scaled = tuple(_scaled(pair, alpha) for pair in pairs)
    tensors = tuple(tensor for pair in scaled for tensor in pair.tensors())
    metadata = {
        "general.architecture": text(family.architecture),
        "general.type": text("adapter"),
        "adapter.type": text("lora"),
        "general.name": text(name),
        "adapter.lora.alpha": f32(alpha),
    }
    plan = GGUFPlan(base, preamble(metadata, tensors), tensors)
    return AdapterPlan(plan, tensors, scaled, alpha)


def _pairs(family: Family, base: ModelSource, adapter: Adapter) -> Iterator[_Pair]:
    """The pairs of every layer that the adapter changes, scaled as PEFT does."""
    from peft.tuners.lora.layer import Embedding, Linear

    from ..merging.injection import inject
    from ..merging.skeleton import build_skeleton

    assert isinstance(base.tensors, Checkpoint)
    skeleton = build_skeleton(base.tensors, adapter)
    injected = inject(skeleton, adapter)
    injected.load()
    for layer in injected.layers():
        if type(layer.module) not in (Linear, Embedding) or layer.trained_values:
            raise UnsupportedAdapterError(
                f"{shown(layer.path)} is a {type(layer.module).__name__}; llama.cpp applies "
                f"adapters to plain matrices only"
            )
        parameter = f"{layer.path}.weight"
        conversion = skeleton.conversion(parameter)
        if conversion.patterns is not None or conversion.parameters != (parameter,):
            raise UnsupportedAdapterError(
                f"{shown(layer.path)} shares its weight with another layer, or is made of several "
                f"tensors of the base; llama.cpp applies an adapter to neither"
            )
        (stored,) = conversion.tensors
        for part in _parts(family, stored, base.tensors.infos[stored].shape):
            _refuse_embedding(layer, part, tied=bool(skeleton.tied))
            yield _pair(layer, part)


def _parts(family: Family, source: str, shape: tuple[int, ...]) -> Sequence[Part]:
    """What the family makes of the base's tensor."""
    name = family.source_name(source)
    pattern = _NUMBER.sub("{}", name or "")
    stored = family.stored_name(pattern) if name and family.knows(pattern) else None
    if name is None or stored is None:
        raise UnsupportedArchitectureError(
            f"{family.architecture} has no place for a change of {shown(source)}"
        )
    numbers = _NUMBER.findall(name)
    if stored.count("{}") != len(numbers):
        raise UnsupportedAdapterError(
            f"{shown(source)} is one of a stack in llama.cpp's file, to which adapters are not "
            f"applied one by one"
        )
    return list(family.parts(name, stored.format(*numbers), shape))


def _pair(layer: AdaptedLayer, part: Part) -> _Pair:
    (out, rank), (_, into) = _shapes(layer)
    rows = _rows_of(layer, part)
    if part.name == _EMBEDDING:
        fits = part.change is None and part.shape == (into, out)
    else:
        out = len(rows(_distinct((out, rank))))
        fits = part.shape == (out, into)
    if not fits:
        raise UnsupportedAdapterError(
            f"a change of {shown(part.name)} cannot be expressed as a pair of factors"
        )
    return _Pair(part.name, layer, rows, rank, (out, into))


def _refuse_embedding(layer: AdaptedLayer, part: Part, *, tied: bool) -> None:
    """Refuse what is looked up, and not multiplied by, but for the embedding of tokens."""
    from peft.tuners.lora.layer import Embedding

    if isinstance(layer.module, Embedding) != (part.name == _EMBEDDING):
        raise UnsupportedAdapterError(f"llama.cpp applies no adapter to {shown(part.name)}")
    if part.name == _EMBEDDING and tied:
        raise UnsupportedAdapterError(
            "the adapter changes the embedding of a base whose output layer is its embedding; "
            "llama.cpp would change both"
        )


def _rows_of(layer: AdaptedLayer, part: Part) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the rows of the layer's change go through, (out, any) to (rows in the file, any).

    Raises:
        UnsupportedAdapterError: The base's matrix goes through something else than its rows.
    """
    change = part.change
    sideways = bool(getattr(layer.module, "fan_in_fan_out", False))
    if sideways:  # the base's matrix is (in, out), and must be turned over
        probe = _distinct(_shapes(layer)[0]).T
        if change is None or not _equal(change.apply(probe), probe.T):
            raise UnsupportedAdapterError(
                f"{shown(part.name)} lies on its side in the base, and not in llama.cpp's file"
            )
        return _as_they_are
    return _as_they_are if change is None else change.apply


def _as_they_are(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _distinct(shape: tuple[int, int]) -> torch.Tensor:
    """A matrix of that shape whose elements all differ."""
    import torch

    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return torch.equal(one, other)


def _shapes(layer: AdaptedLayer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the factors: (out, rank) and (rank, in); of an embedding, in is its tokens."""
    module = layer.module
    (adapter,) = module.active_adapters
    if adapter in module.lora_A:
        up, down = module.lora_B[adapter].weight, module.lora_A[adapter].weight
    else:
        up, down = module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
    return tuple(up.shape), tuple(down.shape)


def _factors(layer: AdaptedLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of `_shapes`, read now."""
    (adapter,) = layer.module.active_adapters
    if adapter in layer.module.lora_A:
        return layer.factors()
    names = (f"lora_embedding_{part}.{adapter}" for part in "BA")
    up, down = (layer.readers[name]() for name in names)
    return up, down


def _common_alpha(pairs: Sequence[_Pair]) -> float:
    """The `alpha` that gives most layers PEFT's scaling; llama.cpp divides it by the rank.

    It takes 0 for "no scaling", so an adapter that does nothing gets 1, and factors of 0.
    """
    import torch

    alphas = Counter(pair.layer.scaling * pair.rank for pair in pairs)
    (alpha, _), *_ = alphas.most_common(1)
    return float(torch.tensor(alpha, dtype=torch.float32)) or 1.0


def _scaled(pair: _Pair, alpha: float) -> _Pair:
    factor = pair.layer.scaling * pair.rank / alpha
    exact = math.isclose(factor, 1.0, rel_tol=2**-23)  # float32 has no number between
    return _Pair(pair.name, pair.layer, pair.rows, pair.rank, pair.shape, 1.0 if exact else factor)


def _reader(file: GGUFFile, tensors: Sequence[Tensor]) -> Callable[[str], torch.Tensor]:
    """Reads a tensor out of the finished file, by its name."""
    sizes = [padded(tensor.size) for tensor in tensors]
    start, places = file.size - sum(sizes), dict[str, tuple[int, Tensor]]()
    for tensor, size in zip(tensors, sizes, strict=True):
        places[tensor.name] = start, tensor
        start += size
    return partial(_read, file.path, places)


def _read(path: Path, places: Mapping[str, tuple[int, Tensor]], name: str) -> torch.Tensor:
    import torch

    start, tensor = places[name]
    with opened(path) as fd:
        data = read_at(fd, start, tensor.size, path.name)
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(tensor.shape)
