"""`Merge`: base and adapter seen as one checkpoint whose tensors are computed when asked for.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from attrs import evolve

from ..adapters.intake import PREFIX, Adapter, check_fits
from ..errors import (
    MergeError,
    NonFiniteError,
    UnchangedTargetsError,
    UnmergedTensorsError,
    UnsupportedArchitectureError,
    listed,
    shown,
)
from ..files.reading import json_object
from ..files.safetensors import Checkpoint, TensorInfo, torch_dtype
from .experts import groups_of
from .groups import Layer, Part, group_of, plan_parts
from .injection import inject
from .lora_blocks import Merging, Pairs
from .private_apis import installed
from .skeleton import Skeleton, build_skeleton

_GROUP = 1 << 24  # elements of stacked experts that are merged at once: 64 megabytes in float32
_OF_TEXT = frozenset({"vocab_size", "tie_word_embeddings"})
_UNCHANGED = (
    "the adapter leaves {} as it is in the base; if that layer was not to be trained, as those of "
    "images in a training on text, train with exclude_modules naming it"
)


def plan(base: Checkpoint, adapter: Adapter) -> Merge:
    """See `open_merge`, which has refused by configuration what it can."""
    check_fits(adapter, base)
    skeleton = build_skeleton(base, adapter)
    injected = inject(skeleton, adapter)
    injected.load()
    parts, untied = plan_parts(injected)
    changes = dict(skeleton.config)
    if untied:
        changes["tie_word_embeddings"] = False
    config = _config(base, changes)
    return Merge(skeleton, parts, untied, config, keeps_values=injected.keeps_values)


def _config(base: Checkpoint, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` must have in place of the base's values; None where nothing is left.

    What is said of the language model stands inside where that has a configuration of its own.
    """
    document = json_object(base.directory / "config.json")
    config = dict(changes)
    if isinstance(inner := document.get("text_config"), dict):
        of_text = {key: changes[key] for key in _OF_TEXT & changes.keys()}
        config = {k: v for k, v in changes.items() if k != "vocab_size" or k in document}
        config |= {"text_config": inner | of_text} if of_text else {}
    return config | dict.fromkeys({"quantization_config"} & document.keys())


class Merge:
    """An adapter merged into its base, seen as a checkpoint; a `TensorSource`.

    `infos`: every tensor; where one is not as in the base's file, its offsets mean nothing.
    `shards`: the names in each file: the base's order, with what replaces a tensor in its place and
    new tensors last in the last file. `changed`: the names that the adapter changes, that are
    dequantized, or that the base does not have. `recipe`: what the merged bits depend on. `config`:
    what must stand in `config.json` in place of the base's values, because the adapter unties the
    output layer, or has another vocabulary or a head, or because the base is quantized.
    `keeps_values`: whether values of the adapter's stay in memory; if not, each merge of a tensor
    reads them. `at_once`: how many files may be written side by side without more memory than
    their pieces take; None where it does not matter. `compared`: how many elements the largest
    product has that was computed as a whole when this was planned.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        parts: list[Part],
        untied: Mapping[str, str],
        config: Mapping[str, Any],
        *,
        keeps_values: bool,
    ) -> None:
        base = skeleton.base
        self.config = config
        self.keeps_values = keeps_values
        self._skeleton = skeleton
        self._merging = Merging()
        parts = self._merging.aside(lambda: [g for part in parts for g in self._by_experts(part)])
        self._parts = {info.name: part for part in parts for info in part.infos}
        if len(self._parts) != sum(len(part.infos) for part in parts):
            raise MergeError("two layers that are merged apart change the same tensor of the base")
        self._copies = {head: skeleton.unit(of).tensors[0] for head, of in untied.items()}
        self._ready: dict[str, torch.Tensor] = {}
        self._one_part = threading.Lock()
        self._unchanged: dict[str, set[str]] = {}
        self._seen: set[object] = set()
        many = any(p.units and len(p.infos) > 1 and not p.experts for p in self._parts.values())
        self.at_once = 1 if many else None
        self.changed = frozenset(self._parts.keys() | untied.keys())
        self._unread = set(self.changed)
        merged = {i.name: i for part in self._parts.values() for i in part.infos}
        copies = {
            head: evolve(base.infos[of], name=head, file="")  # it comes last
            for head, of in self._copies.items()
        }
        replaced = {name for unit in skeleton.quantized for name in unit.tensors}
        kept = {name: info for name, info in base.infos.items() if name not in replaced}
        self.compared = self._merging.compared
        self.infos: Mapping[str, TensorInfo] = {**kept, **copies, **merged}
        self.shards = _shards(base, self.infos)
        self.recipe: Mapping[str, Any] = {
            "base": skeleton.treatment,
            "arithmetic": "peft merge_and_unload, each module by itself",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            **installed(),
        }

    def _by_experts(self, part: Part) -> list[Part]:
        """What is merged at once: of stacked experts only a few, if that gives the same bits."""
        loading = self._skeleton.loading
        places = loading.places(part.units[0]) if len(part.units) == 1 else None
        rows = part.infos[0].shape[0] if places else 0
        pieces = [self._merging.pieces(layer.target, rows) for layer in part.layers]
        if places is None or len(pieces) != 1 or pieces == [None]:
            return [part]
        groups = groups_of(part.layers[0].target, _GROUP)
        parts = [group_of(part, group, places, loading) for group in groups]
        return parts if pieces == ["blocks"] else [evolve(part, places={}) for part in parts]

    def sources(self, name: str) -> tuple[str, ...]:
        """The names of the adapter's tensors that the changed tensor `name` is made of.

        Of experts that are merged at once, those of this one if the adapter has them singly.
        """
        part = self._parts.get(name)
        every = [of for layer in part.layers for of in layer.adapter_tensors] if part else []
        inside = f"{PREFIX}{name.rpartition('.')[0]}."
        own = [of for of in every if of.startswith(inside)]
        return tuple(own or every)

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that checkpoint name, merged now if the adapter changes it.

        Where transformers makes one parameter of many tensors, as it does of experts, they are
        merged at once; those that have not been read yet stay in memory until they are.

        Raises:
            NonFiniteError: the merged tensor holds NaN or infinity.
            UnchangedTargetsError: a merged parameter is the base's.
            MergeError: PEFT cannot merge these values, or changes others than the adapter targets.
            UnsupportedArchitectureError: transformers does not save what it loads.
        """
        if name in self._parts:
            return self._merging.aside(partial(self._whole, name))
        self._unread.discard(name)
        return self._skeleton.base.read(self._copies.get(name, name))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor of `read` in pieces, its first rows first: a large one takes little memory.

        Each is good until the next but one is asked for. Any number of threads may do this at the
        same time, each of which has one thread of torch's from then on.

        Raises: as `read`.
        """
        if name not in self._parts:
            self._unread.discard(name)
            return self._skeleton.base.blocks(self._copies.get(name, name))
        pairs = self._by_blocks(name)
        if pairs is None:
            return iter([self._by_parts(name)])
        self._unread.discard(name)
        return self._checked(name, pairs)

    def way(self, name: str) -> str:
        """What the changed tensor `name` is made by.

        "blocks" or, where those do not suit, "PEFT"; "transformers" where it is only dequantized;
        "copy" where an output layer starts as the embedding that it was tied to.
        """
        part = self._parts.get(name)
        if part is None or not part.layers:
            return "transformers" if part else "copy"
        suits = partial(self._merging.suits_blocks, part.layers[0].target)
        blocks = name in part.places or (part.is_one_weight and self._merging.aside(suits))
        return "blocks" if blocks else "PEFT"

    def together(self, name: str) -> tuple[TensorInfo, ...]:
        """What the changed tensor `name` is merged at once with, itself among them."""
        return self._parts[name].infos if name in self._parts else (self.infos[name],)

    def blocks_by_peft(self, name: str) -> Iterator[torch.Tensor]:
        """As `blocks`, of a tensor that the adapter changes, but all is PEFT's own arithmetic.

        Not while another thread asks for any: PEFT's modules are changed meanwhile.
        """
        if name not in self._parts:
            return iter([self.read(name)])
        pairs = self._pairs(self._parts[name], self._merging.by_peft)
        if pairs is None:
            return iter([self._merged(self._parts[name])[name]])
        return self._checked(name, pairs)

    def _whole(self, name: str) -> torch.Tensor:
        pairs = self._by_blocks(name)
        if pairs is None:
            return self._by_parts(name)
        self._unread.discard(name)
        info, done = self.infos[name], 0
        merged = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        for block in self._checked(name, pairs):
            merged[done : done + len(block)] = block
            done += len(block)
        return merged

    def _by_blocks(self, name: str) -> Pairs | None:
        """Those of a tensor that can be merged by blocks."""
        part, base = self._parts[name], self._skeleton.base
        if name not in part.places:
            return self._pairs(part, self._merging.by_blocks)
        self._see_places(part)
        (layer,), dtype = part.layers, torch_dtype(self.infos[name].dtype)
        place = part.places[name]
        return self._merging.expert_by_blocks(layer.target, base, base.infos[name], dtype, place)

    def _pairs(self, part: Part, way: Callable[..., Pairs | None]) -> Pairs | None:
        """Those of a layer's weight, if that is all to be merged and it can go that way."""
        if not part.is_one_weight:
            return None
        (layer,), base = part.layers, self._skeleton.base
        unit = self._skeleton.unit(layer.sources["weight"])
        dtype = self._skeleton.dtypes[layer.outputs["weight"]]
        return way(layer.target, base, base.infos[unit.tensors[0]], dtype)

    def _see_places(self, part: Part) -> None:
        """That the tensors are where they are thought to be, by values, once for each kind."""
        assert part.experts
        (unit,) = part.units
        with self._one_part:
            if unit.patterns in self._seen:
                return
            (value,) = self._skeleton.loading.read(unit).values()
            for name, (expert, row) in part.places.items():
                tensor = self._skeleton.base.read(name).to(value.dtype)
                there = value[expert - part.experts[0]][row : row + len(tensor)]
                if not torch.equal(there, tensor):
                    raise UnsupportedArchitectureError(
                        f"transformers does not load {shown(name)} as it loads small tensors"
                    )
            self._seen.add(unit.patterns)

    def _checked(
        self, name: str, pairs: Iterator[tuple[torch.Tensor, torch.Tensor]]
    ) -> Iterator[torch.Tensor]:
        """The latter of each pair, as long as all is finite and some pair differs."""
        same = True
        for before, after in pairs:
            _refuse_non_finite(name, after)
            same = same and torch.equal(before, after)
            yield after
        if same and self._none_changed(self._parts[name], [name]):
            raise UnchangedTargetsError(_UNCHANGED.format(shown(name)))

    def _none_changed(self, part: Part, names: Iterable[str]) -> bool:
        """Whether these being the base's, nothing of the parameter has changed.

        Of stacked experts some may be as they were, because they were never called in training.
        """
        if not part.experts:
            return True
        (parameter,) = part.units[0].parameters
        unchanged = self._unchanged.setdefault(parameter, set())
        unchanged.update(names)
        return unchanged.issuperset(self._skeleton.loading.units[parameter].tensors)

    def _by_parts(self, name: str) -> torch.Tensor:
        """The tensor out of its part, whose others are kept until they are asked for."""
        with self._one_part:
            if name not in self._ready:
                self._ready |= self._merged(self._parts[name])
            self._unread.discard(name)
            tensor = self._ready.pop(name)
            if self._unread.isdisjoint(info.name for info in self._parts[name].infos):
                for info in self._parts[name].infos:  # read before, and merged once more
                    self._ready.pop(info.name, None)
            return tensor

    def _merged(self, part: Part) -> dict[str, torch.Tensor]:
        """The tensors that come of it, by PEFT and transformers."""
        loading = self._skeleton.loading
        values: dict[str, torch.Tensor] = {}
        for unit in part.units:
            values |= loading.read(unit)
        for layer in part.layers:
            values |= self._merged_layer(part, layer, values)
        tensors: dict[str, torch.Tensor] = {}
        for unit in part.units:
            tensors |= loading.saved(unit, {name: values.pop(name) for name in unit.parameters})
        for path, tensor in values.items():
            names = self._skeleton.tensors(path) or [path]
            tensors |= dict.fromkeys(names, tensor)
        return tensors

    def _merged_layer(
        self, part: Part, layer: Layer, known: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Its changed parameters, by their names in the model, in place of `known` values."""
        target = layer.target
        values, heads = {}, {}
        for name, path in layer.outputs.items():
            own = target.own.get(name)
            if name in layer.sources:
                before = known.get(layer.sources[name])
                before = self._skeleton.read(layer.sources[name]) if before is None else before
                heads[name] = _head(before).clone()
            else:
                shape, dtype = self._skeleton.shapes[path], self._skeleton.dtypes[path]
                before = torch.zeros(shape, dtype=dtype)
            values[name] = before if own is None else own.clone()
        merged = self._merging.merge(target, values, part.experts[0] if part.experts else 0)
        for name in layer.outputs:
            self._check(part, layer, name, merged[name], heads.get(name))
        return {layer.outputs[name]: merged[name] for name in target.changed}

    def _check(
        self,
        part: Part,
        layer: Layer,
        name: str,
        merged: torch.Tensor,
        head: torch.Tensor | None,
    ) -> None:
        path, changed = layer.outputs[name], layer.target.changed
        _refuse_non_finite(path, merged)
        if head is None:
            return
        beside = name.endswith("bias") and len(changed) > 1  # its gradient may have been 0
        same = torch.equal(_head(merged), head)
        same = same and torch.equal(merged, self._before(part, layer.sources[name]))
        to_change = name in changed and not beside
        if same and to_change and self._none_changed(part, [info.name for info in part.infos]):
            raise UnchangedTargetsError(_UNCHANGED.format(shown(path)))
        if not same and name not in changed:
            raise MergeError(f"merging changed {shown(path)}, which the adapter does not target")

    def _before(self, part: Part, parameter: str) -> torch.Tensor:
        """The base's values, once more."""
        if part.experts:
            return self._skeleton.loading.read(part.units[0])[parameter]
        return self._skeleton.read(parameter)

    def finish(self) -> None:
        """State that every tensor has been taken.

        Raises:
            UnmergedTensorsError: some that the adapter changes were never read.
        """
        if self._unread:
            raise UnmergedTensorsError(f"never merged: {listed(self._unread)}", self._unread)


def _shards(base: Checkpoint, infos: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    shards: dict[str, list[TensorInfo]] = {file: [] for file in base.shards}
    *_, last = shards
    for info in sorted(infos.values(), key=lambda info: (not info.file, info.start)):
        shards[info.file or last].append(info)
    return {file: tuple(info.name for info in found) for file, found in shards.items()}


def _refuse_non_finite(name: str, merged: torch.Tensor) -> None:
    extremes = torch.stack(torch.aminmax(merged))  # NaN if there is any
    if not torch.isfinite(extremes).all():
        raise NonFiniteError(f"merging gives NaN or infinity in {shown(name)}")


def _head(tensor: torch.Tensor) -> torch.Tensor:
    """Its first elements, which tell most changed tensors from the base's."""
    return tensor.reshape(-1)[:4096]
