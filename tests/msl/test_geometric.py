"""Geometric functions and mix, step, smoothstep on vectors, against float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
RELATIVE = {"float": 2e-6, "half": 2.0**-10, "bfloat": 2.0**-7}


def dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sum(x * y, axis=-1, keepdims=True)


def refract(x: np.ndarray, n: np.ndarray, eta: float) -> np.ndarray:
    d = dot(x, n)
    k = 1 - eta * eta * (1 - d * d)
    return np.where(k < 0, 0.0, eta * x - (eta * d + np.sqrt(np.abs(k))) * n)


def normalized(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(dot(x, x))


# scalars come back as a vector of equal components
FUNCTIONS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "dot(x, y)": lambda x, y, z: dot(x, y),
    "length(x)": lambda x, y, z: np.sqrt(dot(x, x)),
    "length_squared(x)": lambda x, y, z: dot(x, x),
    "distance(x, y)": lambda x, y, z: np.sqrt(dot(x - y, x - y)),
    "distance_squared(x, y)": lambda x, y, z: dot(x - y, x - y),
    "normalize(x)": lambda x, y, z: normalized(x),
    "reflect(x, z)": lambda x, y, z: x - 2 * dot(x, z) * z,
    "refract(z, -z, 0.75f)": lambda x, y, z: refract(z, -z, 0.75),
    "refract(y, z, {t}(1.5f))": lambda x, y, z: refract(y, z, 1.5),
    "faceforward(x, y, z)": lambda x, y, z: np.where(dot(y, z) < 0, x, -x),
    "mix(x, y, {t}(0.25f))": lambda x, y, z: x + (y - x) * 0.25,
    "mix(x, y, abs(z))": lambda x, y, z: x + (y - x) * np.abs(z),
    "step(x, y)": lambda x, y, z: np.where(y < x, 0.0, 1.0),
    "fast::normalize(y)": lambda x, y, z: normalized(y),
    "precise::length(z)": lambda x, y, z: np.sqrt(dot(z, z)),
}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_against_float64(msl: Run, kind: str, width: int) -> None:
    rng, n = np.random.default_rng(width), 256
    x, y, z = rng.uniform(-2, 2, (3, n, width))
    y, z = normalized(y), normalized(z)
    tensors = [torch.from_numpy(v).to(DTYPES[kind]) for v in (x, y, z)]
    x, y, z = (t.double().numpy() for t in tensors)
    stored = f"packed_{kind}3" if width == 3 else f"{kind}{width}"
    lines = "\n".join(f"  out[{k}u * n + i] = {kind}{width}({e.format(t=kind)});" for k, e in enumerate(FUNCTIONS))
    source = f"""{HEAD}kernel void k(device const {stored}* xs, device const {stored}* ys, device const {stored}* zs, device {stored}* out,
    constant uint& n, uint i [[thread_position_in_grid]]) {{
  {kind}{width} x = xs[i], y = ys[i], z = zs[i];
{lines}
}}"""
    args = dict(zip(("xs", "ys", "zs"), tensors, strict=True))
    args |= {"out": torch.zeros(len(FUNCTIONS), n, width, dtype=DTYPES[kind])}
    got = msl(source, "k", {**args, "n": n}, threads=n, threads_per_threadgroup=64)["out"].double().numpy()
    for (name, function), values in zip(FUNCTIONS.items(), got, strict=True):
        want = np.broadcast_to(function(x, y, z), values.shape)
        near = (
            np.abs(1 - 1.5**2 * (1 - dot(y, z) ** 2)) < 0.02 if name.startswith("refract(y") else np.zeros((n, 1), bool)
        )
        off = np.abs(values - want) > RELATIVE[kind] * np.maximum(np.abs(want), 1)
        assert not np.any(off & ~near), name


def test_cross(msl: Run) -> None:
    rng = np.random.default_rng(4)
    x, y = rng.uniform(-1, 1, (2, 64, 3)).astype(np.float32)
    source = (
        HEAD
        + """
    kernel void k(device const packed_float3* x, device const packed_float3* y, device packed_float3* out, uint i [[thread_position_in_grid]]) {
      out[i] = cross(float3(x[i]), y[i]);
    }"""
    )
    args = {"x": torch.from_numpy(x), "y": torch.from_numpy(y), "out": torch.zeros(64, 3)}
    got = msl(source, "k", args, threads=64, threads_per_threadgroup=32)["out"].numpy()
    np.testing.assert_allclose(got, np.cross(x.astype(np.float64), y.astype(np.float64)), atol=1e-6)


def test_smoothstep_and_exact_values(msl: Run) -> None:
    source = (
        HEAD
        + """
    kernel void k(device float4* out, constant float4& x) {
      out[0] = smoothstep(0.0f, 1.0f, x);
      out[1] = float4(dot(half4(x), half4(1.0h)), length(x.xy * 0.0f + float2(3, 4)), distance(x, x), length(packed_float2(6, 8)));
      out[2] = float4(normalize(float3(0, 0, 5) * x.w), distance_squared(float2(1, 2), float2(2, 4) * x.w));
      out[3] = float4(cross(half3(1, 0, 0), half3(0, half(x.w), 0)), dot(bfloat2(1.0f, 2.0f), bfloat2(3.0f, 4.0f)));
    }"""
    )
    x = torch.tensor([-1.0, 0.25, 0.5, 1.0])
    got = msl(source, "k", {"out": torch.zeros(4, 4), "x": x.tolist()}, threads=1, threads_per_threadgroup=1)["out"]
    assert got.tolist() == [[0, 0.15625, 0.5, 1], [0.75, 5, 0, 10], [0, 0, 1, 5], [0, 0, 1, 11]]
