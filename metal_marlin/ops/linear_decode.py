"""linear_decode: y = x · Wᵀ for few tokens and quantised W, where time is what reading the weights takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, fp4
from metal_marlin.ops.spec import OpSpec
from metal_marlin.runtime.dispatch import dispatch_kernel
from metal_marlin.runtime.library import MetalKernelLibrary

FAMILY = "decode_gemv.metal"
# torch dtype -> how row names say it
_KEYS = {torch.float16: "half", torch.bfloat16: "bf16", torch.float32: "f32"}
_BATCH = 8  # tokens a _batched row takes in one reading of the weights


@dataclass(frozen=True)
class Case:
    """x [M, K] · W [N, K]ᵀ, group size g."""

    M: int
    N: int
    K: int
    group: int = 128
    dtype: torch.dtype = torch.float16
    scale_dtype: torch.dtype | None = None  # None: as dtype
    model: bool = False  # a model's shape, for the bench

    def __str__(self) -> str:
        scales = "" if self.scale_dtype is None else f"-s{_KEYS[self.scale_dtype]}"
        return f"{self.M}x{self.N}x{self.K}-g{self.group}-{_KEYS[self.dtype]}{scales}"

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, codes, scales: every code occurs, scales vary by group as a model's do."""
        rng = torch.Generator().manual_seed(seed)
        x = torch.randn(self.M, self.K, generator=rng).to(self.dtype)
        codes = torch.randint(-(2**31), 2**31, (self.N, self.K // 8), generator=rng, dtype=torch.int64)
        scales = 0.002 + 0.02 * torch.rand(self.N, fp4.groups(self.K, self.group), generator=rng)
        dtype = self.scale_dtype or self.dtype
        return x.to(device), codes.to(torch.int32).to(device), scales.to(dtype).to(device)


_DTYPES = tuple(_KEYS)
CASES: tuple[Case, ...] = (
    *(Case(1, 64, 512, dtype=d, scale_dtype=s) for d in _DTYPES for s in _DTYPES),
    *(Case(1, 37, 512, g, d) for g in (16, 32, 64, 128, 256, 512) for d in _DTYPES),
    *(Case(1, 5, K, 128, d) for K in (8, 24, 120, 128, 136, 1000, 1056) for d in _DTYPES),
    *(Case(1, 16, K, K, d) for K in (8, 40, 136, 608) for d in _DTYPES),
    *(Case(1, 3, K, 16, d) for K in (24, 104, 488) for d in _DTYPES),
    *(Case(1, N, 256, 64, d) for N in (1, 3, 4, 15, 16, 17, 257) for d in _DTYPES),
    *(Case(M, 33, 416, 32, d) for M in (2, 3, 7, 8, 9, 17) for d in _DTYPES),
    *(Case(M, 31, 1016, 128, d) for M in (2, 8) for d in _DTYPES),
    Case(1, 8, 17408, 128),
    Case(2, 600, 256, 128),
    Case(1, 4096, 14336, 128, model=True),
    Case(1, 14336, 4096, 128, model=True),
    Case(1, 4096, 4096, 128, model=True),
)


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
) -> Plan:
    """The row and grid for x [M, K] in ``dtype``; ``device``: cpu, cuda or mps; ``pool``: threads of the CPU pool.

    ``kernel`` asks for a variant, "decode_gemv_fp4" or "decode_gemv_fp4_batched".
    Raises ArgumentError for dtypes and variants that have no row.
    """
    for name, given in (("x", dtype), ("scales", scale_dtype)):
        if given not in _KEYS:
            raise ArgumentError(f"linear_decode: {name} is {given}; it takes {', '.join(map(str, _KEYS))}")
    base = kernel or ("decode_gemv_fp4" if M == 1 else "decode_gemv_fp4_batched")
    if base not in ("decode_gemv_fp4", "decode_gemv_fp4_batched"):
        raise ArgumentError(f"linear_decode: kernel is {kernel!r}; decode_gemv_fp4 or decode_gemv_fp4_batched")
    t = "" if dtype == torch.float16 else f"t{_KEYS[dtype]}"
    s = "" if scale_dtype == dtype else f"s{_KEYS[scale_dtype]}"
    row = base + ("__" if t or s else "") + "_".join(filter(None, (t, s)))
    down = -(-M // (_BATCH if base.endswith("_batched") else 1))
    if device == "cpu":  # 8 threadgroups a thread even out; each brings x into order once, so not too few rows
        rows = max(4, min(256, -(-N // (8 * pool)) + 3 & ~3))
        return Plan(row, (-(-N // rows), down), 1, rows, lanes=1)
    if device == "cuda" and dtype != torch.float32:  # enough simdgroups to hide reads, each with a turn of 128 weights
        most = 256 if N > 6144 else 384 if base.endswith("_batched") else 512
        threads = min(most, 32 * -(-K // 128))
        return Plan(row, (-(-N // 16), down), threads, 16, lanes=32)
    return Plan(row, (-(-N // 16), down), 128, 16, lanes=32)


def linear_decode_ref(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> torch.Tensor:
    """The meaning, in float64: x [..., K] times the decoded weights [N, K], transposed."""
    return x.double() @ fp4.decode(codes, scales, group_size).T


def linear_decode(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    kernel: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ with FP4 weights; sums in float32, rounded once to x's dtype.

    x: half, bfloat16 or float32, contiguous, on cpu, cuda or mps. codes: int32 [N, K/8]. scales: half, bfloat16 or
    float32 [N, ⌈K/group_size⌉], see ``metal_marlin.formats.fp4``. group_size: 16, 32, 64, 128, 256 or K.
    kernel: a variant of the family, for measurements. out: where to write, x's dtype, shape of y.
    Made for up to 8 tokens; every 8 more read the weights again. On NVIDIA GPUs, weights with groups finer than 128
    are multiplied by their scale in x's dtype, as dequantised weights are.
    Raises ArgumentError naming the argument and the numbers.
    """
    if out is None:
        return torch.ops.metal_marlin.linear_decode(x, codes, scales, group_size, kernel)
    torch.ops.metal_marlin.linear_decode_out(x, codes, scales, group_size, kernel, out)
    return out


def _check(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int) -> tuple[int, int, int]:
    """M, N, K. Raises ArgumentError for shapes that do not belong together."""
    if x.ndim < 1 or codes.ndim != 2 or scales.ndim != 2:
        raise ArgumentError(
            f"linear_decode: shapes x {tuple(x.shape)}, codes {tuple(codes.shape)}, scales {tuple(scales.shape)}; "
            f"needs x [..., K], codes [N, K/8], scales [N, groups]"
        )
    K, N = x.shape[-1], codes.shape[0]
    if codes.shape[1] * fp4.PER_WORD != K:
        raise ArgumentError(f"linear_decode: x has K = {K}, codes have K = {codes.shape[1] * fp4.PER_WORD}")
    fp4.check_group(K, group_size)
    if scales.shape != (N, fp4.groups(K, group_size)):
        raise ArgumentError(
            f"linear_decode: scales have shape {tuple(scales.shape)}; N = {N}, K = {K}, group_size = {group_size} "
            f"need {(N, fp4.groups(K, group_size))}"
        )
    return x.numel() // K, N, K


@functools.lru_cache(maxsize=64)
def _library(device: str, lanes: int) -> MetalKernelLibrary:
    return MetalKernelLibrary(FAMILY, device=device, lanes=lanes)


def _run(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int, kernel: str | None, out: torch.Tensor
) -> None:
    M, N, K = _check(x, codes, scales, group_size)
    if out.shape != (*x.shape[:-1], N) or out.dtype != x.dtype:
        raise ArgumentError(
            f"linear_decode: out is {out.dtype} {tuple(out.shape)}; needs {x.dtype} {(*x.shape[:-1], N)}"
        )
    if M == 0 or N == 0:
        return
    kind = x.device.type
    p = plan(M, N, K, x.dtype, scales.dtype, kind, torch.get_num_threads() if kind == "cpu" else 1, kernel)
    aligned = K % 32 == 0 and kind != "mps" and (x.data_ptr() | codes.data_ptr()) % 16 == 0
    if kind == "mps":  # data_ptr() is a buffer object there
        aligned = K % 32 == 0 and x.storage_offset() * x.element_size() % 16 == 0 and codes.storage_offset() % 4 == 0
    shape = {"M": M, "N": N, "K": K, "group": group_size, "rows": p.rows, "aligned": int(aligned)}
    dispatch_kernel(
        _library(str(x.device), p.lanes),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, scales, out, shape),
    )


def _new(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int, kernel: str | None
) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], codes.shape[0]))
    _run(x, codes, scales, group_size, kernel, out)
    return out


def _fake(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int, kernel: str | None
) -> torch.Tensor:
    _check(x, codes, scales, group_size)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_ARGUMENTS = "Tensor x, Tensor codes, Tensor scales, int group_size, str? kernel"
_torch.define(f"linear_decode({_ARGUMENTS}) -> Tensor")
_torch.define(f"linear_decode_out({_ARGUMENTS}, Tensor(a!) out) -> ()")
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("linear_decode", _new, _key)
    _torch.impl("linear_decode_out", _run, _key)
torch.library.register_fake("metal_marlin::linear_decode", _fake, lib=_torch)
torch.library.register_fake("metal_marlin::linear_decode_out", lambda *_: None, lib=_torch)

OP = OpSpec(
    name="linear_decode",
    family_file=FAMILY,
    reference=linear_decode_ref,
    cases=CASES,
    bench="bench/gemv.py",
)
