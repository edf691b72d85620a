"""The same thing in other words: declarations, initialisers and names that are types in one place only."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

# setup outside the kernel, body with float* y, values of y
CASES = {
    "direct initialisation": (
        "template <typename T> float first(T a) { vec<T, 4> v(a, a, a, a); return float(v.x); } using V = float4;",
        """float4 v(1, 2, 3, 4); half2 h(5.h, 6.h); const float3 k(7, 8, 9); float4 q(float3(1, 2, 3), 5), w = v;
           V a(2.0f); uint2 n(uint(v.y), 4u);
           y[0] = v.w; y[1] = h.y; y[2] = k.z; y[3] = q.w; y[4] = w.x; y[5] = first(half(3)); y[6] = a.z; y[7] = n.x;""",
        [4, 6, 9, 5, 1, 3, 2, 2],
    ),
    "no blanks": (
        "",
        """bool c = y[0] == 0; y[1] = (c?float4(1):float4(0)).x; y[2] = c?half(2):half(0);
           switch (int(y[0])) { case 0:y[3] = float4(3).y; break; default:y[3] = 0; }""",
        [0, 1, 2, 3],
    ),
    "a type here, a value there": (
        """template <typename F> float typed(F x) { return float(F(x)); }
           template <float (*F)(float)> float called(float x) { return F(x); }
           inline float twice(float x) { return 2 * x; }
           template <typename D> D same(D d) { return d; }
           template <int D> int divided(int x) { return x / (D) - 1; }
           namespace a { typedef float4 load; } namespace b { inline float load(float x) { return x + 1; } }""",
        """int T = 3; y[0] = (T) - 1; y[1] = called<twice>(4); y[2] = typed(1.5f); y[3] = divided<2>(10); y[4] = b::load(2);
           y[5] = a::load(7).z; y[6] = same(8.0f);""",
        [2, 8, 1.5, 4, 3, 7, 8],
    ),
    "threadgroup in other places": (
        "struct Pair { float a; int b; };",
        """alignas(64) threadgroup float z[4]; threadgroup alignas(16) uchar bytes[3]; volatile threadgroup float v[4];
           float threadgroup e[2]; threadgroup Pair pair;
           z[0] = 1; bytes[1] = 2; v[3] = 3; e[1] = 4; pair.b = 5;
           y[0] = z[0]; y[1] = bytes[1]; y[2] = v[3]; y[3] = e[1]; y[4] = pair.b; y[5] = ulong(&z[0]) % 64; y[6] = ulong(&bytes[0]) % 16;""",
        [1, 2, 3, 4, 5, 0, 0],
    ),
    "filled matrix with one size": (
        "",
        """simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8>(2.5f); y[0] = m.thread_elements()[0];""",
        [2.5],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_spelling(msl: Run, case: str) -> None:
    before, body, expected = CASES[case]
    source = f"""#include <metal_stdlib>
using namespace metal;
{before}
kernel void k(device float* y) {{
{body}
}}"""
    out = msl(source, "k", {"y": torch.zeros(8)}, threads=1, threads_per_threadgroup=1)
    assert out["y"][: len(expected)].tolist() == expected
