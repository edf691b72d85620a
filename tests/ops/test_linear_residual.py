"""residual + scale · x Wᵀ against float64 by the definitions of the formats; which rows run, bad input, what torch asks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import linear_residual as ops
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.linear_residual import CASES, FAMILY, Case, linear_residual, run
from metal_marlin.runtime.counters import counters
from metal_marlin.runtime.library import MetalKernelLibrary

HALF = torch.float16
Weight = Callable[..., torch.Tensor]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]


def errors(case: Case, y: torch.Tensor, weight: Weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows of y: from float64, and what is allowed: twice that of the composition in x's dtype with dequantised
    weights, and a rounding, which the composition may miss by chance."""
    x, codes, scales, extra, residual = case.tensors()
    W = weight(case.product, codes, scales, extra)
    exact = residual.double() + case.scale * (x.double() @ W.T)
    theirs = residual + case.scale * (x @ W.to(x.dtype).T)
    eps = torch.finfo(x.dtype).eps
    rounding = eps / 2 * exact.norm(dim=-1)
    if case.product.N < 4:  # few numbers are no measure of theirs
        rounding += eps * (x.double().square() @ W.square().T).sqrt().norm(dim=-1)
    return (y.cpu().double() - exact).norm(dim=-1), 2 * (theirs.double() - exact).norm(dim=-1) + rounding


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_against_float64(case: Case, device: str, weight: Weight) -> None:
    p = case.product
    before = counters()
    y = run(case, device, case.kernel)
    launched = list(counters() - before)
    again = p.M <= 48 if p.dtype != HALF else p.M in {*range(12, 17), *range(20, 33)}
    few = p.M <= 8 or (p.M <= 32 and p.K % 32 != 0 if device == "cuda" else again)
    scaled = "" if case.scale == 1 else "_scaled"
    kernel = case.kernel or f"linear_residual{scaled}_{p.format}{'_decode' * few}"
    if case.kernel or few or device == "cpu":
        assert launched == [ops.plan(p.M, p.dtype, p.format, p.zeros, kernel)]
    else:
        assert any(name.startswith("epilogue_standalone") for name in launched)
    error, allowed = errors(case, y, weight)
    assert y.dtype == p.dtype
    assert (error <= allowed).all()
    assert torch.equal(y, run(case, device, case.kernel))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("few", ["", "_decode"])
def test_scale_of_one_has_the_same_bits(few: str, device: str) -> None:
    case = Case(Product(7, 67, 160, 32))
    plain, scaled = (run(case, device, f"linear_residual{s}_fp4{few}") for s in ("", "_scaled"))
    assert torch.equal(plain, scaled)


def test_rows_are_what_plans_name() -> None:
    names = {
        ops.plan(M, d, format, zeros, f"linear_residual{scaled}_{format}{few}")
        for M in (1, 8)
        for d in (torch.float16, torch.bfloat16)
        for format, zeros in (("fp4", "none"), *(("int4", z) for z in ("none", "point", "packed", "bias")))
        for scaled in ("", "_scaled")
        for few in ("", "_decode")
    }
    assert names == set(MetalKernelLibrary(FAMILY, device="cpu").kernels)
    assert len(names) == 60


@pytest.mark.parametrize("device", DEVICES)
def test_shapes(device: str) -> None:
    x, codes, scales, _, residual = Case(Product(6, 20, 64, 32)).tensors(device)
    flat = linear_residual(x, codes, scales, 32, residual)
    assert torch.equal(linear_residual(x.view(2, 3, 64), codes, scales, 32, residual.view(2, 3, 20)).view(6, 20), flat)
    assert linear_residual(x[:0], codes, scales, 32, residual[:0]).shape == (0, 20)
    apart = torch.zeros(6 * 64 + 1, dtype=x.dtype, device=device)[1:].view(6, 64).copy_(x)  # not on 16 bytes
    for kernel in ("linear_residual_fp4", "linear_residual_fp4_decode"):
        aligned = linear_residual(x, codes, scales, 32, residual, kernel=kernel)
        torch.testing.assert_close(linear_residual(apart, codes, scales, 32, residual, kernel=kernel), aligned)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"residual": torch.zeros(5, 20, dtype=HALF)}, r"residual is torch.float16 \(5, 20\); needs .* \(6, 20\)"),
        ({"residual": torch.zeros(6, 20)}, "residual is torch.float32"),
        ({"scales": torch.zeros(20, 2)}, "scales is torch.float32, x is torch.float16"),
        ({"scale": 2.0, "kernel": "linear_residual_fp4"}, r"scale = 2\.0; linear_residual_fp4 has 1"),
        ({"kernel": "linear_residual_int4"}, "kernel is 'linear_residual_int4'"),
        ({"format": "int2", "codes": torch.zeros(20, 4, dtype=torch.int32)}, "W is int2, x is torch.float16"),
    ],
)
def test_bad_input(change: dict[str, object], said: str) -> None:
    x, codes, scales, _, residual = Case(Product(6, 20, 64, 32)).tensors()
    given: dict[str, object] = {"x": x, "codes": codes, "scales": scales, "group_size": 32, "residual": residual}
    with pytest.raises(ArgumentError, match=said):
        linear_residual(**{**given, **change})  # type: ignore[arg-type]


def test_checked_mode_is_clean(monkeypatch: pytest.MonkeyPatch, weight: Weight) -> None:
    checked = MetalKernelLibrary(FAMILY, device="cpu", lanes=32, checked=True)
    monkeypatch.setattr(ops, "library", lambda *_: checked)
    monkeypatch.setattr(ops, "plan_kind", lambda _: "mps")
    for d, format, zeros in ((HALF, "fp4", "none"), (torch.bfloat16, "int4", "packed")):
        for few in ("", "_decode"):
            case = Case(Product(3, 67, 168, 32, d, None, format, zeros), 0.375)
            error, allowed = errors(case, run(case, "cpu", f"linear_residual_scaled_{format}{few}"), weight)
            assert (error <= allowed).all()


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    x, codes, scales, _, residual = Case(Product(6, 20, 64, 32)).tensors(device)
    arguments = (x, codes, scales, None, residual, "fp4", "none", 32, 0.5, None)
    torch.library.opcheck(torch.ops.metal_marlin.linear_residual.default, arguments)
    ours = torch.compile(
        lambda x: linear_residual(x, codes, scales, 32, residual) + 1, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(ours(x), linear_residual(x, codes, scales, 32, residual) + 1)
