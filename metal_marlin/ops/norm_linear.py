"""norm_linear: RMSNorm of x, the product with four-bit weights that follows it, and a residual, in one launch."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.ops import fusion, product
from metal_marlin.ops.linear import linear
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.linear_residual import linear_residual
from metal_marlin.ops.norm import rms_norm, rms_norm_ref
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import library, on_16_bytes, plan_kind
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "norm_linear.metal"


@dataclass(frozen=True)
class Case:
    """norm(x [M, K]) · W [N, K]ᵀ; the product's ``str``, offset, size and kernel are the id. ``size``: of x's elements;
    ``added``: with a residual."""

    product: Product
    offset: float = 0.0
    size: float = 1.0
    kernel: str | None = None
    added: bool = False
    model: bool = False

    def __str__(self) -> str:
        added = "-residual" if self.added else ""
        return f"{self.product}-o{self.offset:g}-s{self.size:g}{added}-{self.kernel or 'chosen'}"

    @property
    def dtype(self) -> torch.dtype:
        return self.product.dtype

    def tensors(
        self, device: str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """x, weight of the norm, codes, scales, extra and the residual."""
        x, codes, scales, extra = self.product.tensors(device, seed)
        rng = torch.Generator().manual_seed(seed + 1)
        weight = 0.5 + torch.rand(self.product.K, generator=rng) - self.offset
        residual = torch.randn(self.product.M, self.product.N, generator=rng).to(self.dtype).to(device)
        weight = weight.to(self.dtype).to(device)
        return x * self.size, weight, codes, scales, extra, residual if self.added else None


def kernels(format: str, added: bool) -> tuple[str, str]:
    """Of a format: for many tokens and for few, with a residual that is ``added`` or without."""
    base = f"norm_linear_residual_{format}" if added else f"norm_linear_{format}"
    return base, f"{base}_decode"


def plan(M: int, dtype: torch.dtype, format: str, zeros: str, kernel: str, added: bool = False) -> str:
    """The row of a kernel. Raises ArgumentError."""
    return fusion.row("norm_linear", M, dtype, format, zeros, kernel, kernels(format, added))


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
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64."""
    normed = rms_norm_ref(x, weight, eps, offset)
    y = product.product_ref(normed, codes, scales, group_size, format=format, zeros=zeros, extra=extra)
    return y if residual is None else residual.double() + y


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
    residual: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """y [..., N] = rms_norm(x, weight, eps, offset) · Wᵀ, or residual + that; W in fp4 or int4.

    x [..., K] half or bfloat16, contiguous; weight [K], scales: x's dtype; codes, scales, zeros and extra as
    ``linear``'s; residual: x's dtype, shape of y. The normalised x is rounded as ``rms_norm`` rounds it; sums are
    float32, y is rounded once. kernel: "norm_linear[_residual]_<format>", or with "_decode", made for up to 8 tokens:
    every 8 more read W again. None: what suits the number of tokens, which is ``rms_norm`` and ``linear`` (or
    ``linear_residual``) for more than ``fuses`` says. Not differentiable.
    Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.norm_linear(
        x, weight, codes, scales, extra, residual, eps, offset, format, zeros, group_size, kernel
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
    residual: torch.Tensor | None,
    eps: float,
    offset: float,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
) -> torch.Tensor:
    M, N, K = check("norm_linear", x, weight, codes, scales, extra, format, zeros, group_size)
    many, decode = kernels(format, residual is not None)
    plan(M, x.dtype, format, zeros, kernel or many, residual is not None)
    out = x.new_empty((*x.shape[:-1], N))
    if residual is not None and (residual.shape != out.shape or residual.dtype != x.dtype):
        given = f"{residual.dtype} {tuple(residual.shape)}"
        raise ArgumentError(f"norm_linear: residual is {given}; needs {x.dtype} {tuple(out.shape)}")
    if out.numel() == 0:
        return out
    kind = plan_kind(x.device.type)
    few = fusion.is_few(M, N, K, x.dtype, format, kind)
    if kernel is None and not fuses(M, few, kind):
        normed = rms_norm(x, weight, eps, offset=offset)
        more = {"format": format, "zeros": zeros, "extra": extra}
        if residual is not None:
            return linear_residual(normed, codes, scales, group_size, residual, **more)  # type: ignore[arg-type]
        return linear(normed, codes, scales, group_size, out=out, **more)  # type: ignore[arg-type]
    kernel = kernel or (decode if few else many)
    aligned = on_16_bytes(x, weight)
    grid = fusion.grid(x, codes, (M, N, K), group_size, kind, kernel == decode, format, zeros, aligned)
    dispatch_kernel(
        library(FAMILY, str(x.device), grid.lanes),
        plan(M, x.dtype, format, zeros, kernel, residual is not None),
        threadgroups=grid.threadgroups,
        threads_per_threadgroup=grid.threads,
        args=(
            *(x, codes, scales, scales if extra is None else extra, out, grid.shape, weight, numbers(eps, offset)),
            x if residual is None else residual,
        ),
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
    residual: torch.Tensor | None,
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
    "norm_linear(Tensor x, Tensor weight, Tensor codes, Tensor scales, Tensor? extra, Tensor? residual, "
    "float eps, float offset, str format, str zeros, int group_size, str? kernel) -> Tensor"
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
    *(
        Case(Product(M, 37, 160, 16, d, None, format, zeros), kernel=kernel, added=True)
        for M in (1, 7, 9, 65)
        for format, zeros in (_ZEROS if M in (1, 9) else _ZEROS[:1])
        for d in fusion.DTYPES
        for kernel in (None, kernels(format, True)[M < 9])
    ),
    *(Case(Product(M, N, 4096, 128), model=True) for M in (1, 8, 512) for N in (4096, 14336)),
    *(Case(Product(M, 4096, 4096, 128), added=True, model=True) for M in (1, 8, 512)),
)


def _row_case(name: str) -> tuple[Case, str]:
    kernel, dtype, zeros, M = fusion.read(name)
    p = Product(M, 37, 264, 64, dtype, None, "int4" if "_int4" in kernel else "fp4", zeros)
    return Case(p, added="_residual" in kernel), kernel


def run(case: Case, device: str = "cpu", kernel: str | None = None, seed: int = 0) -> torch.Tensor:
    """The op on a case's tensors."""
    x, weight, codes, scales, extra, residual = case.tensors(device, seed)
    p, offset = case.product, case.offset
    options = {"offset": offset, "format": p.format, "zeros": p.zeros, "extra": extra, "kernel": kernel}
    return norm_linear(x, weight, codes, scales, p.group, residual=residual, **options)  # type: ignore[arg-type]


def _compare(case: Case, device: str, kernel: str | None) -> Check:
    x, weight, codes, scales, extra, residual = case.tensors()
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
    exact = exact if residual is None else residual.double() + exact
    return worst((y - exact).norm(dim=-1), 2 * theirs + eps * (terms + exact.norm(dim=-1)))


OP = OpSpec(
    "norm_linear",
    FAMILY,
    norm_linear_ref,
    CASES,
    "bench/fusion.py",
    ("norm_linear_*",),
    _compare,
    _row_case,
)
