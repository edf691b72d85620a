"""linear: y = x · Wᵀ with quantised W and any number of tokens, by the kernel that is fastest for so many."""

from __future__ import annotations

from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import linear_decode as _decode
from metal_marlin.ops import marlin_gemm as _gemm
from metal_marlin.ops.dequantize import dequantize
from metal_marlin.ops.product import product_ref, register

# Most tokens for which reading the weights again for every 8 of them costs less than a tile of the GEMM, by device:
# measured for cpu and cuda (bench/results), a guess for mps.
FEW_TOKENS = {"cpu": 8, "cuda": 64, "mps": 8}
FEW_BEFORE_TILES = 1  # on cuda, where the GEMM has tiles of few tokens: ops/marlin_gemm.py

linear_ref = product_ref


def plan(M: int, device: str, kernel: str | None = None, has_tiles: bool = False) -> str:
    """The op for M tokens on a device kind, "linear_decode" or "marlin_gemm"; ``kernel`` asks for a row of one;
    ``has_tiles``: the GEMM has tiles of few tokens for these tensors and this GPU."""
    if kernel is not None:
        return "linear_decode" if kernel.startswith("decode_gemv") else "marlin_gemm"
    return "linear_decode" if (FEW_BEFORE_TILES if has_tiles else FEW_TOKENS.get(device, 8)) >= M else "marlin_gemm"


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    kernel: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ with quantised weights; sums in float32, rounded once to x's dtype.

    x: half, bfloat16 or float32, contiguous, on cpu, cuda or mps. codes: int32 [N, K · bits / 32], scales
    [N, groups], zeros and extra: as ``metal_marlin.formats.codec(format)`` makes them. group_size: 16, 32, 64, 128,
    256 or K, where the format has no size of its own. kernel: a row of ``linear_decode`` or ``marlin_gemm``, for
    measurements. out: where to write, x's dtype, shape of y.
    Up to ``FEW_TOKENS`` tokens run in ``linear_decode``, more in ``marlin_gemm``. Differentiable in x (not with
    ``out``): the gradient is that of the decoded weights. Raises ArgumentError naming the argument and the numbers.
    """
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if type(x) is torch.Tensor and not differentiated and not torch.compiler.is_compiling():
        if out is None:  # without torch's dispatcher, which costs as much as a small kernel
            return _new(x, codes, scales, extra, format, zeros, group_size, kernel)
        _run(x, codes, scales, extra, format, zeros, group_size, kernel, out)
        return out
    if out is not None and differentiated:
        raise ArgumentError("linear: out is given, and x requires a gradient, which can only flow through a new tensor")
    if out is None:
        return torch.ops.metal_marlin.linear(x, codes, scales, extra, format, zeros, group_size, kernel)
    torch.ops.metal_marlin.linear_out(x, codes, scales, extra, format, zeros, group_size, kernel, out)
    return out


def _is_few(x: torch.Tensor, scales: torch.Tensor, format: str, kernel: str | None) -> bool:
    K = x.shape[-1] if x.ndim else 0  # of a wrong shape any op may say so
    M = x.numel() // K if K else 0
    tiles = x.is_cuda and K % 32 == 0 and _gemm.has_tiles(x.dtype, scales.dtype, format)
    return plan(M, x.device.type, kernel, tiles) == "linear_decode"


def _run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
    out: torch.Tensor,
) -> None:
    op = _decode._run if _is_few(x, scales, format, kernel) else _gemm._run
    op(x, codes, scales, extra, format, zeros, group_size, kernel, out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, codes, scales, extra, ctx.format, ctx.zeros, ctx.group_size, _ = inputs
    ctx.save_for_backward(codes, scales, extra)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of x: grad [..., N] · W [N, K]."""
    codes, scales, extra = ctx.saved_tensors
    weight = dequantize(
        codes, scales, ctx.group_size, format=ctx.format, zeros=ctx.zeros, extra=extra, dtype=grad.dtype
    )
    return (grad @ weight, *(None,) * 7)


_new = register("linear", _run)
torch.library.register_autograd("metal_marlin::linear", _gradient, setup_context=_keep)
