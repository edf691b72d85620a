"""RMSNorm, q, k and v against float64 by their definitions; which rows run, bad input, what torch asks of an op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import norm_qkv as ops
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.norm_qkv import CASES, FAMILY, Case, norm_qkv, run
from metal_marlin.runtime.counters import counters
from metal_marlin.runtime.library import MetalKernelLibrary

Weight = Callable[..., torch.Tensor]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]


def holds(case: Case, made: tuple[torch.Tensor, ...], weight: Weight) -> None:
    """Rows of q, k and v are within twice the error of the composition in x's dtype with dequantised weights, and a
    rounding, which the composition may miss by chance."""
    x, w, three = case.tensors()
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (w.double() + case.offset)
    single = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    theirs = (single * (w.float() + case.offset)).to(x.dtype) if case.offset else single.to(x.dtype) * w
    eps = torch.finfo(x.dtype).eps
    for y, N, (codes, scales) in zip(made, case.rows, three, strict=True):
        W = weight(Product(case.M, N, case.K, case.group, case.dtype), codes, scales, None)
        exact = normed @ W.T
        allowed = 2 * ((theirs @ W.to(x.dtype).T).double() - exact).norm(dim=-1) + eps / 2 * exact.norm(dim=-1)
        if N < 4:  # few numbers are no measure of theirs
            allowed += eps * (normed.square() @ W.square().T).sqrt().norm(dim=-1)
        assert y.dtype == x.dtype
        assert y.shape == (case.M, N)
        assert ((y.cpu().double() - exact).norm(dim=-1) <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_against_float64(case: Case, device: str, weight: Weight) -> None:
    before = counters()
    made = run(case, device, case.kernel)
    launched = list(counters() - before)
    if case.kernel or case.M == 1 or (device == "cuda" and case.M == 2):
        assert launched == [ops.plan(case.M, case.dtype, case.kernel or "norm_qkv_fp4_decode")]
    else:
        assert any(name.startswith("rms_norm") for name in launched)
    holds(case, made, weight)
    assert all(torch.equal(a, b) for a, b in zip(made, run(case, device, case.kernel), strict=True))


def test_rows_are_what_plans_name() -> None:
    kernels = ("norm_qkv_fp4", "norm_qkv_fp4_decode")
    names = {ops.plan(M, d, kernel) for M in (1, 8) for d in (torch.float16, torch.bfloat16) for kernel in kernels}
    found = MetalKernelLibrary(FAMILY, device="cpu").kernels
    assert names == {name for name in found if name.startswith("norm_qkv")}
    assert len(names) == 6


@pytest.mark.parametrize("device", DEVICES)
def test_shapes(device: str) -> None:
    x, w, (q, k, v) = Case(6, (20, 8, 4), 64).tensors(device)
    flat = norm_qkv(x, w, q, k, v, 32)
    shaped = norm_qkv(x.view(2, 3, 64), w, q, k, v, 32)
    assert all(torch.equal(a, b.view(6, -1)) for a, b in zip(flat, shaped, strict=True))
    assert [t.shape for t in norm_qkv(x[:0], w, q, k, v, 32)] == [(0, 20), (0, 8), (0, 4)]
    none = (k[0][:0], k[1][:0])
    for kernel in ("norm_qkv_fp4", "norm_qkv_fp4_decode"):  # no rows of k
        a, b, c = norm_qkv(x, w, q, none, v, 32, kernel=kernel)
        assert b.shape == (6, 0)
        torch.testing.assert_close((a, c), (flat[0], flat[2]))


def test_bad_input() -> None:
    x, w, (q, k, v) = Case(6, (20, 8, 4), 64).tensors()
    with pytest.raises(ArgumentError, match=r"norm_qkv, k: scales is torch.float32, x is torch.float16"):
        norm_qkv(x, w, q, (k[0], k[1].float()), v, 32)
    with pytest.raises(ArgumentError, match=r"norm_qkv, v: x has K = 64, codes have K = 56"):
        norm_qkv(x, w, q, k, (v[0][:, :7].contiguous(), v[1]), 32)
    with pytest.raises(ArgumentError, match=r"weight is torch.float16 \(63,\); needs torch.float16 \(64,\)"):
        norm_qkv(x, w[:63], q, k, v, 32)
    with pytest.raises(ArgumentError, match="kernel is 'norm_linear_fp4'"):
        norm_qkv(x, w, q, k, v, 32, kernel="norm_linear_fp4")


def test_checked_mode_is_clean(monkeypatch: pytest.MonkeyPatch, weight: Weight) -> None:
    checked = MetalKernelLibrary(FAMILY, device="cpu", lanes=32, checked=True)
    monkeypatch.setattr(ops, "library", lambda *_: checked)
    monkeypatch.setattr(ops, "plan_kind", lambda _: "mps")
    for kernel in ("norm_qkv_fp4", "norm_qkv_fp4_decode"):
        for M, K in ((3, 168), (1, 96)):  # not aligned and aligned
            case = Case(M, (67, 20, 5), K)
            holds(case, run(case, "cpu", kernel), weight)


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    x, w, (q, k, v) = Case(6, (20, 8, 4), 64).tensors(device)
    arguments = (x, w, [q[0], k[0], v[0]], [q[1], k[1], v[1]], 1e-6, 0.0, 32, None)
    torch.library.opcheck(torch.ops.metal_marlin.norm_qkv.default, arguments)
    ours = torch.compile(lambda x: norm_qkv(x, w, q, k, v, 32)[2] + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(ours(x), norm_qkv(x, w, q, k, v, 32)[2] + 1)
