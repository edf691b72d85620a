"""dense_linear: y = x · wᵀ of dense tensors; linear_split: FP4 weights, K shared out among threadgroups."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.ops.product import check, product_ref, register
from metal_marlin.ops.selfcheck import product_check
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, read_row, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "dense_gemm.metal"
DENSE = ("dense_gemm", "marlin_gemm_fp16_pipelined", "marlin_gemm_fp16_single_stage")
SPLIT = ("dense_gemm_prefill_splitk_fp4", "marlin_gemm_fp4_striped")
_TILE, _THREADS = 64, 128  # core/tile.h
_STEP = 64  # a multiple of every device's step along K
_WORKERS = {"cuda": 264}  # fixed, so that results do not depend on the GPU's size
_MOST = 8  # slices


@dataclass(frozen=True)
class DenseCase:
    """x [M, K] · w [N, K]ᵀ."""

    M: int
    N: int
    K: int
    dtype: torch.dtype = torch.float16
    kernel: str = DENSE[0]
    model: str = ""

    def __str__(self) -> str:
        return f"{self.M}x{self.N}x{self.K}-{KEYS[self.dtype]}-{self.kernel}"

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(rows, self.K, generator=rng).to(self.dtype) for rows in (self.M, self.N))
        return x.to(device), w.to(device)


_16 = (torch.float16, torch.bfloat16)
DENSE_CASES = (
    *(DenseCase(M, 67, 160, d, kernel) for kernel in DENSE for M in (1, 2, 7, 17, 33, 64, 128) for d in _16),
    *(DenseCase(5, N, K, d) for N, K in ((1, 1), (65, 7), (3, 65), (129, 200)) for d in KEYS),
    *(DenseCase(9, 33, 77, d, kernel) for kernel in DENSE[1:] for d in _16),
    DenseCase(512, 4096, 4096, model="large"),
)
SPLIT_CASES = (
    *(Case(M, 67, 416, 32, d) for M in (1, 2, 7, 17, 33, 64, 128) for d in _16),
    *(Case(5, 19, K, g, d) for K, g in ((8, 8), (264, 128), (1000, 128), (520, 520)) for d in KEYS),
    Case(130, 200, 1032, 128, torch.float32),
    Case(128, 4096, 14336, 128, model="large"),
)


def dense_linear_ref(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """The meaning, in float64."""
    return x.double() @ w.double().T


def dense_linear(x: torch.Tensor, w: torch.Tensor, *, kernel: str | None = None) -> torch.Tensor:
    """y [..., N] = x [..., K] · w [N, K]ᵀ; sums in float32, rounded once.

    x and w: half, bfloat16 or float32 of one dtype, contiguous, on cpu, cuda or mps. kernel: one of ``DENSE``, for
    measurements; the last two have no float32. Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.dense_linear(x, w, kernel)


def _check(x: torch.Tensor, w: torch.Tensor, kernel: str | None) -> tuple[int, int, int, str]:
    """M, N, K and the row."""
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        given = f"x {x.dtype} {tuple(x.shape)}, w {w.dtype} {tuple(w.shape)}"
        raise ArgumentError(f"dense_linear: {given}; needs x [..., K], w [N, K] of one dtype")
    known = DENSE[:1] if x.dtype == torch.float32 else DENSE
    row = row_name("dense_linear", kernel or DENSE[0], known, x.dtype, x.dtype, "fp4", "none")
    return x.numel() // max(1, x.shape[-1]), int(w.shape[0]), int(w.shape[1]), row


def _dense(x: torch.Tensor, w: torch.Tensor, kernel: str | None = None) -> torch.Tensor:
    M, N, K, row = _check(x, w, kernel)
    y = x.new_empty(*x.shape[:-1], N)
    if y.numel() == 0:
        return y
    if K == 0:
        return y.zero_()
    aligned = K * x.itemsize % 16 == 0 and on_16_bytes(x, w)
    dispatch_kernel(
        library(FAMILY, str(x.device), 32),
        row,
        threadgroups=(-(-N // _TILE), -(-M // _TILE)),
        threads_per_threadgroup=_THREADS,
        args=(x, w, y, struct.pack("=4q", M, N, K, aligned)),
    )
    return y


def _fake(x: torch.Tensor, w: torch.Tensor, kernel: str | None = None) -> torch.Tensor:
    _check(x, w, kernel)
    return x.new_empty(*x.shape[:-1], w.shape[0])


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define("dense_linear(Tensor x, Tensor w, str? kernel=None) -> Tensor")
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("dense_linear", _dense, _key)
torch.library.register_fake("metal_marlin::dense_linear", _fake, lib=_torch)


@dataclass(frozen=True)
class Plan:
    """Grid, k of a slice, threadgroups that share the units (0: a slice each), parts of every sum."""

    threadgroups: tuple[int, int, int]
    per: int
    workers: int
    parts: int


def plan(M: int, N: int, K: int, device: str, kernel: str) -> Plan:
    """How linear_split runs: for slices at least two steps each, at most ``_MOST`` of them; striped: a step each."""
    across, down, steps = -(-N // _TILE), -(-M // _TILE), -(-K // _STEP)
    if kernel == SPLIT[0]:
        per = -(-steps // min(_MOST, max(1, steps // 2))) * _STEP
        parts = -(-K // per)
        return Plan((across, down, parts), per, 0, parts)
    units = across * down * steps
    workers = min(_WORKERS.get(device, 16), units)
    least = units // workers  # of a worker
    parts = 1 if steps == 1 else min(workers, (steps - 2) // least + 2)
    return Plan((workers, 1, 1), _STEP, workers, parts)


def linear_split(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int, *, kernel: str | None = None
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ, W in FP4 with scales of x's dtype, K shared out among threadgroups.

    Tensors as marlin_gemm's. kernel: "dense_gemm_prefill_splitk_fp4" (None), slices of K; or
    "marlin_gemm_fp4_striped", stream-K. Parts of sums are float32 and are added in a fixed order by a second pass: the
    same bits every time. Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.linear_split(x, codes, scales, None, "fp4", "none", group_size, kernel)


def _split(
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
    M, N, K = check("linear_split", x, codes, scales, extra, format, zeros, group_size, out)
    if format != "fp4" or x.dtype != scales.dtype:
        raise ArgumentError(f"linear_split: {format} with scales {scales.dtype}, x {x.dtype}; needs fp4 and one dtype")
    kernel = kernel or SPLIT[0]
    row = row_name("linear_split", kernel, SPLIT, x.dtype, scales.dtype, format, zeros)
    if out.numel() == 0:
        return
    p = plan(M, N, K, x.device.type, kernel)
    rows, parts = library(FAMILY, str(x.device), 32), x.new_empty(p.parts, M * N, dtype=torch.float32)
    count = struct.pack("=2q", parts.numel(), p.parts)
    if p.workers:
        _each(rows, "marlin_zero_reduction", parts.numel(), (parts, count))
    aligned = K % 32 == 0 and on_16_bytes(x, codes)
    shape = struct.pack("=9q", M, N, K, group_size, _TILE, _TILE, aligned, p.per, p.workers)
    dispatch_kernel(
        rows,
        row,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=_THREADS,
        args=(x, codes, scales, parts, shape),
    )
    key = row.removeprefix(kernel)
    _each(rows, f"dense_splitk_reduce{key}", M * N, (parts, out, struct.pack("=2q", M * N, p.parts)))


def _each(rows: object, kernel: str, count: int, args: tuple[object, ...]) -> None:
    if count >= 1 << 32:
        raise ArgumentError(f"linear_split: {count} sums; at most {(1 << 32) - 1}")
    dispatch_kernel(rows, kernel, threadgroups=-(-count // 256), threads_per_threadgroup=256, args=args)  # type: ignore[arg-type]


_new = register("linear_split", _split)


def _compare(case: DenseCase, device: str, kernel: str | None) -> Check:
    x, w = case.tensors()
    y = dense_linear(x.to(device), w.to(device), kernel=kernel or case.kernel).cpu().double()
    exact, sums = dense_linear_ref(x, w), x.double().abs() @ w.double().abs().T
    return worst((y - exact).abs(), torch.finfo(case.dtype).eps * exact.abs() + 2.0**-20 * sums)


def _product(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group: int, *, kernel: str | None, **_: object
) -> torch.Tensor:
    return linear_split(x, codes, scales, group, kernel=kernel)


def _dense_row_case(name: str) -> tuple[DenseCase, str]:
    base, dtype, _, _ = read_row(name)
    return DenseCase(9, 33, 77, dtype), base


def _row_case(name: str) -> tuple[Case, str]:
    base, dtype, _, _ = read_row(name)
    of = {"marlin_zero_reduction": SPLIT[1], "dense_splitk_reduce": SPLIT[0]}
    return Case(9, 37, 264, 64, dtype), of.get(base, base)


OP = (
    OpSpec(
        "dense_linear",
        FAMILY,
        dense_linear_ref,
        DENSE_CASES,
        "bench/dense.py",
        ("dense_gemm", "dense_gemm__*", "marlin_gemm_fp16_*"),
        _compare,
        _dense_row_case,
    ),
    OpSpec(
        "linear_split",
        FAMILY,
        product_ref,
        SPLIT_CASES,
        "bench/dense.py",
        ("dense_gemm_prefill_splitk_fp4*", "dense_splitk_reduce*", "marlin_gemm_fp4_striped*", "marlin_zero_reduction"),
        lambda case, device, kernel: product_check(_product, case, device, kernel),
        _row_case,
    ),
)
