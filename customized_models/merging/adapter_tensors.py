"""What an adapter's file holds, by the names it has for today's layers, read when it is needed.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel

from ..adapters.intake import PREFIX, WEIGHTS, Adapter, layer_of
from ..errors import UnmergedTensorsError, shown
from ..files.safetensors import TensorInfo, read_tensor
from .private_apis import private


class StoredAdapter:
    """The tensors of an adapter's file as PEFT would load them into `model`.

    PEFT renames, and for experts stacks, what was saved for layers of an earlier transformers.
    `tensors`: by the names of today's layers, without memory. `origins`: the names in the file of
    what each of them is made of; of what is stacked, all that is of its layer.

    Raises:
        UnmergedTensorsError: PEFT cannot convert them.
    """

    def __init__(self, adapter: Adapter, model: PeftModel, name: str) -> None:
        self._adapter = adapter
        self._model = model
        self._name = name
        self._last: tuple[Any, dict[str, torch.Tensor]] = None, {}
        file = {n: torch.empty(i.shape, device="meta") for n, i in adapter.tensors.items()}
        names = {id(tensor): name for name, tensor in file.items()}
        self.tensors: Mapping[str, torch.Tensor] = self._converted(file)
        self._stacked = {name for name, tensor in self.tensors.items() if id(tensor) not in names}
        kept = {names[id(t)] for name, t in self.tensors.items() if name not in self._stacked}
        of_layer: dict[int, list[str]] = {}
        for name in sorted(file.keys() - kept):
            of_layer.setdefault(layer_of(name), []).append(name)
        self.origins: Mapping[str, tuple[str, ...]] = {
            name: tuple(of_layer.get(layer_of(name), ()))
            if name in self._stacked
            else (names[id(tensor)],)
            for name, tensor in self.tensors.items()
        }

    def reader(self, name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """Reads what PEFT would load into the parameter of that name and dtype."""
        infos = tuple(self._adapter.tensors[origin] for origin in self.origins[name])
        if name in self._stacked:
            return lambda: self._of_layer(infos)[name].to(dtype)
        return lambda: self._read(infos[0]).to(dtype)

    def by_layer(self, paths: Iterable[str], unused: Collection[str]) -> dict[str, tuple[str, ...]]:
        """By the path of a layer, the names in the file of what it is merged with."""
        found: dict[str, set[str]] = {path: set() for path in paths}
        for name, origin in self.origins.items():
            path = name.removeprefix(PREFIX)
            while path and path not in found:
                path = path.rpartition(".")[0]
            if path:
                found[path].update(origin)
        return {path: tuple(sorted(names - {*unused})) for path, names in found.items()}

    def _of_layer(self, infos: tuple[TensorInfo, ...]) -> dict[str, torch.Tensor]:
        """One layer as PEFT stacks it; the last is kept, for its other tensors come next."""
        if self._last[0] != infos:
            self._last = infos, self._converted({info.name: self._read(info) for info in infos})
        return self._last[1]

    def _read(self, info: TensorInfo) -> torch.Tensor:
        return read_tensor(self._adapter.directory / WEIGHTS, info)

    def _converted(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        convert = private(
            "peft.utils.transformers_weight_conversion",
            "convert_peft_adapter_state_dict_for_transformers",
        )
        config = self._model.peft_config[self._name]
        try:
            converted: dict[str, torch.Tensor] = convert(self._model, config, tensors, self._name)
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise UnmergedTensorsError(
                f"PEFT cannot convert the adapter's tensors to the layers of this version of "
                f"transformers: {shown(error, 500)}",
                tensors,
            ) from error
        return converted
