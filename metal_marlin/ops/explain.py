"""What a product with quantised weights launches, without launching it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, MMA16, codec, operands
from metal_marlin.msl.target import Target
from metal_marlin.ops import dequantize, linear, linear_decode, marlin_gemm, packed, tuned
from metal_marlin.ops.gemm_tiles import MULTIPROCESSORS, multiprocessors
from metal_marlin.ops.weights import KEYS

_MEASURED = "measured on this device"
_WHY = {
    "linear_decode": "few tokens: time is what reading W takes",
    "marlin_gemm": "tiles of tokens: each weight is decoded once for all of a tile",
    "dequantize": "so many tokens that decoding W into memory for the library's product is faster",
    "linear_packed": "operand order: the tile of least fitted time",
}


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
    """x [M, K] and W [N, K], and where they are."""

    M: int
    N: int
    K: int
    format: str
    zeros: str
    dtype: torch.dtype
    scales: torch.dtype
    kind: str
    hopper: bool
    here: bool

    def _index(self) -> int:
        return torch.cuda.current_device() if self.kind == "cuda" else 0

    def measured(self, op: str) -> str | None:
        """What a table of this machine names."""
        if not self.here:
            return None
        problem = tuned.Problem(self.format, self.zeros, self.dtype, self.scales, self.N, self.K)
        return tuned.choice(problem, self.M, self.kind, self._index(), op)

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
) -> list[Step]:
    """The launches of ``linear`` for x [M, K] and W [N, K] with 16-byte aligned tensors, scales in x's dtype; with
    ``layout="mma16"`` those of ``linear_packed``; with ``layout=""`` both, the latter where layers hold W so.

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
    if K % form.per_word:
        raise ArgumentError(f"plan: K = {K} is no multiple of {form.per_word}, the codes of a word of {format}")
    zeros = form.zero_kinds[0] if zeros == "none" and "none" not in form.zero_kinds else zeros
    scales = number if form.scale_kind == "float" else form.scale_dtypes[0]
    kind, hopper = _device(device)
    product = _Product(M, N, K, format, zeros, number, scales, kind, hopper, not device)
    if layout == MMA16:
        return _packed(product)
    both = layout == "" and prepacked(N, K, format, number, scales, hopper)
    return _canonical(product) + (_packed(product) if both else [])


def prepacked(N: int, K: int, format: str, dtype: torch.dtype, scales: torch.dtype, hopper: bool) -> bool:
    """Whether layers with x of ``dtype`` hold W [N, K] in operand order: on GPUs of compute capability 9.0, where there
    are rows for it."""
    return hopper and packed.has_rows(dtype, scales, format) and operands.fits(codec(format), N, K)


def _canonical(p: _Product) -> list[Step]:
    kernel = p.measured("linear")
    sizes = (p.M, p.N, p.K, p.dtype, p.scales, p.kind)
    pool = torch.get_num_threads() if p.kind == "cpu" else 1
    op = linear.op_of(kernel) if kernel else linear.plan(*sizes, p.format, None, p.hopper)
    why = _MEASURED if kernel else _WHY[op]
    if op == "linear_decode":
        decode = linear_decode.plan(*sizes, pool, kernel, p.format, p.zeros)
        return [Step(op, decode.kernel, decode.threadgroups, decode.threads, why)]
    if op == "marlin_gemm":
        gemm = marlin_gemm.plan(*sizes, p.format, p.zeros, pool, kernel, p.hopper, p.K % 32 == 0)
        return [Step(op, gemm.kernel, gemm.threadgroups, gemm.threads, why)]
    decoded = dequantize.plan(*sizes[1:], pool, None, p.format, p.zeros)
    return [
        Step(op, decoded.kernel, decoded.threadgroups, decoded.threads, why),
        Step("torch.mm", "the library's", (), 0, why),
    ]


def _packed(p: _Product) -> list[Step]:
    p = replace(p, zeros="point") if p.zeros == "packed" else p  # in that order they are a number each
    kernel = p.measured("linear_packed")
    plan = packed.plan(p.M, p.N, p.K, p.dtype, p.scales, p.format, p.zeros, kernel, p.multiprocessors())
    if not operands.fits(codec(p.format), p.N, p.K):
        raise ArgumentError(f"plan: W is [{p.N}, {p.K}]; layout {MMA16} takes N % 16 = 0 and K % 64 = 0")
    why = _MEASURED if kernel else _WHY["linear_packed"]
    return [Step("linear_packed", plan.kernel, plan.threadgroups, plan.threads, why)]


def _device(text: str) -> tuple[str, bool]:
    """Device kind, and whether it has compute capability 9.0."""
    if not text:
        if torch.cuda.is_available():
            return "cuda", marlin_gemm.is_hopper(torch.cuda.current_device())
        return ("mps" if torch.backends.mps.is_available() else "cpu"), False
    target = Target.parse(text)
    return ("mps" if target.kind == "metal" else target.kind), target.arch == "sm_90a"
