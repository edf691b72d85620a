"""linear_packed: weights in operand order, against the canonical decoding in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import metal_marlin.ops.packed as packed_module
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec, operands
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.ops.packed import CASES, FORMATS, linear_packed, packed, plan
from metal_marlin.ops.packed_tiles import TILES
from metal_marlin.ops.product import product_ref
from metal_marlin.runtime.counters import counters

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
HALVES = (torch.float16, torch.bfloat16)
SMALL = [c for c in CASES if not c.model]


def multiply(case: Case, device: str, kernel: str | None = None, scale: float = 1) -> tuple[torch.Tensor, Any]:
    x, w = packed(case, device)
    more: dict[str, Any] = {"format": case.format, "zeros": w.kernel_zeros, "extra": w.extra, "kernel": kernel}
    return linear_packed(x, w.codes, w.scales, w.powers, case.group, **more).cpu(), w


def check(case: Case, y: torch.Tensor) -> None:
    """Within twice the error of decoding to x's dtype and multiplying there, and a rounding of y."""
    x, codes, scales, extra = case.tensors()
    exact = product_ref(x, codes, scales, case.group, format=case.format, zeros=case.zeros, extra=extra)
    W = codec(case.format).decode(codes, scales, extra, case.group, case.zeros, torch.float64)
    theirs = ((x @ W.to(x.dtype).T).double() - exact).norm(dim=-1)
    sums = (x.double().abs() @ W.abs().T).norm(dim=-1)
    ours = (y.double() - exact).norm(dim=-1)
    assert (ours <= 2 * theirs + torch.finfo(x.dtype).eps * exact.norm(dim=-1) + 2.0**-22 * sums).all(), (ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_reference(case: Case, device: str) -> None:
    check(case, multiply(case, device)[0])


TILED = [
    Case(M, N, K, g, d, None, f, z)
    for f in FORMATS
    for z in codec(f).zero_kinds
    for d in HALVES
    for g in ([16, 32, 64, 256, 1088] if f == "fp4" else [g for g in (16, 32, 128) if g in codec(f).groups])
    for M, N, K in ((37, 144, 1088), (258, 272, 320))
    if g <= K
]


@pytest.mark.cuda
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("case", TILED, ids=str)
def test_every_tile(case: Case, tile: str) -> None:
    kernel = f"packed_gemm_{case.format}__m{tile}"
    before = counters()
    check(case, multiply(case, "cuda", kernel)[0])
    assert any(row.endswith(f"m{tile}") for row in counters() - before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", [name for name, tile in TILES.items() if tile.wgmma and tile.parts == 1])
@pytest.mark.parametrize(("M", "count"), [(530, 2), (512, 7), (600, 7), (512, 13)])
@pytest.mark.parametrize("dtype", HALVES, ids=["half", "bf16"])
def test_threadgroups_walk(
    M: int, count: int, dtype: torch.dtype, tile: str, device: str, multiprocessors: Callable[[int], None]
) -> None:
    """More tiles than threadgroups; the last ones whole, split in halves, and of few tokens."""
    case, kernel = Case(M, 400, 320, 64, dtype), f"packed_gemm_fp4__m{tile}"
    multiprocessors(count)
    p = plan(case.M, case.N, case.K, case.dtype, case.dtype, kernel=kernel, multiprocessors=count)
    assert p.threadgroups[0] == min(count * TILES[tile].held, TILES[tile].count(case.M, case.N)), p
    check(case, multiply(case, device, kernel)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES, ids=["half", "bf16"])
@pytest.mark.parametrize(
    "format", [f for f in FORMATS if codec(f).scale_kind == "float" and "none" in codec(f).zero_kinds]
)
def test_every_code_in_every_place(format: str, dtype: torch.dtype, device: str) -> None:
    """Of a block of 16 rows and 64 k, by products with rows of the identity: exact."""
    form = codec(format)
    values = torch.tensor(form.values) - form.middle
    finite = values.isfinite().nonzero().flatten()
    count = len(finite)
    order = (torch.arange(16 * count).view(-1, 1) // 16 + torch.arange(64) * 5) % count
    codes = finite[order].to(torch.uint8)
    scales = torch.ones(16 * count, 1, dtype=dtype)
    w = operands.pack(form, form.pack(codes), scales, None, "none")
    packed_codes, packed_scales, _, powers = (t if t is None else t.to(device) for t in w)
    x = torch.eye(64, dtype=dtype, device=device)
    wanted = values[codes.long()].to(dtype)
    tiles = ((64, "m64x64"), (8, "m32x8"), (16, "m64x16"), (32, "m32x32"))
    for step, tile in tiles if device == "cuda" else tiles[:1]:  # others are no other code there
        name = f"packed_gemm_{format}__{tile}"
        more: dict[str, Any] = {"format": format, "kernel": name}
        parts = [
            linear_packed(x[i : i + step], packed_codes, packed_scales, powers, 64, **more) for i in range(0, 64, step)
        ]
        assert torch.equal(torch.cat(parts).T.cpu(), wanted), tile


@pytest.mark.parametrize("device", DEVICES)
def test_bad_arguments(device: str) -> None:
    x, w = packed(Case(3, 32, 128, 64), device)
    args = (w.codes, w.scales, w.powers, 64)
    for change, words in [
        ((x[:, :64].contiguous(), *args), "K = 64"),
        ((x.float(), *args), "torch.float16 and torch.bfloat16"),
        ((x, w.codes, w.scales, w.powers[:5], 64), "powers"),
        ((x, w.codes[:24], w.scales[:24], w.powers[:24], 64), "N % 16"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            linear_packed(*change)
    with pytest.raises(ArgumentError, match="9x9"):
        plan(1, 32, 128, torch.float16, torch.float16, kernel="packed_gemm_fp4__m9x9")
    assert linear_packed(x[:0], *args).shape == (0, 32)


def test_addresses() -> None:
    aligned = torch.zeros(8, dtype=torch.int32)
    assert packed_module.addresses("op", codes=aligned, extra=None) == (aligned.data_ptr(), 0)
    with pytest.raises(ArgumentError, match="codes starts 4 bytes after a multiple of 16"):
        packed_module.addresses("op", x=aligned, codes=aligned[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["fp4", "int2", "int3", "nf3"])
def test_gradient(format: str, device: str) -> None:
    case = Case(3, 32, 128, 64, format=format)
    x, w = packed(case, device)
    x.requires_grad_()
    y = linear_packed(x, w.codes, w.scales, w.powers, 64, format=format)
    given = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).half().to(device)
    y.backward(given)
    _, codes, scales, extra = case.tensors()
    exact = given.double().cpu() @ codec(format).decode(codes, scales, extra, 64, "none")
    assert x.grad is not None
    assert (x.grad.double().cpu() - exact).norm() <= 2e-3 * exact.norm()
