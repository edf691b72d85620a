"""Matrices against numpy: layout, constructors, products, transpose, determinant."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = """#include <metal_stdlib>
using namespace metal;
"""
SHAPES = [(c, r) for c in (2, 3, 4) for r in (2, 3, 4)]


def columns(m: np.ndarray, dtype: type) -> torch.Tensor:
    """A rows × columns array in MSL's layout: columns one after the other, three rows padded to four."""
    rows, count = m.shape
    out = np.zeros((count, 4 if rows == 3 else rows), dtype)
    out[:, :rows] = m.T
    return torch.from_numpy(out)


def test_sizes(msl: Run) -> None:
    source = HEAD + "kernel void k(device int* y [[buffer(0)]]) {\n"
    expected = []
    for element, size in (("float", 4), ("half", 2)):
        for c, r in SHAPES:
            source += f"    y[{len(expected)}] = sizeof({element}{c}x{r}) * 100 + alignof({element}{c}x{r});\n"
            column = size * (2 if r == 2 else 4)
            expected.append(c * column * 100 + column)
    y = torch.zeros(len(expected), dtype=torch.int32)
    assert msl(source + "}", "k", {"y": y}, threads=1, threads_per_threadgroup=1)["y"].tolist() == expected


def product_source(element: str, c: int, r: int) -> str:
    m = f"{element}{c}x{r}"
    return f"""{HEAD}
kernel void k(device const {m}* a [[buffer(0)]], constant {element}{r}x{c}& b [[buffer(1)]],
              device {element}{r}x{r}* ab [[buffer(2)]], device {element}{r}x{c}* at [[buffer(3)]],
              device {element}{r}* av [[buffer(4)]], device {element}{c}* va [[buffer(5)]],
              device {m}* linear [[buffer(6)]]) {{
    threadgroup {m} shared[1];
    shared[0] = a[0];
    ab[0] = a[0] * b;
    at[0] = transpose(shared[0]);
    av[0] = a[0] * {element}{c}({element}(2));
    va[0] = {element}{r}({element}(3)) * shared[0];
    {m} s = a[0] * {element}(2) + {element}(3) * a[0] - shared[0];
    s += a[0];
    s *= {element}(0.5);
    s[1] = -s[1];
    s[0][1] = {element}(7);
    linear[0] = -s;
}}"""


@pytest.mark.parametrize("element", ["float", "half"])
@pytest.mark.parametrize(("c", "r"), [(2, 2), (2, 3), (4, 3), (3, 3), (4, 4), (2, 4)])
def test_products_match_numpy(msl: Run, element: str, c: int, r: int) -> None:
    dtype = np.float32 if element == "float" else np.float16
    rng = np.random.default_rng(c * 10 + r)
    a, b = rng.integers(-4, 5, (r, c)).astype(dtype), rng.integers(-4, 5, (c, r)).astype(dtype)
    args = {"a": columns(a, dtype), "b": columns(b, dtype), "linear": torch.zeros_like(columns(a, dtype))}
    for name, shape in (("ab", (r, r)), ("at", (c, r)), ("av", (r, 1)), ("va", (c, 1))):
        args[name] = torch.zeros_like(columns(np.zeros(shape), dtype))
    got = msl(product_source(element, c, r), "k", args, threads=1, threads_per_threadgroup=1)
    linear = a * 2.5
    linear[:, 1] *= -1
    linear[1, 0] = 7
    expected = {
        "ab": a @ b,
        "at": a.T,
        "av": 2 * a.sum(1, keepdims=True),
        "va": 3 * a.sum(0)[:, None],
        "linear": -linear,
    }
    for name, value in expected.items():
        rows = value.shape[0]
        assert np.array_equal(got[name].numpy()[:, :rows], value.T), name


def test_determinant_and_constructors(msl: Run) -> None:
    source = (
        HEAD
        + """
constant float2x2 kTable = float2x2(1, 2, 3, 4);
constant float3x3 kIdentity = float3x3(1.0f);
struct S { float4x4 m; half2x2 h; };
template <typename T> T trace(T m) { return m; }
kernel void k(device const float4x4& a [[buffer(0)]], device float* y [[buffer(1)]],
              device S* s [[buffer(2)]], constant float4x4* c [[buffer(3)]]) {
    float3x3 b = float3x3(a[0].xyz, a[1].xyz, a[2].xyz);
    float2x2 d = float2x2(a[0].xy, float2(a[1].x, a[1].y));
    y[0] = determinant(a);
    y[1] = determinant(b);
    y[2] = determinant(d);
    y[3] = kTable[1][0] * 10 + kTable.columns[0].y;
    y[4] = determinant(kIdentity * 2.0f);
    half2x2 h = half2x2(d);
    y[5] = float(h[1][1]);
    y[6] = float(determinant(float2x2(half2x2(1.0h, 2.0h, 3.0h, 4.0h))));
    s[0].m = c[1];
    s[0].m[3].xy = c[0][1].zw;
    s[0].h = h;
    s[1] = s[0];
    float2x3 e = float2x3(float3(1, 2, 3), float3(4, 5, 6));
    float3 ev = e * float2(1, 10);
    y[7] = ev.x + ev.y + ev.z;
    y[8] = (a == a) + 2 * (a != c[0]) + 4 * (kTable == transpose(transpose(kTable)));
    float4x4 copy = a, big = {a[0], a[1], a[2], float4(0, 0, 0, 1)};
    y[9] = big[3].w + copy[2][1];
}"""
    )
    rng = np.random.default_rng(3)
    a, c = rng.integers(-5, 6, (4, 4)).astype(np.float32), rng.integers(-5, 6, (2, 4, 4)).astype(np.float32)
    stacked = torch.cat([columns(c[0], np.float32), columns(c[1], np.float32)])
    args = {"a": columns(a, np.float32), "y": torch.zeros(10), "s": torch.zeros(2 * 80 // 4), "c": stacked}
    got = msl(source, "k", args, threads=1, threads_per_threadgroup=1)
    dets = [np.linalg.det(a[:n, :n].astype(np.float64)) for n in (4, 3, 2)]
    expected = [*dets, 32, 8, a[1, 1], -2, 156, 7, 1 + a[1, 2]]
    assert np.allclose(got["y"].numpy(), expected, rtol=0, atol=1e-3)
    stored = c[1].copy()
    stored[:2, 3] = c[0][2:4, 1]
    second = got["s"].reshape(2, 20)[1]
    assert np.array_equal(second[:16].reshape(4, 4).numpy().T, stored)
    assert second[16:18].view(torch.half).tolist() == [a[0, 0], a[1, 0], a[0, 1], a[1, 1]]
