"""dense_linear and linear_split against float64 by their definitions; how stream-K shares units, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import dense
from metal_marlin.ops.dense import DENSE_CASES, FAMILY, SPLIT, SPLIT_CASES, DenseCase, dense_linear, linear_split, plan
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.runtime.counters import counters
from metal_marlin.runtime.library import MetalKernelLibrary

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-22}
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
SMALL = [case for case in SPLIT_CASES if not case.model]


def weights(case: Case, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[N, K] by the format's definition and not by the codec."""
    nibbles = (codes.cpu().long().unsqueeze(-1) >> 4 * torch.arange(8)) & 15
    group = torch.arange(case.K) // case.group
    return VALUES[nibbles.flatten(-2)] * scales.cpu().double()[..., group]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [c for c in DENSE_CASES if not c.model], ids=str)
def test_dense_linear(case: DenseCase, device: str) -> None:
    x, w = case.tensors(device)
    before = counters()
    y = dense_linear(x, w, kernel=case.kernel)
    assert [name.partition("__")[0] for name in counters() - before] == [case.kernel]
    exact = x.cpu().double() @ w.cpu().double().T
    sums = x.cpu().double().abs() @ w.cpu().double().abs().T
    assert y.dtype == x.dtype
    assert ((y.cpu().double() - exact).abs() <= EPS[case.dtype] * exact.abs() + 2.0**-20 * sums).all()
    assert torch.equal(y, dense_linear(x, w, kernel=case.kernel))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", SPLIT)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_linear_split(case: Case, kernel: str, device: str) -> None:
    x, codes, scales, _ = case.tensors(device)
    before = counters()
    y = linear_split(x, codes, scales, case.group, kernel=kernel)
    launched = {name.partition("__")[0] for name in counters() - before}
    assert launched == {kernel, "dense_splitk_reduce"} | ({"marlin_zero_reduction"} if kernel == SPLIT[1] else set())
    W, wide = weights(case, codes, scales), x.cpu().double()
    exact = wide @ W.T
    theirs = ((x.cpu() @ W.to(x.dtype).T).double() - exact).norm(dim=-1)
    allowed = 2 * theirs + EPS[case.dtype] * exact.norm(dim=-1) + 2.0**-22 * (wide.abs() @ W.abs().T).norm(dim=-1)
    assert y.dtype == x.dtype
    assert ((y.cpu().double() - exact).norm(dim=-1) <= allowed).all()
    assert torch.equal(y, linear_split(x, codes, scales, case.group, kernel=kernel))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stream_k_has_room_for_every_part(device: str) -> None:
    """Units handed out one by one: no tile has more parts than were planned, shares differ by one at most."""
    for M, N, K in ((1, 64, 64), (1, 67, 416), (130, 200, 1032), (128, 4096, 14336), (512, 640, 1000), (1, 64, 40000)):
        p = plan(M, N, K, device, SPLIT[1])
        steps = -(-K // 64)
        units = -(-M // 64) * -(-N // 64) * steps
        begins = [worker * units // p.workers for worker in range(p.workers + 1)]
        shares = [b - a for a, b in itertools.pairwise(begins)]
        assert max(shares) - min(shares) <= 1
        assert min(shares) >= 1
        tiles: dict[int, set[int]] = {}
        for worker in range(p.workers):
            for unit in range(begins[worker], begins[worker + 1]):
                tiles.setdefault(unit // steps, set()).add(worker)
        assert max(map(len, tiles.values())) <= p.parts


@pytest.mark.parametrize("kernel", SPLIT)
def test_what_was_in_memory_does_not_matter(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of a sum is written or cleared: tiles that fewer threadgroups share leave parts alone."""
    x, codes, scales, _ = Case(64, 200, 1032, 128, torch.float32).tensors()
    wanted, new = linear_split(x, codes, scales, 128, kernel=kernel), torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: new(t, *a, **k).fill_(float("nan")))
    assert torch.equal(linear_split(x, codes, scales, 128, kernel=kernel), wanted)


def test_slices_cover_k() -> None:
    for K in (8, 64, 65, 128, 416, 1000, 14336):
        p = plan(3, 5, K, "cpu", SPLIT[0])
        assert p.threadgroups[2] == p.parts <= 8
        assert p.per * (p.parts - 1) < K <= p.per * p.parts


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device: str) -> None:
    x, w = DenseCase(3, 5, 16).tensors(device)
    assert dense_linear(x[:0], w).shape == (0, 5)
    assert torch.equal(dense_linear(x[:, :0].contiguous(), w[:, :0].contiguous()).cpu(), torch.zeros(3, 5).half())
    x, codes, scales, _ = Case(3, 5, 64, 32).tensors(device)
    assert linear_split(x[:0], codes, scales, 32).shape == (0, 5)


def test_bad_input() -> None:
    x, w = DenseCase(3, 5, 16).tensors()
    with pytest.raises(ArgumentError, match=r"x \[..., K\], w \[N, K\] of one dtype"):
        dense_linear(x, w.float())
    with pytest.raises(ArgumentError, match="kernel is 'gemm'"):
        dense_linear(x, w, kernel="gemm")
    with pytest.raises(ArgumentError, match="kernel is 'marlin_gemm_fp16_pipelined'"):
        dense_linear(x.float(), w.float(), kernel="marlin_gemm_fp16_pipelined")
    x, codes, scales, _ = Case(3, 5, 64, 32).tensors()
    with pytest.raises(ArgumentError, match="needs fp4 and one dtype"):
        linear_split(x, codes, scales.float(), 32)
    with pytest.raises(ArgumentError, match="kernel is 'striped'"):
        linear_split(x, codes, scales, 32, kernel="striped")


def test_checked_mode_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = MetalKernelLibrary(FAMILY, device="cpu", lanes=32, checked=True)
    monkeypatch.setattr(dense, "library", lambda *_: checked)
    for dtype in EPS:
        for kernel in dense.DENSE if dtype != torch.float32 else dense.DENSE[:1]:
            x, w = DenseCase(3, 67, 77, dtype).tensors()
            exact, sums = x.double() @ w.double().T, x.double().abs() @ w.double().abs().T
            error = (dense_linear(x, w, kernel=kernel).double() - exact).abs()
            assert (error <= EPS[dtype] * exact.abs() + 2.0**-20 * sums).all()
        small = Case(3, 67, 328, 64, dtype)
        x, codes, scales, _ = small.tensors()
        exact = x.double() @ weights(small, codes, scales).T
        for kernel in SPLIT:
            y = linear_split(x, codes, scales, 64, kernel=kernel).double()
            assert ((y - exact).norm(dim=-1) <= 2 * EPS[dtype] * exact.norm(dim=-1) + 1e-4).all()


def test_torch_ops() -> None:
    x, w = DenseCase(3, 5, 16).tensors()
    torch.library.opcheck(torch.ops.metal_marlin.dense_linear.default, (x, w, None))
    x, codes, scales, _ = Case(3, 5, 64, 32).tensors()
    torch.library.opcheck(
        torch.ops.metal_marlin.linear_split.default, (x, codes, scales, None, "fp4", "none", 32, None)
    )
    compiled = torch.compile(lambda x: linear_split(x, codes, scales, 32) + 1, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), linear_split(x, codes, scales, 32) + 1)
