"""linear_decode: y = x · Wᵀ for few tokens and quantised W, where time is what reading the weights takes."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, codec
from metal_marlin.ops.linear_decode_cases import CASES, Case, row_case
from metal_marlin.ops.product import check, product_ref, register
from metal_marlin.ops.selfcheck import product_check
from metal_marlin.ops.spec import OpSpec
from metal_marlin.ops.weights import library, on_16_bytes, plan_kind, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

__all__ = ["CASES", "FAMILY", "OP", "Case", "Plan", "linear_decode", "linear_decode_ref", "plan"]

FAMILY = "decode_gemv.metal"
_BATCH = 8  # tokens a _batched row takes in one reading of the weights
# fp4 variants of the plain simdgroup pipeline -> rows a simdgroup
_PLAIN = {"decode_gemv_fp4_simd": 4, "decode_gemv_fp4_wide": 2, "decode_gemv_fp4_tiled": 4}


@dataclass(frozen=True)
class Plan:
    """How a call runs: row of the family, grid, ``rows`` a threadgroup (cpu), simdgroup width, layout of W."""

    kernel: str
    threadgroups: tuple[int, int]
    threads: int
    rows: int
    lanes: int
    layout: str = CANONICAL


@functools.lru_cache(maxsize=4096)
def plan(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: str,
    pool: int = 1,
    kernel: str | None = None,
    format: str = "fp4",
    zeros: str = "none",
) -> Plan:
    """The row and grid for x [M, K] in ``dtype``; ``device``: cpu, cuda or mps; ``pool``: threads of the CPU pool.

    ``kernel`` asks for a variant: "decode_gemv_<format>", the same with "_batched", and for fp4 "_simd", "_wide",
    "_tiled" with scales like x. Raises ArgumentError for dtypes and variants that have no row.
    """
    base = kernel or kernel_for(M, device, format)
    row = _row(base, dtype, scale_dtype, format, zeros)
    down = -(-M // (_BATCH if base.endswith("_batched") else 1))
    if base in _PLAIN:
        each = _PLAIN[base]
        rows = each if device == "cpu" else 4 * each
        return Plan(row, (-(-N // rows), down), rows // each * (1 if device == "cpu" else 32), rows, _lanes(device))
    if device == "cpu":  # 8 threadgroups a thread even out; each brings x into order once, so not too few rows
        rows = max(4, min(512 if base.endswith("_batched") else 256, -(-N * down // (8 * pool)) + 3 & ~3))
        return Plan(row, (-(-N // rows), down), 1, rows, lanes=1)
    if device == "cuda" and dtype != torch.float32:  # enough simdgroups to hide reads, each with a turn of 64 bytes
        most = 256 if N > 6144 else 384 if base.endswith("_batched") else 512
        threads = min(most, 32 * -(-K // (16 * codec(format).per_word)))
        return Plan(row, (-(-N // 16), down), threads, 16, lanes=32)
    return Plan(row, (-(-N // 16), down), 128, 16, lanes=32)


def kernel_for(M: int, device: str, format: str) -> str:
    """The kernel for M tokens. A cpu's batched rows multiply for 8, however many there are: two take less time one
    after the other."""
    return f"decode_gemv_{format}{'_batched' if (2 if device == 'cpu' else 1) < M else ''}"


def _lanes(device: str) -> int:
    return 1 if device == "cpu" else 32


def _row(base: str, dtype: torch.dtype, scale_dtype: torch.dtype, format: str, zeros: str) -> str:
    plain = f"decode_gemv_{codec(format).name}"
    known = (plain, f"{plain}_batched", *(_PLAIN if format == "fp4" else ()))
    row = row_name("linear_decode", base, known, dtype, scale_dtype, format, zeros)
    if base in _PLAIN and scale_dtype != dtype:
        raise ArgumentError(f"linear_decode: {base} needs scales in x's {dtype}, they are {scale_dtype}")
    return row


linear_decode_ref = product_ref


def linear_decode(
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

    x: half, bfloat16 or float32, contiguous, on cpu, cuda or mps. codes: int32 [N, K·bits/32]. scales: what the
    format stores, [N, ⌈K/group_size⌉]: half, bfloat16 or float32, or bytes for mxfp4 and nvfp4. See
    ``metal_marlin.formats`` for formats, their group sizes and ``zeros``.
    extra: zeros "point" and "bias": [N, groups] in the scales' dtype; "packed": int32 [N, ⌈groups·bits/32⌉]; nvfp4:
    float32 [1], the scale of the whole tensor; else None.
    kernel: a variant of the family, for measurements. out: where to write, x's dtype, shape of y.
    Made for up to 8 tokens; every 8 more read the weights again. On NVIDIA GPUs, half and bfloat16 weights with groups
    finer than 128 (of 8-bit formats 64) are rounded to x's dtype, as dequantised weights are.
    Raises ArgumentError naming the argument and the numbers.
    """
    if out is None:
        return torch.ops.metal_marlin.linear_decode(x, codes, scales, extra, format, zeros, group_size, kernel)
    torch.ops.metal_marlin.linear_decode_out(x, codes, scales, extra, format, zeros, group_size, kernel, out)
    return out


@functools.lru_cache(maxsize=4096)
def _shape(M: int, N: int, K: int, group_size: int, rows: int, aligned: bool) -> bytes:
    """GemvShape, as bytes: making them of a dict takes half of a launch's time."""
    return struct.pack("=6q", M, N, K, group_size, rows, aligned)


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
    M, N, K = check("linear_decode", x, codes, scales, extra, format, zeros, group_size, out)
    kind = plan_kind(x.device.type)
    pool = torch.get_num_threads() if kind == "cpu" else 1
    p = plan(M, N, K, x.dtype, scales.dtype, kind, pool, kernel, format, zeros)
    if M == 0 or N == 0:
        return
    aligned = K % (4 * codec(format).per_word) == 0 and on_16_bytes(x, codes)
    shape = _shape(M, N, K, group_size, p.rows, aligned)
    dispatch_kernel(
        library(FAMILY, str(x.device), p.lanes),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, scales, scales if extra is None else extra, out, shape),
    )


_new = register("linear_decode", _run)

OP = OpSpec(
    name="linear_decode",
    family_file=FAMILY,
    reference=linear_decode_ref,
    cases=CASES,
    bench="bench/gemv.py",
    check=lambda case, device, kernel: product_check(linear_decode, case, device, kernel),
    row_case=row_case,
)
