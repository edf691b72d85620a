"""Relational functions: classification of every 16-bit number, conditions of every kind, select of every type."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
inf, nan = math.inf, math.nan
CLASSES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "isfinite": lambda x, _: np.isfinite(x),
    "isinf": lambda x, _: np.isinf(x),
    "isnan": lambda x, _: np.isnan(x),
    "isnormal": lambda x, tiny: np.isfinite(x) & (np.abs(x) >= tiny),
    "signbit": lambda x, _: np.signbit(x),
}
KINDS = {"half": (torch.float16, 2.0**-14), "bfloat": (torch.bfloat16, 2.0**-126), "float": (torch.float32, 2.0**-126)}


def numbers(kind: str) -> tuple[torch.Tensor, np.ndarray]:
    """All numbers of a 16-bit type, or a sample of float that has them as its upper halves: as tensor and as float64."""
    bits = np.arange(65536, dtype=np.uint32)
    if kind == "half":
        x = bits.astype(np.uint16).view(np.float16)
        return torch.from_numpy(x), x.astype(np.float64)
    if kind == "float":
        bits = bits << 16 | np.random.default_rng(1).integers(0, 65536, 65536).astype(np.uint32)
        return torch.from_numpy(bits.view(np.float32)), bits.view(np.float32).astype(np.float64)
    wide = (bits << 16).view(np.float32).astype(np.float64)
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16), wide


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_classification(msl: Run, kind: str, width: int) -> None:
    tensor, x = numbers(kind)
    value, truth = (kind, "bool") if width == 1 else (f"{kind}{width}", f"bool{width}")
    n = len(x) // width
    lines = "\n".join(f"  out[{k}u * n + i] = {name}(x[i]);" for k, name in enumerate(CLASSES))
    source = f"""{HEAD}kernel void k(device const {value}* x, device {truth}* out, constant uint& n, uint i [[thread_position_in_grid]]) {{
{lines}
}}"""
    out = torch.zeros(len(CLASSES) * len(x), dtype=torch.bool)
    got = msl(source, "k", {"x": tensor, "out": out, "n": n}, threads=n, threads_per_threadgroup=128)["out"]
    for (name, function), values in zip(CLASSES.items(), got.numpy().reshape(len(CLASSES), -1), strict=True):
        wrong = np.flatnonzero(values != function(x, KINDS[kind][1]))
        assert not len(wrong), f"{name}({x[wrong[0]]}) is {values[wrong[0]]}"


def evaluate(msl: Run, cases: dict[str, float], setup: str = "") -> None:
    """Each expression of O = 1, Z = 0, I = infinity, Q = NaN (known at run time only) has its value."""
    lines = "\n".join(f"  out[{i}] = float({e});" for i, e in enumerate(cases))
    source = f"""{HEAD}kernel void k(device const float* x, device float* out) {{
  float O = x[0], Z = x[1], I = x[2], Q = x[3];
{setup}
{lines}
}}"""
    args = {"x": torch.tensor([1.0, 0.0, inf, nan]), "out": torch.zeros(len(cases))}
    got = msl(source, "k", args, threads=1, threads_per_threadgroup=1)["out"].tolist()
    wrong = [f"{e} is {g}, not {v}" for (e, v), g in zip(cases.items(), got, strict=True) if g != v]
    assert not wrong, "\n".join(wrong)


def test_all_any_and_not(msl: Run) -> None:
    setup = """
  float4 f = float4(1, 2, 3, 4) * O; half3 h = half3(1, 2, 3) * half(O); uchar2 u = uchar2(3, 200); long2 l = long2(-1, 1);
  bool2 b = bool2(true, O < Z); bool4 t = bool4(true); bool3 none = bool3(false);"""
    cases = {
        "all(f > 0.0f)": 1, "all(f > 1.0f)": 0, "any(f > 3.5f)": 1, "any(f > 9.0f)": 0, "all(b)": 0, "any(b)": 1, "all(t)": 1, "any(none)": 0,
        "all(h < half3(4.0h))": 1, "any(h == half3(7.0h))": 0, "any(u > uchar2(150))": 1, "all(l == long2(-1, 1))": 1, "all(O > Z)": 1, "any(O < Z)": 0,
        "all(not(b)) || any(b)": 1, "any(not(none))": 1, "not(O > Z)": 0, "not(bool2(true, false)).y": 1, "all(!(f > 9.0f))": 1,
        "all(bool3(f.xyz > 0.0f) && bool3(true, true, false))": 0, "all(isfinite(f)) && !any(isnan(f))": 1,
    }  # fmt: skip
    evaluate(msl, cases, setup)


def test_ordered_and_comparisons_with_nan(msl: Run) -> None:
    cases = {
        "isordered(O, Z)": 1, "isordered(O, Q)": 0, "isunordered(Q, Q)": 1, "isunordered(O, I)": 0, "isunordered(float2(O, Q), float2(O)).y": 1,
        "isordered(half3(1.0h), half3(half(O), half(Q), 2.0h)).y": 0, "isordered(half3(1.0h), half3(half(O), half(Q), 2.0h)).z": 1,
        "isunordered(bfloat(Q), bfloat(O))": 1, "isnan(Q)": 1, "isnan(Q + O)": 1, "isnan(I - I)": 1, "isinf(I * 2)": 1, "Q == Q": 0, "Q != Q": 1, "O < Q": 0,
        "isinf(half(O * 70000.0f))": 1, "isnan(0.0f / Z)": 1, "signbit(-Z)": 1, "isnormal(O * 1e-39f)": 0, "isfinite(2)": 1, "isnan(packed_float2(O, Q)).y": 1,
    }  # fmt: skip
    evaluate(msl, cases)


def test_select(msl: Run) -> None:
    setup = """
  float4 a = float4(1, 2, 3, 4) * O, b = -a; half2 h = half2(1, 2), g = half2(5, 6); bool2 yes = bool2(true), no = bool2(false);
  ulong3 u = ulong3(1, 2, 3), v = ulong3(7, 8, 9); char4 c = char4(1, 2, 3, 4), d = char4(-1); bfloat4 p = bfloat4(1.0f), q = bfloat4(2.0f);"""
    cases = {
        "select(a, b, a > 2.5f).z": -3, "select(a, b, a > 2.5f).y": 2, "select(a, b, bool4(true, false, false, true)).w": -4, "select(O, Z, O > Z)": 0,
        "select(O, Z, false)": 1, "select(3, 4u, true)": 4, "select(h, g, bool2(false, true)).y": 6, "select(h, g, h > 1.5h).x": 1,
        "select(u, v, bool3(false, true, false)).y": 8, "select(u, v, u > ulong3(2)).z": 9, "select(c, d, c == char4(2)).y": -1, "select(c, d, c == char4(2)).w": 4,
        "select(c, d, a > 3.5f).w": -1, "select(p, q, isfinite(a)).x": 2, "select(yes, no, bool2(true, false)).x": 0, "select(yes, no, bool2(true, false)).y": 1,
        "select(true, false, O > Z)": 0, "select(a, b, true).x": -1, "select(a, 0.0f, a < 1.5f).x": 0, "select(Q, O, isnan(Q))": 1,
        "is_same_v<decltype(select(half(O), half(Z), true)), half>": 1, "select(uchar(200), uchar(3), O > Z)": 3, "select(bfloat(O), bfloat(3.0f), true)": 3,
    }  # fmt: skip
    evaluate(msl, cases, setup)
