"""What a product with quantised weights launches, without launching it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, MMA16, codec, operands
from metal_marlin.formats.sparse import pattern
from metal_marlin.msl.target import Target
from metal_marlin.ops import (
    dequantize,
    linear,
    linear_decode,
    linear_sparse,
    marlin_gemm,
    packed,
    packed_plan,
    packed_sparse,
    tuned,
)
from metal_marlin.ops.gemm_tiles import MULTIPROCESSORS, multiprocessors
from metal_marlin.ops.packed_plan import Rows
from metal_marlin.ops.tuned import Problem
from metal_marlin.ops.weights import KEYS

_OF = pattern("2:4")
_MEASURED = "measured on this device"
_WHY = {
    "linear_decode": "few tokens: time is what reading W takes",
    "marlin_gemm": "tiles of tokens: each weight is decoded once for all of a tile",
    "dequantize": "so many tokens that decoding W into memory for the library's product is faster",
    "linear_sparse": "what was kept of W is read, and multiplied as whole rows",
}
_FITTED = "operand order: the tile of least fitted time"


@dataclass(frozen=True)
class Step:
    """One launch: op, kernel, threadgroups and threads of each (0 and none: torch's), and why it is this one."""

    op: str
    kernel: str
    threadgroups: tuple[int, ...]
    threads: int
    why: str


@dataclass(frozen=True)
class _Product:
    """x [M, K] and W, and where they are."""

    M: int
    of: Problem
    kind: str
    hopper: bool
    here: bool

    @property
    def pool(self) -> int:
        return torch.get_num_threads() if self.kind == "cpu" else 1

    def _index(self) -> int:
        return torch.cuda.current_device() if self.kind == "cuda" else 0

    def measured(self, op: str) -> str | None:
        """What a table of this machine names."""
        return tuned.choice(self.of, self.M, self.kind, self._index(), op) if self.here else None

    def multiprocessors(self) -> int:
        """Of this machine's device; of others what tiles are made for."""
        return multiprocessors(torch.device(self.kind, self._index())) if self.here else MULTIPROCESSORS


def explain(
    M: int,
    N: int,
    K: int,
    *,
    device: str = "",
    format: str = "fp4",
    zeros: str = "none",
    dtype: str = "half",
    layout: str = CANONICAL,
    sparse: bool = False,
) -> list[Step]:
    """The launches of ``linear`` for x [M, K] and W [N, K] with 16-byte aligned tensors, scales in x's dtype; with
    ``layout="mma16"`` those of ``linear_packed``; with ``layout=""`` both, the latter where layers hold W so. Of
    2:4 ``sparse`` W those of ``linear_sparse`` and ``linear_packed_sparse``.

    device: cpu, cuda:sm_80, cuda:sm_90a, metal …; "": the best that this machine has. dtype: half, bf16 or f32.
    Raises ArgumentError for sizes, formats, dtypes and layouts that have no row.
    """
    if min(M, N, K) < 1:
        raise ArgumentError(f"plan: M, N, K are {M}, {N}, {K}; each must be positive")
    names = {word: d for d, word in KEYS.items()}
    if dtype not in names:
        raise ArgumentError(f"plan: dtype is {dtype!r}; it is one of {', '.join(names)}")
    if layout not in ("", CANONICAL, MMA16):
        raise ArgumentError(f"plan: layout is {layout!r}; it is {CANONICAL} or {MMA16}")
    form, number = codec(format), names[dtype]
    unit = _OF.unit if sparse else form.per_word
    if K % unit:
        raise ArgumentError(f"plan: K = {K} is no multiple of {unit}, the weights of a word of {format}")
    zeros = form.zero_kinds[0] if zeros == "none" and "none" not in form.zero_kinds else zeros
    scales = number if form.scale_kind == "float" else form.scale_dtypes[0]
    product = _Product(M, Problem(format, zeros, number, scales, N, K), *_device(device), not device)
    rows = packed_sparse.ROWS if sparse else packed.ROWS
    found = [] if layout == MMA16 else _sparse(product) if sparse else _canonical(product)
    if layout == MMA16 or (layout == "" and product.hopper and rows.take(product.of)):
        found += _packed(product, rows)
    return found


def _canonical(p: _Product) -> list[Step]:
    kernel = p.measured("linear")
    of, pool = p.of, p.pool
    sizes = (p.M, of.N, of.K, of.dtype, of.scale_dtype, p.kind)
    op = linear.op_of(kernel) if kernel else linear.plan(*sizes, of.format, None, p.hopper)
    why = _MEASURED if kernel else _WHY[op]
    if op == "linear_decode":
        decode = linear_decode.plan(*sizes, pool, kernel, of.format, of.zeros)
        return [Step(op, decode.kernel, decode.threadgroups, decode.threads, why)]
    if op == "marlin_gemm":
        gemm = marlin_gemm.plan(*sizes, of.format, of.zeros, pool, kernel, p.hopper, of.K % 32 == 0)
        return [Step(op, gemm.kernel, gemm.threadgroups, gemm.threads, why)]
    decoded = dequantize.plan(*sizes[1:], pool, None, of.format, of.zeros)
    return [
        Step(op, decoded.kernel, decoded.threadgroups, decoded.threads, why),
        Step("torch.mm", "the library's", (), 0, why),
    ]


def _sparse(p: _Product) -> list[Step]:
    of, op = p.of, "linear_sparse"
    plan = linear_sparse.plan(p.M, of.N, of.dtype, of.scale_dtype, p.kind, of.format, of.zeros, str(_OF), p.pool)
    return [Step(op, plan.kernel, plan.threadgroups, plan.threads, _WHY[op])]


def _packed(p: _Product, rows: Rows) -> list[Step]:
    of = replace(p.of, zeros=operands.kernel_zeros(p.of.zeros))
    kernel = replace(p, of=of).measured(rows.op)
    sizes = (p.M, of.N, of.K, of.dtype, of.scale_dtype)
    plan = packed_plan.plan(rows, *sizes, of.format, of.zeros, kernel, p.multiprocessors())
    if not operands.fits(codec(of.format), of.N, of.K):
        raise ArgumentError(f"plan: W is [{of.N}, {of.K}]; layout {MMA16} takes N % 16 = 0 and K % 64 = 0")
    return [Step(rows.op, plan.kernel, plan.threadgroups, plan.threads, _MEASURED if kernel else _FITTED)]


def _device(text: str) -> tuple[str, bool]:
    """Device kind, and whether it has compute capability 9.0."""
    if not text:
        if torch.cuda.is_available():
            return "cuda", marlin_gemm.is_hopper(torch.cuda.current_device())
        return ("mps" if torch.backends.mps.is_available() else "cpu"), False
    target = Target.parse(text)
    return ("mps" if target.kind == "metal" else target.kind), target.arch == "sm_90a"
