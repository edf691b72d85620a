"""batched_linear and grouped_scores against float64 by their definitions; broadcasts, masks, views, bad input."""

from __future__ import annotations

import math

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops.batched import (
    BATCHED_CASES,
    FAMILY,
    SCORES_CASES,
    BatchedCase,
    ScoresCase,
    batched_linear,
    grouped_scores,
)
from metal_marlin.runtime.counters import counters

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def weights(case: BatchedCase, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[B, N, K] by the format's definition and not by the codec."""
    nibbles = (codes.cpu().long().unsqueeze(-1) >> 4 * torch.arange(8)) & 15
    group = torch.arange(case.K) // case.group
    return VALUES[nibbles.flatten(-2)] * scales.cpu().double()[..., group]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in BATCHED_CASES if not c.model], ids=str)
def test_batched_linear(case: BatchedCase, device: str) -> None:
    x, codes, scales = case.tensors(device)
    before = counters()
    y = batched_linear(x, codes, scales, case.group)
    assert [name for name in counters() - before if name.startswith("marlin_gemm_batched_fp4")]
    W, wide = weights(case, codes, scales), x.cpu().double()
    exact = wide @ W.mT
    B = max(t.shape[0] for t in (x, codes, scales))
    assert y.dtype == x.dtype
    assert y.shape == (B, case.M, case.N)
    theirs = ((x.cpu() @ W.to(x.dtype).mT).double() - exact).norm(dim=-1)
    allowed = 2 * theirs + EPS[case.dtype] * exact.norm(dim=-1) + 2.0**-22 * (wide.abs() @ W.abs().mT).norm(dim=-1)
    assert ((y.cpu().double() - exact).norm(dim=-1) <= allowed).all()
    assert torch.equal(y, batched_linear(x, codes, scales, case.group))


def scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """One head at a time."""
    q, k = q.cpu().double(), k.cpu().double()
    ratio, shift = q.shape[1] // k.shape[1], k.shape[2] - q.shape[2]
    found = torch.stack(
        [torch.stack([q[b, h] @ k[b, h // ratio].T * scale for h in range(q.shape[1])]) for b in range(q.shape[0])]
    )
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    return torch.where(j <= i + shift, found, -math.inf) if causal else found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in SCORES_CASES if not c.model], ids=str)
def test_grouped_scores(case: ScoresCase, device: str) -> None:
    q, k = case.tensors(device)
    before = counters()
    s = grouped_scores(q, k, 0.25, case.causal)
    assert [name for name in counters() - before if name.startswith("marlin_gemm_grouped_attention")]
    exact = scores(q, k, 0.25, case.causal)
    assert s.dtype == q.dtype
    torch.testing.assert_close(s.cpu().double(), exact, rtol=EPS[case.dtype], atol=2e-5)
    assert torch.equal(s, grouped_scores(q, k, 0.25, case.causal))


@pytest.mark.parametrize("device", DEVICES)
def test_the_usual_scale_and_odd_addresses(device: str) -> None:
    case = ScoresCase(1, 2, 1, 5, 9, 64, dtype=torch.float32)
    q, k = case.tensors(device)
    torch.testing.assert_close(grouped_scores(q, k).cpu().double(), scores(q, k, 1 / 8, False), rtol=1e-5, atol=1e-5)
    moved = torch.zeros(q.numel() + 1, device=device)[1:].view_as(q).copy_(q)
    assert torch.equal(grouped_scores(moved, k), grouped_scores(q, k))
    small = BatchedCase(2, 3, 5, 64, 32)
    x, codes, scales = small.tensors(device)
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype, device=device)[1:].view_as(x).copy_(x)
    assert torch.equal(batched_linear(shifted, codes, scales, 32), batched_linear(x, codes, scales, 32))


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device: str) -> None:
    x, codes, scales = BatchedCase(2, 3, 5, 64, 32).tensors(device)
    assert batched_linear(x[:, :0], codes, scales, 32).shape == (2, 0, 5)
    assert batched_linear(x[:0], codes[:0], scales[:0], 32).shape == (0, 3, 5)
    q, k = ScoresCase(1, 2, 1, 5, 9, 64).tensors(device)
    assert grouped_scores(q[:, :, :0], k).shape == (1, 2, 0, 9)


def test_bad_input() -> None:
    x, codes, scales = BatchedCase(2, 3, 5, 64, 32).tensors()
    with pytest.raises(ArgumentError, match=r"x \[B, M, K\]"):
        batched_linear(x[0], codes, scales, 32)
    with pytest.raises(ArgumentError, match=r"B of x \(3, 3, 64\)"):
        batched_linear(torch.ones(3, 3, 64, dtype=x.dtype), codes, scales, 32)
    with pytest.raises(ArgumentError, match="x has K = 32, codes have K = 64"):
        batched_linear(x[..., :32].contiguous(), codes, scales, 32)
    with pytest.raises(ArgumentError, match=r"scales is torch\.float32, x is torch\.float16"):
        batched_linear(x, codes, scales.float(), 32)
    q, k = ScoresCase(1, 3, 1, 5, 9, 64).tensors()
    with pytest.raises(ArgumentError, match="D = 32; it is one of 64"):
        grouped_scores(q[..., :32].contiguous(), k[..., :32].contiguous())
    with pytest.raises(ArgumentError, match="H = 3 is no multiple of Hk = 2"):
        grouped_scores(q, k.repeat(1, 2, 1, 1))


def test_checked_mode_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row under the checker, with tails in every dimension."""
    from metal_marlin.ops import batched
    from metal_marlin.runtime.library import MetalKernelLibrary

    checked = MetalKernelLibrary(FAMILY, device="cpu", lanes=32, checked=True)
    monkeypatch.setattr(batched, "library", lambda *_: checked)
    monkeypatch.setattr(batched, "plan_kind", lambda _: "mps")
    for dtype in EPS:
        small = BatchedCase(2, 3, 67, 72, 72, dtype)
        x, codes, scales = small.tensors()
        exact = x.double() @ weights(small, codes, scales).mT
        y = batched_linear(x, codes, scales, 72).double()
        assert ((y - exact).norm(dim=-1) <= 2 * EPS[dtype] * exact.norm(dim=-1) + 1e-4).all()
        q, k = ScoresCase(1, 2, 1, 3, 67, 80, True, dtype).tensors()
        s = grouped_scores(q, k, 0.25, True).double()
        torch.testing.assert_close(s, scores(q, k, 0.25, True), rtol=EPS[dtype], atol=2e-5)


def test_torch_ops() -> None:
    x, codes, scales = BatchedCase(2, 3, 5, 64, 32).tensors()
    torch.library.opcheck(torch.ops.metal_marlin.batched_linear.default, (x, codes, scales, 32))
    q, k = ScoresCase(1, 2, 1, 3, 5, 64).tensors()
    torch.library.opcheck(torch.ops.metal_marlin.grouped_scores.default, (q, k, None, True))
    compiled = torch.compile(lambda q, k: grouped_scores(q, k, causal=True) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k), grouped_scores(q, k, causal=True) + 1)
