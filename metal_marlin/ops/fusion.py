"""What products with four-bit weights that do more in the same launch share: names of rows, grids, tensors of cases."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import linear_decode
from metal_marlin.ops.linear import plan as linear_plan
from metal_marlin.ops.marlin_gemm import plan as gemm_plan
from metal_marlin.ops.weights import on_16_bytes, read_row, row_name

FORMATS = ("fp4", "int4")
DTYPES = (torch.float16, torch.bfloat16)
_GRIDS = {"fp4": "marlin_gemm_fused_fp4", "int4": "marlin_gemm_fused_u4"}  # rows with the same pipeline


@dataclass(frozen=True)
class Grid:
    """How a row is launched; ``rows``: of W, of a threadgroup; ``shape``: its GemmShape or GemvShape."""

    threadgroups: tuple[int, ...]
    threads: int
    lanes: int
    rows: int
    shape: bytes


def row(op: str, M: int, dtype: torch.dtype, format: str, zeros: str, kernel: str, known: tuple[str, ...]) -> str:
    """The row of ``kernel``, one of ``known``; those for few tokens end in _decode. Raises ArgumentError."""
    if format not in FORMATS or dtype not in DTYPES:
        raise ArgumentError(f"{op}: W is {format}, x is {dtype}; needs {', '.join(FORMATS)}, float16 or bfloat16")
    return row_name(
        op, kernel, known, dtype, dtype, format, zeros, "1" if kernel.endswith("_decode") and M == 1 else ""
    )


def is_few(M: int, N: int, K: int, dtype: torch.dtype, format: str, device: str) -> bool:
    """Whether ``linear`` reads W again for every 8 tokens."""
    return linear_plan(M, N, K, dtype, dtype, device, format) == "linear_decode"


def grid(
    x: torch.Tensor,
    codes: torch.Tensor,
    size: tuple[int, int, int],
    group: int,
    kind: str,
    few: bool,
    format: str = "fp4",
    zeros: str = "none",
    aligned: bool = True,
) -> Grid:
    """For M, N, K, rows with the core of decode_gemv (``few``) or of marlin_gemm_fused. ``kind``: cpu, cuda or mps;
    ``aligned``: tensors but x and codes start at multiples of 16 bytes."""
    M, N, K = size
    pool = torch.get_num_threads() if kind == "cpu" else 1
    aligned = aligned and K % 32 == 0 and on_16_bytes(x, codes)
    if few:
        kernel = f"decode_gemv_{format}{'' if M == 1 else '_batched'}"  # as many tokens a threadgroup
        d = linear_decode.plan(M, N, K, x.dtype, x.dtype, kind, pool, kernel, format, zeros)
        return Grid(d.threadgroups, d.threads, d.lanes, d.rows, struct.pack("=6q", M, N, K, group, d.rows, aligned))
    p = gemm_plan(M, N, K, x.dtype, x.dtype, kind, format, zeros, pool, _GRIDS[format])
    return Grid(
        p.threadgroups, p.threads, p.lanes, p.rows, struct.pack("=7q", M, N, K, group, p.rows, p.tokens, aligned)
    )


def read(name: str) -> tuple[str, torch.dtype, str, int]:
    """Kernel, dtype, zeros and a number of tokens of a row's name."""
    base, dtype, _, zeros = read_row(name)
    kernel, _, one = base.partition("__m")
    return kernel, dtype, zeros, 1 if one else 9
