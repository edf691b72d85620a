"""marlin_gemm: y = x · Wᵀ for many tokens and quantised W, where time is what the multiplications take."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, codec
from metal_marlin.ops.linear_decode_cases import KEYS, Case
from metal_marlin.ops.spec import OpSpec
from metal_marlin.runtime.dispatch import dispatch_kernel
from metal_marlin.runtime.library import MetalKernelLibrary

__all__ = ["CASES", "FAMILY", "OP", "Case", "Plan", "check", "marlin_gemm", "marlin_gemm_ref", "plan"]

FAMILY = "marlin_gemm.metal"
VARIANTS = {"fp4": ("", "_fp32acc", "_single_stage")}  # of formats that have more than the plain rows
_TILE = 64  # rows of W and tokens of a threadgroup; src/core/<device>/tile.h
_THREADS = 128
_TOKENS = 256  # most tokens of a threadgroup on the cpu; src/core/cpu/gemm.h


# Tiles of the rows with asynchronous copies: tokens and rows of W of a threadgroup, and what 64 k of it cost on an H200
# (clock cycles, about). "_async" is mma.sync, "_async_deep" wgmma: src/core/nvidia/gemm_few.h and gemm_wgmma.h.
ASYNC = {
    ("_async", 8): (32, 0),
    ("_async", 16): (32, 0),
    ("_async", 32): (32, 0),
    ("_async_deep", 32): (64, 200),
    ("_async_deep", 64): (64, 250),
    ("_async_deep", 128): (128, 650),
    ("_async_deep", 256): (128, 1100),
}
ASYNC_FORMATS = ("fp4", "int4", "int8")
_ASYNC_THREADS = 256
_MULTIPROCESSORS = 132

_DTYPES = tuple(KEYS)
_OTHERS = (
    ("mxfp4", "none", 32),
    ("nvfp4", "none", 16),
    *(("int4", zeros, 64) for zeros in ("none", "point", "packed", "bias")),
    ("int8", "none", 128),
    *(("uint8", zeros, 32) for zeros in ("point", "packed", "bias")),
    ("fp8_e4m3", "none", 128),
    ("fp8_e5m2", "none", 64),
)
CASES: tuple[Case, ...] = (
    *(Case(M, 67, 160, 32, d) for M in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 127, 128, 130) for d in _DTYPES),
    *(Case(9, N, 128, 64, d) for N in (1, 3, 16, 63, 64, 65, 257) for d in _DTYPES),
    *(Case(5, 19, K, g, d) for K, g in ((8, 8), (24, 16), (264, 64), (1000, 128), (520, 520)) for d in _DTYPES),
    *(Case(10, 21, 512, g, d) for g in (16, 32, 64, 128, 256, 512) for d in _DTYPES),
    *(Case(11, 33, 224, 32, d, s) for d in _DTYPES for s in _DTYPES if d != s),
    *(Case(13, 37, 288, g, d, None, f, z) for f, z, g in _OTHERS for d in _DTYPES),
    *(Case(7, 9, 100, g, d, None, f, z) for f, z, g in _OTHERS if codec(f).bits == 8 for d in _DTYPES),
    Case(300, 70, 600, 64, torch.float32),
    *(Case(512, N, K, 128, model="large") for N, K in ((4096, 14336), (14336, 4096), (4096, 4096))),
    *(
        Case(512, N, K, 64, torch.float32, torch.float16, model="smollm2")
        for N, K in ((576, 576), (960, 576), (3072, 576), (576, 1536))
    ),
)


@dataclass(frozen=True)
class Plan:
    """How a call runs: row of the family, grid, rows of W and tokens a threadgroup, simdgroup width, layout of W."""

    kernel: str
    threadgroups: tuple[int, int]
    threads: int
    rows: int
    tokens: int
    lanes: int
    layout: str = CANONICAL


def has_async(dtype: torch.dtype, scale_dtype: torch.dtype, format: str) -> bool:
    """Whether there are rows with asynchronous copies."""
    return format in ASYNC_FORMATS and dtype == scale_dtype != torch.float32


@functools.lru_cache(maxsize=4096)
def plan(
    M: int,
    N: int,
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

    ``kernel`` asks for a variant of the format, such as "marlin_gemm_fp4_single_stage" or "marlin_gemm_fp4_async__m16".
    Raises ArgumentError for dtypes and variants that have no row, or none that runs here.
    """
    of = codec(format)
    if dtype not in KEYS:
        raise ArgumentError(f"marlin_gemm: x is {dtype}; it takes {', '.join(map(str, KEYS))}")
    if scale_dtype not in of.scale_dtypes:
        raise ArgumentError(f"marlin_gemm: scales is {scale_dtype}; {format} takes {_listed(of.scale_dtypes)}")
    known = [f"marlin_gemm_{format}{variant}" for variant in VARIANTS.get(format, ("",))]
    tiles = {f"marlin_gemm_{format}{v}__m{m}": (v, m) for v, m in ASYNC if has_async(dtype, scale_dtype, format)}
    if kernel is not None and kernel not in known and kernel not in tiles:
        raise ArgumentError(f"marlin_gemm: kernel is {kernel!r}; of {format} there are {', '.join((*known, *tiles))}")
    tile = tiles.get(kernel or "")
    if kernel is None and device == "cuda" and hopper and aligned and tiles:
        tile = _tile(M, N)
    base = kernel or known[0] if tile is None else f"marlin_gemm_{format}{tile[0]}"
    keys = [
        "" if dtype == torch.float16 else f"t{KEYS[dtype]}",
        "" if of.scale_kind != "float" or scale_dtype == dtype else f"s{KEYS[scale_dtype]}",
        "" if zeros == "none" else f"z{zeros}",
        "" if tile is None else f"m{tile[1]}",
    ]
    row = "__".join(filter(None, (base, "_".join(filter(None, keys)))))
    across = -(-N // _TILE)
    if device == "cuda" and tile is not None:
        if not hopper or not aligned:
            need = (
                "a GPU of compute capability 9.0" if not hopper else "K % 32 = 0, x and codes at multiples of 16 bytes"
            )
            raise ArgumentError(f"marlin_gemm: kernel {row!r} needs {need}")
        rows, tokens = ASYNC[tile][0], tile[1]
        return Plan(row, (-(-N // rows), -(-M // tokens)), _ASYNC_THREADS, rows, tokens, lanes=32)
    if device != "cpu":
        return Plan(row, (across, -(-M // _TILE)), _THREADS, _TILE, _TILE, lanes=32)
    blocks = -(-M // _TOKENS)  # each decodes W again: more of them only where threads would have nothing to do
    while across * blocks < 3 * pool and 48 * blocks < M:
        blocks += 1
    tokens = -(-M // blocks)
    return Plan(row, (across, -(-M // tokens)), 1, _TILE, tokens, lanes=1)


def _tile(M: int, N: int) -> tuple[str, int]:
    """The tile of least time: few tokens in one, else by how often the multiprocessors have to take a threadgroup."""
    few = [tile for tile in ASYNC if tile[0] == "_async" and tile[1] >= M]
    if few:
        return min(few, key=lambda tile: tile[1])

    def cost(tile: tuple[str, int]) -> int:
        rows, each = ASYNC[tile]
        blocks = -(-N // rows) * -(-M // tile[1])
        return -(-blocks // _MULTIPROCESSORS) * each

    return min((tile for tile in ASYNC if tile[0] == "_async_deep"), key=cost)


@functools.lru_cache(maxsize=64)
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def _listed(values: object) -> str:
    return ", ".join(map(str, values))  # type: ignore[call-overload]


def marlin_gemm_ref(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64: x [..., K] times the decoded weights [N, K], transposed."""
    return x.double() @ codec(format).decode(codes, scales, extra, group_size, zeros).T


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


def check(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
) -> tuple[int, int, int]:
    """M, N, K. Raises ArgumentError, in the name of ``op``, for tensors that do not belong together."""
    of = codec(format)
    if x.ndim < 1 or codes.ndim != 2 or scales.ndim != 2:
        raise ArgumentError(
            f"{op}: shapes x {tuple(x.shape)}, codes {tuple(codes.shape)}, scales {tuple(scales.shape)}; "
            f"needs x [..., K], codes [N, K/{of.per_word}], scales [N, groups]"
        )
    K, N = x.shape[-1], codes.shape[0]
    if codes.shape[1] * of.per_word != K:
        raise ArgumentError(f"{op}: x has K = {K}, codes have K = {codes.shape[1] * of.per_word}")
    of.check(K, group_size)
    groups = of.groups_of(K, group_size)
    if scales.shape != (N, groups):
        raise ArgumentError(
            f"{op}: scales have shape {tuple(scales.shape)}; N = {N}, K = {K}, group_size = {group_size} "
            f"need {(N, groups)}"
        )
    of.check_zeros(zeros)
    shape = of.extra_shape(N, groups, zeros)
    wanted = None if shape is None else (of.extra_dtype(scales.dtype, zeros), shape)
    given = None if extra is None else (extra.dtype, tuple(extra.shape))
    if given != wanted:
        said = ["None" if e is None else f"{e[0]} {e[1]}" for e in (given, wanted)]
        raise ArgumentError(f"{op}: extra is {said[0]}; {format} with zeros = {zeros!r} needs {said[1]}")
    return x.numel() // K, N, K


@functools.lru_cache(maxsize=64)
def _library(device: str, lanes: int) -> MetalKernelLibrary:
    return MetalKernelLibrary(FAMILY, device=device, lanes=lanes)


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
    M, N, K = check("marlin_gemm", x, codes, scales, extra, format, zeros, group_size)
    if out.shape != (*x.shape[:-1], N) or out.dtype != x.dtype:
        raise ArgumentError(f"marlin_gemm: out is {out.dtype} {tuple(out.shape)}; needs {x.dtype} {(*x.shape[:-1], N)}")
    kind = x.device.type
    pool = torch.get_num_threads() if kind == "cpu" else 1
    aligned = K % 32 == 0 and kind != "mps" and (x.data_ptr() | codes.data_ptr()) % 16 == 0
    if kind == "mps":  # data_ptr() is a buffer object there
        aligned = K % 32 == 0 and x.storage_offset() * x.element_size() % 16 == 0 and codes.storage_offset() % 4 == 0
    hopper = kind == "cuda" and _is_hopper(x.device.index)
    p = plan(max(M, 1), N, x.dtype, scales.dtype, kind, format, zeros, pool, kernel, hopper, aligned)
    if M == 0 or N == 0:
        return
    shape = {"M": M, "N": N, "K": K, "group": group_size, "rows": p.rows, "tokens": p.tokens, "aligned": int(aligned)}
    dispatch_kernel(
        _library(str(x.device), p.lanes),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, scales, scales if extra is None else extra, out, shape),
    )


def _new(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], codes.shape[0]))
    _run(x, codes, scales, extra, format, zeros, group_size, kernel, out)
    return out


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
) -> torch.Tensor:
    check("marlin_gemm", x, codes, scales, extra, format, zeros, group_size)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


ARGUMENTS = "Tensor x, Tensor codes, Tensor scales, Tensor? extra, str format, str zeros, int group_size, str? kernel"
_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(f"marlin_gemm({ARGUMENTS}) -> Tensor")
_torch.define(f"marlin_gemm_out({ARGUMENTS}, Tensor(a!) out) -> ()")
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("marlin_gemm", _new, _key)
    _torch.impl("marlin_gemm_out", _run, _key)
torch.library.register_fake("metal_marlin::marlin_gemm", _fake, lib=_torch)
torch.library.register_fake("metal_marlin::marlin_gemm_out", lambda *_: None, lib=_torch)

OP = OpSpec(
    name="marlin_gemm",
    family_file=FAMILY,
    reference=marlin_gemm_ref,
    cases=CASES,
    bench="bench/gemm.py",
)
