"""Which tensors a file has, and in which order: a family's tables applied to a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

from attrs import frozen

from ..errors import MalformedError, UnsupportedArchitectureError, listed, shown
from ..files.safetensors import TensorInfo
from .family import Family, Part
from .format import Tensor

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_DROPPED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
"""Constants that old checkpoints keep; transformers ignores them too."""


@frozen
class _Member:
    """A part, the checkpoint tensor it comes of, and its numbers in the stack it belongs to."""

    numbers: tuple[int, ...]
    source: str
    part: Part


def file_tensors(family: Family, infos: Mapping[str, TensorInfo]) -> list[Tensor]:
    """Every tensor of the file, in the order in which upstream converts them.

    Raises:
        MalformedError: a layer or the vocabulary is not as `config.json` implies.
        UnsupportedArchitectureError: a tensor that the architecture does not have.
    """
    order = converted_order(infos)
    stacks: dict[str, list[_Member]] = {}
    unknown = []
    for source in order:
        name = family.source_name(source)
        if name is None or name.endswith(_DROPPED):
            continue
        numbers = tuple(map(int, _NUMBER.findall(name)))
        pattern = _NUMBER.sub("{}", name)
        if not family.knows(pattern):
            unknown.append(source)
            continue
        stored = family.stored_name(pattern)
        if stored is None:
            continue
        depth = stored.count("{}")
        for part in family.parts(name, stored.format(*numbers), infos[source].shape):
            stacks.setdefault(part.name, []).append(_Member(numbers[depth:], source, part))
    if unknown:
        raise UnsupportedArchitectureError(
            f"{family.architecture} has no place for the tensors {listed(unknown)}"
        )
    tensors = [_stacked(name, members) for name, members in stacks.items()]
    _check(family, tensors)
    places = {name: place for place, name in enumerate(order)}
    return family.extra_tensors() + _in_place(family, tensors, places)


def shards_of(infos: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """Names by shard, both in order; what is in no file yet would come into the last."""
    shards: dict[str, list[str]] = {}
    last = max((info.file for info in infos.values()), default="") or "model.safetensors"
    for name in sorted(infos, key=lambda name: (infos[name].file or last, name)):
        shards.setdefault(infos[name].file or last, []).append(name)
    return shards


def converted_order(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Shard by shard, by name: the order in which upstream reads a checkpoint."""
    return [name for names in shards_of(infos).values() for name in names]


def _stacked(name: str, members: list[_Member]) -> Tensor:
    """One tensor of the parts that go under its name, by their numbers."""
    members = sorted(members, key=lambda member: member.numbers)
    numbers, first = [member.numbers for member in members], members[0].part
    if numbers == [()]:
        return Tensor(name, first.shape, (members[0].source,), first.change)
    if numbers != [(i,) for i in range(len(members))]:
        raise MalformedError(f"the checkpoint lacks or repeats tensors for {shown(name)}")
    if any(member.part.shape != first.shape for member in members):
        raise MalformedError(f"tensors for {shown(name)} have different shapes")
    shape = (len(members), *first.shape)
    return Tensor(name, shape, tuple(member.source for member in members), first.change)


def _in_place(family: Family, tensors: list[Tensor], places: Mapping[str, int]) -> list[Tensor]:
    """The order in which they are complete: a layer's stacks all when the last of them is."""

    def group(tensor: Tensor) -> str:
        return tensor.sources[0].rpartition(".experts.")[0] if len(tensor.sources) > 1 else ""

    last = {tensor.name: max(places[source] for source in tensor.sources) for tensor in tensors}
    complete: dict[str, int] = {}
    for tensor in tensors:
        complete[group(tensor)] = max(complete.get(group(tensor), 0), last[tensor.name])
    rank = {name: place for place, name in enumerate(family.names)}

    def key(tensor: Tensor) -> tuple[int, int]:
        if not group(tensor):
            return last[tensor.name], 0
        module = _NUMBER.sub("{}", tensor.sources[0]).removesuffix(".weight")
        return complete[group(tensor)], rank.get(module, 0)

    return sorted(tensors, key=key)


def _check(family: Family, tensors: list[Tensor]) -> None:
    """The layers are those of the configuration, each has what the others have, and so on."""
    names = {tensor.name: tensor for tensor in tensors}
    by_kind: dict[str, set[int]] = {}
    for name in names:
        if name.startswith("blk.") and name.endswith(".weight"):
            number = int(name.split(".")[1])
            by_kind.setdefault(name.split(".", 2)[2], set()).add(number)
    every = set(range(family.layers))
    if beyond := set().union(*by_kind.values()) - every:
        raise UnsupportedArchitectureError(
            f"there is no place for layer {min(beyond)} of the checkpoint: config.json has "
            f"{family.layers} layers"
        )
    for kind, numbers in by_kind.items():
        if numbers != every and not kind.startswith(family.some_layers):
            missing = f"blk.{min(every - numbers)}.{kind}"
            raise MalformedError(f"the checkpoint lacks the tensors for {missing}")
    embedding = names.get("token_embd.weight")
    if not by_kind or embedding is None:
        raise MalformedError("the checkpoint lacks the tensors of layers or of the embedding")
    if embedding.shape[0] != family.vocabulary:
        raise MalformedError(
            f"tensor {shown(embedding.sources[0])} has shape {embedding.shape}; config.json "
            f"implies ({family.vocabulary}, {embedding.shape[1]})"
        )
    tied = family.settings.get("tie_word_embeddings", False)
    if "output.weight" not in names and not tied and "output" in family.names.values():
        raise MalformedError("the checkpoint lacks the tensors of the output layer")
