"""Which of a checkpoint's tensors each parameter is loaded from, and what it is saved as.

transformers renames, stacks, splits and permutes the tensors of many architectures when it loads
them, and reverses that when it saves. Here its own conversions do this for a few tensors at a time,
and for tensors without memory where only names and shapes are asked for.

Source: `transformers/core_model_loading.py`, `convert_and_load_state_dict_in_model` for loading and
`revert_weight_conversion` for saving; `transformers/conversion_mapping.py` for the rules.

This module is only imported when a merge is prepared.
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

_SMALL = (2, 3)  # different, so that a transposed matrix is not taken for itself

StackPosition: TypeAlias = tuple[int, int]
"""Where a matrix is in a stack of matrices: its index, an expert's, and its first row there."""


@frozen
class Conversion:
    """Parameters of the model, and the checkpoint's tensors that they and no others come from.

    Attributes:
        parameters: Names in the model.
        tensors: Names in the checkpoint, in the order in which they are loaded.
        patterns: The part of transformers' rule that each tensor matches; None if it is a single
            tensor that is loaded as it is.
        quantized: Whether the conversion turns codes and scales into numbers.
        unsupported_reason: Why it is not known what transformers makes of the tensors; else empty.
        names: Pairs of names, if this is a subset of a stack: transformers takes its tensors for
            the first of the stack, so the first name is one of those, the second the tensor's own.
    """

    parameters: tuple[str, ...]
    tensors: tuple[str, ...]
    patterns: tuple[str, ...] | None = field(default=None, repr=False)
    quantized: bool = False
    unsupported_reason: str = ""
    names: tuple[tuple[str, str], ...] = field(default=(), repr=False)


class Conversions:
    """How the parameters of a model come from a checkpoint and go back, by transformers' rules.

    Attributes:
        by_parameter: The conversion of each parameter and saved buffer that the checkpoint has.
        parameters: Names of the model's parameters, without its buffers.
        ignored: Conversions of quantized tensors that the model has no parameter for; they go by
            their own names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: Checkpoint,
        dtypes: Mapping[str, torch.dtype],
        quantizer: Any = None,
    ) -> None:
        """Match every tensor of `base` with the parameters of `model`.

        Args:
            model: On the meta device.
            base: The checkpoint.
            dtypes: What each parameter has once it is loaded.
            quantizer: transformers' own, told to dequantize; None if the base is not quantized.
        """
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
        self._verified_stacks: set[tuple[str, ...]] = set()
        self.by_parameter: Mapping[str, Conversion] = {
            parameter: found for found in self._find() for parameter in found.parameters
        }
        self.ignored = tuple(self._find_ignored()) if quantizer else ()

    def load(self, conversion: Conversion) -> dict[str, torch.Tensor]:
        """Fresh values of the conversion's parameters, as transformers would load them.

        Raises:
            UnsupportedArchitectureError: Saving them would not give back what was loaded. This is
                checked for the first conversion of each kind.
        """
        values = self._convert(conversion, map(self._base.read, conversion.tensors))
        patterns = conversion.patterns
        if patterns and not conversion.quantized and patterns not in self._reversed:
            for name, tensor in self.save(conversion, values).items():
                if not torch.equal(tensor, self._base.read(name).to(tensor.dtype)):
                    raise UnsupportedArchitectureError(
                        f"transformers does not save {shown(name)} as it loads it"
                    )
            self._reversed.add(patterns)
        return values

    def save(
        self, conversion: Conversion, values: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors if the parameters have these values.

        The result may share memory with `values`.
        """
        if conversion.patterns is None:
            (parameter,), (name,) = conversion.parameters, conversion.tensors
            return {name: values[parameter]}
        if conversion in self.ignored:
            return dict(values)
        revert = private("transformers.core_model_loading", "revert_weight_conversion")
        self._model._weight_conversions = [t for t in self._saving.every if t.was_used()]
        tensors: dict[str, torch.Tensor] = revert(self._model, dict(values))
        names = dict(conversion.names)
        return {names.get(name, name): tensor for name, tensor in tensors.items()}

    def saved_infos(self, conversion: Conversion) -> list[TensorInfo]:
        """Dtype and shape of each tensor that `save` gives; the place of one that it replaces.

        Raises:
            UnsupportedArchitectureError: These are not the tensors that it was loaded from.
        """
        tensors = self.save(conversion, self._empty(conversion))
        before = {name: self._base.infos[name] for name in conversion.tensors}
        same = {name: info for name, info in before.items() if name in tensors}
        lost = before.keys() ^ tensors.keys()
        lost |= {name for name, info in same.items() if info.shape != tensors[name].shape}
        if lost and not conversion.quantized:
            raise UnsupportedArchitectureError(
                f"transformers loads {shown(conversion.parameters[0])} from tensors that it does "
                f"not save again: {listed(lost)}"
            )
        first = before[conversion.tensors[0]]
        return [
            evolve(
                same.get(name, first),
                name=name,
                dtype=dtype_name(tensor.dtype),
                shape=tuple(tensor.shape),
            )
            for name, tensor in tensors.items()
        ]

    # Stacks of matrices, such as the experts of a layer

    def stack_positions(self, conversion: Conversion) -> dict[str, StackPosition] | None:
        """Where each tensor is in the parameter, if the conversion only stacks matrices.

        This is found with small matrices, no two of whose elements are alike.

        Returns:
            The positions by tensor name; None if the conversion does anything else.
        """
        stack = self._stack_shape(conversion)
        if stack is None:
            return None
        rows = self._base.infos[conversion.tensors[0]].shape[0]
        size = torch.Size((stack[0], stack[1] // rows, *_SMALL))
        given = torch.arange(size.numel(), dtype=torch.float64).view(-1, *_SMALL)
        if len(given) != len(conversion.tensors):
            return None
        try:
            (value,) = self._convert(conversion, given, torch.float64).values()
            found = value.reshape(size[0], size[1], *_SMALL)
        except Exception:  # the operations raise all kinds of errors at input they do not expect
            return None
        positions = {}
        for name, matrix in zip(conversion.tensors, given, strict=True):
            where = (found == matrix).all(dim=(2, 3)).nonzero().tolist()
            if len(where) != 1:
                return None
            positions[name] = where[0][0], where[0][1] * rows
        return positions

    def _stack_shape(self, conversion: Conversion) -> tuple[int, ...] | None:
        """Shape of the parameter, if matrices of one shape may fill it row by row."""
        if conversion.patterns is None or conversion.quantized or len(conversion.parameters) != 1:
            return None
        shape, *others = {self._base.infos[name].shape for name in conversion.tensors}
        stack = tuple(self._known[conversion.parameters[0]].shape)
        matrices = not others and len(shape) == 2 and len(stack) == 3
        return stack if matrices and shape[1] == stack[2] and stack[1] % shape[0] == 0 else None

    def subset(self, conversion: Conversion, chosen: Mapping[str, str]) -> Conversion:
        """The conversion of some tensors of a stack.

        Args:
            conversion: One that `stack_positions` knows the positions of.
            chosen: The wanted tensors, by the names of as many at the start of the stack.
        """
        own = {*chosen.values()}
        kept = [name in own for name in conversion.tensors]
        return evolve(
            conversion,
            tensors=tuple(compress(conversion.tensors, kept)),
            patterns=tuple(compress(conversion.patterns or (), kept)),
            names=tuple(chosen.items()),
        )

    def verify_positions(
        self, conversion: Conversion, positions: Mapping[str, StackPosition]
    ) -> None:
        """Check by values that a stack's tensors are where small matrices were found.

        This is done for the first conversion of each kind.

        Args:
            conversion: A stack, or a subset of one.
            positions: Of its tensors, counted from its first expert.

        Raises:
            UnsupportedArchitectureError: One is somewhere else.
        """
        assert conversion.patterns is not None
        kind = tuple(dict.fromkeys(conversion.patterns))
        if kind in self._verified_stacks:
            return
        (value,) = self.load(conversion).values()
        for name, (expert, row) in positions.items():
            tensor = self._base.read(name).to(value.dtype)
            if not torch.equal(value[expert][row : row + len(tensor)], tensor):
                raise UnsupportedArchitectureError(
                    f"transformers does not load {shown(name)} as it loads small tensors"
                )
        self._verified_stacks.add(kind)

    # Which tensors belong together

    def _find(self) -> Iterable[Conversion]:
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
        return [self._conversion(parameter, sources) for parameter, sources in found.items()]

    def _find_ignored(self) -> Iterable[Conversion]:
        loaded = {name for found in self.by_parameter.values() for name in found.tensors}
        for name, info in self._base.infos.items():
            scales = f"{name}_scale_inv"
            if name not in loaded and info.dtype.startswith("F8") and scales in self._base.infos:
                yield Conversion((name,), (name, scales), ("weight", "weight_scale_inv"), True)

    def _conversion(self, parameter: str, sources: list[tuple[str, str | None]]) -> Conversion:
        tensors = tuple(name for name, _ in sources)
        patterns = tuple(pattern for _, pattern in sources if pattern is not None)
        quantized = any(self._base.infos[name].dtype not in FLOATS for name in tensors)
        if len(tensors) == 1 and not (patterns and self._changes_values(patterns[0], quantized)):
            return Conversion((parameter,), tensors)
        if len(patterns) != len(tensors):  # which of them is loaded depends on their order
            reason = "several tensors go by its name"
            return Conversion((parameter,), tensors, unsupported_reason=reason)
        found = Conversion((parameter,), tensors, patterns, quantized)
        try:
            values = self._empty(found)
        except Exception as error:  # the operations raise all kinds of errors, as above
            return evolve(found, unsupported_reason=f"its conversion fails: {shown(error)}")
        found = evolve(found, parameters=tuple(values))
        if odd := {n for n, v in values.items() if v.shape != self._known[n].shape}:
            reason = f"the conversion gives {listed(odd)} another shape"
            return evolve(found, unsupported_reason=reason)
        return found

    def _changes_values(self, pattern: str, quantized: bool) -> bool:
        """Whether the rule does more than dequantize what may not be quantized."""
        return quantized or not all(map(_dequantizes, self._loading.by_pattern[pattern].operations))

    def _empty(self, conversion: Conversion) -> dict[str, torch.Tensor]:
        """The parameters on the meta device."""
        infos = (self._base.infos[name] for name in conversion.tensors)
        dtypes = ((info, torch_dtype(info.dtype)) for info in infos)
        return self._convert(
            conversion,
            (torch.empty(info.shape, dtype=dtype, device="meta") for info, dtype in dtypes),
        )

    def _convert(
        self,
        conversion: Conversion,
        tensors: Iterable[torch.Tensor],
        dtype: torch.dtype | None = None,
    ) -> dict[str, torch.Tensor]:
        """The parameters, made of `tensors`; in their own dtype if `dtype` is None."""
        first = conversion.parameters[0]
        dtype = dtype or self._dtypes.get(first)  # an ignored one has none
        if conversion.patterns is None:
            (tensor,) = tensors
            return {first: tensor.to(dtype)}
        converter = copy.deepcopy(self._loading.by_pattern[conversion.patterns[0]])
        cast = not any(map(_dequantizes, converter.operations))  # those cast themselves
        for name, pattern, tensor in zip(
            conversion.tensors, conversion.patterns, tensors, strict=True
        ):
            converter.add_tensor(first, name, pattern, tensor.to(dtype) if cast else tensor)
        if first not in self._known:  # an operation asks the model for a parameter's dtype
            model = torch.nn.Linear(1, 1, device="meta", dtype=self._model.dtype)
            (value,) = converter.convert("weight", model=model, config=None).values()
            return {first: value}
        values = converter.convert(first, model=self._model, config=self._model.config)
        return {n: v[0] if isinstance(v, list) else v for n, v in values.items()}


class _Transforms:
    """transformers' rules: all of them, by kind (renamings, converters), converters by pattern."""

    def __init__(self, every: list[Any], converter: Any) -> None:
        converters = [transform for transform in every if isinstance(transform, converter)]
        renamings = [transform for transform in every if not isinstance(transform, converter)]
        self.every = every
        self.by_kind = renamings, converters
        self.by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}


def _dequantizes(operation: Any) -> bool:
    return getattr(operation, "hf_quantizer", None) is not None
