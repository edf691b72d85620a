"""marlin_gemm and its rows: every format, tails, tiles and group sizes against float64, bad input, what torch asks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.msl.target import Target
from metal_marlin.ops import gemm_tiles as tiles
from metal_marlin.ops.marlin_gemm import (
    CASES,
    FAMILY,
    NAMED,
    OP,
    VARIANTS,
    Case,
    Plan,
    marlin_gemm,
    marlin_gemm_ref,
    plan,
)
from metal_marlin.runtime import device_cpu

ROOT = Path(__file__).parent.parent.parent
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
SMALL = [case for case in CASES if not case.model]
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}
DTYPES = tuple(ROUNDING)
BITS = {"int8": 8, "uint8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8, "int2": 2, "int3": 3, "nf3": 3}  # others have 4
NF3 = torch.tensor([-1, -0.5350227, -0.2469314, 0, 0.1833375, 0.3819940, 0.6229857, 1]).tolist()
ZEROS = {"int4": ("none", "point", "packed", "bias"), "uint8": ("point", "packed", "bias")}  # others have none
FORMATS = ("fp4", "mxfp4", "nvfp4", "int4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "int2", "int3", "nf3")
KINDS = [(name, zeros) for name in FORMATS for zeros in ZEROS.get(name, ("none",))]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


def small_float(code: int, exponents: int, mantissas: int) -> float:
    """Sign, exponent, mantissa: what the bits of a small float mean, without the cases that are not finite."""
    sign = -1.0 if code >> (exponents + mantissas) else 1.0
    e, m = code >> mantissas & (1 << exponents) - 1, code & (1 << mantissas) - 1
    bias = (1 << exponents - 1) - 1
    return sign * math.ldexp(m + (1 << mantissas) * (e > 0), max(e, 1) - bias - mantissas)


def value(name: str, code: int) -> float:
    if name in ("fp4", "mxfp4", "nvfp4"):
        return small_float(code, 2, 1)
    if name == "fp8_e4m3":
        return math.nan if code & 0x7F == 0x7F else small_float(code, 4, 3)
    if name == "fp8_e5m2":
        largest = math.copysign(math.inf, 0x7F - code) if code & 3 == 0 else math.nan
        return largest if code & 0x7C == 0x7C else small_float(code, 5, 2)
    if name in ("int2", "int3"):
        return code - (1.5 if name == "int2" else 3.5)
    if name == "nf3":
        return NF3[code]
    return float(code - 256 * (code >> 7)) if name == "int8" else float(code)


def parts(words: torch.Tensor, bits: int) -> torch.Tensor:
    unsigned = words.cpu().long() & 0xFFFFFFFF
    single = (unsigned.unsqueeze(-1) >> torch.arange(32) & 1).flatten(-2)
    return (single.unflatten(-1, (-1, bits)) << torch.arange(bits)).sum(-1)


def weights(case: Case, codes: torch.Tensor, scales: torch.Tensor, extra: torch.Tensor | None) -> torch.Tensor:
    """[N, K] in float64, by the formats' definitions and not by the codecs."""
    bits = BITS.get(case.format, 4)
    table = torch.tensor([value(case.format, c) for c in range(1 << bits)], dtype=torch.float64)
    values = table[parts(codes, bits)]
    column = torch.arange(values.shape[1]) // case.group
    if case.format == "mxfp4":
        return values * (2.0 ** (scales.cpu().double() - 127))[:, column]
    if case.format == "nvfp4":
        assert extra is not None
        each = torch.tensor([[value("fp8_e4m3", int(s)) for s in row] for row in scales.cpu()], dtype=torch.float64)
        return values * each[:, column] * extra.cpu().double()
    each = scales.cpu().double()[:, column]
    if case.zeros == "bias":
        assert extra is not None
        return values * each + extra.cpu().double()[:, column]
    if case.zeros == "none":
        return (values - (8.0 if case.format == "int4" else 0.0)) * each
    assert extra is not None
    zero = parts(extra, bits).double() if case.zeros == "packed" else extra.cpu().double()
    return (values - zero[:, column]) * each


def check(y: torch.Tensor, case: Case, tensors: Tensors) -> None:
    """Against the same product of dequantised weights in torch, in the activations' dtype."""
    x, codes, scales, extra = tensors
    W = weights(case, codes, scales, extra)
    exact = x.cpu().double() @ W.T
    composed = x @ W.to(x.dtype).to(x.device).T
    # torch sums short rows in an order of its own: two roundings of the largest partial sums are granted
    unit, size = ROUNDING[case.dtype], 2 * x.cpu().double().abs() @ W.abs().T
    if case.dtype != torch.float32:
        size = exact
    # the error of a token with few outputs is chance: there those of all tokens are taken together
    over = -1 if y.shape[1] >= 8 else (0, 1)
    ours, theirs = ((t.cpu().double() - exact).norm(dim=over) for t in (y, composed))
    assert y.dtype == x.dtype
    assert (ours <= 2 * theirs + unit * size.norm(dim=over)).all(), (ours, theirs)
    worst = (composed.cpu().double() - exact).abs().max()
    assert (y.cpu().double() - exact).abs().max() <= 8 * worst + unit * size.abs().max()


def call(case: Case, tensors: Tensors, **options: object) -> torch.Tensor:
    x, codes, scales, extra = tensors
    return marlin_gemm(x, codes, scales, case.group, format=case.format, zeros=case.zeros, extra=extra, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_matches_the_reference(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    check(call(case, tensors), case, tensors)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [16, 200])
def test_model_shape(M: int, dtype: torch.dtype) -> None:
    case = Case(M, 1024, 4096, 128, dtype)
    tensors = case.tensors("cuda")
    check(call(case, tensors), case, tensors)


def row_cases() -> list[object]:
    """A case for every row of the family; on a CPU the compiler is what takes time, so most of them are slow."""
    found: list[object] = []
    for name, zeros in KINDS:
        group = {"mxfp4": 32, "nvfp4": 16}.get(name, 64)
        for dtype in DTYPES:
            for scale in (None,) if name in ("mxfp4", "nvfp4") else DTYPES:
                for variant in VARIANTS.get(name, ("",)):
                    case = Case(11, 70, 160 if BITS.get(name) == 3 else 144, group, dtype, scale, name, zeros)
                    slow = [] if len(found) % 6 == 0 else [pytest.mark.slow]
                    found.append(pytest.param(case, variant, id=f"{case}{variant}", marks=slow))
    return found


@pytest.mark.parametrize(("case", "variant"), row_cases())
def test_every_row(case: Case, variant: str) -> None:
    tensors = case.tensors()
    check(call(case, tensors, kernel=f"marlin_gemm_{case.format}{variant}"), case, tensors)


def tile_cases() -> list[object]:
    """Every tile: tails of all three sizes, scales of every kind of group."""
    found: list[object] = []
    for tile in tiles.TILES.values():
        rows, m = tile.rows, tile.tokens
        for name, zeros in [(f, z) for f, z in KINDS if f in tiles.FORMATS]:
            for dtype in (torch.float16, torch.bfloat16):
                shapes = [(m, rows, 512, 128), (m - 1, rows + 1, 96, 32), (2 * m + 1, 3 * rows - 7, 1184, 16)]
                shapes += [(1, 4 * rows, 2048, 64), (min(m, 40), 8, 4128, 4128), (m // 2 + 1, 1, 32, 32)]
                for M, N, K, group in shapes:
                    own = codec(name).groups[0] if codec(name).scale_kind != "float" else group
                    case = Case(M, N, K, own, dtype, None, name, zeros)
                    found.append(pytest.param(case, f"__m{tile}", id=f"{case}-m{tile}"))
    return found


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "variant"), tile_cases())
def test_every_tile_on_a_gpu(case: Case, variant: str) -> None:
    tensors = case.tensors("cuda")
    around = torch.full((case.M * case.N + 512,), float("nan"), dtype=case.dtype, device="cuda")
    out = around[256:-256].view(case.M, case.N)
    call(case, tensors, kernel=f"marlin_gemm_{case.format}{variant}", out=out)
    check(out.clone(), case, tensors)
    assert around[:256].isnan().all()
    assert around[-256:].isnan().all()
    first = out.clone()
    call(case, tensors, kernel=f"marlin_gemm_{case.format}{variant}", out=out)
    assert torch.equal(out, first)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [16, 128])
@pytest.mark.parametrize("size", [6e-8, 3e-5, 1.0, 6e4])
@pytest.mark.parametrize("tile", tiles.TILES)
def test_sizes_of_scales_in_tiles(tile: str, size: float, group: int, dtype: torch.dtype) -> None:
    """The smallest and the largest that half has, in every row beside groups a thousand times smaller."""
    case = Case(tiles.TILES[tile].tokens, 130, 512, group, dtype)
    x, codes, scales, _ = case.tensors("cuda")
    scales = torch.full_like(scales, size)
    scales[:, 1::2] /= 1024
    x *= min(1 / size, 2.0**10) if size < 1 else 2.0**-10
    exact = x.cpu().double() @ weights(case, codes, scales, None).T
    y = call(case, (x, codes, scales, None), kernel=f"marlin_gemm_fp4__m{tile}").cpu()
    inside = exact.abs() < torch.finfo(dtype).max
    assert ((y.double() - exact)[inside].abs() <= 4 * ROUNDING[dtype] * exact.norm(dim=-1).max()).all()
    assert y[~inside].isinf().all()


@pytest.mark.cuda
@pytest.mark.parametrize("exponent", [1, 7, 127, 200, 254])
@pytest.mark.parametrize("tile", tiles.TILES)
def test_exponents_of_mxfp4_in_tiles(tile: str, exponent: int) -> None:
    case = Case(3, 70, 256, 32, torch.bfloat16, format="mxfp4")
    x, codes, scales, _ = case.tensors("cuda")
    scales[:, 1], scales[:, ::2] = exponent, max(exponent - 30, 0)
    x = x * (2.0**-20 if exponent > 200 else 1)
    exact = x.cpu().double() @ weights(case, codes, scales, None).T
    kernel = f"marlin_gemm_mxfp4__m{tile}"
    y = call(case, (x, codes, scales, None), kernel=kernel).cpu()
    assert (y.double() - exact).norm() <= 4 * ROUNDING[torch.bfloat16] * exact.norm() + 1e-37
    scales[2, 1] = 255
    again = call(case, (x, codes, scales, None), kernel=kernel)
    assert again[:, 2].isnan().all()
    assert torch.equal(again[:, 3:].cpu(), y[:, 3:])


def test_tiles_are_chosen_by_their_times() -> None:
    assert tiles.TILES["64x64"].time(64, 4096, 4096) == pytest.approx(3.7 + 64 * 0.245)
    assert tiles.TILES["128x256"].time(1024, 14336, 4096) == pytest.approx(5.8 + 64 * 0.726 * 4)
    assert tiles.fastest(33, 4096, 4096, hopper=False) == ""
    small = [tiles.TILES[tiles.fastest(M, N, 4096, hopper=False)] for M in (1, 16, 32) for N in (64, 4096, 14336)]
    assert not any(tile.hopper for tile in small)
    for M in (1, 16, 64, 500, 5000):
        best = tiles.TILES[tiles.fastest(M, 3000, 2048, hopper=True)].time(M, 3000, 2048)
        assert best == min(tile.time(M, 3000, 2048) for tile in tiles.TILES.values())


def test_plans_on_hopper() -> None:
    def of(M: int, N: int = 4096, K: int = 4096, **options: object) -> Plan:
        return plan(M, N, K, torch.float16, torch.float16, "cuda", hopper=True, **options)  # type: ignore[arg-type]

    rows = {8: "32x8", 9: "32x16", 32: "64x16", 64: "64x64x2", 128: "64x128x2", 512: "64x256", 1024: "128x256"}
    assert {M: of(M).kernel for M in rows} == {M: f"marlin_gemm_fp4__m{tile}" for M, tile in rows.items()}
    wide = {8: "112x8", 16: "112x16", 32: "64x32", 64: "64x64", 128: "128x128", 512: "128x256"}
    assert {M: of(M, 14336).kernel for M in wide} == {M: f"marlin_gemm_fp4__m{tile}" for M, tile in wide.items()}
    assert of(1, 128256).kernel == "marlin_gemm_fp4__m112x8"
    assert of(128).threadgroups == (64, 1, 2)
    assert of(32, K=14336).kernel == "marlin_gemm_fp4__m64x32x2"
    assert of(64, aligned=False).kernel == "marlin_gemm_fp4"
    with pytest.raises(ArgumentError, match="K % 32 = 0"):
        of(64, aligned=False, kernel="marlin_gemm_fp4__m32x16")
    with pytest.raises(ArgumentError, match=r"compute capability 9\.0"):
        plan(64, 64, 64, torch.float16, torch.float16, "cuda", kernel="marlin_gemm_fp4__m128x128")
    with pytest.raises(ArgumentError, match="tiles of marlin_gemm_fp4 are 16x8"):
        of(64, kernel="marlin_gemm_fp4__m7x7")


@pytest.mark.parametrize(("case", "variant"), tile_cases()[::41])
def test_every_tile(case: Case, variant: str) -> None:
    tensors = case.tensors()
    check(call(case, tensors, kernel=f"marlin_gemm_{case.format}{variant}"), case, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", NAMED)
def test_every_named_tile(kernel: str, dtype: torch.dtype, device: str) -> None:
    form = NAMED[kernel].format
    for zeros in ZEROS.get(form, ("none",)):
        for M, N, K, group in ((131, 137, 200, 16), (17, 40, 32, 32), (66, 65, 128, 64), (1, 1, 8, 8)):
            case = Case(M, N, K, group, dtype, None, form, zeros)
            tensors = case.tensors(device)
            if NAMED[kernel].copies and device == "cuda" and K % 32:
                with pytest.raises(ArgumentError, match="K % 32"):
                    call(case, tensors, kernel=kernel)
                continue
            check(call(case, tensors, kernel=kernel), case, tensors)


def test_named_tiles_are_planned() -> None:
    half = torch.float16
    p = plan(300, 200, 64, half, half, "mps", kernel="marlin_gemm_fp4_128x64x32")
    assert (p.kernel, p.file, p.threadgroups) == ("marlin_gemm_fp4_128x64x32", "kernels_autotune.metal", (4, 3))
    assert plan(300, 200, 64, half, half, "cuda", kernel="gemm_fp4_optimized_decode").threadgroups == (4, 19)
    for options in (
        {"dtype": torch.float32, "scale_dtype": torch.float32},
        {"dtype": half, "scale_dtype": torch.bfloat16},
    ):
        with pytest.raises(ArgumentError, match="marlin_gemm_fp4_128x64x32"):
            plan(3, 2, 64, device="cpu", kernel="marlin_gemm_fp4_128x64x32", **options)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="marlin_gemm_fp4_128x64x32"):
        plan(3, 2, 64, half, half, "cpu", "int4", kernel="marlin_gemm_fp4_128x64x32")


@pytest.mark.cuda
@pytest.mark.parametrize(("case", "variant"), [p.values for p in row_cases()], ids=str)  # type: ignore[attr-defined]
def test_every_row_on_a_gpu(case: Case, variant: str) -> None:
    tensors = case.tensors("cuda")
    check(call(case, tensors, kernel=f"marlin_gemm_{case.format}{variant}"), case, tensors)


def test_rows_are_what_plans_name() -> None:
    names = {
        plan(9, 64, 64, d, s, "cpu", name, zeros, 1, f"marlin_gemm_{name}{variant}").kernel
        for name, zeros in KINDS
        for variant in VARIANTS.get(name, ("",))
        for d in DTYPES
        for s in codec(name).scale_dtypes
    }
    names |= {
        plan(9, 64, 64, d, s, "cpu", name, zeros, 1, f"marlin_gemm_{name}__m{tile}").kernel
        for name, zeros in KINDS
        for tile in tiles.TILES
        for d in DTYPES
        for s in codec(name).scale_dtypes
        if tiles.has_tiles(d, s, name)
    }
    names |= {
        plan(9, 64, 64, d, d, "cpu", of.format, zeros, 1, kernel).kernel
        for kernel, of in NAMED.items()
        if of.file == FAMILY
        for zeros in ZEROS.get(of.format, ("none",))
        for d in (torch.float16, torch.bfloat16)
    }
    assert names == set(MetalKernelLibrary(FAMILY, device="cpu").kernels)


def dispatch(library: MetalKernelLibrary, case: Case, tensors: Tensors, p: Plan) -> torch.Tensor:
    """A plan on a library of the test's own."""
    x, codes, scales, extra = tensors
    y = x.new_full((case.M, case.N), float("nan"))
    shape = {"M": case.M, "N": case.N, "K": case.K, "group": case.group, "rows": p.rows, "tokens": p.tokens}
    args = (x, codes, scales, scales if extra is None else extra, y, {**shape, "aligned": case.K % 32 == 0})
    dispatch_kernel(library, p.kernel, threadgroups=p.threadgroups, threads_per_threadgroup=p.threads, args=args)
    return y


def planned(case: Case, tensors: Tensors, kind: str) -> Plan:
    return plan(case.M, case.N, case.K, case.dtype, tensors[2].dtype, kind, case.format, case.zeros)


NEW = [c for c in SMALL if c.format in ("int2", "int3", "nf3")]
LANES = [c for c in SMALL[::9] if c.M < 100] + NEW[::2] + [Case(70, 66, 200, 16, d) for d in DTYPES]


@pytest.mark.parametrize("case", LANES, ids=str)
def test_32_lanes_agree_with_one(case: Case) -> None:
    """The pipeline of Apple GPUs, run here by fibres."""
    tensors = case.tensors()
    one = call(case, tensors)
    y = dispatch(MetalKernelLibrary(FAMILY, device="cpu", lanes=32), case, tensors, planned(case, tensors, "mps"))
    check(y, case, tensors)
    near = 16 if case.dtype == torch.float32 else 4  # the order of the sums differs, and weights are rounded
    assert (y.double() - one.double()).norm() <= near * ROUNDING[case.dtype] * one.double().norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_one_stage_with_32_lanes(dtype: torch.dtype) -> None:
    case = Case(40, 66, 200, 32, dtype)
    tensors = case.tensors()
    library = MetalKernelLibrary(FAMILY, device="cpu", lanes=32)
    p = planned(case, tensors, "mps")
    single = p.kernel.replace("marlin_gemm_fp4", "marlin_gemm_fp4_single_stage")
    y = dispatch(library, case, tensors, replace(p, kernel=single))
    assert torch.equal(y, dispatch(library, case, tensors, p))
    check(y, case, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [kernel for kernel in NAMED if "fused" in kernel])
def test_weights_in_registers_with_32_lanes(kernel: str, dtype: torch.dtype) -> None:
    library = MetalKernelLibrary(FAMILY, device="cpu", lanes=32)
    form = NAMED[kernel].format
    for zeros in ZEROS.get(form, ("none",)):
        for M, N, K, group in ((70, 66, 200, 16), (17, 129, 96, 32), (1, 3, 8, 8)):
            case = Case(M, N, K, group, dtype, None, form, zeros)
            tensors = case.tensors()
            p = plan(M, N, K, dtype, dtype, "mps", form, zeros, kernel=kernel)
            check(dispatch(library, case, tensors, p), case, tensors)
            assert library.compile(p.kernel).meta.threadgroup_bytes < 16 << 10


@pytest.mark.parametrize("level", ["cpu:x86-64-v3", "cpu:x86-64-v4"])
@pytest.mark.parametrize("case", [Case(15, 83, 200, 16, torch.bfloat16), *SMALL[-46:-18:6], *NEW[::5]], ids=str)
def test_older_cpus(case: Case, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Target.host_cpu().arch
    if "x86" not in host or host < level.partition(":")[2]:
        pytest.skip(f"this CPU is {host}")
    monkeypatch.setattr(device_cpu, "target", lambda index: Target.parse(level))
    tensors = case.tensors()
    y = dispatch(MetalKernelLibrary(FAMILY, device="cpu", lanes=1), case, tensors, planned(case, tensors, "cpu"))
    check(y, case, tensors)


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize(
    ("target", "most", "first"), [("cpu:aarch64", 0, 6), ("cuda:sm_80", 48, 0), ("cuda:sm_90a", 48, 12)]
)
def test_compiles_for_other_targets(target: str, most: int, first: int, part: int) -> None:
    """Every 24th row, each target others; it needs no more threadgroup memory than every launch may have, in KiB."""
    library = MetalKernelLibrary(FAMILY, target=Target.parse(target))
    for name in library.kernels[first + 24 * part :: 72]:
        row = library.compile(name)
        assert row.binary
        assert not most or row.meta.threadgroup_bytes <= (227 if re.search("_m[0-9]", name) else most) << 10


@pytest.mark.parametrize("kernel", ["marlin_gemm_fp4", "marlin_gemm_fp4__tf32", "marlin_gemm_int8__tbf16"])
def test_fits_an_apple_gpu(kernel: str) -> None:
    row = MetalKernelLibrary(FAMILY, device="cpu", lanes=32).compile(kernel)
    assert row.meta.threadgroup_bytes <= 32 << 10


def test_single_stage_has_one_stage() -> None:
    library = MetalKernelLibrary(FAMILY, target=Target.parse("cuda:sm_80"))
    double, single = (library.compile(f"marlin_gemm_fp4{v}").meta.threadgroup_bytes for v in ("", "_single_stage"))
    assert single < 0.6 * double


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variants_have_the_same_bits(dtype: torch.dtype, device: str) -> None:
    case = Case(70, 65, 328, 64, dtype)
    tensors = case.tensors(device)
    plain = call(case, tensors, kernel="marlin_gemm_fp4")
    for variant in ("_fp32acc", "_single_stage", "_3stage"):
        assert torch.equal(call(case, tensors, kernel=f"marlin_gemm_fp4{variant}"), plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fp4", "int4", "int8", "fp8_e4m3", "fp8_e5m2", "int2", "int3", "nf3"])
def test_every_code_is_exact(name: str, dtype: torch.dtype, device: str) -> None:
    """x picks one weight of each row: y is that weight, bit for bit (scales are powers of two)."""
    count = max(32, 1 << BITS.get(name, 4))
    each = torch.arange(count) % (1 << BITS.get(name, 4))
    finite = torch.tensor([math.isfinite(value(name, c)) for c in each.tolist()])
    row = torch.where(finite, each, 0).to(torch.uint8)
    codes = codec(name).pack(torch.stack([row, row.flip(0)] * 2))
    scales = torch.tensor([[0.25], [0.5], [1.0], [2.0**-7]]).to(dtype)
    case = Case(count, 4, count, count, dtype, None, name)
    W = weights(case, codes, scales, None)
    W = W.to(dtype).double()  # what no number of the dtype can be is rounded once
    x = torch.eye(count, dtype=dtype, device=device)
    y = call(case, (x, codes.to(device), scales.to(device), None)).cpu()
    assert torch.equal(y.double() + 0.0, W.T + 0.0)


@pytest.mark.parametrize("device", [*DEVICES, pytest.param("lanes")])
@pytest.mark.parametrize(("name", "code", "wanted"), [("fp8_e4m3", 0x7F, math.nan), ("fp8_e5m2", 0xFC, -math.inf)])
def test_codes_that_are_not_finite(name: str, code: int, wanted: float, device: str) -> None:
    """They stay in their row: the row before ends in the middle of a tile."""
    case = Case(3, 70, 68, 32, torch.float16, None, name)
    x, codes, scales, _ = case.tensors("cuda" if device == "cuda" else "cpu")
    codes[5, 0] = codec(name).pack(torch.tensor([[code, 0, 0, 0]], dtype=torch.uint8)).item()
    tensors = (torch.ones_like(x), codes, scales, None)
    if device == "lanes":
        library = MetalKernelLibrary(FAMILY, device="cpu", lanes=32)
        y = dispatch(library, case, tensors, planned(case, tensors, "mps"))
    else:
        y = call(case, tensors).cpu()
    assert y[:, 5].isnan().all() if math.isnan(wanted) else (y[:, 5] == wanted).all()
    assert y[:, torch.arange(70) != 5].isfinite().all()


GUARDED = [Case(9, 65, 136, 16), Case(65, 63, 64, 64, torch.float32), Case(130, 1, 32, 32, torch.bfloat16)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", GUARDED, ids=str)
def test_writes_only_its_output(case: Case, device: str) -> None:
    tensors = case.tensors(device)
    before = [t.clone() for t in tensors if t is not None]
    around = torch.full((case.M * case.N + 256,), float("nan"), dtype=case.dtype, device=device)
    out = around[128:-128].view(case.M, case.N)
    assert call(case, tensors, out=out) is out
    check(out.clone(), case, tensors)
    assert around[:128].isnan().all()
    assert around[-128:].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors[:3], strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["fp4", "int8", "int3"])
def test_views_that_start_anywhere(name: str, dtype: torch.dtype, device: str) -> None:
    case = Case(9, 70, 96, 32, dtype, None, name)
    tensors = case.tensors(device)
    kernel = f"marlin_gemm_{name}"
    y = call(case, tensors, kernel=kernel)
    moved = []
    for t in tensors[:3]:
        room = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
        room[1:] = t.flatten()
        moved.append(room[1:].view(t.shape))
    moved_on = (*moved, None)
    assert torch.equal(call(case, moved_on, kernel=kernel), y)  # type: ignore[arg-type]
    check(call(case, moved_on), case, tensors)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_again(device: str) -> None:
    case = Case(100, 300, 1024)
    tensors = case.tensors(device)
    first = call(case, tensors)
    assert all(torch.equal(first, call(case, tensors)) for _ in range(5))


def test_any_number_of_threads() -> None:
    case = Case(260, 130, 96, 32, torch.float32)
    tensors = case.tensors()
    y, threads = call(case, tensors), torch.get_num_threads()
    try:
        torch.set_num_threads(7)
        assert torch.equal(call(case, tensors), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256)])
def test_no_tokens(shape: tuple[int, ...], device: str) -> None:
    case = Case(1, 20, 256)
    _, *rest = case.tensors(device)
    y = call(case, (torch.empty(shape, dtype=torch.float16, device=device), *rest))  # type: ignore[arg-type]
    assert y.shape == (*shape[:-1], 20)


def test_no_rows_and_shapes_of_x() -> None:
    case = Case(6, 10, 256)
    x, codes, scales, _ = case.tensors()
    assert marlin_gemm(x, codes[:0], scales[:0], 128).shape == (6, 0)
    y = marlin_gemm(x, codes, scales, 128)
    assert torch.equal(marlin_gemm(x.view(2, 3, 256), codes, scales, 128), y.view(2, 3, 10))
    assert torch.equal(marlin_gemm(x[0], codes, scales, 128), y[0])


@pytest.mark.parametrize(("name", "zeros"), KINDS)
def test_reference_is_the_product(name: str, zeros: str) -> None:
    case = Case(2, 9, 64, {"mxfp4": 32, "nvfp4": 16}.get(name, 16), torch.float32, None, name, zeros)
    x, codes, scales, extra = case.tensors()
    got = marlin_gemm_ref(x, codes, scales, case.group, format=name, zeros=zeros, extra=extra)
    assert got.dtype == torch.float64
    assert torch.allclose(got, x.double() @ weights(case, codes, scales, extra).T, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, c, s: (x[:, :96].contiguous(), c, s, 128), "marlin_gemm: x has K = 96, codes have K = 128"),
        (lambda x, c, s: (x, c, s, 48), "group_size = 48; fp4 takes"),
        (
            lambda x, c, s: (x, c, s, 32),
            r"scales have shape \(10, 1\); N = 10, K = 128, group_size = 32 need \(10, 4\)",
        ),
        (lambda x, c, s: (x.double(), c, s, 128), "dtype is torch.float64"),
        (lambda x, c, s: (x, c, s.double(), 128), "scales is torch.float64; fp4 takes"),
        (lambda x, c, s: (x, c.long(), s, 128), "codes: tensor is torch.int64"),
        (lambda x, c, s: (x.T.contiguous().T, c, s, 128), r"x: tensor of shape \(2, 128\) with strides"),
        (lambda x, c, s: (x, c[0], s, 128), r"codes \(16,\)"),
        (lambda x, c, s: (x[:, :0], c[:, :0], s, 128), "K = 0; fp4"),
    ],
)
def test_bad_input(change: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        marlin_gemm(*change(*Case(2, 10, 128).tensors()[:3]))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "fp5"}, "fp5"),
        ({"zeros": "point"}, "zeros = 'point'; fp4 takes 'none'"),
        ({"extra": torch.ones(1)}, r"extra is torch.float32 \(1,\); fp4 with zeros = 'none' needs None"),
        ({"format": "int4", "zeros": "packed"}, r"extra is None; int4 .* needs torch.int32 \(10, 1\)"),
        (
            {"format": "int4", "zeros": "point", "extra": torch.ones(10, 1)},
            r"extra is torch.float32 \(10, 1\); .* needs torch.float16 \(10, 1\)",
        ),
        (
            {"kernel": "marlin_gemm_fp4_4stage"},
            "kernel is 'marlin_gemm_fp4_4stage'; fp4 has marlin_gemm_fp4, ",
        ),
        ({"out": torch.empty(2, 11)}, r"out is torch.float32 \(2, 11\); needs torch.float16 \(2, 10\)"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    x, codes, scales, _ = Case(2, 10, 128).tensors()
    with pytest.raises(ArgumentError, match=message):
        marlin_gemm(x, codes, scales, 128, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", DEVICES)
def test_is_an_op_to_torch(device: str) -> None:
    case = Case(9, 12, 128, 64, torch.float16, None, "int4", "point")
    x, codes, scales, extra = case.tensors(device)
    arguments = (x, codes, scales, extra, "int4", "point", 64, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.metal_marlin.marlin_gemm.default, arguments, test_utils=checks)
    out = x.new_empty(9, 12)
    torch.library.opcheck(
        torch.ops.metal_marlin.marlin_gemm_out.default,
        (*arguments, out),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.cuda
def test_in_a_cuda_graph(recorded: Callable[..., Callable[[], torch.Tensor]]) -> None:
    case = Case(70, 64, 512)
    tensors = case.tensors("cuda")
    y = call(case, tensors)
    assert torch.equal(recorded(lambda: call(case, tensors))(), y)


def test_plans_cover_every_output() -> None:
    for M, N, pool in [(1, 1, 1), (64, 64, 2), (65, 129, 2), (257, 64, 8), (5000, 4096, 64), (512, 576, 2)]:
        for kind in ("cpu", "cuda", "mps"):
            p = plan(M, N, 256, torch.float16, torch.float16, kind, pool=pool)
            assert p.threadgroups[0] * p.rows >= N > (p.threadgroups[0] - 1) * p.rows
            assert p.threadgroups[1] * p.tokens >= M > (p.threadgroups[1] - 1) * p.tokens
            assert p.tokens <= 256
            assert p.rows <= 64


def test_spec_names_what_exists() -> None:
    assert (ROOT / str(OP.bench)).exists()
    assert OP.reference is marlin_gemm_ref
    assert len({str(case) for case in CASES}) == len(CASES)
