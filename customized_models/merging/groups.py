"""Which layers are merged together, and what comes out: decided by names, before any is.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import evolve, field, frozen
from peft.utils import ModulesToSaveWrapper

from ..errors import BaseModelMismatch, UnsupportedAdapterError, listed, shown
from ..files.safetensors import TensorInfo, dtype_name
from .conversion import Loading, Place, Unit
from .injection import Injected
from .layers import Target, move_together
from .skeleton import Skeleton


def plan_parts(injected: Injected) -> tuple[list[Part], dict[str, str]]:
    """All parts of the merge, and the parameter that each new tensor starts from.

    Raises:
        UnsupportedAdapterError, UnsupportedArchitectureError, BaseModelMismatch: as `open_merge`.
    """
    skeleton = injected.skeleton
    targets = {target.place: target for target in injected.targets()}
    untied = _untie(targets, skeleton)
    sources = injected.sources(targets)
    layers = [_layer(t, sources[place], skeleton, untied) for place, t in targets.items()]
    if injected.adapter.config.get("task_type") != "FEATURE_EXTRACTION":  # which uses no head
        _refuse_incomplete(layers, skeleton)
    _refuse_two_vocabularies(layers, skeleton)
    parts = _parts(layers, skeleton)
    done = {unit for part in parts for unit in part.units}
    parts += [_part([], [unit], skeleton) for unit in skeleton.quantized if unit not in done]
    return parts, untied


@frozen
class Layer:
    """A layer to merge.

    `adapter_tensors`: the names of what it is merged with. `sources`: the parameter of the model
    that each of its parameters has its values from; none for a head that the base lacks. `outputs`:
    the one that it is afterwards.
    """

    target: Target
    adapter_tensors: tuple[str, ...]
    sources: Mapping[str, str]
    outputs: Mapping[str, str]


@frozen
class Part:
    """Layers that are merged together, because tensors of the checkpoint hold several of them.

    `units`: of those tensors. `infos`: what comes out. `experts`: where it is some of those that a
    parameter stacks, the first and the end, exclusive. `places`: of each tensor in the stack, if
    blocks of rows suit.
    """

    layers: tuple[Layer, ...]
    units: tuple[Unit, ...]
    infos: tuple[TensorInfo, ...]
    experts: tuple[int, int] | None = None
    places: Mapping[str, Place] = field(factory=dict, repr=False)

    @property
    def is_one_weight(self) -> bool:
        """Whether it is one tensor of the base's, which transformers loads as it is."""
        if len(self.layers) != 1 or len(self.infos) != 1 or self.units:
            return False
        (layer,) = self.layers
        own = layer.target.own or "weight" not in layer.sources
        return layer.target.changed == ("weight",) and not own


def group_of(
    part: Part, experts: tuple[int, int], places: Mapping[str, Place], loading: Loading
) -> Part:
    """Of `part`, which stacks experts as `places` says, those from the first to the end."""
    start, end = experts
    inside = {name: place for name, place in places.items() if start <= place[0] < end}
    by_place = {place: name for name, place in places.items()}
    chosen = {by_place[expert - start, row]: name for name, (expert, row) in inside.items()}
    unit = loading.section(part.units[0], chosen)
    infos = tuple(info for info in part.infos if info.name in inside)
    return Part(part.layers, (unit,), infos, experts, inside)


def _layer(
    target: Target,
    adapter_tensors: tuple[str, ...],
    skeleton: Skeleton,
    untied: Mapping[str, str],
) -> Layer:
    if not target.changed:
        raise UnsupportedAdapterError(
            f"the adapter trains a bias of {shown(target.path)}, which has none in the base"
        )
    outputs = {name: f"{target.path}.{name}" for name in target.parameters}
    sources = {name: skeleton.tied.get(path, path) for name, path in outputs.items()}
    if isinstance(target.module, ModulesToSaveWrapper):  # which needs nothing of the base
        known = skeleton.loading.units
        sources = {name: path for name, path in sources.items() if path in known}
    if not untied:
        outputs = {name: skeleton.tied.get(path, path) for name, path in outputs.items()}
    for path in sources.values():
        skeleton.unit(path)
    return Layer(target, adapter_tensors, sources, outputs)


def _refuse_incomplete(layers: list[Layer], skeleton: Skeleton) -> None:
    """A head that was drawn at random before the training and is not saved is lost."""
    there = {path for layer in layers for path in _changed(layer)}
    there |= skeleton.loading.units.keys() | skeleton.tied.keys()
    there |= {*(skeleton.model._keys_to_ignore_on_save or ())}  # computed, not learnt
    if lost := skeleton.loading.parameters - there:
        raise BaseModelMismatch(
            f"neither the base model's files nor the adapter have {listed(lost)}, which a "
            f"{type(skeleton.model).__name__} needs; save it with the adapter (modules_to_save)"
        )


def _refuse_two_vocabularies(layers: list[Layer], skeleton: Skeleton) -> None:
    """Embedding and output layer have the same number of rows, or the model cannot be loaded."""
    changed = {skeleton.tied.get(path, path) for layer in layers for path in _changed(layer)}
    ends = {skeleton.tied.get(path, path) for path in skeleton.embeddings}
    if skeleton.vocabulary is not None and (short := ends - changed):
        raise BaseModelMismatch(
            f"the adapter was trained with a vocabulary of {skeleton.vocabulary}, but has no "
            f"{listed(short)} of that size; save it with the adapter (save_embedding_layers=True)"
        )


def _untie(targets: dict[str, Target], skeleton: Skeleton) -> dict[str, str]:
    """Which parameter each new tensor starts from, if the output layer and the embedding part ways.

    PEFT would change both, or neither, where the adapter was trained with one of them changed.
    Of `targets` that stay tied, one is left.
    """
    by_path = {f"{t.path}.{name}": t for t in targets.values() for name in t.changed}
    for holder in dict.fromkeys(skeleton.tied.values()):
        members = [name for name, of in skeleton.tied.items() if of == holder]
        ends = [by_path[name] for name in (*members, holder) if name in by_path]
        if not ends:
            continue
        together = all(move_together(end, ends[-1]) for end in ends[:-1] or ends)
        if members == [skeleton.head] and not together:
            return {members[0]: holder}
        needed = {holder} if members == [skeleton.head] else {holder, *members}
        if not together or needed - by_path.keys():
            what = "resizes" if skeleton.vocabulary is not None else "changes"
            raise UnsupportedAdapterError(
                f"the adapter {what} some of {listed([*members, holder])}, which the base model "
                f"ties to one another: PEFT would change all, which is not what was trained"
            )
        for name in by_path.keys() & members:
            del targets[by_path[name].place]
    return {}


def _parts(layers: list[Layer], skeleton: Skeleton) -> list[Part]:
    """The layers, together where tensors of the checkpoint hold parameters of several."""
    groups: dict[int, list[Layer]] = {}
    of_unit: dict[Unit, list[Layer]] = {}
    for layer in layers:
        near = {id(of_unit[u]): of_unit[u] for u in _converted([layer], skeleton) if u in of_unit}
        group = [layer, *(member for other in near.values() for member in other)]
        for key in near:
            del groups[key]
        groups[id(group)] = group
        of_unit.update(dict.fromkeys(_converted(group, skeleton), group))
    every = groups.values()
    return [_part(group, _converted(group, skeleton), skeleton) for group in every]


def _converted(layers: Iterable[Layer], skeleton: Skeleton) -> list[Unit]:
    """What transformers converts of that which the layers change."""
    found = (skeleton.loading.units.get(path) for layer in layers for path in _changed(layer))
    return [*dict.fromkeys(unit for unit in found if unit and unit.patterns is not None)]


def _changed(layer: Layer) -> list[str]:
    return [layer.outputs[name] for name in layer.target.changed]


def _part(layers: list[Layer], units: list[Unit], skeleton: Skeleton) -> Part:
    infos = [info for unit in units for info in skeleton.loading.saved_infos(unit)]
    inside = {parameter for unit in units for parameter in unit.parameters}
    for path in (path for layer in layers for path in _changed(layer) if path not in inside):
        dtype = dtype_name(skeleton.dtypes[path])
        for name in skeleton.tensors(path) or [path]:
            of = skeleton.base.infos.get(name, TensorInfo(name, "", (), "", 0, 0))
            infos.append(evolve(of, shape=skeleton.shapes[path], dtype=dtype))
    return Part(tuple(layers), tuple(units), tuple(infos))
