"""Kernel arguments from Python values: structs of every shape, enums, arrays; what a signature may not say."""

from __future__ import annotations

import pytest
import torch

from metal_marlin import MetalKernelLibrary
from metal_marlin.errors import MetalCompileError

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"

CASES = [
    ("struct I { int x; }; struct O { I i[2]; int k; };", "O", {"i": [{"x": 3}, {"x": 5}], "k": 7},
     "a.i[0].x, a.i[1].x, a.k", [3, 5, 7]),
    ("struct P { struct { int q; float r; } in; int z; };", "P", {"in": {"q": 2, "r": 1.5}, "z": 4},
     "a.in.q, a.in.r, a.z", [2, 1.5, 4]),
    ("struct P { struct { int q; float r; }; int z; };", "P", {"q": 2, "r": 1.5, "z": 4},
     "a.q, a.r, a.z", [2, 1.5, 4]),
    ("struct P { union { float f; uint u; }; int c; };", "P", bytes([0, 0, 128, 63, 9, 0, 0, 0]),
     "a.f, a.c, 0", [1, 9, 0]),
    ("union U { float f; uint u; };", "U", bytes([0, 0, 128, 63]), "a.f, a.u >> 24, 0", [1, 63, 0]),
    ("enum class M : int { X, Y };", "M", 1, "a == M::Y, int(a), 0", [1, 1, 0]),
    ("enum class M : uchar { X, Y }; struct E { M m; int k; };", "E", {"m": 1, "k": 6},
     "a.m == M::Y, a.k, 0", [1, 6, 0]),
    ("struct B { int a; }; struct D : B { int b; };", "D", {"a": 1, "b": 2}, "a.a, a.b, 0", [1, 2, 0]),
    ("struct A { float2 s[2]; };", "A", {"s": [[1, 2], [3, 4]]}, "a.s[0].y, a.s[1].x, a.s[1].y", [2, 3, 4]),
    ("template <typename T> struct PP { T a; int b; }; using PF = PP<float>;", "PF", {"a": 2.5, "b": 3},
     "a.a, a.b, 0", [2.5, 3, 0]),
    ("template <class T> struct PP { T a; int b; };", "PP<float>", {"a": 2.5, "b": 3}, "a.a, a.b, 0", [2.5, 3, 0]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name", "value", "read", "expected"), CASES, ids=[c[0][:40] for c in CASES])
def test_value(msl, text, name, value, read, expected):
    body = "".join(f"o[{i}] = float({e.strip()});" for i, e in enumerate(read.split(",")))
    source = f"{HEAD}{text}\nkernel void k(device float* o, constant {name}& a) {{ {body} }}"
    out = msl(source, "k", {"o": torch.zeros(3), "a": value}, threads=1, threads_per_threadgroup=1)
    assert out["o"].tolist() == expected


def test_struct_with_array_of_structs_as_buffer(msl):
    source = HEAD + (
        "struct I { int x; }; struct O { I i[2]; int k; };"
        "kernel void k(device float* o, device const O* a) { o[0] = a[1].i[1].x; o[1] = a[0].k; }"
    )
    args = {"o": torch.zeros(2), "a": torch.arange(6, dtype=torch.int32)}
    assert msl(source, "k", args, threads=1, threads_per_threadgroup=1)["o"].tolist() == [4, 2]


def test_reference_to_array(msl):
    source = HEAD + (
        "kernel void k(device float* o, constant float (&tab)[4] [[buffer(1)]],"
        " uint i [[thread_position_in_grid]]) { o[i] = tab[3 - i]; }"
    )
    args = {"o": torch.zeros(4), "tab": [1.0, 2.0, 3.0, 4.0]}
    assert msl(source, "k", args, threads=4, threads_per_threadgroup=4)["o"].tolist() == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        ("uint i [[thread_position_in_gird]]", "did you mean '.*thread_position_in_grid"),
        ("device int* b [[buffer(31)]]", "31 buffers, 0 to 30"),
    ],
)
def test_refused(parameter, message):
    source = f"{HEAD}kernel void k(device float* o, {parameter}) {{ o[0] = 1; }}"
    with pytest.raises(MetalCompileError, match=message):
        MetalKernelLibrary(source, device="cpu").kernel("k")
