"""Activations against float64; tails, extremes, bad input, what torch asks of an op."""

from __future__ import annotations

import math

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.ops.activation import ACTIVATIONS, CASES, FAMILY, Case, activation, gated_activation

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-22}


def exact(name: str, x: torch.Tensor) -> torch.Tensor:
    """By the definitions, in float64."""
    x = x.cpu().double()
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": x * 0.5 * torch.special.erfc(-x / math.sqrt(2)),
        "gelu_tanh": 0.5 * x * (1 + tanh),
        "quick_gelu": x / (1 + torch.exp(-1.702 * x)),
        "relu": x.clamp(min=0),
    }[name]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_definition(case: Case, device: str) -> None:
    unit = ROUNDING[case.dtype]
    x = case.tensor(1, device)
    y, wanted = activation(x, case.activation), exact(case.activation, x)
    assert y.dtype == x.dtype
    assert ((y.cpu().double() - wanted).abs() <= unit * wanted.abs() + 1e-6).all()
    x = case.tensor(2, device)
    gate, up = x[..., : case.width], x[..., case.width :]
    y, wanted = gated_activation(x, case.activation), exact(case.activation, gate) * up.cpu().double()
    assert y.shape == gate.shape
    assert ((y.cpu().double() - wanted).abs() <= unit * wanted.abs() + 1e-5).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_extremes(name: str, device: str) -> None:
    x = torch.tensor([-1e4, -88.0, -6.0, -1e-3, 0.0, 1e-3, 6.0, 88.0, 1e4, float("inf"), float("nan")], device=device)
    y, wanted = activation(x, name).cpu().double(), exact(name, x[:-2])
    torch.testing.assert_close(y[:-2], wanted, rtol=3e-6, atol=1e-7)
    assert y[-2] == float("inf")
    assert y[-1].isnan()


def test_32_lanes_agree_with_one() -> None:
    x = Case(3, 100, "gelu", torch.float32).tensor(2)
    y = torch.full((3, 100), float("nan"))
    library = MetalKernelLibrary(FAMILY, device="cpu", lanes=32)
    dispatch_kernel(
        library,
        "gated_activation_gelu__tf32",
        threadgroups=(2, 3),
        threads_per_threadgroup=64,
        args=(x, y, {"width": 100, "run": 64}),
    )
    torch.testing.assert_close(y, gated_activation(x, "gelu"), rtol=1e-6, atol=1e-7)


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r"shape \(2, 3\); needs \[..., 2 F\]"):
        gated_activation(torch.ones(2, 3))
    with pytest.raises(ArgumentError, match="activation = 'swish'; there are silu"):
        activation(torch.ones(2), "swish")
    with pytest.raises(ArgumentError, match=r"x is torch\.int32"):
        activation(torch.ones(2, dtype=torch.int32))


def test_torch_ops() -> None:
    x = torch.randn(3, 8)
    torch.library.opcheck(torch.ops.metal_marlin.activation.default, (x, "silu"))
    torch.library.opcheck(torch.ops.metal_marlin.gated_activation.default, (x, "gelu"))
    compiled = torch.compile(lambda x: gated_activation(x) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), gated_activation(x) + 1)
