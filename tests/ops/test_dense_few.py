"""linear_few and each of its rows against float64 by the definition of FP4; bad input, what torch asks of an op."""

from __future__ import annotations

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import dense_few
from metal_marlin.ops.dense_few import CASES, FAMILY, GEMV, SMALL, linear_few, usual
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.runtime.counters import counters
from metal_marlin.runtime.library import MetalKernelLibrary

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def weights(case: Case, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[N, K] by the format's definition and not by the codec."""
    nibbles = (codes.cpu().long().unsqueeze(-1) >> 4 * torch.arange(8)) & 15
    group = torch.arange(case.K) // case.group
    return VALUES[nibbles.flatten(-2)] * scales.cpu().double()[..., group]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in CASES if not c.model], ids=str)
def test_every_row(case: Case, device: str) -> None:
    x, codes, scales, _ = case.tensors(device)
    W, wide = weights(case, codes, scales), x.cpu().double()
    exact = wide @ W.T
    theirs = ((x.cpu() @ W.to(x.dtype).T).double() - exact).norm(dim=-1)
    allowed = 2 * theirs + EPS[case.dtype] * exact.norm(dim=-1) + 2.0**-22 * (wide.abs() @ W.abs().T).norm(dim=-1)
    for kernel in (None, *GEMV, *(SMALL if case.dtype != torch.float32 else ())):
        before = counters()
        y = linear_few(x, codes, scales, case.group, kernel=kernel)
        launched = [name.partition("__")[0] for name in counters() - before]
        assert launched == [kernel or usual(case.M, case.dtype)]
        assert y.dtype == x.dtype
        assert ((y.cpu().double() - exact).norm(dim=-1) <= allowed).all(), kernel
        assert torch.equal(y, linear_few(x, codes, scales, case.group, kernel=kernel))


def test_bad_input() -> None:
    x, codes, scales, _ = Case(17, 5, 64, 32).tensors()
    with pytest.raises(ArgumentError, match="M = 17; at most 16"):
        linear_few(x, codes, scales, 32)
    with pytest.raises(ArgumentError, match="needs fp4 and one dtype"):
        linear_few(x[:2], codes, scales.float(), 32)
    with pytest.raises(ArgumentError, match="kernel is 'dense_gemm_small_batch_fp4'"):
        linear_few(x[:2].float(), codes, scales.float(), 32, kernel=SMALL[0])
    assert linear_few(x[:0], codes, scales, 32).shape == (0, 5)


def test_checked_mode_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = MetalKernelLibrary(FAMILY, device="cpu", lanes=32, checked=True)
    monkeypatch.setattr(dense_few, "library", lambda *_: checked)
    monkeypatch.setattr(dense_few, "plan_kind", lambda _: "mps")
    for dtype in EPS:
        small = Case(3, 67, 328, 64, dtype)
        x, codes, scales, _ = small.tensors()
        exact = x.double() @ weights(small, codes, scales).T
        for kernel in (*GEMV, *(SMALL if dtype != torch.float32 else ())):
            y = linear_few(x, codes, scales, 64, kernel=kernel).double()
            assert ((y - exact).norm(dim=-1) <= 2 * EPS[dtype] * exact.norm(dim=-1) + 1e-4).all()


def test_torch_ops() -> None:
    x, codes, scales, _ = Case(3, 5, 64, 32).tensors()
    torch.library.opcheck(torch.ops.metal_marlin.linear_few.default, (x, codes, scales, None, "fp4", "none", 32, None))
    compiled = torch.compile(lambda x: linear_few(x, codes, scales, 32) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear_few(x, codes, scales, 32) + 1)
