"""Every opcode against numpy, Python integers or torch."""

import numpy as np
import pytest
import torch

from tests.ptx.parser import PtxError
from tests.ptx.snippets import evaluate

RNG = np.random.default_rng(0)
EDGES = np.float32([0.0, -0.0, 1.0, -1.5, 3e-39, -1e-45, 3.4e38, np.inf, -np.inf, np.nan, 0.1, 1e-30, 7.0, 2.5])
X, Y = (grid.ravel().copy() for grid in np.meshgrid(EDGES, EDGES))


def edge_integers(dtype, count=2):
    """`count` arrays that together hold every combination of some integers."""
    info = np.iinfo(dtype)
    values = np.array([0, 1, 2, 3, 7, 255, info.max, info.max - 1, info.min, info.min + 1, info.max // 3], dtype)
    values = np.concatenate([values, RNG.integers(info.min, info.max, 20, dtype, endpoint=True)])
    return [grid.ravel().copy() for grid in np.meshgrid(*[values] * count)]


def wrap(numbers, dtype):
    """Python integers modulo the type's range."""
    bits = np.dtype(dtype).itemsize * 8
    return np.array([number % 2**bits for number in numbers], f"u{bits // 8}").view(dtype)


def pairs_of(*arrays):
    return list(zip(*(array.tolist() for array in arrays), strict=True))


# --- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_integer_arithmetic_wraps(bits):
    kind, dtype = f"s{bits}", np.dtype(f"i{bits // 8}")
    a, b = edge_integers(dtype)
    for text, function in {
        f"add.{kind} %o, %a, %b;": lambda x, y: x + y,
        f"sub.{kind} %o, %a, %b;": lambda x, y: x - y,
        f"mul.lo.{kind} %o, %a, %b;": lambda x, y: x * y,
        f"mad.lo.{kind} %o, %a, %b, %b;": lambda x, y: x * y + y,
    }.items():
        expected = wrap((function(x, y) for x, y in pairs_of(a, b)), dtype)
        np.testing.assert_array_equal(evaluate(text, dtype, a, b), expected, err_msg=text)


@pytest.mark.parametrize("kind", ["s", "u"])
def test_products_of_32_bits_have_64(kind):
    narrow, wide = ("i4", "i8") if kind == "s" else ("u4", "u8")
    a, b = edge_integers(np.dtype(narrow))
    c = RNG.integers(0, 2**62, len(a)).astype(wide)
    product = [x * y for x, y in pairs_of(a, b)]
    np.testing.assert_array_equal(evaluate(f"mul.wide.{kind}32 %o, %a, %b;", wide, a, b), wrap(product, wide))
    total = wrap((x + y for x, y in zip(product, c.tolist(), strict=True)), wide)
    np.testing.assert_array_equal(evaluate(f"mad.wide.{kind}32 %o, %a, %b, %c;", wide, a, b, c), total)
    if kind == "u":
        high = wrap((x >> 32 for x in product), narrow)
        np.testing.assert_array_equal(evaluate("mul.hi.u32 %o, %a, %b;", narrow, a, b), high)
    else:
        np.testing.assert_array_equal(evaluate("neg.s32 %o, %a;", narrow, a), wrap((-x for x in a.tolist()), narrow))
        np.testing.assert_array_equal(evaluate("min.s32 %o, %a, %b;", narrow, a, b), np.minimum(a, b))
        quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in pairs_of(a, b) if y]
        np.testing.assert_array_equal(
            evaluate("div.s32 %o, %a, %b;", narrow, a[b != 0], b[b != 0]), wrap(quotients, narrow)
        )


@pytest.mark.parametrize("bits", [32, 64])
def test_shifts_clamp_their_count_to_the_width(bits):
    unsigned, signed = f"u{bits // 8}", f"i{bits // 8}"
    counts = np.array([0, 1, bits - 1, bits, bits + 1, 255, 2**31, 2**32 - 1], np.uint32)
    value, count = (grid.ravel().copy() for grid in np.meshgrid(edge_integers(np.dtype(unsigned), 1)[0], counts))
    left = wrap((x << min(n, bits) for x, n in pairs_of(value, count)), unsigned)
    np.testing.assert_array_equal(evaluate(f"shl.b{bits} %o, %a, %b;", unsigned, value, count), left)
    right = wrap((x >> min(n, bits) for x, n in pairs_of(value, count)), unsigned)
    np.testing.assert_array_equal(evaluate(f"shr.u{bits} %o, %a, %b;", unsigned, value, count), right)
    arithmetic = wrap((x >> min(n, bits) for x, n in pairs_of(value.view(signed), count)), signed)
    np.testing.assert_array_equal(evaluate(f"shr.s{bits} %o, %a, %b;", signed, value, count), arithmetic)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    a, b = edge_integers(np.dtype(f"u{bits // 8}"))
    for name, function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
        np.testing.assert_array_equal(evaluate(f"{name}.b{bits} %o, %a, %b;", a.dtype, a, b), function(a, b))
    np.testing.assert_array_equal(evaluate(f"not.b{bits} %o, %a;", a.dtype, a), ~a)


def test_not_of_a_predicate():
    body = "setp.ne.b32 %p0, %a, 0; not.pred %p1, %p0; selp.b32 %o, 1, 0, %p1;"
    np.testing.assert_array_equal(evaluate(body, np.uint32, np.uint32([0, 1])), [1, 0])


@pytest.mark.parametrize("name", ["and", "or", "xor"])
def test_logic_of_predicates(name):
    a, b = np.uint32([0, 0, 1, 1]), np.uint32([0, 1, 0, 1])
    body = f"setp.ne.b32 %p0, %a, 0; setp.ne.b32 %p1, %b, 0; {name}.pred %p2, %p0, %p1; selp.b32 %o, 1, 0, %p2;"
    expected = {"and": a & b, "or": a | b, "xor": a ^ b}[name]
    np.testing.assert_array_equal(evaluate(body, np.uint32, a, b), expected)


@pytest.mark.parametrize(("number", "truth"), [(0, 0), (1, 1), (-1, 1), (2, 1)])
def test_a_number_is_true_unless_it_is_0(number, truth):
    body = f"mov.pred %p0, {number}; setp.ne.b32 %p1, %a, 0; and.pred %p2, %p1, {number}; selp.b32 %o, 1, 0, %p"
    a = np.uint32([0, 1])
    np.testing.assert_array_equal(evaluate(f"{body}0;", np.uint32, a), [truth, truth])
    np.testing.assert_array_equal(evaluate(f"{body}2;", np.uint32, a), [0, truth])


@pytest.mark.parametrize(("start", "length"), [(0, 32), (0, 1), (31, 1), (5, 2), (8, 24)])
def test_bit_fields(start, length):
    (a,) = edge_integers(np.dtype(np.uint32), 1)
    fields = [x >> start & 2**length - 1 for x in a.tolist()]
    found = evaluate(f"bfe.u32 %o, %a, {start}, {length};", np.uint32, a)
    np.testing.assert_array_equal(found, fields)
    found = evaluate(f"bfe.s32 %o, %a, {start}, {length};", np.int32, a)
    np.testing.assert_array_equal(found, [x - 2**length * (x >> length - 1) for x in fields])


@pytest.mark.parametrize("field", ["5, 0", "5, 28", "32, 1", "4294967295, 2"])
def test_bit_fields_that_leave_the_register_are_refused(field):
    with pytest.raises(PtxError, match="bit field"):
        evaluate(f"bfe.u32 %o, %a, {field};", np.uint32, np.uint32([1]))


# --- floating point ---------------------------------------------------------------------------------------------------


def test_float_arithmetic_is_numpys():
    with np.errstate(all="ignore"):
        for text, expected in {
            "add.rn.f32 %o, %a, %b;": X + Y,
            "sub.rn.f32 %o, %a, %b;": X - Y,
            "mul.rn.f32 %o, %a, %b;": X * Y,
            "div.rn.f32 %o, %a, %b;": X / Y,
            "max.f32 %o, %a, %b;": np.fmax(X, Y),
            "sqrt.rn.f32 %o, %a;": np.sqrt(X),
            "div.full.f32 %o, %a, %b;": X / Y,
            "ex2.approx.f32 %o, %a;": np.exp2(X.astype(np.float64)).astype(np.float32),
        }.items():
            np.testing.assert_array_equal(evaluate(text, np.float32, X, Y), expected, err_msg=text)


def test_signs_of_floats():
    np.testing.assert_array_equal(evaluate("neg.f32 %o, %a;", np.uint32, X), (-X).view(np.uint32))
    np.testing.assert_array_equal(evaluate("abs.f32 %o, %a;", np.uint32, X), np.abs(X).view(np.uint32))
    zeros, others = np.float32([0, -0.0, -0.0, 0]), np.float32([-0.0, 0, -0.0, 0])
    signs = np.signbit(evaluate("max.f32 %o, %a, %b;", np.float32, zeros, others))
    np.testing.assert_array_equal(signs, [False, False, True, False])


# --- comparison, selection, conversion --------------------------------------------------------------------------------


def truth(comparison, *inputs):
    return evaluate(f"setp.{comparison} %p0, %a, %b; selp.b32 %o, 1, 0, %p0;", np.uint32, *inputs).astype(bool)


ORDERS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}


def test_comparisons_of_floats_are_false_of_nan_but_for_the_unordered_one():
    for name, function in {**ORDERS, "eq": np.equal, "neu": np.not_equal}.items():
        np.testing.assert_array_equal(truth(f"{name}.f32", X, Y), function(X, Y), err_msg=name)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_comparisons_of_integers_are_signed_or_unsigned(kind):
    bits = kind[1:]
    a, b = edge_integers(np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(bits) // 8}"))
    for name, function in ORDERS.items():
        np.testing.assert_array_equal(truth(f"{name}.{kind}", a, b), function(a, b), err_msg=name)
    np.testing.assert_array_equal(truth(f"eq.b{bits}", a, b), a == b)
    np.testing.assert_array_equal(truth(f"ne.b{bits}", a, b), a != b)


def test_selections():
    flags = np.uint32([1, 0, 0, 1])
    for kind, dtype in {"b16": "u2", "b32": "u4", "b64": "u8", "f32": "f4"}.items():
        a, b = np.arange(4).astype(dtype), np.arange(10, 14).astype(dtype)
        found = evaluate(f"setp.eq.b32 %p0, %c, 1; selp.{kind} %o, %a, %b, %p0;", dtype, a, b, flags)
        np.testing.assert_array_equal(found, [0, 11, 12, 3])


def test_moves_of_scalars_and_of_halves():
    for kind, half, dtype, bits in (("b32", "%h", np.uint32, 16), ("b64", "%r", np.uint64, 32)):
        (a,) = edge_integers(np.dtype(dtype), 1)
        body = f"mov.{kind} {{{half}10, {half}11}}, %a; mov.{kind} %o, {{{half}11, {half}10}};"
        np.testing.assert_array_equal(evaluate(body, dtype, a), a >> bits | a << bits)
        # `_` leaves a half out
        body = f"mov.{kind} {{_, {half}10}}, %a; mov.{kind} %o, {{{half}10, {half}10}};"
        np.testing.assert_array_equal(evaluate(body, dtype, a), a >> bits | a >> bits << bits)
    for kind in ("b16", "u16", "b32", "u32", "b64", "u64"):
        (a,) = edge_integers(np.dtype(f"u{int(kind[1:]) // 8}"), 1)
        np.testing.assert_array_equal(evaluate(f"mov.{kind} %o, %a;", a.dtype, a), a)


@pytest.mark.parametrize(("name", "torch_dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversion_to_16_bits_rounds_to_nearest_even(name, torch_dtype):
    low, high = 2.0**-126 if name == "bf16" else 2.0**-14, 65504.0 if name == "f16" else 3.3895e38
    ties = np.float32([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-11, 1 + 3 * 2**-11, 65519, 65520])
    subnormal = low / np.float64([2, 128, 256, 1024, 2048, 3000])
    edges = np.concatenate([subnormal, [high, 3.4e38, np.inf, -np.inf, 0, -0.0]]).astype(np.float32)
    x = np.concatenate([ties, edges, -ties, RNG.standard_normal(500).astype(np.float32)])
    rounded = torch.from_numpy(x).to(torch_dtype)
    expected = rounded.view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(evaluate(f"cvt.rn.{name}.f32 %o, %a;", np.uint16, x), expected)
    assert evaluate(f"cvt.rn.{name}.f32 %o, %a;", np.uint16, np.float32([np.nan]))[0] == 0x7FFF
    np.testing.assert_array_equal(evaluate(f"cvt.f32.{name} %o, %a;", np.float32, expected), rounded.float().numpy())
    # packed: the first operand goes to the upper half
    packed = evaluate(f"cvt.rn.{name}x2.f32 %o, %a, %b;", np.uint32, x, x[::-1].copy())
    np.testing.assert_array_equal(packed, expected.astype(np.uint32) << 16 | expected[::-1])


def test_float_to_integer_goes_towards_zero_and_saturates():
    x = np.float32([0.5, 1.5, -0.5, -1.5, 2.7, -2.7, 3e9, -3e9, np.inf, -np.inf, 1e20, np.nan])
    high, low = 2**31 - 1, -(2**31)
    expected = [0, 1, 0, -1, 2, -2, high, low, high, low, high, 0]
    np.testing.assert_array_equal(evaluate("cvt.rzi.s32.f32 %o, %a;", np.int32, x), expected)


def test_integer_to_float_rounds_to_nearest_even():
    a = np.int32([2**24 + 1, -(2**24) - 3, 7, -(2**31)])
    # 2^24 + 1 lies between 2^24 and 2^24 + 2, and 2^24 + 3 between 2^24 + 2 and 2^24 + 4
    np.testing.assert_array_equal(evaluate("cvt.rn.f32.s32 %o, %a;", np.float32, a), [2**24, -(2**24) - 4, 7, -(2**31)])
    b = np.uint32([2**24 + 1, 2**32 - 1, 2**31 + 128])
    np.testing.assert_array_equal(evaluate("cvt.rn.f32.u32 %o, %a;", np.float32, b), [2**24, 2**32, 2**31])


def test_integer_to_integer_extends_by_the_source_type():
    (a,) = edge_integers(np.dtype(np.int32), 1)
    np.testing.assert_array_equal(evaluate("cvt.s64.s32 %o, %a;", np.int64, a), a)
    np.testing.assert_array_equal(evaluate("cvt.u64.u32 %o, %a;", np.int64, a), a.view(np.uint32))
    b = a * np.int64(2**33 + 5)
    np.testing.assert_array_equal(evaluate("cvt.u32.u64 %o, %a;", np.uint32, b), b.astype(np.uint32))
    c = np.uint32([0, 2**16 - 1, 2**16 + 3, 2**32 - 1])
    np.testing.assert_array_equal(evaluate("cvt.u16.u32 %o, %a;", np.uint16, c), c.astype(np.uint16))
