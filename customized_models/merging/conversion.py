"""Which of a checkpoint's tensors each parameter is loaded from, and what it is saved as.

transformers renames, stacks, splits and permutes the tensors of many architectures while it loads
them, and does the reverse when it saves. This has its own conversions do so with a few tensors at
a time, and with tensors that have no memory where only names and shapes are asked for.

This module is only imported when a merge is planned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import compress
from typing import Any, TypeAlias

import torch
from attrs import evolve, field, frozen
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError, listed, shown
from ..files.safetensors import FLOATS, Checkpoint, TensorInfo, dtype_name, torch_dtype
from .private_apis import private

_SMALL = (2, 3)

Place: TypeAlias = tuple[int, int]
"""Of a matrix in a stack: its index, which is an expert's, and there its first row."""


@frozen
class Unit:
    """Parameters, and the checkpoint's tensors that they and no others are loaded from.

    `tensors`: in the order in which they are loaded. `patterns`: what of the conversion each of
    them matches; None where there is one tensor that is loaded as it is. `quantized`: whether the
    conversion makes numbers of codes and scales. `flaw`: why it is not known what transformers
    makes of them, if so. `names`: where the tensors are some of a stack, their own by the names
    that transformers gives them, for it takes those for the first.
    """

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    patterns: tuple[str, ...] | None = field(default=None, repr=False)
    quantized: bool = False
    flaw: str = ""
    names: tuple[tuple[str, str], ...] = field(default=(), repr=False)


class Loading:
    """How the parameters of `model` come from `base` and go back, by transformers' own rules.

    `dtypes`: of each parameter, once it is loaded. `quantizer`: transformers' own, told to
    dequantize, if the base is quantized. `parameters`: those of the model, without its buffers.
    `units`: by parameter or saved buffer. `ignored`: quantized tensors that
    the model has no parameters for, which go by their own names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Checkpoint,
        dtypes: Mapping[str, torch.dtype],
        quantizer: Any = None,
    ) -> None:
        mapping = private("transformers.conversion_mapping", "get_model_conversion_mapping")
        converter = private("transformers.core_model_loading", "WeightConverter")
        self._model: Any = model
        self._base = base
        self._dtypes = dtypes
        self._known = model.state_dict()
        self.parameters = frozenset(n for n, _ in model.named_parameters(remove_duplicate=False))
        self._loading = _Transforms(mapping(model, hf_quantizer=quantizer), converter)
        self._saving = _Transforms(mapping(model), converter) if quantizer else self._loading
        self._reversed: set[tuple[str, ...]] = set()
        self.units: Mapping[str, Unit] = {
            parameter: unit for unit in self._find() for parameter in unit.parameters
        }
        self.ignored = tuple(self._ignored()) if quantizer else ()

    def read(self, unit: Unit) -> dict[str, torch.Tensor]:
        """Fresh values of its parameters, as transformers would load them.

        Raises:
            UnsupportedArchitectureError: saving them would not give back what was loaded; of each
                kind of conversion, this is seen to with the first unit.
        """
        values = self._converted(unit, map(self._base.read, unit.tensors))
        if unit.patterns and not unit.quantized and unit.patterns not in self._reversed:
            for name, tensor in self.saved(unit, values).items():
                if not torch.equal(tensor, self._base.read(name).to(tensor.dtype)):
                    raise UnsupportedArchitectureError(
                        f"transformers does not save {shown(name)} as it loads it"
                    )
            self._reversed.add(unit.patterns)
        return values

    def places(self, unit: Unit) -> dict[str, Place] | None:
        """Where each tensor is in the parameter, if that stacks matrices as they are, else None.

        It is found with small matrices, of whose elements no two are alike.
        """
        if unit.patterns is None or unit.quantized or len(unit.parameters) != 1:
            return None
        shape, *others = {self._base.infos[name].shape for name in unit.tensors}
        stack = self._known[unit.parameters[0]].shape
        if (
            others
            or len(shape) != 2
            or len(stack) != 3
            or shape[1] != stack[2]
            or stack[1] % shape[0]
        ):
            return None
        size = torch.Size((stack[0], stack[1] // shape[0], *_SMALL))
        given = torch.arange(size.numel(), dtype=torch.float64).view(-1, *_SMALL)
        if len(given) != len(unit.tensors):
            return None
        try:
            (value,) = self._converted(unit, given, torch.float64).values()
            found = value.reshape(size[0], size[1], *_SMALL)
        except Exception:  # the operations raise of all kinds at what they do not expect
            return None
        places = {}
        for name, matrix in zip(unit.tensors, given, strict=True):
            where = (found == matrix).all(dim=(2, 3)).nonzero().tolist()
            if len(where) != 1:
                return None
            places[name] = where[0][0], where[0][1] * shape[0]
        return places

    def section(self, unit: Unit, chosen: Mapping[str, str]) -> Unit:
        """Some of what a parameter stacks: tensors, by the names of as many of the first."""
        own = {*chosen.values()}
        kept = [name in own for name in unit.tensors]
        return evolve(
            unit,
            tensors=tuple(compress(unit.tensors, kept)),
            patterns=tuple(compress(unit.patterns or (), kept)),
            names=tuple(chosen.items()),
        )

    def saved(self, unit: Unit, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors when `unit` has these values; it may be parts of them."""
        if unit.patterns is None:
            (parameter,), (name,) = unit.parameters, unit.tensors
            return {name: values[parameter]}
        if unit in self.ignored:
            return dict(values)
        revert = private("transformers.core_model_loading", "revert_weight_conversion")
        self._model._weight_conversions = [t for t in self._saving.every if t.was_used()]
        tensors: dict[str, torch.Tensor] = revert(self._model, dict(values))
        names = dict(unit.names)
        return {names.get(name, name): tensor for name, tensor in tensors.items()}

    def saved_infos(self, unit: Unit) -> list[TensorInfo]:
        """What `saved` gives: each tensor's dtype and shape, and the place of one it replaces.

        Raises:
            UnsupportedArchitectureError: not the tensors that it was loaded from.
        """
        tensors = self.saved(unit, self._empty(unit))
        before = {name: self._base.infos[name] for name in unit.tensors}
        same = {name: info for name, info in before.items() if name in tensors}
        lost = before.keys() ^ tensors.keys()
        lost |= {name for name, info in same.items() if info.shape != tensors[name].shape}
        if lost and not unit.quantized:
            raise UnsupportedArchitectureError(
                f"transformers loads {shown(unit.parameters[0])} from tensors that it does not "
                f"save again: {listed(lost)}"
            )
        first = before[unit.tensors[0]]
        return [
            evolve(
                same.get(name, first),
                name=name,
                dtype=dtype_name(tensor.dtype),
                shape=tuple(tensor.shape),
            )
            for name, tensor in tensors.items()
        ]

    def _find(self) -> Iterable[Unit]:
        rename = private("transformers.core_model_loading", "rename_source_key")
        order = private("transformers.core_model_loading", "dot_natural_key")
        known, prefix = self._known, self._model.base_model_prefix
        found: dict[str, list[tuple[str, str | None]]] = {}
        for name in sorted(self._base.infos, key=order):
            parameter, pattern = rename(name, *self._loading.by_kind, prefix, known)
            rename(name, *self._saving.by_kind, prefix, known)  # which notes what it used
            if parameter not in known and name in known:
                parameter, pattern = rename(name, [], [], prefix, known)
            if parameter in known:
                found.setdefault(parameter, []).append((name, pattern))
        return [self._unit(parameter, sources) for parameter, sources in found.items()]

    def _ignored(self) -> Iterable[Unit]:
        loaded = {name for unit in self.units.values() for name in unit.tensors}
        for name, info in self._base.infos.items():
            scales = f"{name}_scale_inv"
            if name not in loaded and info.dtype.startswith("F8") and scales in self._base.infos:
                yield Unit((name,), (name, scales), ("weight", "weight_scale_inv"), True)

    def _unit(self, parameter: str, sources: list[tuple[str, str | None]]) -> Unit:
        tensors = tuple(name for name, _ in sources)
        patterns = tuple(pattern for _, pattern in sources if pattern is not None)
        quantized = any(self._base.infos[name].dtype not in FLOATS for name in tensors)
        if len(tensors) == 1 and not (patterns and self._changes_values(patterns[0], quantized)):
            return Unit((parameter,), tensors)
        if len(patterns) != len(tensors):  # which of them is loaded depends on their order
            return Unit((parameter,), tensors, flaw="several tensors go by its name")
        unit = Unit((parameter,), tensors, patterns, quantized)
        try:
            values = self._empty(unit)
        except Exception as error:  # the operations raise of all kinds at what they do not expect
            return evolve(unit, flaw=f"its conversion fails: {shown(error)}")
        unit = evolve(unit, parameters=tuple(values))
        if odd := {n for n, v in values.items() if v.shape != self._known[n].shape}:
            return evolve(unit, flaw=f"the conversion gives {listed(odd)} another shape")
        return unit

    def _changes_values(self, pattern: str, quantized: bool) -> bool:
        """Whether the conversion does more than to dequantize what may not be quantized."""
        return quantized or not all(map(_dequantizes, self._loading.by_pattern[pattern].operations))

    def _empty(self, unit: Unit) -> dict[str, torch.Tensor]:
        """Its parameters, on the meta device."""
        infos = (self._base.infos[name] for name in unit.tensors)
        dtypes = ((info, torch_dtype(info.dtype)) for info in infos)
        return self._converted(
            unit, (torch.empty(info.shape, dtype=dtype, device="meta") for info, dtype in dtypes)
        )

    def _converted(
        self, unit: Unit, tensors: Iterable[torch.Tensor], dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """`dtype`: another than the parameter's."""
        first = unit.parameters[0]
        dtype = dtype or self._dtypes.get(first)  # it has none if it is ignored
        if unit.patterns is None:
            (tensor,) = tensors
            return {first: tensor.to(dtype)}
        converter = copy.deepcopy(self._loading.by_pattern[unit.patterns[0]])
        cast = not any(map(_dequantizes, converter.operations))  # those cast themselves
        for name, pattern, tensor in zip(unit.tensors, unit.patterns, tensors, strict=True):
            given = tensor.to(dtype) if cast else tensor
            converter.add_tensor(first, name, pattern, given)
        if first not in self._known:  # an operation asks the model for a parameter's dtype
            model = torch.nn.Linear(1, 1, device="meta", dtype=self._model.dtype)
            (value,) = converter.convert("weight", model=model, config=None).values()
            return {first: value}
        values = converter.convert(first, model=self._model, config=self._model.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in values.items()}


class _Transforms:
    """`every` one of a mapping; `by_kind`: renamings, converters; the converters `by_pattern`."""

    def __init__(self, every: list[Any], converter: Any) -> None:
        converters = [transform for transform in every if isinstance(transform, converter)]
        renamings = [transform for transform in every if not isinstance(transform, converter)]
        self.every = every
        self.by_kind = renamings, converters
        self.by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}


def _dequantizes(operation: Any) -> bool:
    return getattr(operation, "hf_quantizer", None) is not None
