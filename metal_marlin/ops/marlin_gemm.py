"""marlin_gemm: y = x · Wᵀ for many tokens and quantised W, where time is what the multiplications take."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, codec
from metal_marlin.ops.gemm_tiles import TILES, fastest, has_tiles
from metal_marlin.ops.linear_decode_cases import Case, row_case
from metal_marlin.ops.product import check, product_ref, register
from metal_marlin.ops.selfcheck import product_check
from metal_marlin.ops.spec import OpSpec
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind, read_row, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel
from metal_marlin.runtime.tensor_map import NONE, tensor_map

__all__ = ["CASES", "FAMILY", "OP", "Case", "Plan", "marlin_gemm", "marlin_gemm_ref", "plan"]

FAMILY = "marlin_gemm.metal"
VARIANTS = {"fp4": ("", "_fp32acc", "_single_stage", "_3stage")}  # of formats that have more than the plain rows
_TILE = 64  # rows of W and tokens of a threadgroup; src/core/<device>/tile.h
_THREADS = 128
_TOKENS = 256  # most tokens of a threadgroup on the cpu; src/core/cpu/gemm.h


@dataclass(frozen=True)
class Named:
    """A kernel with a tile of its own, half and bfloat16: its format, rows of W and tokens of a threadgroup, its file,
    threads; ``copies``: the tile of ``TILES`` that it has on cuda, which has asynchronous copies."""

    format: str
    rows: int
    tokens: int
    file: str = FAMILY
    threads: int = _THREADS
    copies: str = ""


_SIZES = "32x32x32 64x32x32 32x64x32 64x64x16 64x64x32 64x64x64 128x64x32 64x128x32 128x128x16"
NAMED = {
    **{
        f"marlin_gemm_fp4_{size}": Named(
            "fp4", int(size.split("x")[1]), int(size.split("x")[0]), "kernels_autotune.metal"
        )
        for size in _SIZES.split()
    },
    **{
        f"gemm_fp4_optimized{name}": Named("fp4", 64, tokens, "gemm_fp4_optimized.metal")
        for name, tokens in (("", 32), ("_fp32acc", 32), ("_decode", 16), ("_large_m", 128))
    },
    **{f"marlin_gemm_fused_fp4{name}": Named("fp4", 64, 64) for name in ("", "_fp32acc")},
    "marlin_gemm_fused_u4": Named("int4", 64, 64),
    "marlin_gemm_divergent_fp4": Named("fp4", 64, 64, threads=2 * _THREADS),
    **{f"marlin_gemm_fp4_async{name}": Named("fp4", 64, 64, copies="32x32") for name in ("", "_deep")},
}
_DTYPES = tuple(KEYS)
_OTHERS = (
    ("mxfp4", "none", 32),
    ("nvfp4", "none", 16),
    *(("int4", zeros, 64) for zeros in ("none", "point", "packed", "bias")),
    ("int8", "none", 128),
    *(("uint8", zeros, 32) for zeros in ("point", "packed", "bias")),
    ("fp8_e4m3", "none", 128),
    ("fp8_e5m2", "none", 64),
    ("int2", "none", 64),
    ("int3", "none", 32),
    ("nf3", "none", 16),
)
CASES: tuple[Case, ...] = (
    *(Case(M, 67, 160, 32, d) for M in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 127, 128, 130) for d in _DTYPES),
    *(Case(9, N, 128, 64, d) for N in (1, 3, 16, 63, 64, 65, 257) for d in _DTYPES),
    *(Case(5, 19, K, g, d) for K, g in ((8, 8), (24, 16), (264, 64), (1000, 128), (520, 520)) for d in _DTYPES),
    *(Case(10, 21, 512, g, d) for g in (16, 32, 64, 128, 256, 512) for d in _DTYPES),
    *(Case(11, 33, 224, 32, d, s) for d in _DTYPES for s in _DTYPES if d != s),
    *(Case(13, 37, 288, g, d, None, f, z) for f, z, g in _OTHERS for d in _DTYPES),
    *(Case(7, 9, 100, g, d, None, f, z) for f, z, g in _OTHERS if codec(f).bits == 8 for d in _DTYPES),
    *(Case(7, 9, 96 + codec(f).unit, 16, d, None, f) for f in ("int2", "int3", "nf3") for d in _DTYPES),
    Case(300, 70, 600, 64, torch.float32),
    *(Case(512, N, K, 128, model="large") for N, K in ((4096, 14336), (14336, 4096), (4096, 4096))),
    *(
        Case(512, N, K, 64, torch.float32, torch.float16, model="smollm2")
        for N, K in ((576, 576), (960, 576), (3072, 576), (576, 1536))
    ),
)


@dataclass(frozen=True)
class Plan:
    """How a call runs: row, grid, rows of W and tokens a threadgroup, simdgroup width, file of the row, layout of W."""

    kernel: str
    threadgroups: tuple[int, ...]
    threads: int
    rows: int
    tokens: int
    lanes: int
    file: str = FAMILY
    tile: str = ""
    layout: str = CANONICAL


@functools.lru_cache(maxsize=4096)
def plan(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: str,
    format: str = "fp4",
    zeros: str = "none",
    pool: int = 1,
    kernel: str | None = None,
    hopper: bool = False,
    aligned: bool = True,
) -> Plan:
    """The row and grid for x [M, K] in ``dtype``; ``device``: cpu, cuda or mps; ``pool``: threads of the CPU pool;
    ``hopper``: the GPU has compute capability 9.0; ``aligned``: K is a multiple of 32, x and codes start at 16 bytes.

    ``kernel`` asks for a variant of the format, such as "marlin_gemm_fp4_single_stage", a tile of it, such as
    "marlin_gemm_fp4__m32x16", or one of ``NAMED``.
    Raises ArgumentError for dtypes and variants that have no row, or none that runs here.
    """
    named = NAMED.get(kernel or "")
    if kernel and named and format == named.format and dtype == scale_dtype != torch.float32:
        row = row_name("marlin_gemm", kernel, [kernel], dtype, scale_dtype, format, zeros)
        if device == "cuda" and named.copies:
            return _tiled(row, M, N, named.copies, hopper, aligned)
        return on_grid(row, M, N, device, pool, named.file, named.rows, named.tokens, threads=named.threads)
    known = [f"marlin_gemm_{codec(format).name}{variant}" for variant in VARIANTS.get(format, ("",))]
    tiles = TILES if has_tiles(dtype, scale_dtype, format) else {}
    base, _, tile = (kernel or known[0]).partition("__m")
    if tile and (base != known[0] or tile not in tiles):
        raise ArgumentError(f"marlin_gemm: kernel is {kernel!r}; tiles of {known[0]} are {', '.join(tiles) or 'none'}")
    if kernel is None and tiles and device == "cuda" and aligned:
        tile = fastest(M, N, K, hopper)
    row = row_name("marlin_gemm", base, known, dtype, scale_dtype, format, zeros, tile)
    if tile and device == "cuda":
        return _tiled(row, M, N, tile, hopper, aligned)
    return on_grid(row, M, N, device, pool, FAMILY, tile=tile)


def _tiled(row: str, M: int, N: int, tile: str, hopper: bool, aligned: bool) -> Plan:
    """A grid of a tile of ``TILES`` on cuda."""
    t = TILES[tile]
    if not aligned or (t.hopper and not hopper):
        need = "K % 32 = 0, x and codes at multiples of 16 bytes" if not aligned else "compute capability 9.0"
        raise ArgumentError(f"marlin_gemm: kernel {row!r} needs {need}")
    grid = (-(-N // t.rows), -(-M // t.tokens), t.parts)
    return Plan(row, grid, t.threads, t.rows, t.tokens, 32, FAMILY, tile)


def on_grid(
    row: str,
    M: int,
    N: int,
    device: str,
    pool: int,
    file: str,
    rows: int = _TILE,
    tokens: int = _TILE,
    tile: str = "",
    threads: int = _THREADS,
) -> Plan:
    """A grid of tiles; on the cpu rows and tokens are what suits its threads."""
    if device != "cpu":
        return Plan(row, (-(-N // rows), -(-M // tokens)), threads, rows, tokens, 32, file, tile)
    across = -(-N // _TILE)
    blocks = -(-M // _TOKENS)  # each decodes W again: more of them only where threads would have nothing to do
    while across * blocks < 3 * pool and 48 * blocks < M:
        blocks += 1
    tokens = -(-M // blocks)
    return Plan(row, (across, -(-M // tokens)), 1, _TILE, tokens, 1, file, tile)


@functools.lru_cache(maxsize=64)
def is_hopper(index: int) -> bool:
    """Whether a CUDA device has compute capability 9.0."""
    return torch.cuda.get_device_capability(index) == (9, 0)


marlin_gemm_ref = product_ref


def marlin_gemm(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    kernel: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ with quantised weights; sums in float32, rounded once to x's dtype.

    x: half, bfloat16 or float32, contiguous, on cpu, cuda or mps. codes: int32 [N, K · bits / 32], scales
    [N, groups], zeros and extra: as ``metal_marlin.formats.codec(format)`` makes them. group_size: 16, 32, 64, 128,
    256 or K, where the format has no size of its own. kernel: a variant of the format, for measurements. out: where to
    write, x's dtype, shape of y.
    Weights are rounded to x's dtype before they are multiplied, as dequantised weights are; on the CPU they stay
    float32. Raises ArgumentError naming the argument and the numbers.
    """
    if out is None:
        return torch.ops.metal_marlin.marlin_gemm(x, codes, scales, extra, format, zeros, group_size, kernel)
    torch.ops.metal_marlin.marlin_gemm_out(x, codes, scales, extra, format, zeros, group_size, kernel, out)
    return out


def _run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
    out: torch.Tensor,
) -> None:
    M, N, K = check("marlin_gemm", x, codes, scales, extra, format, zeros, group_size, out)
    kind = plan_kind(x.device.type)
    pool = torch.get_num_threads() if kind == "cpu" else 1
    hopper = kind == "cuda" and is_hopper(x.device.index)
    aligned = K % 32 == 0 and on_16_bytes(x, codes)
    p = plan(max(M, 1), N, K, x.dtype, scales.dtype, kind, format, zeros, pool, kernel, hopper, aligned)
    if M == 0 or N == 0:
        return
    shape = {"M": M, "N": N, "K": K, "group": group_size, "rows": p.rows, "tokens": p.tokens, "aligned": int(aligned)}
    dispatch_kernel(
        library(p.file, str(x.device), p.lanes),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, scales, scales if extra is None else extra, out, shape, *_map(x, M, K, p)),
    )


def _map(x: torch.Tensor, M: int, K: int, p: Plan) -> tuple[bytes, ...]:
    """What rows for many tokens take besides."""
    tile = TILES.get(p.tile)
    if tile is None or not tile.wgmma:
        return ()
    return (tensor_map(x.data_ptr(), M, K, tile.tokens) if x.is_cuda else NONE,)


_new = register("marlin_gemm", _run)


def _row_case(name: str) -> tuple[Case, str]:
    named = NAMED.get(read_row(name)[0])
    return row_case(name, named.format if named else None)


OP = OpSpec(
    name="marlin_gemm",
    family_file=FAMILY,
    reference=marlin_gemm_ref,
    cases=CASES,
    bench="bench/gemm.py",
    check=lambda case, device, kernel: product_check(marlin_gemm, case, device, kernel),
    row_case=_row_case,
    more_files=tuple(sorted({named.file for named in NAMED.values()} - {FAMILY})),
)
