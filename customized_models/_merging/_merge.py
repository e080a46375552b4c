"""`Merge`: base and adapter seen as one checkpoint whose tensors are computed when asked for.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from attrs import evolve, frozen

from .._adapters import Adapter, check_fits
from .._checkpoints import Checkpoint, TensorInfo, dtype_name
from .._errors import (
    MergeError,
    NonFiniteError,
    UnchangedTargetsError,
    UnmergedTensorsError,
    UnsupportedAdapterError,
    listed,
    shown,
)
from ._fused import Merging, Pairs
from ._injection import inject
from ._skeleton import Skeleton, build_skeleton
from ._target import Target, move_together
from ._versions import installed


def plan(base: Checkpoint, adapter: Adapter) -> Merge:
    """See `open_merge`, which has refused by configuration what it can."""
    check_fits(adapter, base)
    skeleton = build_skeleton(base, adapter)
    injected = inject(skeleton, adapter)
    injected.load()
    targets = injected.targets()
    modules: dict[str, _Module] = {}
    for target in targets:
        if not target.changed:
            raise UnsupportedAdapterError(
                f"the adapter trains a bias of {shown(target.path)}, which has none in the base"
            )
        modules.update(_named(target, skeleton))
    untied = _untie(targets, skeleton, modules)
    config: dict[str, Any] = {"tie_word_embeddings": False} if untied else {}
    if skeleton.vocabulary is not None:
        config["vocab_size"] = skeleton.vocabulary
    return Merge(skeleton, modules, untied, config, keeps_values=injected.keeps_values)


@frozen
class _Module:
    """A layer to merge, and for each of its parameters the checkpoint's tensor before and after."""

    target: Target
    sources: Mapping[str, str]
    names: Mapping[str, str]


def _named(target: Target, skeleton: Skeleton) -> dict[str, _Module]:
    """The layer under the name of each tensor that it changes."""
    paths = {name: f"{target.path}.{name}" for name in target.parameters}
    sources = {name: skeleton.tensor(path).name for name, path in paths.items()}
    names = {n: path if path in skeleton.tied else sources[n] for n, path in paths.items()}
    module = _Module(target, sources, names)
    return {names[name]: module for name in target.changed}


def _untie(
    targets: list[Target], skeleton: Skeleton, modules: dict[str, _Module]
) -> dict[str, str]:
    """Which of the base's tensors each new one starts from, if head and embedding part ways.

    PEFT would change both, or neither, where the adapter was trained with one of them changed.
    """
    by_path = {f"{target.path}.weight": target for target in targets}
    for head, embedding in skeleton.tied.items():
        ends = [by_path[name] for name in (head, embedding) if name in by_path]
        if not ends:
            continue
        if not move_together(ends):
            return {head: skeleton.tensor(embedding).name}
        if embedding not in by_path:
            raise UnsupportedAdapterError(f"the adapter has {shown(head)} but not {embedding}")
        modules.pop(head, None)
    return {}


class Merge:
    """An adapter merged into its base, seen as a checkpoint; a `TensorSource`.

    `infos`: every tensor; where one is not as in the base's file, its offsets mean nothing.
    `shards`: the base's, with its order; tensors that it lacks come last, in the last file.
    `changed`: the names that the adapter changes, or that the base does not have. `recipe`: what
    the merged bits depend on. `config`: what must stand in `config.json` in place of the base's
    values, because the adapter unties the output layer or has another vocabulary. `keeps_values`:
    whether values of the adapter's stay in memory; if not, each merge of a tensor reads them.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        modules: Mapping[str, _Module],
        untied: Mapping[str, str],
        config: Mapping[str, Any],
        *,
        keeps_values: bool,
    ) -> None:
        base, dtype = skeleton.base, skeleton.dtype
        self.config = config
        self.keeps_values = keeps_values
        self._untied = untied
        self._base = base
        self._modules = modules
        self._dtype = dtype
        self._merging = Merging()
        self.changed = frozenset(modules.keys() | untied.keys())
        self._unread = set(self.changed)
        self.infos: Mapping[str, TensorInfo] = {
            **base.infos,
            **{name: evolve(base.infos[of], name=name) for name, of in untied.items()},
            **{name: _merged_info(name, module, skeleton) for name, module in modules.items()},
        }
        self.shards = _shards(base, [name for name in self.infos if name not in base.infos])
        self.recipe: Mapping[str, Any] = {
            "arithmetic": "peft merge_and_unload, each module by itself",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            **installed(),
        }

    def read(self, name: str) -> torch.Tensor:
        """The tensor of that checkpoint name, merged now if the adapter changes it.

        Raises:
            NonFiniteError: the merged tensor holds NaN or infinity.
            UnchangedTargetsError: the merged tensor is the base's.
        """
        if name in self._modules:
            return self._merging.aside(lambda: self._merged(name))
        self._unread.discard(name)
        return self._base.read(self._untied.get(name, name))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor of `read` in pieces, its first rows first: a large one takes little memory.

        Each is good until the next but one is asked for. Any number of threads may do this at the
        same time, each of which has one thread of torch's from then on.

        Raises: as `read`.
        """
        if name not in self._modules:
            return iter([self.read(name)])
        self._unread.discard(name)
        return self._in_blocks(name, self._merging.by_blocks)

    def takes_blocks(self, name: str) -> bool:
        """Whether `blocks` has more than the whole of a tensor that the adapter changes."""
        return self._merging.aside(lambda: self._pairs(name, self._merging.by_blocks)) is not None

    def blocks_by_peft(self, name: str) -> Iterator[torch.Tensor]:
        """As `blocks`, of a tensor that the adapter changes, but all is PEFT's own arithmetic."""
        return self._in_blocks(name, self._merging.by_peft)

    def _in_blocks(self, name: str, way: Callable[..., Pairs | None]) -> Iterator[torch.Tensor]:
        pairs = self._pairs(name, way)
        return iter([self._whole(name)]) if pairs is None else _checked(name, pairs)

    def _pairs(self, name: str, way: Callable[..., Pairs | None]) -> Pairs | None:
        """Those of the layer's weight, if that is all to be merged and it can go that way."""
        module = self._modules[name]
        if module.target.changed != ("weight",) or module.target.own:
            return None
        info = self._base.infos[module.sources["weight"]]
        return way(module.target, self._base, info, self._dtype)

    def _merged(self, name: str) -> torch.Tensor:
        self._unread.discard(name)
        pairs = self._pairs(name, self._merging.by_blocks)
        if pairs is None:
            return self._whole(name)
        merged, done = torch.empty(self.infos[name].shape, dtype=self._dtype), 0
        for block in _checked(name, pairs):
            merged[done : done + len(block)] = block
            done += len(block)
        return merged

    def _whole(self, name: str) -> torch.Tensor:
        module = self._modules[name]
        values, heads = {}, {}
        for parameter, of in module.sources.items():
            own = module.target.own.get(parameter)
            before = self._before(of)
            heads[parameter] = _head(before).clone()
            values[parameter] = before if own is None else own.clone()
        merged = self._merging.merge(module.target, values)
        for parameter in module.names:
            self._check(module, parameter, merged[parameter], heads[parameter])
        return next(merged[p] for p, of in module.names.items() if of == name)

    def _before(self, name: str) -> torch.Tensor:
        """A fresh copy of the base's tensor, as transformers would load it."""
        return self._base.read(name).to(self._dtype)

    def _check(
        self, module: _Module, parameter: str, merged: torch.Tensor, head: torch.Tensor
    ) -> None:
        name, changed = module.names[parameter], module.target.changed
        _refuse_non_finite(name, merged)
        beside = parameter.endswith("bias") and len(changed) > 1  # its gradient may have been 0
        same = torch.equal(_head(merged), head)
        same = same and torch.equal(merged, self._before(module.sources[parameter]))
        if same and parameter in changed and not beside:
            raise UnchangedTargetsError(f"the adapter leaves {shown(name)} as it is in the base")
        if not same and parameter not in changed:
            raise MergeError(f"merging changed {shown(name)}, which the adapter does not target")

    def finish(self) -> None:
        """State that every tensor has been taken.

        Raises:
            UnmergedTensorsError: some that the adapter changes were never read.
        """
        if self._unread:
            raise UnmergedTensorsError(f"never merged: {listed(self._unread)}", self._unread)


def _shards(base: Checkpoint, new: Collection[str]) -> Mapping[str, tuple[str, ...]]:
    shards = {file: (*header.tensors,) for file, header in base.shards.items()}
    shards[list(shards)[-1]] += (*new,)
    return shards


def _merged_info(name: str, module: _Module, skeleton: Skeleton) -> TensorInfo:
    parameter = next(p for p, of in module.names.items() if of == name)
    shape = skeleton.shapes[f"{module.target.path}.{parameter}"]
    of = skeleton.base.infos[module.sources[parameter]]
    return evolve(of, name=name, shape=shape, dtype=dtype_name(skeleton.dtype))


def _checked(name: str, pairs: Pairs) -> Iterator[torch.Tensor]:
    """The latter of each pair, as long as all is finite and some pair differs."""
    same = True
    for before, after in pairs:
        _refuse_non_finite(name, after)
        same = same and torch.equal(before, after)
        yield after
    if same:
        raise UnchangedTargetsError(f"the adapter leaves {shown(name)} as it is in the base")


def _refuse_non_finite(name: str, merged: torch.Tensor) -> None:
    extremes = torch.stack(torch.aminmax(merged))  # NaN if there is any
    if not torch.isfinite(extremes).all():
        raise NonFiniteError(f"merging gives NaN or infinity in {shown(name)}")


def _head(tensor: torch.Tensor) -> torch.Tensor:
    """Its first elements, which tell most changed tensors from the base's."""
    return tensor.reshape(-1)[:4096]
