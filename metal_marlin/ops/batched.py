"""Many products at once: batched_linear over quantised weights, grouped_scores (scaled q · kᵀ of grouped heads)."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops.product import check, product_ref
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind, random_weights, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "batched_gemm.metal"
HEAD_DIMS = (64, 80, 96, 128, 192, 256)
_MOST = 65535  # threadgroups along z that every device takes
_TILE, _THREADS, _TOKENS = 64, 128, 256  # core/tile.h, core/cpu/gemm.h


@dataclass(frozen=True)
class BatchedCase:
    """B products [M, K] · [N, K]ᵀ; ``shared``: which of x, codes, scales all of them have in common."""

    B: int
    M: int
    N: int
    K: int
    group: int = 128
    dtype: torch.dtype = torch.float16
    shared: str = ""
    model: str = ""

    def __str__(self) -> str:
        shared = f"-one-{self.shared}" if self.shared else ""
        return f"{self.B}x{self.M}x{self.N}x{self.K}-g{self.group}-{KEYS[self.dtype]}{shared}"

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, codes, scales."""
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(1 if "x" in self.shared else self.B, self.M, self.K, generator=rng).to(self.dtype)
        made = [random_weights("fp4", self.N, self.K, self.group, self.dtype, "none", rng) for _ in range(self.B)]
        codes, scales = torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])
        codes = codes[:1] if "c" in self.shared else codes
        scales = scales[:1] if "s" in self.shared else scales
        return x.to(device), codes.contiguous().to(device), scales.contiguous().to(device)


@dataclass(frozen=True)
class ScoresCase:
    """q [batch, heads, queries, width], k [batch, kv_heads, keys, width]."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    causal: bool = False
    dtype: torch.dtype = torch.float16
    model: str = ""

    def __str__(self) -> str:
        causal = "-causal" if self.causal else ""
        heads = f"{self.batch}x{self.heads}over{self.kv_heads}"
        return f"{heads}x{self.queries}x{self.keys}-d{self.width}-{KEYS[self.dtype]}{causal}"

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(seed)
        q = torch.randn(self.batch, self.heads, self.queries, self.width, generator=rng)
        k = torch.randn(self.batch, self.kv_heads, self.keys, self.width, generator=rng)
        return q.to(self.dtype).to(device), k.to(self.dtype).to(device)


_16 = (torch.float16, torch.bfloat16)
BATCHED_CASES = (
    *(BatchedCase(3, M, 67, 160, 32, d) for M in (1, 2, 7, 17, 33, 64, 128) for d in _16),
    *(BatchedCase(2, 5, 19, K, g, d) for K, g in ((8, 8), (264, 128), (520, 520)) for d in KEYS),
    *(BatchedCase(3, 9, 37, 256, 64, d, shared) for shared in ("x", "c", "s", "cs", "xcs") for d in _16),
    BatchedCase(1, 6, 65, 96, 32, torch.float32),
    BatchedCase(8, 128, 4096, 4096, model="large"),
)
SCORES_CASES = (
    *(ScoresCase(1, 2, 1, 17, 33, width, True, d) for width in HEAD_DIMS for d in KEYS),
    *(ScoresCase(2, 6, 2, M, M + 70, 64, causal, d) for M in (1, 2, 64, 65) for causal in (False, True) for d in _16),
    *(ScoresCase(1, 3, 3, 70, 40, 80, True, d) for d in KEYS),
    ScoresCase(1, 1, 1, 130, 200, 64, True),
    ScoresCase(1, 32, 8, 1024, 1024, 128, True, model="large"),
)


def batched_linear_ref(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """The meaning, in float64."""
    B = max(x.shape[0], codes.shape[0], scales.shape[0])
    whole = [t.expand(B, -1, -1) for t in (x, codes, scales)]
    return torch.stack([product_ref(whole[0][b], whole[1][b], whole[2][b], group_size) for b in range(B)])


def grouped_scores_ref(
    q: torch.Tensor, k: torch.Tensor, scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """The meaning, in float64."""
    wide = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    s = q.double() @ wide.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    queries, keys = s.shape[-2:]
    keep = torch.ones(queries, keys, dtype=torch.bool, device=s.device).tril(keys - queries)
    return s.masked_fill(~keep, -torch.inf) if causal else s


def _check_batched(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int
) -> tuple[int, int, int, int]:
    """B, M, N, K."""
    shapes = f"x {tuple(x.shape)}, codes {tuple(codes.shape)}, scales {tuple(scales.shape)}"
    if x.ndim != 3 or codes.ndim != 3 or scales.ndim != 3:
        raise ArgumentError(
            f"batched_linear: shapes {shapes}; needs x [B, M, K], codes [B, N, K/8], scales [B, N, groups]"
        )
    counts = [int(t.shape[0]) for t in (x, codes, scales)]
    B = next((count for count in counts if count != 1), 1)
    if any(count not in (1, B) for count in counts) or B > _MOST:
        raise ArgumentError(f"batched_linear: B of {shapes}; needs one number up to {_MOST}, or 1 where all share")
    if B == 0:
        return 0, int(x.shape[1]), int(codes.shape[1]), int(x.shape[2])
    _, N, K = check("batched_linear", x[0], codes[0], scales[0], None, "fp4", "none", group_size)
    return B, int(x.shape[1]), N, K


def _check_scores(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int]:
    """Heads of all batches, queries, keys, heads of q to a head of k."""
    shapes = f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}"
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.dtype != k.dtype:
        raise ArgumentError(f"grouped_scores: {shapes}; needs q [B, H, Sq, D], k [B, Hk, Sk, D] of one dtype")
    if q.dtype not in KEYS:
        raise ArgumentError(f"grouped_scores: dtype is {q.dtype}; it is one of {', '.join(map(str, KEYS))}")
    if q.shape[3] not in HEAD_DIMS:
        raise ArgumentError(f"grouped_scores: D = {q.shape[3]}; it is one of {', '.join(map(str, HEAD_DIMS))}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(f"grouped_scores: H = {q.shape[1]} is no multiple of Hk = {k.shape[1]}")
    heads = int(q.shape[0] * q.shape[1])
    if heads > _MOST:
        raise ArgumentError(f"grouped_scores: B · H = {heads}; at most {_MOST}")
    return heads, int(q.shape[2]), int(k.shape[2]), int(q.shape[1] // k.shape[1])


@functools.lru_cache(maxsize=1024)
def plan(
    B: int, M: int, N: int, dtype: torch.dtype, scale_dtype: torch.dtype, device: str
) -> tuple[str, tuple[int, int, int], int, int]:
    """Row of batched_linear, grid, threads, tokens of a threadgroup; ``device``: cpu, cuda or mps."""
    known = ["marlin_gemm_batched_fp4"]
    if dtype != scale_dtype:
        raise ArgumentError(f"batched_linear: scales is {scale_dtype}, x is {dtype}; both have the same dtype")
    row = row_name("batched_linear", known[0], known, dtype, scale_dtype, "fp4", "none")
    tokens, threads = (min(max(M, 1), _TOKENS), 1) if device == "cpu" else (_TILE, _THREADS)
    return row, (-(-N // _TILE), -(-M // tokens), B), threads, tokens


def batched_linear(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """y [B, M, N] = x [B, M, K] · W[b]ᵀ with W in fp4; sums in float32, rounded once to x's dtype.

    x: half, bfloat16 or float32, contiguous, on cpu, cuda or mps. codes: int32 [B, N, K/8]; scales: x's dtype,
    [B, N, ⌈K/group_size⌉]. Each of the three may have 1 instead of B: all products share it, and it is stored once.
    Weights are rounded as marlin_gemm's. Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.batched_linear(x, codes, scales, group_size)


def _batched(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    B, M, N, K = _check_batched(x, codes, scales, group_size)
    kind = plan_kind(x.device.type)
    row, grid, threads, tokens = plan(B, M, N, x.dtype, scales.dtype, kind)
    y = x.new_empty(B, M, N)
    if y.numel() == 0:
        return y
    aligned = K % 32 == 0 and on_16_bytes(x, codes)
    steps = [0 if t.shape[0] == 1 else t[0].numel() for t in (x, codes, scales)]
    shape = struct.pack("=11q", M, N, K, group_size, _TILE, tokens, aligned, *steps, M * N)
    dispatch_kernel(
        library(FAMILY, str(x.device), 1 if kind == "cpu" else 32),
        row,
        threadgroups=grid,
        threads_per_threadgroup=threads,
        args=(x, codes, scales, y, shape),
    )
    return y


def grouped_scores(q: torch.Tensor, k: torch.Tensor, scale: float | None = None, causal: bool = False) -> torch.Tensor:
    """s [B, H, Sq, Sk] = scale · q [B, H, Sq, D] · k [B, Hk, Sk, D]ᵀ, head h with the keys of head h · Hk / H.

    half, bfloat16 or float32, contiguous, on cpu, cuda or mps; sums in float32, rounded once. D: 64, 80, 96, 128, 192
    or 256; scale: D^-0.5 where None; causal: −inf where j > i + Sk − Sq.
    Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.grouped_scores(q, k, scale, causal)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float | None = None, causal: bool = False) -> torch.Tensor:
    heads, queries, keys, ratio = _check_scores(q, k)
    s = q.new_empty(*q.shape[:3], keys)
    if s.numel() == 0:
        return s
    width = int(q.shape[3])
    key = KEYS[q.dtype]
    dispatch_kernel(
        library(FAMILY, str(q.device), 32),
        "marlin_gemm_grouped_attention" + ("" if key == "half" else f"__t{key}"),
        threadgroups=(-(-keys // _TILE), -(-queries // _TILE), heads),
        threads_per_threadgroup=_THREADS,
        args=(
            q,
            k,
            s,
            struct.pack("=6q", queries, keys, width, ratio, causal, on_16_bytes(q, k)),
            struct.pack("=f", width**-0.5 if scale is None else scale),
        ),
    )
    return s


def _fake_batched(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    B, M, N, _ = _check_batched(x, codes, scales, group_size)
    return x.new_empty(B, M, N)


def _fake_scores(q: torch.Tensor, k: torch.Tensor, scale: float | None = None, causal: bool = False) -> torch.Tensor:
    _check_scores(q, k)
    return q.new_empty(*q.shape[:3], k.shape[2])


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define("batched_linear(Tensor x, Tensor codes, Tensor scales, int group_size) -> Tensor")
_torch.define("grouped_scores(Tensor q, Tensor k, float? scale=None, bool causal=False) -> Tensor")
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("batched_linear", _batched, _key)
    _torch.impl("grouped_scores", _scores, _key)
torch.library.register_fake("metal_marlin::batched_linear", _fake_batched, lib=_torch)
torch.library.register_fake("metal_marlin::grouped_scores", _fake_scores, lib=_torch)


def _compare_batched(case: BatchedCase, device: str, _: str | None) -> Check:
    """Within what rounding weights and y to x's dtype allows, and roundings of partial sums."""
    x, codes, scales = case.tensors()
    y = batched_linear(x.to(device), codes.to(device), scales.to(device), case.group).cpu().double()
    exact = batched_linear_ref(x, codes, scales, case.group)
    eps = torch.finfo(case.dtype).eps
    return worst((y - exact).norm(dim=-1), 2 * eps * exact.norm(dim=-1) + 2.0**-20 * case.K * x.abs().max().double())


def _compare_scores(case: ScoresCase, device: str, _: str | None) -> Check:
    q, k = case.tensors()
    s = grouped_scores(q.to(device), k.to(device), None, case.causal).cpu().double()
    exact = grouped_scores_ref(q, k, None, case.causal)
    hidden = exact.isinf()
    if not torch.equal(s.isinf(), hidden):
        return Check(float("inf"), 0.0)
    error = (s - exact).masked_fill(hidden, 0).abs()
    return worst(error, torch.finfo(case.dtype).eps * exact.masked_fill(hidden, 0).abs() + 1e-5)


OP = (
    OpSpec(
        "batched_linear",
        FAMILY,
        batched_linear_ref,
        BATCHED_CASES,
        "bench/batched.py",
        ("marlin_gemm_batched_*",),
        _compare_batched,
    ),
    OpSpec(
        "grouped_scores",
        FAMILY,
        grouped_scores_ref,
        SCORES_CASES,
        "bench/batched.py",
        ("marlin_gemm_grouped_*",),
        _compare_scores,
    ),
)
