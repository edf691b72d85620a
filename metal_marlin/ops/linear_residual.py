"""linear_residual: y = residual + scale · x · Wᵀ with four-bit weights in one launch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.ops import fusion, product
from metal_marlin.ops.epilogue import epilogue
from metal_marlin.ops.linear import linear
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import library, plan_kind
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "attention_residual.metal"


@dataclass(frozen=True)
class Case:
    """residual [M, N] + scale · x [M, K] · W [N, K]ᵀ; the product's ``str``, the scale and the kernel are the id."""

    product: Product
    scale: float = 1.0
    kernel: str | None = None
    model: bool = False

    def __str__(self) -> str:
        return f"{self.product}-x{self.scale:g}-{self.kernel or 'chosen'}"

    @property
    def dtype(self) -> torch.dtype:
        return self.product.dtype

    def tensors(
        self, device: str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """x, codes, scales, extra and the residual."""
        p = self.product
        residual = torch.randn(p.M, p.N, generator=torch.Generator().manual_seed(seed + 1)).to(p.dtype)
        return *p.tensors(device, seed), residual.to(device)


def plan(M: int, dtype: torch.dtype, format: str, zeros: str, kernel: str) -> str:
    """The row of a kernel. Raises ArgumentError."""
    known = tuple(f"linear_residual{s}_{format}{d}" for s in ("", "_scaled") for d in ("", "_decode"))
    return fusion.row("linear_residual", M, dtype, format, zeros, kernel, known)


def linear_residual_ref(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    residual: torch.Tensor,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The meaning, in float64."""
    y = product.product_ref(x, codes, scales, group_size, format=format, zeros=zeros, extra=extra)
    return residual.double() + scale * y


def linear_residual(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    residual: torch.Tensor,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    scale: float = 1.0,
    kernel: str | None = None,
) -> torch.Tensor:
    """y [..., N] = residual + scale · x · Wᵀ, what ends each half of a transformer's block; W in fp4 or int4.

    x [..., K] half or bfloat16, contiguous; codes, scales (x's dtype), zeros and extra: as ``linear``'s. residual:
    x's dtype, shape of y. Sums are float32, y is rounded once. kernel: "linear_residual[_scaled]_<format>" (scale is
    1 where it does not say scaled), the same with "_decode", made for up to 8 tokens: every 8 more read W again. None:
    what suits the number of tokens; on cuda, for more of them than ``linear`` takes so, ``linear`` and ``epilogue``,
    with faster tiles (the product is rounded in between). Not differentiable.
    Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.linear_residual(
        x, codes, scales, extra, residual, format, zeros, group_size, float(scale), kernel
    )


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    residual: torch.Tensor,
    format: str,
    zeros: str,
    group_size: int,
    scale: float,
    kernel: str | None,
) -> tuple[int, int, int]:
    M, N, K = product.check("linear_residual", x, codes, scales, extra, format, zeros, group_size)
    if scales.dtype != x.dtype:
        raise ArgumentError(f"linear_residual: scales is {scales.dtype}, x is {x.dtype}; they are the same")
    wanted = (*x.shape[:-1], N)
    if residual.shape != wanted or residual.dtype != x.dtype:
        given = f"{residual.dtype} {tuple(residual.shape)}"
        raise ArgumentError(f"linear_residual: residual is {given}; needs {x.dtype} {tuple(wanted)}")
    plan(M, x.dtype, format, zeros, kernel or f"linear_residual_{format}")
    if kernel is not None and scale != 1 and "_scaled" not in kernel:
        raise ArgumentError(f"linear_residual: scale = {scale}; {kernel} has 1")
    return M, N, K


def _new(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    residual: torch.Tensor,
    format: str,
    zeros: str,
    group_size: int,
    scale: float,
    kernel: str | None,
) -> torch.Tensor:
    M, N, K = _check(x, codes, scales, extra, residual, format, zeros, group_size, scale, kernel)
    out = x.new_empty((*x.shape[:-1], N))
    if out.numel() == 0:
        return out
    kind = plan_kind(x.device.type)
    few = fusion.is_few(M, N, K, x.dtype, format, kind)
    if kernel is None and kind == "cuda" and not few:
        linear(x, codes, scales, group_size, format=format, zeros=zeros, extra=extra, out=out)
        return epilogue(out, residual=residual, scale=scale)
    kernel = kernel or f"linear_residual{'' if scale == 1 else '_scaled'}_{format}{'_decode' if few else ''}"
    grid = fusion.grid(x, codes, (M, N, K), group_size, kind, kernel.endswith("_decode"), format, zeros)
    dispatch_kernel(
        library(FAMILY, str(x.device), grid.lanes),
        plan(M, x.dtype, format, zeros, kernel),
        threadgroups=grid.threadgroups,
        threads_per_threadgroup=grid.threads,
        args=(x, codes, scales, scales if extra is None else extra, out, grid.shape, residual, scale),
    )
    return out


def _fake(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    residual: torch.Tensor,
    format: str,
    zeros: str,
    group_size: int,
    scale: float,
    kernel: str | None,
) -> torch.Tensor:
    product.check("linear_residual", x, codes, scales, extra, format, zeros, group_size)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(
    "linear_residual(Tensor x, Tensor codes, Tensor scales, Tensor? extra, Tensor residual, str format, str zeros, "
    "int group_size, float scale, str? kernel) -> Tensor"
)
for _device in ("CPU", "CUDA", "MPS"):
    _torch.impl("linear_residual", _new, _device)
torch.library.register_fake("metal_marlin::linear_residual", _fake, lib=_torch)


_ZEROS = (("fp4", "none"), *(("int4", zeros) for zeros in ("none", "point", "packed", "bias")))
CASES: tuple[Case, ...] = (
    *(
        Case(Product(M, 37, 96, 32, d, None, format, zeros), scale)
        for M in (1, 2, 9)
        for format, zeros in _ZEROS
        for d in fusion.DTYPES
        for scale in (1.0, 0.375)
    ),
    *(Case(Product(M, 67, 160, 16, d)) for M in (3, 7, 8, 17, 33, 64, 65) for d in fusion.DTYPES),
    *(
        Case(Product(5, N, K, g), 0.375, kernel)
        for N, K, g in ((1, 8, 8), (130, 264, 128), (3, 520, 520), (64, 1000, 128))
        for kernel in ("linear_residual_scaled_fp4", "linear_residual_scaled_fp4_decode")
    ),
    Case(Product(19, 67, 160, 32), kernel="linear_residual_fp4_decode"),
    *(Case(Product(M, 4096, K, 128), model=True) for M in (1, 8, 512) for K in (4096, 14336)),
)


def _row_case(name: str) -> tuple[Case, str]:
    kernel, dtype, zeros, M = fusion.read(name)
    format = "int4" if "_int4" in kernel else "fp4"
    return Case(Product(M, 37, 264, 64, dtype, None, format, zeros), 0.375 if "_scaled" in kernel else 1.0), kernel


def run(case: Case, device: str = "cpu", kernel: str | None = None, seed: int = 0) -> torch.Tensor:
    """The op on a case's tensors."""
    x, codes, scales, extra, residual = case.tensors(device, seed)
    p, scale = case.product, case.scale
    return linear_residual(
        x, codes, scales, p.group, residual, format=p.format, zeros=p.zeros, extra=extra, scale=scale, kernel=kernel
    )


def _compare(case: Case, device: str, kernel: str | None) -> Check:
    x, codes, scales, extra, residual = case.tensors()
    p, eps = case.product, torch.finfo(case.dtype).eps
    exact = linear_residual_ref(
        x, codes, scales, p.group, residual, format=p.format, zeros=p.zeros, extra=extra, scale=case.scale
    )
    W = codec(p.format).decode(codes, scales, extra, p.group, p.zeros, torch.float64)
    product = x.double() @ W.T
    theirs = ((x @ W.to(x.dtype).T).double() - product).norm(dim=-1)
    sums = (x.double().abs() @ W.abs().T).norm(dim=-1)
    y = run(case, device, kernel or case.kernel)
    allowed = case.scale * (2 * theirs + eps * product.norm(dim=-1) + 2.0**-22 * sums) + eps * exact.norm(dim=-1)
    return worst((y.cpu().double() - exact).norm(dim=-1), allowed)


OP = OpSpec(
    "linear_residual",
    FAMILY,
    linear_residual_ref,
    CASES,
    "bench/fusion.py",
    ("linear_residual_*",),
    _compare,
    _row_case,
)
