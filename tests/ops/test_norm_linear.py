"""RMSNorm and the product that follows it against float64 by their definitions; which rows run, bad input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import norm_linear as ops
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.norm_linear import CASES, FAMILY, Case, norm_linear, run
from metal_marlin.runtime.counters import counters
from metal_marlin.runtime.library import MetalKernelLibrary

HALF = torch.float16
Weight = Callable[..., torch.Tensor]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]


def composed(x: torch.Tensor, w: torch.Tensor, offset: float) -> torch.Tensor:
    """The norm in x's dtype, as models of the Llama (offset 0) and Gemma families write it."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (normed * (w.float() + offset)).to(x.dtype) if offset else normed.to(x.dtype) * w


def errors(case: Case, y: torch.Tensor, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows of y: from float64, and what is allowed: twice that of the composition in x's dtype with dequantised
    weights, and a rounding, which the composition may miss by chance."""
    x, w, codes, scales, extra, residual = case.tensors()
    W, wide = weight(case.product, codes, scales, extra), x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (w.double() + case.offset)
    exact, product = normed @ W.T, composed(x, w, case.offset) @ W.to(x.dtype).T
    if residual is not None:
        exact, product = residual.double() + exact, residual + product
    theirs = product.double() - exact
    rounding = torch.finfo(x.dtype).eps / 2 * exact.norm(dim=-1)
    if case.product.N < 4:  # few numbers are no measure of theirs
        rounding += torch.finfo(x.dtype).eps * (normed.square() @ W.square().T).sqrt().norm(dim=-1)
    return (y.cpu().double() - exact).norm(dim=-1), 2 * theirs.norm(dim=-1) + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_against_float64(case: Case, device: str, weight: Weight) -> None:
    p = case.product
    before = counters()
    y = run(case, device, case.kernel)
    launched = list(counters() - before)
    if case.kernel or p.M == 1 or (device == "cuda" and p.M <= 8):
        kernel = case.kernel or f"norm_linear{'_residual' * case.added}_{p.format}_decode"
        assert launched == [ops.plan(p.M, p.dtype, p.format, p.zeros, kernel, case.added)]
    else:
        assert any(name.startswith("rms_norm") for name in launched)
    error, allowed = errors(case, y, weight)
    assert y.dtype == p.dtype
    assert (error <= allowed).all()
    assert torch.equal(y, run(case, device, case.kernel))


def test_rows_are_what_plans_name() -> None:
    names = {
        ops.plan(M, d, format, zeros, f"norm_linear{'_residual' * added}_{format}{few}", added)
        for M in (1, 8)
        for d in (torch.float16, torch.bfloat16)
        for format, zeros in (("fp4", "none"), *(("int4", z) for z in ("none", "point", "packed", "bias")))
        for few in ("", "_decode")
        for added in (False, True)
    }
    kernels = MetalKernelLibrary(FAMILY, device="cpu").kernels
    assert names == {name for name in kernels if name.startswith("norm_linear")}
    assert len(names) == 60


@pytest.mark.parametrize("device", DEVICES)
def test_shapes(device: str) -> None:
    x, w, codes, scales, *_ = Case(Product(6, 20, 64, 32)).tensors(device)
    flat = norm_linear(x, w, codes, scales, 32)
    assert torch.equal(norm_linear(x.view(2, 3, 64), w, codes, scales, 32), flat.view(2, 3, 20))
    assert norm_linear(x[:0], w, codes, scales, 32).shape == (0, 20)
    apart = torch.zeros(65, dtype=x.dtype, device=device)[1:].copy_(w)  # not on 16 bytes
    for kernel in ("norm_linear_fp4", "norm_linear_fp4_decode"):
        aligned = norm_linear(x, w, codes, scales, 32, kernel=kernel)
        torch.testing.assert_close(norm_linear(x, apart, codes, scales, 32, kernel=kernel), aligned)
        halved = norm_linear(x, w, codes, scales, 32, eps=3.0, kernel=kernel)  # about 1 / sqrt(1 + 3) of it
        assert 0.4 < (halved.norm() / aligned.norm()).item() < 0.6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": torch.zeros(63, dtype=HALF)}, r"weight is torch.float16 \(63,\); needs torch.float16 \(64,\)"),
        ({"weight": torch.zeros(64)}, "weight is torch.float32"),
        ({"scales": torch.zeros(20, 2)}, "scales is torch.float32, x is torch.float16"),
        ({"kernel": "norm_linear_int4"}, "kernel is 'norm_linear_int4'"),
        ({"kernel": "norm_linear_residual_fp4"}, "kernel is 'norm_linear_residual_fp4'"),
        ({"residual": torch.zeros(5, 20, dtype=HALF)}, r"residual is torch.float16 \(5, 20\); needs .* \(6, 20\)"),
        ({"format": "int2", "codes": torch.zeros(20, 4, dtype=torch.int32)}, "W is int2, x is torch.float16"),
    ],
)
def test_bad_input(change: dict[str, object], said: str) -> None:
    x, w, codes, scales, *_ = Case(Product(6, 20, 64, 32)).tensors()
    given: dict[str, object] = {"x": x, "weight": w, "codes": codes, "scales": scales, "group_size": 32}
    with pytest.raises(ArgumentError, match=said):
        norm_linear(**{**given, **change})  # type: ignore[arg-type]


def test_checked_mode_is_clean(monkeypatch: pytest.MonkeyPatch, weight: Weight) -> None:
    checked = MetalKernelLibrary(FAMILY, device="cpu", lanes=32, checked=True)
    monkeypatch.setattr(ops, "library", lambda *_: checked)
    monkeypatch.setattr(ops, "plan_kind", lambda _: "mps")
    for d, format, zeros in ((HALF, "fp4", "none"), (torch.bfloat16, "int4", "packed")):
        for few in ("", "_decode"):
            for M, K in ((3, 168), (1, 96)):  # not aligned and aligned
                case = Case(Product(M, 67, K, 32, d, None, format, zeros), 1.0, added=M == 3)
                kernel = f"norm_linear{'_residual' * case.added}_{format}{few}"
                error, allowed = errors(case, run(case, "cpu", kernel), weight)
                assert (error <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    x, w, codes, scales, *_ = Case(Product(6, 20, 64, 32)).tensors(device)
    arguments = (x, w, codes, scales, None, None, 1e-6, 0.0, "fp4", "none", 32, None)
    torch.library.opcheck(torch.ops.metal_marlin.norm_linear.default, arguments)
    ours = torch.compile(lambda x: norm_linear(x, w, codes, scales, 32) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(ours(x), norm_linear(x, w, codes, scales, 32) + 1)
