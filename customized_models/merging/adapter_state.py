"""What an adapter's file holds, by the names of today's layers, read when it is needed.

This module is only imported when a merge is prepared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel

from ..adapters.intake import WEIGHTS, Adapter
from ..adapters.tensor_names import PREFIX, layer_of
from ..errors import UnmergedTensorsError, shown
from ..files.safetensors import TensorInfo, read_tensor
from .private_apis import private


class AdapterStateDict:
    """The tensors of an adapter's file as PEFT would load them into a model.

    PEFT renames, and for experts stacks, what was saved for layers of an earlier transformers.

    Attributes:
        tensors: By the names of today's layers, on the meta device.
        origins: For each of them, the names in the file of what it is made of. If it is stacked,
            these are all of its layer that are stacked.
    """

    def __init__(
        self, adapter: Adapter, model: PeftModel, name: str, expected: Collection[str]
    ) -> None:
        """Convert the names and shapes in the adapter's header.

        Args:
            adapter: The adapter.
            model: The PEFT model that it belongs to.
            name: Of the adapter in that model.
            expected: What the model calls for, by the names of today's layers.

        Raises:
            UnmergedTensorsError: PEFT cannot convert them.
        """
        self._adapter = adapter
        self._model = model
        self._name = name
        self._last_layer: tuple[Any, dict[str, torch.Tensor]] = None, {}
        file = {n: torch.empty(i.shape, device="meta") for n, i in adapter.tensors.items()}
        names = {id(tensor): name for name, tensor in file.items()}
        converted = self._convert(file)
        # A pattern for an earlier name may fit today's as well, as that of Laguna's experts does.
        lost = {*expected} - converted.keys()
        self.tensors: Mapping[str, torch.Tensor] = {
            own if name not in expected and (own := names.get(id(tensor))) in lost else name: tensor
            for name, tensor in converted.items()
        }
        self._stacked = {name for name, tensor in self.tensors.items() if id(tensor) not in names}
        kept = {names[id(t)] for name, t in self.tensors.items() if name not in self._stacked}
        stacked_by_layer: dict[int, list[str]] = {}
        for name in sorted(file.keys() - kept):
            stacked_by_layer.setdefault(layer_of(name), []).append(name)
        self.origins: Mapping[str, tuple[str, ...]] = {
            name: tuple(stacked_by_layer.get(layer_of(name), ()))
            if name in self._stacked
            else (names[id(tensor)],)
            for name, tensor in self.tensors.items()
        }

    def reader(self, name: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """A function that reads what PEFT would load into the parameter of that name and dtype."""
        infos = tuple(self._adapter.tensors[origin] for origin in self.origins[name])
        if name in self._stacked:
            return lambda: self._read_layer(infos)[name].to(dtype)
        return lambda: self._read(infos[0]).to(dtype)

    def by_layer(self, paths: Iterable[str], unused: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The names in the file of what each layer is merged with.

        Args:
            paths: Of the layers' wrappers.
            unused: Names that no layer is merged with.

        Returns:
            Sorted names by path.
        """
        found: dict[str, set[str]] = {path: set() for path in paths}
        for name, origin in self.origins.items():
            path = name.removeprefix(PREFIX)
            while path and path not in found:
                path = path.rpartition(".")[0]
            if path:
                found[path].update(origin)
        return {path: tuple(sorted(names - {*unused})) for path, names in found.items()}

    def _read_layer(self, infos: tuple[TensorInfo, ...]) -> dict[str, torch.Tensor]:
        """One layer as PEFT stacks it; the last is kept, because its other tensors come next."""
        if self._last_layer[0] != infos:
            values = self._convert({info.name: self._read(info) for info in infos})
            self._last_layer = infos, values
        return self._last_layer[1]

    def _read(self, info: TensorInfo) -> torch.Tensor:
        return read_tensor(self._adapter.directory / WEIGHTS, info)

    def _convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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
