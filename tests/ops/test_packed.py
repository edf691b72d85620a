"""linear_packed: weights in operand order, against the canonical decoding in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import metal_marlin.ops.packed as packed_module
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec, operands
from metal_marlin.ops import linear_sparse, packed_plan, packed_sparse
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.ops.packed import CASES, FORMATS, linear_packed, packed, plan
from metal_marlin.ops.packed_sparse import linear_packed_sparse
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
@pytest.mark.parametrize(
    ("M", "K", "dtype", "count"),
    [
        (530, 576, torch.float16, 2),  # more stages than the ring has
        *((M, 192, torch.float16, count) for M, count in ((100, 3), (512, 5), (512, 7), (512, 13), (600, 7))),
        (600, 192, torch.bfloat16, 7),
    ],
)
def test_threadgroups_walk(
    M: int, K: int, dtype: torch.dtype, count: int, tile: str, device: str, multiprocessors: Callable[[int], None]
) -> None:
    """More tiles than threadgroups; the last ones whole, split in halves, and of few tokens."""
    case, kernel = Case(M, 400, K, 64, dtype), f"packed_gemm_fp4__m{tile}"
    multiprocessors(count)
    sizes = (case.M, case.N, case.K, dtype, dtype, torch.device(device), "fp4", "none")
    p = packed_plan.chosen(packed_module.ROWS, *sizes, kernel)
    assert p.threadgroups[0] == min(count * TILES[tile].held, TILES[tile].count(case.M, case.N)), p
    check(case, multiply(case, device, kernel)[0])


@pytest.mark.parametrize("rows", [packed_module.ROWS, packed_sparse.ROWS], ids=["dense", "sparse"])
def test_tiles_are_those_of_the_rows(rows: packed_plan.Rows) -> None:
    """The host makes descriptors and grids for what the kernels' templates say."""
    text = (Path(packed_module.__file__).parents[1] / "src" / rows.family).read_text()
    numbers = r"(\d+), (\d+), (\d+), (\d+), \d+, \d+, (\d+), (true|false), (\d+)"
    found = re.findall(rf'TILE\(name, "([^"]+)", {numbers}', text)
    assert [name for name, *_ in found] == list(rows.tiles)
    for name, height, tokens, parts, depth, along_k, few, threads in found:
        tile = rows.tiles[name]
        said = (int(height), int(tokens), int(parts), int(depth), int(threads), few == "false")
        assert said == (tile.rows, tile.tokens, tile.parts, rows.tiles.depths[name], tile.threads, tile.wgmma), name
        walks = tile.wgmma and tile.parts == 1
        assert tile.halves == (walks and tile.tokens == 256), name  # as TileWalk says
        assert not walks or int(along_k) == 1, name


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


Call = Callable[..., torch.Tensor]


def of_both(op: str, device: str = "cpu", M: int = 3) -> tuple[torch.Tensor, Call, tuple[Any, ...]]:
    """x [M, 128], the product with a W [32, 128], and what torch's op takes after x."""
    if op == "linear_packed":
        x, w = packed(Case(M, 32, 128, 64), device)
        tensors = (w.codes, w.scales, w.powers)
        return x, lambda x, **more: linear_packed(x, *tensors, 64, **more), (*tensors, None, "fp4", "none", 64, None)
    x, *kept = packed_sparse.packed(linear_sparse.Case(M, 32, 128, 64), device)
    return x, lambda x, **more: linear_packed_sparse(x, *kept, 64, **more), (*kept, "fp4", 64, None)


BOTH = ["linear_packed", "linear_packed_sparse"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", BOTH)
def test_where_to_write(op: str, device: str) -> None:
    x, call, _ = of_both(op, device, 6)
    x, y = x.view(2, 3, 128), call(x)
    out = torch.full_like(y.view(2, 3, 32), torch.nan)
    assert call(x, out=out) is out
    assert torch.equal(out.view(6, 32), y)
    parameter = torch.nn.Parameter(x)
    assert call(parameter).requires_grad
    with torch.no_grad():
        assert call(parameter, out=out.zero_()) is out  # by torch's dispatcher
        assert torch.equal(call(parameter), out)
    assert torch.equal(out.view(6, 32), y)
    for wrong, words in ((out.float(), "out is torch.float32"), (out[:1], r"out is torch.float16 \(1, 3, 32\)")):
        with pytest.raises(ArgumentError, match=f"{op}: {words}"):
            call(x, out=wrong)
    with pytest.raises(ArgumentError, match=f"{op}: out is given, and x requires a gradient"):
        call(parameter, out=out)
    assert call(x[:0]).shape == (0, 3, 32)


@pytest.mark.parametrize("op", BOTH)
def test_plain_tensors_pass_by_torchs_dispatcher(op: str) -> None:
    x, call, _ = of_both(op)

    def calls(x: torch.Tensor) -> bool:
        with torch.profiler.profile() as profile:
            call(x)
        return any(event.name == f"metal_marlin::{op}" for event in profile.events())

    assert not calls(x)
    assert calls(x.requires_grad_())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("op", BOTH)
def test_is_an_op_to_torch(op: str, device: str) -> None:
    x, _, more = of_both(op, device)
    checks = ("test_schema", "test_faketensor")
    plain, out = (getattr(torch.ops.metal_marlin, name).default for name in (op, f"{op}_out"))
    torch.library.opcheck(plain, (x, *more), test_utils=(*checks, "test_autograd_registration"))
    torch.library.opcheck(out, (x, *more, x.new_empty(3, 32)), test_utils=checks)


@pytest.mark.parametrize("op", BOTH)
def test_compiles_as_one_graph(op: str) -> None:
    x, call, _ = of_both(op)

    def twice(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(3, 32, dtype=x.dtype)
        return call(x * 2) + call(x, out=out)

    with torch.no_grad():
        assert torch.equal(torch.compile(twice, fullgraph=True, backend="aot_eager")(x), twice(x))
