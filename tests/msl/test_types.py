"""Scalar types, conversions, packed vectors, type traits, limits, arrays."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from metal_marlin.msl.target import Target

Run = Callable[..., dict[str, torch.Tensor]]
Cases = Sequence[tuple[str, float]]


def evaluate(msl: Run, cases: Cases, *, out: str = "float", before: str = "", setup: str = "") -> None:
    """Each (expression, value): the expression, computed on the device from x[i] = i + 1, has the value."""
    lines = "\n".join(f"    out[{i}] = {expression};" for i, (expression, _) in enumerate(cases))
    source = f"""#include <metal_stdlib>
using namespace metal;
{before}
kernel void k(device const float* x [[buffer(0)]], device {out}* out [[buffer(1)]]) {{
{setup}
{lines}
}}"""
    dtype = {"float": torch.float32, "long": torch.int64}[out]
    x = torch.arange(1, 33, dtype=torch.float32)
    got = msl(
        source,
        "k",
        {"x": x, "out": torch.zeros(len(cases), dtype=dtype)},
        threads=1,
        threads_per_threadgroup=1,
    )["out"]
    wrong = [
        f"{expression} is {value.item()}, not {expected}"
        for (expression, expected), value in zip(cases, got, strict=True)
        if not (value.item() == expected or (math.isnan(expected) and math.isnan(value.item())))
    ]
    assert not wrong, "\n".join(wrong)


SIZES = {
    "char": 1,
    "uchar": 1,
    "short": 2,
    "ushort": 2,
    "int": 4,
    "uint": 4,
    "long": 8,
    "ulong": 8,
    "half": 2,
}
SIZES |= {
    "float": 4,
    "bfloat": 2,
    "bool": 1,
    "int8_t": 1,
    "uint8_t": 1,
    "int16_t": 2,
    "uint16_t": 2,
    "int32_t": 4,
}
SIZES |= {"uint32_t": 4, "int64_t": 8, "uint64_t": 8, "size_t": 8, "ptrdiff_t": 8}


def test_sizes_and_alignments(msl: Run) -> None:
    cases: list[tuple[str, float]] = []
    for name, size in SIZES.items():
        cases += [(f"sizeof({name})", size), (f"alignof({name})", size)]
        if name.endswith("_t"):
            continue
        for n in (2, 3, 4):
            padded = size * (2 if n == 2 else 4)
            cases += [(f"sizeof({name}{n})", padded), (f"alignof({name}{n})", padded)]
            if name != "bool":
                cases += [(f"sizeof(packed_{name}{n})", n * size), (f"alignof(packed_{name}{n})", size)]
    evaluate(msl, cases, out="long")


def test_layout_of_structs(msl: Run) -> None:
    before = """
    struct A { char a; float3 b; float c; };
    struct B { char a; packed_float3 b; char c; };
    struct C { half h; bool3 m; half3 v; bfloat z; };"""
    cases = [("sizeof(A)", 48), ("sizeof(B)", 20), ("sizeof(C)", 24), ("alignof(A)", 16), ("alignof(B)", 4)]
    cases += [
        ("__builtin_offsetof(C, m)", 4),
        ("__builtin_offsetof(C, v)", 8),
        ("__builtin_offsetof(B, c)", 16),
    ]
    evaluate(msl, cases, out="long", before=before)


def test_unsuffixed_literals_are_float(msl: Run) -> None:
    evaluate(msl, [("sizeof(2.0)", 4), ("sizeof(1e-5 * x[0])", 4), ("float(x[0] * 0.1 == x[0] * 0.1f)", 1)])


def test_scalar_conversions(msl: Run) -> None:
    setup = """
    float big = x[0] * 300.0f, third = x[0] / 3.0f;
    half h = half(third); bfloat b = bfloat(third); uchar narrow = (uchar)int(big); char c = char(x[1]) - 130;"""
    cases = [
        ("float(h)", float(np.float16(np.float32(1) / np.float32(3)))),
        ("float(b)", 0.333984375),
        ("float(half(big * 300.0f))", math.inf),
        ("float(bfloat(3.4028235e38f * x[0]))", math.inf),
        ("float(narrow)", 300 % 256),
        ("float(c)", -128 + 128 - 128),
        ("float(bool(third)) + float(bool(x[0] - 1.0f))", 1),
        ("float(bfloat(h))", 0.333984375),
        ("float(half(b))", 0.333984375),
        ("float(int(-x[1] * 0.75f))", -1),
        ("float(uint(x[2]) - 4u == 0xffffffffu)", 1),
        ("float(bfloat(int(x[4])) * bfloat(x[1]))", 10),
        ("1.5h + x[0]", 2.5),
        ("float(true) + x[0]", 2),
    ]
    evaluate(msl, cases, setup=setup)


def _bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, nearest even; NaN stays NaN (written independently: via torch)."""
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy()


ROUNDING = """#include <metal_stdlib>
using namespace metal;
kernel void k(device const float* x [[buffer(0)]], device bfloat* b [[buffer(1)]], device half* h [[buffer(2)]],
              device bfloat4* b4 [[buffer(3)]], device half4* h4 [[buffer(4)]],
              uint i [[thread_position_in_grid]]) {
    b[i] = bfloat(x[i]);
    h[i] = half(x[i]);
    if (i % 4 == 0) {
        float4 v = float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        b4[i / 4] = bfloat4(v);
        h4[i / 4] = half4(v);
    }
}"""


@pytest.mark.parametrize("level", ["host", "cpu:x86-64-v3", "cpu:x86-64-v4"])
def test_narrowing_rounds_to_nearest_even(msl: Run, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where clang calls library functions that our own library supplies (x86 without AVX512-BF16)."""
    if level != "host":
        if msl.backend == "cuda" or platform.machine() not in ("x86_64", "AMD64"):  # type: ignore[attr-defined]
            pytest.skip("x86 only")
        if level.removeprefix("cpu:") > Target.host_cpu().arch:
            pytest.skip(f"this CPU is below {level}")
        monkeypatch.setattr(Target, "host_cpu", staticmethod(lambda: Target.parse(level)))
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    edge = [
        0x00000000,
        0x80000000,
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        0x00800000,
    ]
    edge += [
        0x7F7F8000,
        0x7F7F7FFF,
        0x33000000,
        0x33000001,
        0x477FF000,
        0x477FEFFF,
        0x387FE000,
        0x7FC00001,
        0x7F800001,
    ]
    bits[: len(edge)] = edge
    x = bits.view(np.float32)
    n = len(x)
    args = {
        "x": torch.from_numpy(x),
        "b": torch.zeros(n, dtype=torch.bfloat16),
        "h": torch.zeros(n, dtype=torch.half),
    }
    args |= {"b4": torch.zeros(n, dtype=torch.bfloat16), "h4": torch.zeros(n, dtype=torch.half)}
    got = msl(ROUNDING, "k", args, threads=n, threads_per_threadgroup=64)
    nan = np.isnan(x)
    subnormal = np.abs(x) < np.finfo(np.float32).tiny  # MSL lets bfloat flush these, and AVX512-BF16 does
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    for name in ("b", "b4"):
        kept = ~nan & ~subnormal
        assert np.array_equal(got[name].view(torch.int16).numpy()[kept], _bf16(x)[kept])
        assert (got[name].float().abs().numpy()[subnormal] <= np.finfo(np.float32).tiny).all()
        assert got[name].isnan().numpy()[nan].all()
    for name in ("h", "h4"):
        assert np.array_equal(got[name].numpy().view(np.int16)[~nan], half.view(np.int16)[~nan])
        assert got[name].isnan().numpy()[nan].all()


CHAIN = """#include <metal_stdlib>
using namespace metal;
kernel void k(device const half* a [[buffer(0)]], device const half* b [[buffer(1)]], device half* y [[buffer(2)]],
              device const bfloat* c [[buffer(3)]], device const bfloat* d [[buffer(4)]], device bfloat* z [[buffer(5)]],
              uint i [[thread_position_in_grid]]) {
    half s = a[i] + b[i];
    s = s / b[i];
    y[i] = s + a[i];
    bfloat t = c[i] + d[i];
    t = t / d[i];
    z[i] = t + c[i];
}"""


def test_half_and_bfloat_chains_round_per_operation(msl: Run) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4096).half(), (torch.randn(4096).abs() + 0.1).half()
    c, d = torch.randn(4096).bfloat16(), (torch.randn(4096).abs() + 0.1).bfloat16()
    args = {"a": a, "b": b, "y": torch.zeros_like(a), "c": c, "d": d, "z": torch.zeros_like(c)}
    got = msl(CHAIN, "k", args, threads=4096, threads_per_threadgroup=128)
    assert torch.equal(got["y"], (a + b) / b + a)
    assert torch.equal(got["z"], (c + d) / d + c)


def test_as_type(msl: Run) -> None:
    setup = "float2 v = float2(x[0], x[1]); half2 h = half2(v); uchar4 c = uchar4(1, 2, 3, x[3]);"
    cases = [
        ("as_type<uint>(x[0])", 0x3F800000),
        ("as_type<uint>(h)", 0x40003C00),
        ("as_type<half2>(as_type<uint>(h) + 0x10001u).y == half(2.001953125f)", 1),
        ("as_type<uint>(c)", 0x04030201),
        ("as_type<ushort>(bfloat(x[2]))", 0x4040),
        ("as_type<uint>(bfloat2(v))", 0x40003F80),
        ("as_type<ulong>(v)", 0x400000003F800000),
        ("as_type<int2>(v).y", 0x40000000),
        ("as_type<uchar4>(0x01020304u).x", 4),
        ("as_type<ushort>(half(x[0]))", 0x3C00),
        ("as_type<packed_uchar4>(c).w + as_type<uint>(packed_half2(h)) - as_type<uint>(h)", 4),
        ("as_type<uint3>(float3(v, x[0])).z", 0x3F800000),
    ]
    evaluate(msl, cases, out="long", setup=setup)


PACKED = """#include <metal_stdlib>
using namespace metal;
struct S { packed_float3 p; packed_half4 h; packed_uchar3 c; };
float3 grow(constant packed_float3& p, threadgroup packed_float3& t) { return float3(t) + p * 2.0f; }
kernel void k(device S* s [[buffer(0)]], constant packed_float3* c [[buffer(1)]], device packed_float3* y [[buffer(2)]],
              device packed_half4* h [[buffer(3)]]) {
    threadgroup packed_float3 t[2];
    t[1] = s[0].p;
    t[1] += 1.0f;
    y[0] = grow(c[1], t[1]);
    packed_float3 local = c[0];
    local.x = 7.0f;
    local[1] += local.z;
    local.yz = local.zy * 10.0f;
    y[1] = local;
    y[2].xy = c[1].yz;
    y[2].z = c[1][0];
    float3 v = c[0];
    v += c[1];
    y[3] = packed_float3(v) - c[0] / 2.0f;
    y[4] = -packed_float3(1, 2.0h, s[0].c.z);
    y[5] = packed_float3(s[0].h.xyz);
    y[6] = c[1].x > c[0].x ? c[0] : c[1];
    S copy = s[0];
    copy.h *= 2.0h;
    copy.h.w = 1.0h;
    s[1] = copy;
    h[0] = s[1].h + packed_half4(half4(copy.h));
}"""


def test_packed_vectors_in_every_address_space(msl: Run) -> None:
    s = np.zeros(2, dtype=[("p", np.float32, 3), ("h", np.float16, 4), ("c", np.uint8, 3), ("pad", np.uint8, 1)])
    s["p"][0], s["h"][0], s["c"][0] = (1, 2, 3), (0.5, 1.5, 2.5, 3.5), (4, 5, 6)
    raw = torch.from_numpy(s.view(np.uint8).copy())
    args: dict[str, Any] = {"s": raw, "c": torch.tensor([[1.0, 2, 3], [4, 5, 6]]), "y": torch.zeros(7, 3)}
    got = msl(PACKED, "k", args | {"h": torch.zeros(4, dtype=torch.half)}, threads=1, threads_per_threadgroup=1)
    expected = [[10, 13, 16], [7, 30, 50], [5, 6, 4], [4.5, 6, 7.5], [-1, -2, -6], [0.5, 1.5, 2.5], [1, 2, 3]]
    assert got["y"].tolist() == expected
    second = got["s"].numpy().view(s.dtype)[1]
    assert second["p"].tolist() == [1, 2, 3]
    assert second["h"].tolist() == [1, 3, 5, 1]
    assert second["c"].tolist() == [4, 5, 6]
    assert got["h"].tolist() == [2, 6, 10, 2]


def test_every_packed_type_converts(msl: Run) -> None:
    cases = [
        (f"float(packed_{t}{n}({t}{n}(x[1])).{'xyzw'[n - 1]} + {t}{n}(packed_{t}{n}({t}(x[2])))[{n - 1}])", 5)
        for t in [
            "char",
            "uchar",
            "short",
            "ushort",
            "int",
            "uint",
            "long",
            "ulong",
            "half",
            "float",
            "bfloat",
        ]
        for n in (2, 3, 4)
    ]
    evaluate(msl, cases)


def test_type_traits_see_through_address_spaces(msl: Run) -> None:
    before = """
    template <typename T> enable_if_t<is_integral_v<T>, int> kind(T) { return 1; }
    template <typename T> enable_if_t<is_floating_point_v<T>, int> kind(T) { return 2; }
    template <typename T, typename = void> struct has_x : false_type {};
    template <typename T> struct has_x<T, void_t<decltype(T::x)>> : true_type {};
    struct with_x { int x; };
    enum class E : uchar { a };
    template <typename T> float twice(device const T* p) {
        using V = remove_cv_t<remove_reference_t<decltype(p[0])>>;
        V v = p[0];
        v += v;
        return float(v);
    }"""
    same = [
        ("remove_cv_t<const device float>", "float"),
        ("remove_reference_t<threadgroup int&>", "threadgroup int"),
        ("remove_const_t<const half>", "half"),
        ("conditional_t<true, float, int>", "float"),
        ("typename conditional<false, float, int>::type", "int"),
        ("make_unsigned_t<short>", "ushort"),
        ("make_signed_t<uint>", "int"),
        ("decltype(declval<half>() + declval<float>())", "float"),
        ("vec<half, 3>", "half3"),
        ("vec<bool, 4>", "bool4"),
        ("metal::vec<bfloat, 2>", "bfloat2"),
        ("underlying_type_t<E>", "uchar"),
        ("common_type_t<int, half, float>", "float"),
        ("remove_pointer_t<device float*>", "device float"),
    ]
    true = [f"is_same_v<{a}, {b}>" for a, b in same]
    true += [
        "is_same<float, float>::value",
        "!is_same_v<half, bfloat>",
        "is_floating_point_v<bfloat>",
        "is_signed_v<char>",
    ]
    true += [
        "is_integral<uchar>::value",
        "!is_floating_point<int>()",
        "is_unsigned_v<ulong>",
        "is_integral_v<bool>",
    ]
    true += ["is_vector_v<half4>", "!is_vector_v<half>", "is_scalar_v<bfloat>", "is_pointer_v<device float*>"]
    true += [
        "has_x<with_x>::value",
        "!has_x<E>::value",
        "integral_constant<int, 3>::value == 3",
        "true_type{}",
    ]
    true += ["is_convertible_v<half, float>", "is_const_v<const int>", "is_enum_v<E>", "is_class_v<with_x>"]
    true += [
        "is_array_v<float[3]>",
        "is_reference_v<device int&>",
        "is_arithmetic_v<half>",
        "is_void_v<void>",
    ]
    cases: list[tuple[str, float]] = [(f"float({t})", 1) for t in true]
    cases += [
        ("kind(x[0])", 2),
        ("kind(short(1))", 1),
        ("kind(1.0h)", 2),
        ("kind(bfloat(1))", 2),
        ("twice(x + 2)", 6),
    ]
    evaluate(msl, cases, before=before)


def test_numeric_limits(msl: Run) -> None:
    cases: list[tuple[str, float]] = []
    for name, dtype in (("half", torch.float16), ("float", torch.float32), ("bfloat", torch.bfloat16)):
        info, limits = torch.finfo(dtype), f"numeric_limits<{name}>"
        cases += [
            (f"{limits}::max()", info.max),
            (f"{limits}::lowest()", info.min),
            (f"{limits}::min()", info.tiny),
        ]
        cases += [(f"{limits}::epsilon()", info.eps), (f"{limits}::infinity()", math.inf)]
        cases += [(f"-{limits}::infinity()", -math.inf), (f"{limits}::quiet_NaN()", math.nan)]
        cases += [(f"{limits}::denorm_min()", info.smallest_normal * info.eps)]
        cases += [(f"{limits}::round_error()", 0.5)]
    cases += [("numeric_limits<float>::digits", 24), ("numeric_limits<half>::digits10", 3)]
    cases += [
        ("numeric_limits<bfloat>::digits", 8),
        ("INFINITY", math.inf),
        ("NAN", math.nan),
        ("HUGE_VALF", math.inf),
    ]
    cases += [("M_PI_F", float(np.float32(math.pi))), ("M_LOG2E_F", float(np.float32(1 / math.log(2))))]
    cases += [("M_PI_H", float(np.float16(math.pi))), ("M_SQRT1_2_H", float(np.float16(math.sqrt(0.5))))]
    cases += [("FLT_MAX", torch.finfo(torch.float32).max), ("HALF_MAX", 65504), ("HALF_MIN", 2.0**-14)]
    cases += [
        ("FLT_MIN", 2.0**-126),
        ("FLT_EPSILON", 2.0**-23),
        ("HALF_EPSILON", 2.0**-10),
        ("HUGE_VALH", math.inf),
    ]
    evaluate(msl, cases)


def test_integer_limits(msl: Run) -> None:
    cases: list[tuple[str, float]] = []
    for name, bits in (("char", 8), ("short", 16), ("int", 32), ("long", 64)):
        limits = f"numeric_limits<{name}>"
        cases += [(f"{limits}::max()", 2 ** (bits - 1) - 1), (f"{limits}::min()", -(2 ** (bits - 1)))]
        cases += [(f"{limits}::lowest()", -(2 ** (bits - 1))), (f"{limits}::digits", bits - 1)]
    for name, bits in (("uchar", 8), ("ushort", 16), ("uint", 32)):
        cases += [(f"numeric_limits<{name}>::max()", 2**bits - 1), (f"numeric_limits<{name}>::min()", 0)]
    cases += [("numeric_limits<ulong>::max() == ~0ul", 1), ("INT_MAX", 2**31 - 1), ("INT_MIN", -(2**31))]
    cases += [("UINT_MAX", 2**32 - 1), ("SHRT_MIN", -(2**15)), ("LONG_MIN", -(2**63)), ("UCHAR_MAX", 255)]
    evaluate(msl, cases, out="long")


def test_limits_are_constant_expressions(msl: Run) -> None:
    before = """
    constant float kLowest = -numeric_limits<float>::infinity();
    constant constexpr half kMax = numeric_limits<half>::max();
    template <typename T> struct Min { static constant constexpr T init = numeric_limits<T>::max(); };
    constant float3 kAxis = float3(0, 1, -INFINITY);
    constant half2 kTable[2] = {half2(1, 2), half2(3.0h)};
    """
    cases = [
        ("kLowest", -math.inf),
        ("kMax", 65504),
        ("Min<int>::init == INT_MAX", 1),
        ("Min<bfloat>::init > 1e38f", 1),
    ]
    cases += [
        ("kAxis.z", -math.inf),
        ("kAxis.y", 1),
        ("kTable[int(x[0])].y", 3),
        ("kTable[int(x[0]) - 1].y", 2),
    ]
    evaluate(msl, cases, before=before)


def test_array(msl: Run) -> None:
    before = """
    struct Lut { array<float, 4> values; };
    constant array<float, 3> kLut = {1.0f, 2.0f, 4.0f};
    float sum(array<float, 4> a) { float s = 0; for (float v : a) s += v; a[0] = 100; return s; }"""
    setup = """
    array<float, 4> a; for (uint i = 0; i < a.size(); ++i) a[i] = x[i];
    threadgroup array<float, 4> shared[1]; shared[0] = a;
    Lut lut = {a}; array<half2, 2> b; b.fill(half2(x[0], x[1])); lut.values[3] = 0;"""
    cases = [("sum(a)", 10), ("a[0]", 1), ("kLut[int(x[1])]", 4), ("shared[0][2]", 3), ("sum(lut.values)", 6)]
    cases += [("a.back() + a.front()", 5), ("b[1].y", 2), ("sizeof(Lut)", 16)]
    evaluate(msl, cases, before=before, setup=setup)
