"""A number type for Numba that is many numbers: each operation is done on all of them at once.

`Lanes` is a row of numbers in a SIMD register. `+ - * / & | ^ << >> < > ==`, `abs`, `-` and
`numpy.sqrt` go lane by lane, each as the scalar operation would: nothing is fused or reordered. A
number goes to all lanes. `where` takes the place of `if`.
"""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Lanes(types.Type):
    """`count` numbers of a scalar type."""

    def __init__(self, dtype, count):
        self.dtype, self.count = dtype, count
        super().__init__(f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    """A vector; truth values are single bits, as comparisons give them."""

    def __init__(self, manager, type_):
        is_truth = type_.dtype == types.boolean
        element = ir.IntType(1) if is_truth else manager.lookup(type_.dtype).get_value_type()
        super().__init__(manager, type_, ir.VectorType(element, type_.count))


# Operators ----------------------------------------------------------------------------------------


def _spread(context, builder, value, given, wanted):
    """`value` in every lane, unless it has lanes already."""
    if isinstance(given, Lanes):
        return value
    vector = ir.VectorType(context.get_value_type(wanted.dtype), wanted.count)
    number = context.cast(builder, value, given, wanted.dtype)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), number, _I32(0))
    return builder.shuffle_vector(first, first, _order([0] * wanted.count))


def _order(lanes):
    return ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)


def _binary(function, emit, result=None):
    """Define `function` of two arguments, at least one of which has lanes."""

    @type_callable(function)
    def typing(context):
        def typer(a, b):
            of = a if isinstance(a, Lanes) else b
            return Lanes(result or of.dtype, of.count) if isinstance(of, Lanes) else None

        return typer

    def lower(context, builder, signature, arguments):
        of = next(type_ for type_ in signature.args if isinstance(type_, Lanes))
        pairs = zip(arguments, signature.args, strict=True)
        a, b = (_spread(context, builder, value, type_, of) for value, type_ in pairs)
        return emit(builder, a, b, of.dtype)

    for pair in (Lanes, Lanes), (Lanes, types.Number), (types.Number, Lanes):
        lower_builtin(function, *pair)(lower)


def _arithmetic(real, signed, unsigned=None):
    """The methods of an `IRBuilder` by the kind of number."""

    def emit(builder, a, b, dtype):
        if isinstance(dtype, types.Float):
            return getattr(builder, real)(a, b)
        has_sign = getattr(dtype, "signed", True)  # truth values have not
        return getattr(builder, signed if has_sign else unsigned or signed)(a, b)

    return emit


def _comparison(sign):
    def emit(builder, a, b, dtype):
        if isinstance(dtype, types.Float):
            return builder.fcmp_ordered(sign, a, b)
        compare = builder.icmp_signed if dtype.signed else builder.icmp_unsigned
        return compare(sign, a, b)

    return emit


def _unary(function, emit):
    """Define `function` of one argument that has lanes."""

    @type_callable(function)
    def typing(context):
        return lambda a: a if isinstance(a, Lanes) else None

    @lower_builtin(function, Lanes)
    def lower(context, builder, signature, arguments):
        return emit(builder, *arguments)


def _math(name):
    """One of LLVM's functions that are an instruction of the processor."""

    def emit(builder, value):
        kind = ir.FunctionType(value.type, [value.type])
        full = f"llvm.{name}.v{value.type.count}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, full), [value])

    return emit


_OPERATORS = {
    (operator.add, operator.iadd): ("fadd", "add"),
    (operator.sub, operator.isub): ("fsub", "sub"),
    (operator.mul, operator.imul): ("fmul", "mul"),
    (operator.truediv, operator.itruediv): ("fdiv", ""),
    (operator.and_, operator.iand): ("", "and_"),
    (operator.or_, operator.ior): ("", "or_"),
    (operator.lshift, operator.ilshift): ("", "shl"),
    (operator.rshift, operator.irshift): ("", "ashr", "lshr"),
}
for _functions, _names in _OPERATORS.items():
    for _function in _functions:
        _binary(_function, _arithmetic(*_names))
for _function, _sign in {operator.lt: "<", operator.gt: ">", operator.eq: "=="}.items():
    _binary(_function, _comparison(_sign), types.boolean)
_unary(abs, _math("fabs"))
_unary(np.sqrt, _math("sqrt"))
_unary(operator.neg, lambda builder, value: builder.fneg(value))


@intrinsic
def fma(typing, a, b, c):
    """`a * b + c`, rounded once; `a` is one number."""

    def emit(context, builder, signature, arguments):
        x, y, z = arguments
        x = _spread(context, builder, x, signature.args[0], c)
        kind = ir.FunctionType(z.type, [z.type] * 3)
        full = f"llvm.fma.v{c.count}f32"
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, full), [x, y, z])

    return c(a, b, c), emit


@intrinsic
def zeros(typing, value):
    """As many lanes of the same kind, all of them zero."""

    def emit(context, builder, signature, arguments):
        return ir.Constant(arguments[0].type, None)

    return value(value), emit


@intrinsic
def where(typing, mask, a, b):
    """`a` in the lanes where `mask` is true, `b` in the others."""
    of = next((t for t in (a, b) if isinstance(t, Lanes)), None) or Lanes(a, mask.count)

    def emit(context, builder, signature, arguments):
        pairs = zip(arguments[1:], signature.args[1:], strict=True)
        x, y = (_spread(context, builder, value, type_, of) for value, type_ in pairs)
        return builder.select(arguments[0], x, y)

    return of(mask, a, b), emit


# Conversions --------------------------------------------------------------------------------------


def _conversion(instruction, dtype):
    @intrinsic
    def convert(typing, value):
        def emit(context, builder, signature, arguments):
            (x,) = arguments
            vector = ir.VectorType(context.get_value_type(dtype), x.type.count)
            return getattr(builder, instruction)(x, vector)

        return Lanes(dtype, value.count)(value), emit

    return convert


bits = _conversion("bitcast", types.int32)  # of float32
real = _conversion("sitofp", types.float32)  # of int32
integer = _conversion("fptosi", types.int32)  # of float32, towards 0; it must fit
low_byte = _conversion("trunc", types.uint8)  # of int32
low_half = _conversion("trunc", types.uint16)  # of int32
from_bits = _conversion("bitcast", types.float32)  # of int32
from_half = _conversion("zext", types.int32)  # of uint16


# Memory -------------------------------------------------------------------------------------------


def _pointer(context, builder, type_, array, count):
    data = context.make_array(type_)(context, builder, array).data
    vector = ir.VectorType(context.get_value_type(type_.dtype), count)
    return builder.bitcast(data, vector.as_pointer())


def loader(count):
    """A function that gives the first `count` numbers of an array."""

    @intrinsic
    def load(typing, row):
        def emit(context, builder, signature, arguments):
            value = builder.load(_pointer(context, builder, row, arguments[0], count))
            value.align = row.dtype.bitwidth // 8  # rows lie anywhere
            return value

        return Lanes(row.dtype, count)(row), emit

    return load


@intrinsic
def store(typing, row, value):
    """Put the lanes at the beginning of an array."""

    def emit(context, builder, signature, arguments):
        at = _pointer(context, builder, row, arguments[0], value.count)
        builder.store(arguments[1], at).align = value.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.none(row, value), emit


# Across lanes -------------------------------------------------------------------------------------


@intrinsic
def largest(typing, value):
    """A number: the largest lane."""

    def emit(context, builder, signature, arguments):
        (x,), distance = arguments, value.count // 2
        while distance:
            swapped = _order([lane ^ distance for lane in range(value.count)])
            y = builder.shuffle_vector(x, x, swapped)
            x = builder.select(_comparison(">")(builder, x, y, value.dtype), x, y)
            distance //= 2
        return builder.extract_element(x, _I32(0))

    return value.dtype(value), emit


@intrinsic
def bit_mask(typing, mask):
    """An integer: bit i is lane i."""

    def emit(context, builder, signature, arguments):
        return builder.zext(builder.bitcast(arguments[0], ir.IntType(mask.count)), _I64)

    return types.int64(mask), emit


@intrinsic
def first(typing, mask):
    """The number of the first lane that is true; of none, the count of lanes."""

    def emit(context, builder, signature, arguments):
        as_integer = builder.bitcast(arguments[0], ir.IntType(mask.count))
        return builder.zext(builder.cttz(as_integer, ir.IntType(1)(0)), _I64)

    return types.int64(mask), emit


def transposer(count, stride):
    """A function that turns `count` rows of `count` float32 into columns, one after the other.

    `stride`: how many numbers lie from the beginning of a row to that of the next.
    """

    @intrinsic
    def transpose(typing, rows, columns):
        def emit(context, builder, signature, arguments):
            pairs = zip(signature.args, arguments, strict=True)
            source, target = (_pointer(context, builder, t, v, count) for t, v in pairs)
            numbers = builder.bitcast(source, ir.FloatType().as_pointer())
            lines = []
            for i in range(count):
                at = builder.gep(numbers, [_I64(i * stride)])
                line = builder.load(builder.bitcast(at, source.type))
                line.align = 4
                lines.append(line)
            _butterfly(builder, lines)
            for i, line in enumerate(lines):
                builder.store(line, builder.gep(target, [_I64(i)])).align = 4
            return context.get_dummy_value()

        return types.none(rows, columns), emit

    return transpose


def _butterfly(builder, lines):
    """Swap, at every distance, the lanes that lie in each other's line."""
    count, distance = len(lines), 1
    lanes = range(count)
    while distance < count:
        upper = _order([(i ^ distance) + count if i & distance else i for i in lanes])
        lower = _order([i + count if i & distance else i ^ distance for i in lanes])
        for row in (row for row in lanes if not row & distance):
            a, b = lines[row], lines[row | distance]
            lines[row] = builder.shuffle_vector(a, b, upper)
            lines[row | distance] = builder.shuffle_vector(a, b, lower)
        distance *= 2
