"""What a product with quantised weights launches, without launching it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.msl.target import Target
from metal_marlin.ops import dequantize, linear, linear_decode, marlin_gemm, tuned
from metal_marlin.ops.weights import KEYS

_WHY = {
    "linear_decode": "few tokens: time is what reading W takes",
    "marlin_gemm": "tiles of tokens: each weight is decoded once for all of a tile",
    "dequantize": "so many tokens that decoding W into memory for the library's product is faster",
}


@dataclass(frozen=True)
class Step:
    """One launch: op, kernel, threadgroups and threads of each (0 and none: torch's), and why it is this one."""

    op: str
    kernel: str
    threadgroups: tuple[int, ...]
    threads: int
    why: str


def explain(
    M: int, N: int, K: int, *, device: str = "", format: str = "fp4", zeros: str = "none", dtype: str = "half"
) -> list[Step]:
    """The launches of ``linear`` for x [M, K] and W [N, K] with 16-byte aligned tensors, scales in x's dtype.

    device: cpu, cuda:sm_80, cuda:sm_90a, metal …; "": the best that this machine has. dtype: half, bf16 or f32.
    Raises ArgumentError for sizes, formats and dtypes that have no row.
    """
    if min(M, N, K) < 1:
        raise ArgumentError(f"plan: M, N, K are {M}, {N}, {K}; each must be positive")
    names = {word: d for d, word in KEYS.items()}
    if dtype not in names:
        raise ArgumentError(f"plan: dtype is {dtype!r}; it is one of {', '.join(names)}")
    form, number = codec(format), names[dtype]
    if K % form.per_word:
        raise ArgumentError(f"plan: K = {K} is no multiple of {form.per_word}, the codes of a word of {format}")
    zeros = form.zero_kinds[0] if zeros == "none" and "none" not in form.zero_kinds else zeros
    scales = number if form.scale_kind == "float" else form.scale_dtypes[0]
    kind, hopper = _device(device)
    pool = torch.get_num_threads() if kind == "cpu" else 1
    kernel = None
    if not device:
        index = torch.cuda.current_device() if kind == "cuda" else 0
        kernel = tuned.choice(tuned.Problem(format, zeros, number, scales, N, K), M, kind, index)
    op = linear.op_of(kernel) if kernel else linear.plan(M, N, K, number, scales, kind, format, None, hopper)
    why = "measured on this device" if kernel else _WHY[op]
    if op == "linear_decode":
        decode = linear_decode.plan(M, N, K, number, scales, kind, pool, kernel, format, zeros)
        return [Step(op, decode.kernel, decode.threadgroups, decode.threads, why)]
    if op == "marlin_gemm":
        gemm = marlin_gemm.plan(M, N, K, number, scales, kind, format, zeros, pool, kernel, hopper, K % 32 == 0)
        return [Step(op, gemm.kernel, gemm.threadgroups, gemm.threads, why)]
    decoded = dequantize.plan(N, K, number, scales, kind, pool, None, format, zeros)
    return [
        Step(op, decoded.kernel, decoded.threadgroups, decoded.threads, why),
        Step("torch.mm", "the library's", (), 0, why),
    ]


def _device(text: str) -> tuple[str, bool]:
    """Device kind, and whether it has compute capability 9.0."""
    if not text:
        if torch.cuda.is_available():
            return "cuda", marlin_gemm.is_hopper(torch.cuda.current_device())
        return ("mps" if torch.backends.mps.is_available() else "cpu"), False
    target = Target.parse(text)
    return ("mps" if target.kind == "metal" else target.kind), target.arch == "sm_90a"
