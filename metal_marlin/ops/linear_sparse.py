"""linear_sparse: y = x · Wᵀ with n:m sparse quantised W, for any number of tokens."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec, sparse
from metal_marlin.formats.sparse import Pattern, pattern
from metal_marlin.ops import linear_decode_cases as dense
from metal_marlin.ops.marlin_gemm import Plan, on_grid
from metal_marlin.ops.product import layout
from metal_marlin.ops.selfcheck import rounded_check
from metal_marlin.ops.spec import Check, OpSpec
from metal_marlin.ops.weights import library, on_16_bytes, plan_kind, read_row, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "sparse_gemm.metal"
NM = "marlin_gemm_sparse_nm"
FUSED = "marlin_gemm_sparse_fp4_fused"
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]


@functools.lru_cache(maxsize=4096)
def plan(
    M: int,
    N: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: str,
    format: str = "fp4",
    zeros: str = "none",
    of: str = "2:4",
    pool: int = 1,
    kernel: str | None = None,
) -> Plan:
    """The row and grid for x [M, K]; device, pool: as of ``marlin_gemm.plan``; kernel: for measurements.
    Raises ArgumentError for what has no row."""
    if format not in sparse.FORMATS or (of != "2:4" and format != "fp4"):
        raise ArgumentError(
            f"linear_sparse: format {format!r}, pattern {of}; there are rows for {', '.join(sparse.FORMATS)} with 2:4, "
            f"and for fp4 with {', '.join(sparse.PATTERNS)}"
        )
    if codec(format).scale_kind == "float" and scale_dtype != dtype:
        raise ArgumentError(f"linear_sparse: scales is {scale_dtype}, x is {dtype}; they need one dtype")
    known = [f"marlin_gemm_sparse_{format}"] if of == "2:4" else []
    known += [NM] if format == "fp4" else []
    known += [FUSED] if format == "fp4" and of == "2:4" and dtype != torch.float32 else []
    key = "" if of == "2:4" else of.replace(":", "of")
    row = row_name("linear_sparse", kernel or known[0], known, dtype, scale_dtype, format, zeros, pattern=key)
    return on_grid(row, M, N, device, pool, FAMILY)


def linear_sparse_ref(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    pattern: str = "2:4",
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64: x [..., K] times the decoded weights [N, K], 0 where none was kept, transposed."""
    of = sparse.pattern(pattern)
    return x.double() @ sparse.decode(codec(format), of, codes, places, scales, extra, x.shape[-1], group_size, zeros).T


def linear_sparse(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    pattern: str = "2:4",
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ with weights that ``metal_marlin.quant.quantize_sparse`` made.

    x: half, bfloat16 or float32, contiguous, on cpu, cuda or mps; K a multiple of 16, where a quarter is kept of 32.
    codes: int32 [N, K · n / m / 8] of the kept weights; places: int32 [N, ⌈K · n / m · b / 32⌉], b bits each: 2 (of 4
    weights) or 3 (of 8); scales [N, groups] (x's dtype, or bytes), zeros and extra: of groups of all weights, as
    ``marlin_gemm`` takes them. pattern: "n:m", one of ``formats.sparse.PATTERNS``; others than 2:4 for fp4. kernel: a
    row, for measurements. Sums are float32, y is rounded once. Differentiable in x. Raises ArgumentError naming the
    argument and the numbers.
    """
    return torch.ops.metal_marlin.linear_sparse(
        x, codes, places, scales, extra, pattern, format, zeros, group_size, kernel
    )


def check(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    of: Pattern,
    format: str,
    zeros: str,
    group_size: int,
) -> tuple[int, int, int]:
    """M, N, K. Raises ArgumentError, in the name of ``op``, for shapes that do not belong together."""
    if x.ndim < 1 or codes.ndim != 2:
        raise ArgumentError(f"{op}: shapes x {tuple(x.shape)}, codes {tuple(codes.shape)}; needs [..., K], [N, words]")
    K, N = int(x.shape[-1]), int(codes.shape[0])
    if K == 0 or K % of.unit:
        raise ArgumentError(f"{op}: x has K = {K}; pattern {of} needs a multiple of {of.unit}")
    wanted = (N, of.stored(K) // 8), (N, of.words(K))
    given = tuple(codes.shape), tuple(places.shape)
    if given != wanted or (codes.dtype, places.dtype) != (torch.int32, torch.int32):
        raise ArgumentError(
            f"{op}: codes are {codes.dtype} {given[0]}, places {places.dtype} {given[1]}; N = {N}, K = {K} with {of} "
            f"need torch.int32 {wanted[0]} and {wanted[1]}"
        )
    groups, more = layout(format, zeros, N, K, group_size, scales.dtype)
    if scales.shape != groups:
        raise ArgumentError(
            f"{op}: scales have shape {tuple(scales.shape)}; N = {N}, K = {K}, group_size = {group_size} need {groups}"
        )
    said = None if extra is None else (tuple(extra.shape), extra.dtype)
    if said != more:
        raise ArgumentError(f"{op}: extra is {said}; {format} with zeros = {zeros!r} needs {more}")
    return x.numel() // K, N, K


def _run(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    of: str,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
) -> torch.Tensor:
    M, N, K = check("linear_sparse", x, codes, places, scales, extra, pattern(of), format, zeros, group_size)
    kind = plan_kind(x.device.type)
    pool = torch.get_num_threads() if kind == "cpu" else 1
    p = plan(max(M, 1), N, x.dtype, scales.dtype, kind, format, zeros, of, pool, kernel)
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    aligned = int(K % 32 == 0 and on_16_bytes(x, codes))
    shape = {"M": M, "N": N, "K": K, "group": group_size, "rows": p.rows, "tokens": p.tokens, "aligned": aligned}
    dispatch_kernel(
        library(FAMILY, str(x.device), p.lanes),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, places, scales, scales if extra is None else extra, out, shape),
    )
    return out


def _fake(x: torch.Tensor, codes: torch.Tensor, places: torch.Tensor, *more: Any) -> torch.Tensor:
    scales, extra, of, format, zeros, group_size, _ = more
    check("linear_sparse", x, codes, places, scales, extra, pattern(of), format, zeros, group_size)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, places, scales, extra, *ctx.said, _ = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(codes, places, scales, extra)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of x: grad [..., N] · W [N, K]."""
    codes, places, scales, extra = ctx.saved_tensors
    of, format, zeros, group = ctx.said
    K = ctx.columns
    weight = sparse.decode(codec(format), pattern(of), codes, places, scales, extra, K, group, zeros, grad.dtype)
    return (grad @ weight, *(None,) * 9)


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(
    "linear_sparse(Tensor x, Tensor codes, Tensor places, Tensor scales, Tensor? extra, str pattern, str format, "
    "str zeros, int group_size, str? kernel) -> Tensor"
)
for _device in ("CPU", "CUDA", "MPS"):
    _torch.impl("linear_sparse", _run, _device)
torch.library.register_fake("metal_marlin::linear_sparse", _fake, lib=_torch)
torch.library.register_autograd("metal_marlin::linear_sparse", _gradient, setup_context=_keep)


def random_kept(N: int, K: int, of: Pattern) -> torch.Tensor:
    """Which weights of W [N, K] are kept, at random."""
    order = torch.rand(N, K // of.of, of.of, generator=torch.Generator().manual_seed(1)).argsort(-1)
    return (order < of.kept).flatten(1)


@dataclass(frozen=True)
class Case:
    """x [M, K] · W [N, K]ᵀ, W in ``format``, n of every m kept, scales in x's dtype or of the format's own."""

    M: int
    N: int
    K: int
    group: int = 128
    dtype: torch.dtype = torch.float16
    format: str = "fp4"
    zeros: str = "none"
    of: str = "2:4"
    model: str = ""

    def __str__(self) -> str:
        return f"{self.dense}-{self.of.replace(':', 'of')}"

    @property
    def dense(self) -> dense.Case:
        """The case of all weights."""
        return dense.Case(self.M, self.N, self.K, self.group, self.dtype, None, self.format, self.zeros, self.model)

    def tensors(self, device: str = "cpu") -> Tensors:
        """x, codes, places, scales, extra; which weights are kept is random."""
        x, codes, scales, extra = self.dense.tensors()
        of = pattern(self.of)
        codes, places = sparse.compress(codec(self.format), of, codes, random_kept(self.N, self.K, of))
        more = None if extra is None else extra.to(device)
        return x.to(device), codes.to(device), places.to(device), scales.to(device), more


def case_check(case: Case, device: str, kernel: str | None) -> Check:
    """As ``product_check``, with the weights that were kept."""
    x, codes, places, scales, extra = case.tensors(device)
    more: Any = {"pattern": case.of, "format": case.format, "zeros": case.zeros, "extra": extra}
    y = linear_sparse(x, codes, places, scales, case.group, kernel=kernel, **more)
    return rounded_check(y, *weights(case))


def weights(case: Case, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """x, and the decoded weights in float64."""
    x, codes, places, scales, extra = case.tensors(device)
    form, of = codec(case.format), pattern(case.of)
    return x, sparse.decode(form, of, codes, places, scales, extra, case.K, case.group, case.zeros)


def _row_case(name: str) -> tuple[Case, str]:
    base, dtype, _, zeros = read_row(name)
    of = re.search(r"_p(\d)of(\d)", name)
    format = base.split("_")[3].replace("nm", "fp4")
    group = next(g for g in (64, 32, 16) if g in codec(format).groups)
    return Case(9, 33, 192, group, dtype, format, zeros, f"{of[1]}:{of[2]}" if of else "2:4"), base


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_KINDS = tuple((f, z) for f in sparse.FORMATS for z in codec(f).zero_kinds)
CASES: tuple[Case, ...] = (
    *(Case(M, 67, 160, 32, d) for M in (1, 2, 3, 8, 17, 64, 65, 130) for d in _DTYPES),
    *(Case(5, N, 128, 64, d) for N in (1, 16, 63, 64, 129) for d in _DTYPES),
    *(Case(3, 19, K, g, d) for K, g in ((16, 16), (48, 16), (80, 80), (624, 128), (336, 32)) for d in _DTYPES),
    *(Case(4, 33, K, 32, d, of=p) for p in sparse.PATTERNS for K in (32, 96, 352) for d in _DTYPES if p != "2:4"),
    *(Case(7, 37, 288, (codec(f).groups or (64,))[0], d, f, z) for f, z in _KINDS for d in _DTYPES),
    *(
        replace(Case(M, N, K, 128), model="large")
        for M in (1, 16, 512)
        for N, K in ((4096, 4096), (14336, 4096), (4096, 14336))
    ),
)
OP = OpSpec("linear_sparse", FAMILY, linear_sparse_ref, CASES, "bench/sparse.py", ("*",), case_check, _row_case)
