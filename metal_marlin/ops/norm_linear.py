"""norm_linear: RMSNorm of x and the product with four-bit weights that follows it, in one launch."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.ops import fusion, product
from metal_marlin.ops.linear import linear
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.norm import rms_norm, rms_norm_ref
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import library, on_16_bytes, plan_kind
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "norm_linear.metal"


@dataclass(frozen=True)
class Case:
    """norm(x [M, K]) · W [N, K]ᵀ; the product's ``str``, offset and kernel are the id. ``size``: of x's elements."""

    product: Product
    offset: float = 0.0
    size: float = 1.0
    kernel: str | None = None
    model: bool = False

    def __str__(self) -> str:
        return f"{self.product}-o{self.offset:g}-s{self.size:g}-{self.kernel or 'chosen'}"

    @property
    def dtype(self) -> torch.dtype:
        return self.product.dtype

    def tensors(
        self, device: str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x, weight of the norm, codes, scales and extra."""
        x, codes, scales, extra = self.product.tensors(device, seed)
        rng = torch.Generator().manual_seed(seed + 1)
        weight = 0.5 + torch.rand(self.product.K, generator=rng) - self.offset
        return x * self.size, weight.to(self.dtype).to(device), codes, scales, extra


def plan(M: int, dtype: torch.dtype, format: str, zeros: str, kernel: str) -> str:
    """The row of a kernel. Raises ArgumentError."""
    known = (f"norm_linear_{format}", f"norm_linear_{format}_decode")
    return fusion.row("norm_linear", M, dtype, format, zeros, kernel, known)


def fuses(M: int, few: bool, device: str) -> bool:
    """Whether one launch is the choice: every threadgroup normalises the tokens it reads, which on a cpu costs more
    than a launch from 2 tokens on; on cuda tiles for more than a ``few`` tokens are faster without."""
    return device == "mps" or (few and (device == "cuda" or M == 1))


def norm_linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64."""
    normed = rms_norm_ref(x, weight, eps, offset)
    return product.product_ref(normed, codes, scales, group_size, format=format, zeros=zeros, extra=extra)


def norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """y [..., N] = rms_norm(x, weight, eps, offset) · Wᵀ, W in fp4 or int4.

    x [..., K] half or bfloat16, contiguous; weight [K], scales: x's dtype; codes, scales, zeros and extra as
    ``linear``'s. The normalised x is rounded as ``rms_norm`` rounds it; sums are float32, y is rounded once. kernel:
    "norm_linear_<format>", or with "_decode", made for up to 8 tokens: every 8 more read W again. None: what suits the
    number of tokens, which is ``rms_norm`` and ``linear`` for more than ``fuses`` says. Not differentiable.
    Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.norm_linear(
        x, weight, codes, scales, extra, eps, offset, format, zeros, group_size, kernel
    )


def check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
) -> tuple[int, int, int]:
    """M, N, K. Raises ArgumentError in the name of ``op``."""
    M, N, K = product.check(op, x, codes, scales, extra, format, zeros, group_size)
    if scales.dtype != x.dtype:
        raise ArgumentError(f"{op}: scales is {scales.dtype}, x is {x.dtype}; they are the same")
    if weight.shape != (K,) or weight.dtype != x.dtype:
        raise ArgumentError(f"{op}: weight is {weight.dtype} {tuple(weight.shape)}; needs {x.dtype} {(K,)}")
    return M, N, K


def _new(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    eps: float,
    offset: float,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
) -> torch.Tensor:
    M, N, K = check("norm_linear", x, weight, codes, scales, extra, format, zeros, group_size)
    plan(M, x.dtype, format, zeros, kernel or f"norm_linear_{format}")
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    kind = plan_kind(x.device.type)
    few = fusion.is_few(M, N, K, x.dtype, format, kind)
    if kernel is None and not fuses(M, few, kind):
        normed = rms_norm(x, weight, eps, offset=offset)
        return linear(normed, codes, scales, group_size, format=format, zeros=zeros, extra=extra, out=out)
    kernel = kernel or f"norm_linear_{format}{'_decode' if few else ''}"
    aligned = on_16_bytes(x, weight)
    grid = fusion.grid(x, codes, (M, N, K), group_size, kind, kernel.endswith("_decode"), format, zeros, aligned)
    dispatch_kernel(
        library(FAMILY, str(x.device), grid.lanes),
        plan(M, x.dtype, format, zeros, kernel),
        threadgroups=grid.threadgroups,
        threads_per_threadgroup=grid.threads,
        args=(x, codes, scales, scales if extra is None else extra, out, grid.shape, weight, numbers(eps, offset), x),
    )
    return out


def numbers(eps: float, offset: float) -> bytes:
    """NormNumbers."""
    return struct.pack("=2f", eps, offset)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    eps: float,
    offset: float,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
) -> torch.Tensor:
    check("norm_linear", x, weight, codes, scales, extra, format, zeros, group_size)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(
    "norm_linear(Tensor x, Tensor weight, Tensor codes, Tensor scales, Tensor? extra, float eps, float offset, "
    "str format, str zeros, int group_size, str? kernel) -> Tensor"
)
for _device in ("CPU", "CUDA", "MPS"):
    _torch.impl("norm_linear", _new, _device)
torch.library.register_fake("metal_marlin::norm_linear", _fake, lib=_torch)

_ZEROS = (("fp4", "none"), *(("int4", zeros) for zeros in ("none", "point", "packed", "bias")))
CASES: tuple[Case, ...] = (
    *(
        Case(Product(M, 37, 96, 32, d, None, format, zeros), kernel=kernel)
        for M in (1, 2, 9)
        for format, zeros in _ZEROS
        for d in fusion.DTYPES
        for kernel in (None, f"norm_linear_{format}", *([f"norm_linear_{format}_decode"] if M < 9 else []))
    ),
    *(
        Case(Product(M, 67, 160, 16, d), 1.0, kernel=f"norm_linear_fp4{'_decode' if M <= 8 else ''}")
        for M in (1, 3, 7, 8, 17, 33, 64, 65)
        for d in fusion.DTYPES
    ),
    *(
        Case(Product(5, N, K, g), kernel=kernel)
        for N, K, g in ((1, 8, 8), (130, 264, 128), (3, 520, 520), (64, 1000, 128))
        for kernel in ("norm_linear_fp4", "norm_linear_fp4_decode")
    ),
    *(
        Case(Product(9, 33, 288, 32), size=size, kernel=f"norm_linear_fp4{few}")
        for size in (0.0, 1e-3, 3000.0)
        for few in ("", "_decode")
    ),
    Case(Product(300, 70, 600, 64, torch.bfloat16), kernel="norm_linear_fp4"),
    *(Case(Product(M, N, 4096, 128), model=True) for M in (1, 8, 512) for N in (4096, 14336)),
)


def _row_case(name: str) -> tuple[Case, str]:
    kernel, dtype, zeros, M = fusion.read(name)
    return Case(Product(M, 37, 264, 64, dtype, None, "int4" if "_int4" in kernel else "fp4", zeros)), kernel


def run(case: Case, device: str = "cpu", kernel: str | None = None, seed: int = 0) -> torch.Tensor:
    """The op on a case's tensors."""
    x, weight, codes, scales, extra = case.tensors(device, seed)
    p, offset = case.product, case.offset
    options = {"offset": offset, "format": p.format, "zeros": p.zeros, "extra": extra, "kernel": kernel}
    return norm_linear(x, weight, codes, scales, p.group, **options)  # type: ignore[arg-type]


def _compare(case: Case, device: str, kernel: str | None) -> Check:
    x, weight, codes, scales, extra = case.tensors()
    p, eps = case.product, torch.finfo(case.dtype).eps
    exact = norm_linear_ref(
        x, weight, codes, scales, p.group, offset=case.offset, format=p.format, zeros=p.zeros, extra=extra
    )
    W = codec(p.format).decode(codes, scales, extra, p.group, p.zeros, torch.float64)
    normed = rms_norm_ref(x, weight, 1e-6, case.offset)
    theirs = ((normed.to(x.dtype) @ W.to(x.dtype).T).double() - exact).norm(dim=-1)
    # roundings of the normalised x, of weights and of y, each a random one of a sum's terms
    terms = (normed.square() @ W.square().T).sqrt().norm(dim=-1)
    y = run(case, device, kernel or case.kernel).cpu().double()
    return worst((y - exact).norm(dim=-1), 2 * theirs + eps * (terms + exact.norm(dim=-1)))


OP = OpSpec(
    "norm_linear",
    FAMILY,
    norm_linear_ref,
    CASES,
    "bench/fusion.py",
    ("norm_linear_fp4*", "norm_linear_int4*"),
    _compare,
    _row_case,
)
