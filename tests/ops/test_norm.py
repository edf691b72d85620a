"""Norms against float64 and torch's composition; tails, large means, bad input, what torch asks of an op."""

from __future__ import annotations

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.ops.norm import CASES, FAMILY, Case, layer_norm, rms_norm, rms_norm_residual

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-23}  # float rounds at every step


def close(y: torch.Tensor, exact: torch.Tensor, composed: torch.Tensor) -> None:
    """Per row not worse than twice torch's composition and a rounding, nowhere beyond eight times its worst."""
    unit, size = ROUNDING[y.dtype], exact.norm(dim=-1)
    ours, theirs = ((t.cpu().double() - exact).norm(dim=-1) for t in (y, composed))
    assert (ours <= 2 * theirs + unit * size).all(), (ours / size, theirs / size)
    if y.numel():
        worst = (composed.cpu().double() - exact).abs().max()
        assert (y.cpu().double() - exact).abs().max() <= 8 * worst + unit * exact.abs().max()


def exact_rms(x: torch.Tensor, w: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    x = x.cpu().double()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * (w.cpu().double() + offset)


def llama(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """As transformers' LlamaRMSNorm computes it."""
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_rms_norm(case: Case, device: str) -> None:
    x, residual, w, _ = case.tensors(device)
    y = rms_norm(x, w, 1e-5)
    assert y.dtype == x.dtype
    close(y, exact_rms(x, w, 1e-5), llama(x, w, 1e-5))
    gemma = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5) * (1 + w.float())).to(x.dtype)
    close(rms_norm(x, w, 1e-5, offset=1.0), exact_rms(x, w, 1e-5, 1.0), gemma)
    y, h = rms_norm_residual(x, residual, w, 1e-5)
    assert torch.equal(h, x + residual)
    close(y, exact_rms(h, w, 1e-5), llama(h, w, 1e-5))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(dtype: torch.dtype, device: str) -> None:
    rng = torch.Generator().manual_seed(3)
    x, r, w, b = (torch.randn(s, generator=rng).to(dtype) for s in ((3, 40), (3, 40), (40,), (40,)))
    g, h = torch.randn(3, 40, generator=rng).to(dtype), torch.randn(3, 40, generator=rng).to(dtype)
    rms = lambda x, w: torch.nn.functional.rms_norm(x, (40,), w, 1e-5)  # noqa: E731
    layer = lambda x, w, b: torch.nn.functional.layer_norm(x, (40,), w, b, 1e-5)  # noqa: E731
    ways = [
        (lambda x, w: rms_norm(x, w, 1e-5), rms, (x, w), (g,)),
        (lambda x, w, b: layer_norm(x, w, b, 1e-5), layer, (x, w, b), (g,)),
        (lambda x, r, w: rms_norm_residual(x, r, w, 1e-5), lambda x, r, w: (rms(x + r, w), x + r), (x, r, w), (g, h)),
    ]
    for ours, theirs, inputs, grads in ways:
        got = [t.detach().clone().to(device).requires_grad_() for t in inputs]
        made = ours(*got)
        torch.autograd.backward(made if isinstance(made, tuple) else (made,), [t.to(device) for t in grads])
        want = [t.double().requires_grad_() for t in inputs]
        made = theirs(*want)
        torch.autograd.backward(made if isinstance(made, tuple) else (made,), [t.double() for t in grads])
        for a, e in zip(got, want, strict=True):
            assert a.grad is not None
            assert a.grad.dtype == dtype
            torch.testing.assert_close(a.grad.cpu().double(), e.grad, rtol=4 * ROUNDING[dtype], atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_layer_norm(case: Case, biased: bool, device: str) -> None:
    x, _, w, b = case.tensors(device)
    wide = x.cpu().double()
    d = wide - wide.mean(-1, keepdim=True)
    exact = d * torch.rsqrt((d * d).mean(-1, keepdim=True) + 1e-5) * w.cpu().double()
    exact = exact + b.cpu().double() if biased else exact
    composed = torch.nn.functional.layer_norm(x, x.shape[-1:], w, b if biased else None)
    close(layer_norm(x, w, b if biased else None), exact, composed)


@pytest.mark.parametrize("kernel", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("width", [1, 31, 33, 600, 2100])
def test_32_lanes_agree_with_one(kernel: str, width: int) -> None:
    x, _, w, b = Case(3, width, torch.float32).tensors()
    y = torch.full_like(x, float("nan"))
    library = MetalKernelLibrary(FAMILY, device="cpu", lanes=32)
    args = (x, w, *((b,) if kernel == "layer_norm" else ()), y)
    shape, numbers = {"width": width, "bias": 1}, {"eps": 1e-5, "offset": 0.0}
    dispatch_kernel(
        library, f"{kernel}__tf32", threadgroups=3, threads_per_threadgroup=160, args=(*args, shape, numbers)
    )
    one = rms_norm(x, w, 1e-5) if kernel == "rms_norm" else layer_norm(x, w, b)
    torch.testing.assert_close(y, one, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_special_values(device: str) -> None:
    w = torch.ones(40, device=device)
    assert torch.equal(rms_norm(torch.zeros(2, 40, device=device), w), torch.zeros(2, 40, device=device))
    x = torch.ones(3, 40, device=device)
    x[0, 3], x[1, 39] = float("nan"), float("inf")
    y = rms_norm(x, w)
    assert y[0].isnan().all()
    assert y[1].isnan().any()
    torch.testing.assert_close(y[2], w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_writes_only_its_output(device: str) -> None:
    x, _, w, _ = Case(3, 100).tensors(device)
    memory = torch.full((5, 100), float("nan"), dtype=x.dtype, device=device)
    rms_norm(x, w, out=memory[1:4])
    assert memory[0].isnan().all()
    assert memory[4].isnan().all()
    assert torch.equal(memory[1:4], rms_norm(x, w))


def test_bad_input() -> None:
    x, w = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ArgumentError, match=r"weight is torch.float32 \(7,\); x torch.float32 \(2, 8\) needs"):
        rms_norm(x, torch.ones(7))
    with pytest.raises(ArgumentError, match=r"weight is torch\.float16"):
        rms_norm(x, w.half())
    with pytest.raises(ArgumentError, match=r"residual is torch.float32 \(1, 8\)"):
        rms_norm_residual(x, x[:1], w)
    with pytest.raises(ArgumentError, match=r"bias is torch.float32 \(1,\)"):
        layer_norm(x, w, torch.ones(1))
    with pytest.raises(ArgumentError, match=r"x is torch\.float64"):
        rms_norm(x.double(), w.double())
    with pytest.raises(ArgumentError, match="contiguous"):
        rms_norm(torch.ones(8, 2).T, w)
    with pytest.raises(ArgumentError, match=r"shape \(\)"):
        rms_norm(torch.ones(()), w)


def test_torch_ops() -> None:
    x, r, w, b = Case(3, 40, torch.float32).tensors()
    ops = torch.ops.metal_marlin
    torch.library.opcheck(ops.rms_norm.default, (x, w, 1e-6, 0.0))
    torch.library.opcheck(ops.rms_norm_residual.default, (x, r, w, 1e-6, 0.0))
    torch.library.opcheck(ops.layer_norm.default, (x, w, b, 1e-6))
    torch.library.opcheck(ops.rms_norm_out.default, (x, w, 1e-6, 0.0, torch.empty_like(x)))
    compiled = torch.compile(lambda x: rms_norm(x, w) + layer_norm(x, w), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), rms_norm(x, w) + layer_norm(x, w))
