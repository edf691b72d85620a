"""norm_qkv: RMSNorm of x and the three products of attention that follow it, in one launch."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.ops import fusion
from metal_marlin.ops.linear import linear
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.norm import rms_norm, rms_norm_ref
from metal_marlin.ops.norm_linear import FAMILY, check, fuses, norm_linear_ref, numbers
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind
from metal_marlin.runtime.dispatch import dispatch_kernel

Weight = tuple[torch.Tensor, torch.Tensor]  # codes, scales
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_KERNELS = ("norm_qkv_fp4", "norm_qkv_fp4_decode")


@dataclass(frozen=True)
class Case:
    """norm(x [M, K]) times Wᵀ of q, k and v, which have ``rows`` rows; FP4."""

    M: int
    rows: tuple[int, int, int]
    K: int
    group: int = 32
    dtype: torch.dtype = torch.float16
    offset: float = 0.0
    kernel: str | None = None
    model: bool = False

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.rows))
        return f"{self.M}x{sizes}x{self.K}-g{self.group}-{KEYS[self.dtype]}-o{self.offset:g}-{self.kernel or 'chosen'}"

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[Weight]]:
        """x, weight of the norm, W of q, k and v."""
        made = [
            Product(self.M, N, self.K, self.group, self.dtype).tensors(device, 3 * seed + i)
            for i, N in enumerate(self.rows)
        ]
        weight = 0.5 + torch.rand(self.K, generator=torch.Generator().manual_seed(seed)) - self.offset
        return made[0][0], weight.to(self.dtype).to(device), [(codes, scales) for _, codes, scales, _ in made]


def plan(M: int, dtype: torch.dtype, kernel: str) -> str:
    """The row of a kernel. Raises ArgumentError."""
    return fusion.row("norm_qkv", M, dtype, "fp4", "none", kernel, _KERNELS)


def norm_qkv_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    q: Weight,
    k: Weight,
    v: Weight,
    group_size: int,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> Three:
    """The meaning, in float64."""
    a, b, c = (norm_linear_ref(x, weight, *w, group_size, eps=eps, offset=offset) for w in (q, k, v))
    return a, b, c


def norm_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    q: Weight,
    k: Weight,
    v: Weight,
    group_size: int,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    kernel: str | None = None,
) -> Three:
    """q [..., Nq], k [..., Nk] and v [..., Nv] = rms_norm(x, weight, eps, offset) · Wᵀ of each; FP4 weights.

    x [..., K] half or bfloat16, contiguous; weight [K] of x's dtype; q, k, v: codes and scales (x's dtype) of [N, K],
    as ``linear``'s. The normalised x is rounded as ``rms_norm`` rounds it; sums are float32, rounded once. kernel:
    "norm_qkv_fp4" or "norm_qkv_fp4_decode", made for up to 8 tokens: every 8 more read the weights again. None: what
    suits the number of tokens, which is ``rms_norm`` and three times ``linear`` for more than ``norm_linear.fuses``
    says. Not differentiable. Raises ArgumentError naming the argument and the numbers.
    """
    pairs = (q, k, v)
    codes, scales = ([pair[i] for pair in pairs] for i in (0, 1))
    a, b, c = torch.ops.metal_marlin.norm_qkv(x, weight, codes, scales, eps, offset, group_size, kernel)
    return a, b, c


def _sizes(
    x: torch.Tensor, weight: torch.Tensor, codes: list[torch.Tensor], scales: list[torch.Tensor], group: int
) -> tuple[int, list[int], int]:
    """M, N of each, K. Raises ArgumentError."""
    if len(codes) != 3 or len(scales) != 3:
        raise ArgumentError(f"norm_qkv: {len(codes)} codes, {len(scales)} scales; needs 3 of each")
    sizes = [
        check(f"norm_qkv, {name}", x, weight, c, s, None, "fp4", "none", group)
        for name, c, s in zip("qkv", codes, scales, strict=True)
    ]
    return sizes[0][0], [N for _, N, _ in sizes], sizes[0][2]


def _new(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: list[torch.Tensor],
    scales: list[torch.Tensor],
    eps: float,
    offset: float,
    group_size: int,
    kernel: str | None,
) -> Three:
    M, each, K = _sizes(x, weight, codes, scales, group_size)
    plan(M, x.dtype, kernel or _KERNELS[0])
    outs = [x.new_empty((*x.shape[:-1], N)) for N in each]
    N, kind = sum(each), plan_kind(x.device.type)
    if M == 0 or N == 0:
        return outs[0], outs[1], outs[2]
    few = fusion.is_few(M, N, K, x.dtype, "fp4", kind)
    if kernel is None and not fuses(M, few, kind):
        normed = rms_norm(x, weight, eps, offset=offset)
        for out, c, s in zip(outs, codes, scales, strict=True):
            linear(normed, c, s, group_size, out=out)
        return outs[0], outs[1], outs[2]
    kernel = kernel or _KERNELS[few]
    aligned = on_16_bytes(x, weight) and on_16_bytes(codes[1], codes[2])
    grid = fusion.grid(x, codes[0], (M, N, K), group_size, kind, kernel == _KERNELS[1], aligned=aligned)
    pairs = [t for pair in zip(codes, scales, strict=True) for t in pair]
    dispatch_kernel(
        library(FAMILY, str(x.device), grid.lanes),
        plan(M, x.dtype, kernel),
        threadgroups=(sum(-(-N // grid.rows) for N in each), grid.threadgroups[1]),
        threads_per_threadgroup=grid.threads,
        args=(x, *pairs, *outs, grid.shape, weight, numbers(eps, offset), struct.pack("=2q", *each[1:])),
    )
    return outs[0], outs[1], outs[2]


def _fake(
    x: torch.Tensor, weight: torch.Tensor, codes: list[torch.Tensor], scales: list[torch.Tensor], *more: object
) -> Three:
    _sizes(x, weight, codes, scales, more[2])  # type: ignore[arg-type]
    q, k, v = (x.new_empty((*x.shape[:-1], c.shape[0])) for c in codes)
    return q, k, v


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(
    "norm_qkv(Tensor x, Tensor weight, Tensor[] codes, Tensor[] scales, float eps, float offset, int group_size, "
    "str? kernel) -> (Tensor, Tensor, Tensor)"
)
for _device in ("CPU", "CUDA", "MPS"):
    _torch.impl("norm_qkv", _new, _device)
torch.library.register_fake("metal_marlin::norm_qkv", _fake, lib=_torch)

CASES: tuple[Case, ...] = (
    *(
        Case(M, rows, 96, 32, d, offset, kernel)
        for M in (1, 2, 8, 9, 65)
        for rows, offset in (((130, 33, 17), 0.0), ((64, 64, 64), 1.0), ((3, 1, 80), 0.0))
        for d in fusion.DTYPES
        for kernel in (None, *_KERNELS)
        if M in (1, 2, 9) or kernel == _KERNELS[M <= 8]
    ),
    *(Case(5, (37, 16, 15), K, g, kernel=name) for K, g in ((8, 8), (264, 128), (520, 520)) for name in _KERNELS),
    *(Case(M, (4096, 1024, 1024), 4096, 128, model=True) for M in (1, 8, 512)),
)


def _row_case(name: str) -> tuple[Case, str]:
    kernel, dtype, _, M = fusion.read(name)
    return Case(M, (37, 20, 5), 264, 64, dtype), kernel


def run(case: Case, device: str = "cpu", kernel: str | None = None, seed: int = 0) -> Three:
    """The op on a case's tensors."""
    x, weight, (q, k, v) = case.tensors(device, seed)
    return norm_qkv(x, weight, q, k, v, case.group, offset=case.offset, kernel=kernel)


def _compare(case: Case, device: str, kernel: str | None) -> Check:
    x, weight, (q, k, v) = case.tensors()
    eps, normed = torch.finfo(x.dtype).eps, rms_norm_ref(x, weight, 1e-6, case.offset)
    exact = norm_qkv_ref(x, weight, q, k, v, case.group, offset=case.offset)
    errors, allowed = [], []
    for y, e, (codes, scales) in zip(run(case, device, kernel or case.kernel), exact, (q, k, v), strict=True):
        W = codec("fp4").decode(codes, scales, None, case.group, "none", torch.float64)
        theirs = ((normed.to(x.dtype) @ W.to(x.dtype).T).double() - e).norm(dim=-1)
        terms = (normed.square() @ W.square().T).sqrt().norm(dim=-1)  # as norm_linear's
        errors.append((y.cpu().double() - e).norm(dim=-1))
        allowed.append(2 * theirs + eps * (terms + e.norm(dim=-1)))
    return worst(torch.cat(errors), torch.cat(allowed))


OP = OpSpec(
    "norm_qkv",
    FAMILY,
    norm_qkv_ref,
    CASES,
    "bench/fusion.py",
    ("norm_qkv_fp4*",),
    _compare,
    _row_case,
)
