"""Which layers are merged together, and what comes out: decided by names, before any merge.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import evolve, field, frozen
from peft.utils import ModulesToSaveWrapper

from ..errors import (
    BaseModelMismatch,
    UnchangedTargetsError,
    UnsupportedAdapterError,
    listed,
    shown,
)
from ..files.safetensors import TensorInfo, dtype_name
from .conversion import Conversion
from .injection import Injected
from .layers import AdaptedLayer, stay_tied
from .skeleton import Skeleton

NOTHING_CHANGES = (
    "the adapter changes nothing: what it holds is zero, as before a training, multiplied by a "
    "lora_alpha of zero, or as it is in the base; register the checkpoint that was trained"
)


def group_tensors(injected: Injected) -> tuple[list[TensorGroup], dict[str, str]]:
    """All tensors that change, in groups that are merged together.

    Returns:
        The groups, and by the name of each tensor that the merge adds, the parameter whose values
        it starts from.

    Raises:
        UnsupportedAdapterError, UnsupportedArchitectureError, BaseModelMismatch,
            UnchangedTargetsError: As `open_merge`.
    """
    skeleton = injected.skeleton
    adapted = {layer.wrapper_path: layer for layer in injected.layers()}
    untied = _untie(adapted, skeleton)
    sources = injected.sources(adapted)
    layers = [_planned(one, sources[path], injected, untied) for path, one in adapted.items()]
    if all(layer.untrained for layer in layers):
        raise UnchangedTargetsError(NOTHING_CHANGES)
    if injected.adapter.config.get("task_type") != "FEATURE_EXTRACTION":  # which uses no head
        _refuse_incomplete(layers, skeleton)
    _refuse_two_vocabularies(layers, skeleton)
    groups = _groups(layers, skeleton)
    done = {conversion for group in groups for conversion in group.conversions}
    rest = [one for one in skeleton.quantized if one not in done]
    return [*groups, *(_group([], [conversion], skeleton) for conversion in rest)], untied


@frozen
class PlannedLayer:
    """A layer to merge, and the names of everything it takes and gives.

    Attributes:
        adapted: The layer.
        adapter_tensors: Names in the adapter's file of what it is merged with.
        sources: The parameter of the model that each of the layer's parameters has its values
            from; a head that the base lacks has none.
        outputs: The parameter that it is afterwards.
        untrained: Whether the training left what it is merged with as it was: without effect.
    """

    adapted: AdaptedLayer
    adapter_tensors: tuple[str, ...]
    sources: Mapping[str, str]
    outputs: Mapping[str, str]
    untrained: bool

    @property
    def may_stay(self) -> bool:
        """Whether it may come out as it is in the base."""
        return self.untrained or self.adapted.replaces_values

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        """Those of `outputs` that come out changed."""
        return tuple(self.outputs[name] for name in self.adapted.changed)


@frozen
class TensorGroup:
    """Tensors that change together, because the layers of each depend on several of them.

    Attributes:
        layers: What changes them; none if they are only dequantized.
        conversions: Of those tensors that transformers does not load as they are.
        infos: The tensors that come out.
    """

    layers: tuple[PlannedLayer, ...]
    conversions: tuple[Conversion, ...]
    infos: tuple[TensorInfo, ...] = field(repr=False)

    @property
    def untrained(self) -> bool:
        """Whether the training left all of its layers as they were before."""
        return bool(self.layers) and all(layer.untrained for layer in self.layers)

    @property
    def is_one_weight(self) -> bool:
        """Whether it is one tensor of the base, which transformers loads as it is."""
        if len(self.layers) != 1 or len(self.infos) != 1 or self.conversions:
            return False
        (layer,) = self.layers
        only_weight = layer.adapted.changed == ("weight",) and "weight" in layer.sources
        return only_weight and not layer.adapted.trained_values

    def adapter_tensors_of(self, prefix: str) -> tuple[str, ...]:
        """Names in the adapter's file that start with `prefix`, or all if none does."""
        every = tuple(name for layer in self.layers for name in layer.adapter_tensors)
        return tuple(name for name in every if name.startswith(prefix)) or every


def _planned(
    adapted: AdaptedLayer,
    adapter_tensors: tuple[str, ...],
    injected: Injected,
    untied: Mapping[str, str],
) -> PlannedLayer:
    skeleton = injected.skeleton
    if not adapted.changed:
        raise UnsupportedAdapterError(
            f"the adapter trains a bias of {shown(adapted.path)}, which has none in the base"
        )
    outputs = {name: f"{adapted.path}.{name}" for name in adapted.parameters}
    sources = {name: skeleton.tied.get(path, path) for name, path in outputs.items()}
    if isinstance(adapted.module, ModulesToSaveWrapper):  # which needs nothing of the base
        known = skeleton.conversions.by_parameter
        sources = {name: path for name, path in sources.items() if path in known}
    if not untied:
        outputs = {name: skeleton.tied.get(path, path) for name, path in outputs.items()}
    for path in sources.values():
        skeleton.conversion(path)
    untrained = injected.is_untrained(adapted, adapter_tensors)
    return PlannedLayer(adapted, adapter_tensors, sources, outputs, untrained)


def _refuse_incomplete(layers: list[PlannedLayer], skeleton: Skeleton) -> None:
    """A head that was drawn at random before the training and is not saved is lost."""
    there = {path for layer in layers for path in layer.changed_parameters}
    there |= skeleton.conversions.by_parameter.keys() | skeleton.tied.keys()
    there |= {*(skeleton.model._keys_to_ignore_on_save or ())}  # computed, not learnt
    if lost := skeleton.conversions.parameters - there:
        raise BaseModelMismatch(
            f"neither the base model's files nor the adapter have {listed(lost)}, which a "
            f"{type(skeleton.model).__name__} needs; save it with the adapter (modules_to_save)"
        )


def _refuse_two_vocabularies(layers: list[PlannedLayer], skeleton: Skeleton) -> None:
    """Embedding and output layer have the same number of rows, or the model cannot be loaded."""
    paths = (path for layer in layers for path in layer.changed_parameters)
    changed = {skeleton.tied.get(path, path) for path in paths}
    ends = {skeleton.tied.get(path, path) for path in skeleton.embeddings}
    if skeleton.vocabulary is not None and (short := ends - changed):
        raise BaseModelMismatch(
            f"the adapter was trained with a vocabulary of {skeleton.vocabulary}, but has no "
            f"{listed(short)} of that size; save it with the adapter (save_embedding_layers=True)"
        )


def _untie(adapted: dict[str, AdaptedLayer], skeleton: Skeleton) -> dict[str, str]:
    """Decide which tied parameters part, and drop from `adapted` all but one of those that do not.

    PEFT would change all tied parameters, or none, where the adapter was trained with one of them
    changed.

    Returns:
        The parameter that each new tensor starts from, if output layer and embedding part.
    """
    by_path = {f"{a.path}.{name}": a for a in adapted.values() for name in a.changed}
    for holder in dict.fromkeys(skeleton.tied.values()):
        members = [name for name, of in skeleton.tied.items() if of == holder]
        ends = [by_path[name] for name in (*members, holder) if name in by_path]
        if not ends:
            continue
        together = all(stay_tied(end, ends[-1]) for end in ends[:-1] or ends)
        if members == [skeleton.head] and not together:
            return {members[0]: holder}
        needed = {holder} if members == [skeleton.head] else {holder, *members}
        if not together or needed - by_path.keys():
            what = "resizes" if skeleton.vocabulary is not None else "changes"
            raise UnsupportedAdapterError(
                f"the adapter {what} some of {listed([*members, holder])}, which the base model "
                f"ties to one another: PEFT would change all, which is not what was trained; train "
                f"it once more without them (exclude_modules)"
            )
        for name in by_path.keys() & members:
            del adapted[by_path[name].wrapper_path]
    return {}


def _groups(layers: list[PlannedLayer], skeleton: Skeleton) -> list[TensorGroup]:
    """The layers, together where tensors of the checkpoint hold parameters of several."""
    groups: dict[int, list[PlannedLayer]] = {}
    by_conversion: dict[Conversion, list[PlannedLayer]] = {}
    for layer in layers:
        shared = [c for c in _conversions([layer], skeleton) if c in by_conversion]
        near = {id(by_conversion[c]): by_conversion[c] for c in shared}
        group = [layer, *(member for other in near.values() for member in other)]
        for key in near:
            del groups[key]
        groups[id(group)] = group
        by_conversion.update(dict.fromkeys(_conversions(group, skeleton), group))
    every = groups.values()
    return [_group(group, _conversions(group, skeleton), skeleton) for group in every]


def _conversions(layers: Iterable[PlannedLayer], skeleton: Skeleton) -> list[Conversion]:
    """Those of what the layers change that do not load a tensor as it is."""
    stored = skeleton.conversions.by_parameter
    found = (stored.get(path) for layer in layers for path in layer.changed_parameters)
    return [*dict.fromkeys(one for one in found if one and one.patterns is not None)]


def _group(
    layers: list[PlannedLayer], conversions: list[Conversion], skeleton: Skeleton
) -> TensorGroup:
    infos = [info for one in conversions for info in skeleton.conversions.saved_infos(one)]
    inside = {parameter for one in conversions for parameter in one.parameters}
    paths = (path for layer in layers for path in layer.changed_parameters if path not in inside)
    for path in paths:
        dtype = dtype_name(skeleton.dtypes[path])
        for name in skeleton.tensors_of(path) or [path]:
            of = skeleton.base.infos.get(name, TensorInfo(name, "", (), "", 0, 0))
            infos.append(evolve(of, shape=skeleton.shapes[path], dtype=dtype))
    return TensorGroup(tuple(layers), tuple(conversions), tuple(infos))
