"""Vectors: constructors, casts, swizzles, operators, bool vectors; a case for each of clang's known traps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from metal_marlin.errors import MetalCompileError

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = """#include <metal_stdlib>
using namespace metal;
"""


def evaluate(msl: Run, cases: Sequence[tuple[str, Sequence[float]]], *, before: str = "", setup: str = "") -> None:
    """Each (expression, components): the float4 that the expression gives, computed from x[i] = i + 1."""
    lines = "\n".join(f"    out[{i}] = {expression};" for i, (expression, _) in enumerate(cases))
    source = f"""{HEAD}{before}
kernel void k(device const float* x [[buffer(0)]], device float4* out [[buffer(1)]]) {{
{setup}
{lines}
}}"""
    args = {"x": torch.arange(1, 33, dtype=torch.float32), "out": torch.zeros(len(cases), 4)}
    got = msl(source, "k", args, threads=1, threads_per_threadgroup=1)["out"]
    wrong = [
        f"{expression} is {value.tolist()}, not {list(expected)}"
        for (expression, expected), value in zip(cases, got, strict=True)
        if not torch.equal(value.nan_to_num(-99.0), torch.tensor(expected, dtype=torch.float32).nan_to_num(-99.0))
    ]
    assert not wrong, "\n".join(wrong)


def test_constructors(msl: Run) -> None:
    setup = """
    float a = x[0], b = x[1]; float2 v2 = float2(a, b); float3 v3 = float3(v2, x[2]); uint4 u = uint4(7u, 8, 9, x[9]);
    half2 h2 = half2(v2); bool2 m2 = bool2(true, a > b); packed_float2 p2 = packed_float2(v2 * 10.0f); ushort2 s2 = ushort2(v2);"""
    cases = [
        ("float4(a, b, x[2], x[3])", (1, 2, 3, 4)),
        ("float4(v2, v2)", (1, 2, 1, 2)),
        ("float4(a, v2, b)", (1, 1, 2, 2)),
        ("float4(a, v3)", (1, 1, 2, 3)),
        ("float4(v3, a)", (1, 2, 3, 1)),
        ("float4(b)", (2, 2, 2, 2)),
        ("float4(3)", (3, 3, 3, 3)),
        ("float4(u)", (7, 8, 9, 10)),
        ("float4(h2, s2)", (1, 2, 1, 2)),
        ("float4(m2, p2)", (1, 0, 10, 20)),
        ("float4(int2(-1, 2), half(b), true)", (-1, 2, 2, 1)),
        ("float4(uchar4(300u + uint(a), 1, 2, 3))", (45, 1, 2, 3)),
        ("float4(half4(v2, 70000.0f, 1.0h))", (1, 2, math.inf, 1)),
        ("float4(bfloat4(v3, 1.00390625f))", (1, 2, 3, 1)),
        ("float4(vec<float, 4>(v2.yx, v2))", (2, 1, 1, 2)),
        ("float4(vec<half, 2>(v2), vec<int, 2>(b))", (1, 2, 2, 2)),
        ("metal::float4(metal::half4(h2, h2))", (1, 2, 1, 2)),
        ("float4()", (0, 0, 0, 0)),
        ("float4(bool4(v2, -0.0f, NAN))", (1, 1, 0, 1)),
        ("float4(long2(v2), ulong2(v2))", (1, 2, 1, 2)),
        ("float4(int4(float4(-1.75f * a, 1.75f, b, -0.5f)))", (-1, 1, 2, 0)),
        ("float4(char4(v2, -v2))", (1, 2, -1, -2)),
    ]
    evaluate(msl, cases, setup=setup)


def test_casts(msl: Run) -> None:
    before = """
    template <typename T> T cast(float v) { return (T)v; }
    template <typename T, typename U> T convert(U v) { return static_cast<T>(v); }
    using V = float4;
    typedef half4 H;"""
    setup = "half4 h = half4(x[0], 2.5h, 3.0h, 4.0h); uint4 u = uint4(1, 2, 3, 4); float2 v2 = float2(x[0], x[1]);"
    cases = [
        ("(float4)h", (1, 2.5, 3, 4)),
        ("(float4)u", (1, 2, 3, 4)),
        ("(V)(H)u", (1, 2, 3, 4)),
        ("-(float4)h * 2.0f", (-2, -5, -6, -8)),
        ("(float4)-h + 1.0f", (0, -1.5, -2, -3)),
        ("(float4)h.yxwz", (2.5, 1, 4, 3)),
        ("(float4)(int4)h", (1, 2, 3, 4)),
        ("(float4)(~(uint4)h & 3)", (2, 1, 0, 3)),
        ("(float4)x[1] / (float4)u", (2, 1, 2 / torch.tensor(3.0), 0.5)),
        ("static_cast<float4>(u)", (1, 2, 3, 4)),
        ("convert<float4>(u)", (1, 2, 3, 4)),
        ("convert<V>(h)", (1, 2.5, 3, 4)),
        ("cast<float4>(x[1])", (2, 2, 2, 2)),
        ("float4(cast<half>(x[1]), cast<int2>(2.9f), cast<float>(1))", (2, 2, 2, 1)),
        ("decltype(v2.xyxy)(u)", (1, 2, 3, 4)),
        ("float4((int)2.9f, (half)x[0], (bfloat)x[1], (uchar)u.z)", (2, 1, 2, 3)),
        ("(float4)2.5f", (2.5, 2.5, 2.5, 2.5)),
        ("(half)x[0] + float4((float2)x[1], v2)", (3, 3, 2, 3)),
    ]
    evaluate(msl, cases, before=before, setup=setup)


def test_constructors_in_templates(msl: Run) -> None:
    before = """
    template <typename T> struct Traits { using v2 = vec<T, 2>; using v4 = vec<T, 4>; };
    template <typename T> vec<T, 4> pair(T a, T b) {
        using V = vec<T, 4>;
        typename Traits<T>::v2 half_of = typename Traits<T>::v2(a, b);
        return V(half_of, T(2) * half_of);
    }
    template <typename T, typename S> T make(S a, S b) { return T(a, b, b, a); }
    struct Pair { float a, b; Pair(float v, float w) : a(v), b(w) {} operator float() const { return a + b; } };
    template <typename P> float total(float a) { return P(a, a); }"""
    cases = [
        ("pair<float>(x[0], x[1])", (1, 2, 2, 4)),
        ("float4(pair<half>(1.0h, 2.0h))", (1, 2, 2, 4)),
        ("float4(pair<int>(1, 2))", (1, 2, 2, 4)),
        ("float4(pair<bfloat>(bfloat(1), bfloat(2)))", (1, 2, 2, 4)),
        ("make<float4>(x[0], x[1])", (1, 2, 2, 1)),
        ("float4(make<uchar4>(x[0], x[1]))", (1, 2, 2, 1)),
        ("float4(total<Pair>(x[1]), Pair(x[0], x[1]), 0, 0)", (4, 3, 0, 0)),
    ]
    evaluate(msl, cases, before=before)


SWIZZLES = (
    HEAD
    + """
struct S { float4 v; half3 h; };
kernel void k(device float4* y [[buffer(0)]], device S* s [[buffer(1)]], constant float4& c [[buffer(2)]]) {
    threadgroup float4 t[1];
    float4 v = c;
    v.zx = v.xy;
    y[0] = v;
    v = c;
    v.xy += 10.0f;
    v.wz *= float2(2, 3);
    y[1] = v;
    y[2].xyz = c.wzy;
    y[2].w = c.bgra.x;
    t[0] = c;
    t[0].yw = t[0].xx;
    t[0].rg -= 1.0f;
    y[3] = t[0];
    s[0].v.zw += s[0].v.xy;
    s[0].h.xz = half2(c.xw);
    v = c;
    v[1] = 9.0f;
    for (int i = 2; i < 4; ++i) v[i] = v[i - 1] + 1.0f;
    y[4] = v;
}
"""
)


def test_swizzles_are_lvalues_in_every_address_space(msl: Run) -> None:
    s = torch.zeros(6, dtype=torch.float32)
    s[:4] = torch.tensor([1.0, 2, 3, 4])
    args = {"y": torch.zeros(5, 4), "s": torch.cat([s, torch.zeros(2)]), "c": [1.0, 2.0, 3.0, 4.0]}
    got = msl(SWIZZLES, "k", args, threads=1, threads_per_threadgroup=1)
    expected = [[2, 2, 1, 4], [11, 12, 9, 8], [4, 3, 2, 3], [0, 0, 3, 1], [1, 9, 10, 11]]
    assert got["y"].tolist() == expected
    assert got["s"][:4].tolist() == [1, 2, 4, 6]
    assert got["s"][4:6].view(torch.half).tolist() == [1, 0, 4, 0]


def test_operators(msl: Run) -> None:
    setup = """
    float4 v = float4(x[0], x[1], x[2], x[3]); int4 i = int4(v); uint4 u = uint4(v); half4 h = half4(v); uchar4 c = uchar4(v);
    bfloat4 b = bfloat4(v); float s = x[1]; float4 w = v; w += 1.0; w *= v; w -= s; int4 p = i++; --i; ++i;"""
    cases = [
        ("v * 2.0 + s", (4, 6, 8, 10)),
        ("1.0f / v.xxyy - v", (0, -1, -2.5, -3.5)),
        ("w", (0, 4, 10, 18)),
        ("float4(p + i)", (3, 5, 7, 9)),
        ("float4(p / 2 + p % 3 - 1)", (0, 2, 0, 2)),
        ("float4(u << 2u) + float4(u >> uint4(0, 1, 0, 2))", (5, 9, 15, 17)),
        ("float4((u & 3u) | 8u) + float4(u ^ u.wzyx) + float4(~p)", (12, 8, 8, 8)),
        ("float4(h + h * h)", (2, 6, 12, 20)),
        ("float4(b * b - b)", (0, 2, 6, 12)),
        ("float4(c * uchar4(200, 1, 2, 100))", (200, 2, 6, 144)),
        ("float4(-p)", (-1, -2, -3, -4)),
        ("s > 1.0f ? v : w", (1, 2, 3, 4)),
        ("s > 3.0f ? v : float4(0.5f)", (0.5, 0.5, 0.5, 0.5)),
        ("s > 3.0f ? v : 0.0f", (0, 0, 0, 0)),
    ]
    evaluate(msl, cases, setup=setup)


def test_scalar_operands_take_the_vectors_element_type(msl: Run) -> None:
    """OpenCL refuses these; MSL computes in the vector's type."""
    before = "template <typename V> V scale(V v, float s) { return (v * s) * s + s; }"
    setup = """
    float s = x[1]; half4 h = half4(x[0], x[1], x[2], x[3]); uchar4 c = uchar4(255, 16, 17, 3); ushort4 u = ushort4(c);
    bfloat4 b = bfloat4(h); half4 g = h; g *= s; g += 0.5f; float4 f = float4(h); uint4 w = uint4(h);"""
    cases = [
        ("float4(h * s)", (2, 4, 6, 8)),
        ("float4(s * h + 2.0f)", (4, 6, 8, 10)),
        (
            "float4(h * 0.1f)",
            tuple(torch.tensor([1.0, 2, 3, 4]).half().mul(0.0999755859375).float().tolist()),
        ),
        ("float4((h * s) * (s + 1.0f))", (6, 12, 18, 24)),
        ("float4(c & 15)", (15, 0, 1, 3)),
        ("float4(c >> 4) + float4((c >> 4) & 0x0F)", (30, 2, 2, 0)),
        ("float4(u << uint(s))", (1020, 64, 68, 12)),
        ("float4(b * s + 1.0f)", (3, 5, 7, 9)),
        ("float4(g)", (2.5, 4.5, 6.5, 8.5)),
        ("float4(s > 1.0f ? h : 0.0f)", (1, 2, 3, 4)),
        ("float4(scale(h, s)) + scale(f, s)", (12, 20, 28, 36)),
        ("float4(w * 2ul)", (2, 4, 6, 8)),
        ("float4(h * half(M_PI_F) / M_PI_F)", (1, 2, 3, 4)),
    ]
    evaluate(msl, cases, before=before, setup=setup)


def test_comparisons_and_bool_vectors(msl: Run) -> None:
    setup = """
    float4 v = float4(x[0], x[1], x[2], x[3]); bool4 m = v > 2.0f; bool4 n = bool4(true, false, x[0] > 0, false);
    bool3 m3 = m.wzy; bool2 m2 = bool2(v.xy < v.yx); bool4 w = m; w.x = true; w[3] = false;
    bool4 splat = true; half4 h = half4(v); bool4 e = h == h.xxzz; bool4 nan = v != v; w &= n; n |= m;"""
    cases = [
        ("float4(m)", (0, 0, 1, 1)),
        ("float4(!m)", (1, 1, 0, 0)),
        ("float4(m && (v < 4.0f))", (0, 0, 1, 0)),
        ("float4((v < 4.0f) || m)", (1, 1, 1, 1)),
        ("float4(m ^ (v > 3.0f))", (0, 0, 1, 0)),
        ("float4(m == (v == 3.0f))", (1, 1, 1, 0)),
        ("float4(m != splat)", (1, 1, 0, 0)),
        ("float4(w)", (1, 0, 1, 0)),
        ("float4(n)", (1, 0, 1, 1)),
        ("float4(m3, m2.x)", (1, 1, 0, 1)),
        ("float4(m.zwyx)", (1, 1, 0, 0)),
        ("float4(m2.yx, m.zw)", (0, 1, 1, 1)),
        ("float4(e)", (1, 0, 1, 0)),
        ("float4(nan)", (0, 0, 0, 0)),
        ("float4(m[2], m.r, m.a, m3.z)", (1, 0, 1, 0)),
        ("float4(int4(m) + int4(n))", (1, 0, 2, 2)),
        ("float4(bool4(m.xy, m.zw) | bool4(true, false, false, false))", (1, 0, 1, 1)),
        ("float4(bool4(int4(0, -1, 2, 0)))", (0, 1, 1, 0)),
        ("m.z ? v : -v", (1, 2, 3, 4)),
        ("float4(vec<bool, 4>(v < 2.0f))", (1, 0, 0, 0)),
    ]
    evaluate(msl, cases, setup=setup)


def test_comparison_results_are_true_not_minus_one(msl: Run) -> None:
    setup = "float4 v = float4(x[0], x[1], x[2], x[3]); half4 h = half4(v);"
    cases = [
        ("float4(v > 2.0f)", (0, 0, 1, 1)),
        ("float4(int4(v == 3.0f))", (0, 0, 1, 0)),
        ("(float4)(v <= 2.0f)", (1, 1, 0, 0)),
        ("float4(half4(h > 1.0h))", (0, 1, 1, 1)),
        ("float4(!(v > 2.0f))", (1, 1, 0, 0)),
        ("float4(v > 1.0f && v < 4.0f)", (0, 1, 1, 0)),
    ]
    evaluate(msl, cases, setup=setup)


MEMORY = (
    HEAD
    + """
struct Item { float3 a; bool4 flags; half2 h; packed_short3 s; uchar2 c; };
Item bump(Item v) { v.a += 1.0f; v.flags.y = !v.flags.y; v.h = v.h.yx; v.s.z += 1; v.c[1] = 77; return v; }
float pick(device const float* p) { return p[0] + 100; }
float pick(threadgroup const float* p) { return p[0] + 200; }
float read(const thread Item& v) { return v.a.z; }
kernel void k(device Item* items [[buffer(0)]], constant Item& c [[buffer(1)]], device float* y [[buffer(2)]]) {
    threadgroup Item shared[2];
    threadgroup float f[1];
    shared[1] = items[0];
    Item local = shared[1];
    local = bump(local);
    shared[0] = local;
    items[1] = shared[0];
    items[2] = c;
    items[2].flags = c.flags && !local.flags;
    f[0] = local.a.x;
    y[0] = pick(y + 1);
    y[2] = pick(f);
    y[3] = read(local) + float(items[1].flags.y) + c.a[2];
}
"""
)


def test_structs_copy_between_address_spaces(msl: Run) -> None:
    layout = np.dtype(
        {
            "names": ["a", "flags", "h", "s", "c"],
            "formats": [(np.float32, 3), (np.uint8, 4), (np.float16, 2), (np.int16, 3), (np.uint8, 2)],
            "offsets": [0, 16, 20, 24, 30],
            "itemsize": 32,
        }
    )
    items = np.zeros(3, layout)
    items["a"][0], items["flags"][0], items["h"][0], items["s"][0], items["c"][0] = (
        (1, 2, 3),
        (1, 0, 0, 1),
        (5, 6),
        (7, 8, 9),
        (1, 2),
    )
    c = np.zeros(1, layout)
    c["a"], c["flags"], c["h"], c["s"], c["c"] = (10, 20, 30), (1, 1, 0, 1), (1, 2), (-1, -2, -3), (3, 4)
    raw = {
        "items": torch.from_numpy(items.view(np.uint8).copy()),
        "c": torch.from_numpy(c.view(np.uint8).copy()),
    }
    got = msl(MEMORY, "k", raw | {"y": torch.tensor([0.0, 5, 0, 0])}, threads=1, threads_per_threadgroup=1)
    out = got["items"].numpy().view(layout)
    assert out["a"][1].tolist() == [2, 3, 4]
    assert out["flags"][1].tolist() == [1, 1, 0, 1]
    assert out["h"][1].tolist() == [6, 5]
    assert out["s"][1].tolist() == [7, 8, 10]
    assert out["c"][1].tolist() == [1, 77]
    assert out["a"][2].tolist() == [10, 20, 30]
    assert out["flags"][2].tolist() == [0, 0, 0, 0]
    assert got["y"].tolist() == [105, 5, 202, 4 + 1 + 30]


def test_members_qualified_by_address_space(msl: Run) -> None:
    before = """
    struct Counter {
        float n;
        Counter(float v) : n(v) {}
        float where() const device { return 1; }
        float where() const threadgroup { return 2; }
        float where() const thread { return 3; }
        float get() const { return n; }
        void add(float v) thread { n += v; }
        thread Counter& operator+=(float v) thread { n += v; return *this; }
        bool operator<(thread const Counter& o) const { return n < o.n; }
    };
    template <typename P> float first(P p) { return p->where(); }
    kernel void unused(device Counter* c [[buffer(0)]], constant Counter& d [[buffer(1)]]) { c[0].n = d.get() + c[0].get(); }"""
    setup = """
    device const Counter* d = (device const Counter*)x; threadgroup float f[2]; f[0] = x[4];
    threadgroup const Counter* t = (threadgroup const Counter*)f; Counter c(x[1]); c.add(1); c += 2; Counter e = d[3];"""
    cases = [
        ("float4(d->where(), t->where(), c.where(), d[2].get())", (1, 2, 3, 3)),
        ("float4(t->get(), c.get(), e.get(), c < e)", (5, 5, 4, 0)),
        ("float4(first(d), first(t), first(&c), e < c)", (1, 2, 3, 1)),
    ]
    evaluate(msl, cases, before=before, setup=setup)


def test_vectors_of_every_element_type_convert(msl: Run) -> None:
    names = [
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
        "bool",
    ]
    cases = [
        (f"float4({to}4({source}4({source}(1), {source}2(x[0]), {source}(0))))", (1, 1, 1, 0))
        for to in names
        for source in names
    ]
    evaluate(msl, cases)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("float4(x[0], x[1], x[2])", "too few components"),
        ("float2(x[0], float2(x[1]))", "too many components"),
        ("float3(float4(x[0]))", "too many components"),
        ("as_type<float2>(x[0]).xxxx", "differ in size"),
    ],
)
def test_wrong_constructors_are_refused(msl: Run, expression: str, message: str) -> None:
    with pytest.raises(MetalCompileError, match=message):
        evaluate(msl, [(f"float4({expression}.x)", (0, 0, 0, 0))])


def test_normalised_packing(msl: Run) -> None:
    setup = "float4 v = float4(x[0] * 0.5f, -2.0f, NAN, 1.5f); float4 s = float4(-0.25f, 2.0f, -3.0f, x[0] * 0.5f);"
    f = torch.tensor
    cases = [
        ("unpack_unorm4x8_to_float(pack_float_to_unorm4x8(v))", (f(128.0) / 255, 0, 0, 1)),
        ("unpack_snorm4x8_to_float(pack_float_to_snorm4x8(s))", (f(-32.0) / 127, 1, -1, f(64.0) / 127)),
        ("unpack_snorm4x8_to_float(0x7f8081c0u)", (f(-64.0) / 127, -1, -1, 1)),
        ("float4(unpack_unorm2x16_to_float(0xffff0001u), 0, 0)", (f(1.0) / 65535, 1, 0, 0)),
        (
            "float4(unpack_snorm2x16_to_float(pack_float_to_snorm2x16(s.xz)), 0, 0)",
            (f(-8192.0) / 32767, -1, 0, 0),
        ),
        ("float4(unpack_unorm4x8_to_half(0x00ff0080u))", (f(128 / 255).half().float(), 0, 1, 0)),
        (
            "unpack_unorm10a2_to_float(pack_float_to_unorm10a2(float4(1, 0, 0.5f, 0.7f)))",
            (1, 0, f(512.0) / 1023, f(2.0) / 3),
        ),
        (
            "float4(unpack_unorm565_to_float(pack_float_to_unorm565(float3(1, 0.5f, 0))), 0)",
            (1, f(32.0) / 63, 0, 0),
        ),
    ]
    evaluate(msl, cases, setup=setup)
