"""linear_sparse and linear_packed_sparse: n:m sparse weights against their decoding in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metal_marlin import MetalKernelLibrary
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec, operands
from metal_marlin.formats.sparse import PATTERNS
from metal_marlin.ops import linear_sparse as canonical
from metal_marlin.ops import packed_plan
from metal_marlin.ops import packed_sparse as ordered
from metal_marlin.ops.linear_sparse import FUSED, NM, Case, linear_sparse, linear_sparse_ref
from metal_marlin.ops.packed_sparse import linear_packed_sparse, linear_packed_sparse_ref, packed
from metal_marlin.ops.packed_tiles import SPARSE
from metal_marlin.runtime.counters import counters

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
HALVES = (torch.float16, torch.bfloat16)
GIVEN = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).half()


def small(cases: tuple[Case, ...]) -> list[Case]:
    return [case for case in cases if not case.model]


def by_hand(case: Case) -> torch.Tensor:
    """W [N, K] in float64, weight by weight from the bits of the contract: codes of four bits, ascending places."""
    _, codes, places, scales, _ = case.tensors()
    kept, of = (int(n) for n in case.of.split(":"))
    bits, form = {4: 2, 8: 3}[of], codec(case.format)
    values = torch.tensor(form.values, dtype=torch.float64)
    W = torch.zeros(case.N, case.K, dtype=torch.float64)
    for n in range(case.N):
        words = [int(w) & 0xFFFFFFFF for w in codes[n]]
        stream = sum((int(w) & 0xFFFFFFFF) << 32 * i for i, w in enumerate(places[n]))
        for i in range(case.K // of * kept):
            code, place = words[i // 8] >> 4 * (i % 8) & 15, stream >> bits * i & of - 1
            k = i // kept * of + place
            W[n, k] = values[code] * scales[n, k // case.group].double()
    return W


@pytest.mark.parametrize("of", PATTERNS)
def test_the_reference_reads_what_the_contract_says(of: str) -> None:
    case = Case(2, 5, 96, 32, of=of)
    x, *w, _ = case.tensors()
    W = by_hand(case)
    kept, m = (int(n) for n in of.split(":"))
    assert ((W != 0).unflatten(1, (-1, m)).sum(-1) <= kept).all()
    assert (W != 0).float().mean() > 0.6 * kept / m
    torch.testing.assert_close(linear_sparse_ref(x, *w, 32, pattern=of), x.double() @ W.T, rtol=1e-12, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", small(canonical.CASES), ids=str)
def test_canonical(case: Case, device: str) -> None:
    assert canonical.case_check(case, device, None).passed


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", small(ordered.CASES), ids=str)
def test_in_operand_order(case: Case, device: str) -> None:
    assert ordered.case_check(case, device, None).passed


@pytest.mark.parametrize("device", DEVICES)
def test_every_canonical_row(device: str) -> None:
    rows = MetalKernelLibrary(canonical.FAMILY, device=device).kernels
    assert {FUSED, NM, "marlin_gemm_sparse_fp4", "marlin_gemm_sparse_int4__tf32_zpacked"} <= set(rows)
    for row in rows:
        before = counters()
        case, kernel = canonical.OP.row_case(row)  # type: ignore[misc]
        assert canonical.case_check(case, device, kernel).passed, row
        assert list(counters() - before) == [row]


TILED = [
    *(Case(M, N, K, g, d) for M, N, K in ((37, 144, 1088), (258, 272, 320)) for g in (32, 64, 256) for d in HALVES),
    *(Case(37, 144, 1088, 32, d, f) for f in ("mxfp4", "int4") for d in HALVES),
    Case(300, 272, 1088, 1088),
]


@pytest.mark.cuda
@pytest.mark.parametrize("tile", SPARSE)
@pytest.mark.parametrize("case", [case for case in TILED if case.group <= case.K], ids=str)
def test_every_tile(case: Case, tile: str) -> None:
    before = counters()
    assert ordered.case_check(case, "cuda", f"packed_sparse_{case.format}__m{tile}").passed
    assert any(row.endswith(f"m{tile}") for row in counters() - before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [name for name, tile in SPARSE.items() if tile.halves])
@pytest.mark.parametrize(("M", "count"), [(530, 2), (512, 5), (512, 7), (600, 7)])
def test_threadgroups_walk(M: int, count: int, tile: str, device: str, multiprocessors: Callable[[int], None]) -> None:
    """More tiles than threadgroups; the last ones whole, split in halves, and of few tokens."""
    multiprocessors(count)
    kernel, half = f"packed_sparse_fp4__m{tile}", torch.float16
    p = packed_plan.chosen(ordered.ROWS, M, 400, 320, half, half, torch.device(device), "fp4", "none", kernel)
    assert p.threadgroups[0] == min(count, SPARSE[tile].count(M, 400)), p
    assert ordered.case_check(Case(M, 400, 320, 64), device, kernel).passed


def test_operand_order_is_undone() -> None:
    case = Case(1, 48, 192, 64)
    _, *w = packed(case)
    found = operands.unpack_sparse(codec("fp4"), *w[:3])
    for mine, theirs in zip(found, case.tensors()[1:4], strict=True):
        assert torch.equal(mine, theirs)
    x, *w = packed(case)
    codes, places, scales = case.tensors()[1:4]
    assert torch.equal(linear_packed_sparse_ref(x, *w, 64), linear_sparse_ref(x, codes, places, scales, 64))


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device: str) -> None:
    x, codes, places, scales, _ = Case(3, 32, 128, 64).tensors(device)
    for args, more, words in [
        ((x[:, :120].contiguous(), codes, places, scales, 64), {}, "K = 120; pattern 2:4 needs a multiple of 16"),
        ((x, codes[:, :4], places, scales, 64), {}, r"\(32, 4\)"),
        ((x, codes, places[:, :1], scales, 64), {}, r"\(32, 1\)"),
        ((x, codes, places, scales[:3], 64), {}, "scales have shape"),
        ((x.float(), codes, places, scales, 64), {}, "they need one dtype"),
        ((x, codes, places, scales, 64), {"pattern": "3:4"}, "3:4"),
        ((x, codes, places, scales, 64), {"format": "int8"}, "fp4, mxfp4, nvfp4, int4"),
        ((x, codes, places, scales, 64), {"format": "int4", "pattern": "2:8"}, "2:8"),
        ((x, codes, places, scales, 64), {"extra": scales}, "extra"),
        ((x, codes, places, scales, 64), {"kernel": "marlin_gemm_sparse_fp5"}, "marlin_gemm_sparse_fp5"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            linear_sparse(*args, **more)  # type: ignore[arg-type]
    assert linear_sparse(x[:0], codes, places, scales, 64).shape == (0, 32)
    x, codes, places, scales, powers = packed(Case(3, 32, 128, 64), device)
    for args, more, words in [
        ((x, codes[:24], places[:24], scales[:24], powers[:24], 64), {}, "N % 16"),
        ((x, codes, places, scales, powers[:5], 64), {}, "powers"),
        ((x, codes, places, scales, powers, 64), {"kernel": "packed_sparse_fp4__m9x9"}, "9x9"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            linear_packed_sparse(*args, **more)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="fp4, mxfp4, int4"):
        ordered.plan(1, 32, 128, torch.float16, torch.uint8, "nvfp4")
    assert linear_packed_sparse(x[:0], codes, places, scales, powers, 64).shape == (0, 32)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_both(device: str) -> None:
    case = Case(3, 32, 128, 64)
    exact = GIVEN.double() @ canonical.weights(case)[1]
    for x, call in (
        (case.tensors(device)[0], lambda x: linear_sparse(x, *case.tensors(device)[1:4], 64)),
        (packed(case, device)[0], lambda x: linear_packed_sparse(x, *packed(case, device)[1:], 64)),
    ):
        x.requires_grad_()
        call(x).backward(GIVEN.to(device))
        assert x.grad is not None
        assert (x.grad.double().cpu() - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_and_takes_batches(device: str) -> None:
    x, codes, places, scales, _ = Case(6, 32, 128, 64).tensors(device)

    def both(x: torch.Tensor, *w: Any) -> torch.Tensor:
        return linear_sparse(x, *w, 64) + 1

    y = linear_sparse(x, codes, places, scales, 64)
    whole = torch.compile(both, fullgraph=True, backend="eager")(x.view(2, 3, 128), codes, places, scales)
    assert torch.equal(whole, (y + 1).view(2, 3, 32))
