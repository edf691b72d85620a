"""linear_few: y = x · Wᵀ for at most 16 tokens, W in FP4, by the rows of dense_gemm.metal that are made for so few."""

from __future__ import annotations

import struct

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import linear_decode
from metal_marlin.ops.dense import FAMILY
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.ops.product import check, product_ref, register
from metal_marlin.ops.selfcheck import product_check
from metal_marlin.ops.spec import OpSpec
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

SMALL = ("dense_gemm_small_batch_fp4", "dense_gemm_small_batch_fp4_fp32acc")
# grids are those of the rows of decode_gemv.metal with the same core
GEMV = {
    "dense_decode_gemv_fp4": "decode_gemv_fp4",
    "dense_decode_gemv_fp4_tiled": "decode_gemv_fp4_tiled",
    "dense_batched_decode_gemv_fp4": "decode_gemv_fp4_batched",
}
MOST = 16
_ROWS = 64  # of W, of a threadgroup: Tiled of src/dense_gemm.metal, core/cpu/gemm.h

_16 = (torch.float16, torch.bfloat16)
CASES = (
    *(Case(M, 67, 160, 32, d) for M in (1, 2, 7, 8, 9, 16) for d in KEYS),
    *(Case(M, 19, K, g, d) for M in (1, 5) for K, g in ((8, 8), (264, 128), (1000, 128), (520, 520)) for d in KEYS),
    *(Case(12, N, 520, 520, d) for N in (1, 64, 65) for d in _16),
    *(Case(M, 4096, 14336, 128, model="large") for M in (1, 8, 16)),
)


def usual(M: int, dtype: torch.dtype) -> str:
    """The row for so many tokens."""
    names = list(GEMV)
    return names[0] if M == 1 else names[2] if M <= 8 or dtype == torch.float32 else SMALL[0]


def linear_few(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int, *, kernel: str | None = None
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ for at most 16 tokens; sums in float32, rounded once.

    x: half, bfloat16 or float32, contiguous, on cpu, cuda or mps; codes, scales: fp4, scales in x's dtype. kernel: one
    of ``SMALL`` (not for float32) or ``GEMV``, for measurements. Raises ArgumentError naming the argument and the
    numbers.
    """
    return torch.ops.metal_marlin.linear_few(x, codes, scales, None, "fp4", "none", group_size, kernel)


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
    M, N, K = check("linear_few", x, codes, scales, extra, format, zeros, group_size, out)
    if format != "fp4" or x.dtype != scales.dtype:
        raise ArgumentError(f"linear_few: {format} with scales {scales.dtype}, x {x.dtype}; needs fp4 and one dtype")
    if M > MOST:
        raise ArgumentError(f"linear_few: M = {M}; at most {MOST}")
    kernel = kernel or usual(M, x.dtype)
    known = [*GEMV, *(SMALL if x.dtype != torch.float32 else ())]
    row = row_name("linear_few", kernel, known, x.dtype, scales.dtype, format, zeros)
    if out.numel() == 0:
        return
    kind = plan_kind(x.device.type)
    aligned, lanes = K % 32 == 0 and on_16_bytes(x, codes), 1 if kind == "cpu" else 32
    args: tuple[torch.Tensor | bytes, ...]
    if kernel in SMALL:
        tokens = M if kind == "cpu" else MOST
        shape = struct.pack("=7q", M, N, K, group_size, _ROWS, tokens, aligned)
        grid, threads, args = (-(-N // _ROWS), 1), 1 if kind == "cpu" else 128, (x, codes, scales, scales, out, shape)
    else:
        pool = torch.get_num_threads() if kind == "cpu" else 1
        p = linear_decode.plan(M, N, K, x.dtype, scales.dtype, kind, pool, GEMV[kernel])
        shape = struct.pack("=6q", M, N, K, group_size, p.rows, aligned)
        grid, threads, lanes, args = p.threadgroups, p.threads, p.lanes, (x, codes, scales, out, shape)
    dispatch_kernel(
        library(FAMILY, str(x.device), lanes), row, threadgroups=grid, threads_per_threadgroup=threads, args=args
    )


_new = register("linear_few", _run)


def _product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group: int, *, kernel: str | None, **_: object
) -> torch.Tensor:
    return linear_few(x, codes, scales, group, kernel=kernel)


def _row_case(name: str) -> tuple[Case, str]:
    base, _, key = name.partition("__t")
    return Case(9, 37, 264, 64, {word: dtype for dtype, word in KEYS.items()}[key or "half"]), base


OP = OpSpec(
    "linear_few",
    FAMILY,
    product_ref,
    CASES,
    "bench/dense.py",
    ("dense_gemm_small_batch_fp4*", "dense_decode_gemv_fp4*", "dense_batched_decode_gemv_fp4*"),
    lambda case, device, kernel: product_check(_product, case, device, kernel),
    _row_case,
)
