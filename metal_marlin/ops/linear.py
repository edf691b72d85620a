"""linear: y = x · Wᵀ with quantised W and any number of tokens, by the kernel that is fastest for so many."""

from __future__ import annotations

import functools
from typing import Any

import torch

from metal_marlin.formats import codec
from metal_marlin.ops import linear_decode as _decode
from metal_marlin.ops import marlin_gemm as _gemm
from metal_marlin.ops import tuned
from metal_marlin.ops.dequantize import dequantize
from metal_marlin.ops.gemm_tiles import has_tiles
from metal_marlin.ops.product import call, check, product_ref, register
from metal_marlin.ops.weights import KEYS, on_16_bytes, plan_kind

# Most tokens for which reading the weights again for every 8 of them costs less than a tile of the GEMM, by device:
# measured for cpu and cuda (bench/results), a guess for mps.
FEW_TOKENS = {"cpu": 8, "cuda": 64, "mps": 8}
# On cuda, half and bfloat16 (H200, bench/results): without tiles for them in the GEMM it is faster from so many tokens
# on to decode W into memory and let torch multiply, and so it is with them from so many on.
_LIBRARY_PLAIN = 33
_LIBRARY_TILES = 2048
_LIBRARY_MOST = 1 << 28  # weights, lest the memory they take for a while be more than 512 MiB
_ROWS_TO_SHARE = 8192  # of W, from which on a tile reads x so much less often that it is worth while from 2 tokens on

linear_ref = product_ref


def _again(M: int, dtype: torch.dtype, format: str) -> bool:
    """Whether a cpu should read W again for every 8 tokens (measured, four and eight bits: where the last 8 are enough
    of them; always where an instruction multiplies bfloats, which the GEMM does not use)."""
    bits = codec(format).bits
    if bits == 4 and dtype == torch.bfloat16:
        return M <= 48
    return bits in (4, 8) and (12 <= M <= 16 or 20 <= M <= 32)


@functools.lru_cache(maxsize=4096)
def plan(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: str,
    format: str = "fp4",
    kernel: str | None = None,
    hopper: bool = False,
) -> str:
    """The op for x [M, K] in ``dtype`` and W [N, K]: "linear_decode", "marlin_gemm", or "dequantize" where W is decoded
    into memory and torch multiplies. ``device``: cpu, cuda or mps; ``kernel`` asks for a row of one of the first two;
    ``hopper``: the GPU has compute capability 9.0."""
    if kernel is not None:
        return op_of(kernel)
    if device != "cuda" or dtype == torch.float32:
        decode = FEW_TOKENS.get(device, 8) >= M or (device == "cpu" and _again(M, dtype, format))
        return "linear_decode" if decode else "marlin_gemm"
    tiles = K % 32 == 0 and has_tiles(dtype, scale_dtype, format)
    few = _LIBRARY_PLAIN - 1 if not tiles else 8 if N < _ROWS_TO_SHARE else 1
    if few >= M:
        return "linear_decode"
    many = _LIBRARY_TILES if tiles and hopper else _LIBRARY_PLAIN
    return "dequantize" if many <= M and N * K <= _LIBRARY_MOST else "marlin_gemm"


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
    ``plan`` says which kernels run, or a table of measured choices (ops/tuned.py); where that lets torch multiply
    decoded weights, torch's rules for sums hold.
    Differentiable in x (not with ``out``): the gradient is that of the decoded weights.
    Raises ArgumentError naming the argument and the numbers.
    """
    return call("linear", _run, out, x, codes, scales, extra, format, zeros, group_size, kernel)


def op_of(kernel: str) -> str:
    """The op that runs a kernel, or ``tuned.LIBRARY``."""
    if kernel == tuned.LIBRARY:
        return kernel
    return "linear_decode" if kernel.startswith("decode_gemv") else "marlin_gemm"


@functools.lru_cache(maxsize=8192)
def _chosen(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    device: torch.device,
    format: str,
    zeros: str,
    tables: bool,
) -> tuple[str, str | None]:
    """Op and kernel (None: its own choice), by a table of measured choices or by ``plan``."""
    kind, index = plan_kind(device.type), device.index or 0
    if tables and dtype in KEYS:
        kernel = tuned.choice(tuned.Problem(format, zeros, dtype, scale_dtype, N, K), M, kind, index)
        if kernel is not None:
            return op_of(kernel), None if kernel == tuned.LIBRARY else kernel
    hopper = device.type == "cuda" and _gemm.is_hopper(index)
    return plan(M, N, K, dtype, scale_dtype, kind, format, None, hopper), None


tuned.caches.append(_chosen)


def _by_library(
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
    M, N, K = check("linear", x, codes, scales, extra, format, zeros, group_size, out)
    weight = dequantize(codes, scales, group_size, format=format, zeros=zeros, extra=extra, dtype=x.dtype)
    torch.mm(x.reshape(M, K), weight.T, out=out.view(M, N))


_RUNS = {"linear_decode": _decode._run, "marlin_gemm": _gemm._run, "dequantize": _by_library}


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
    if kernel is not None:
        _RUNS[op_of(kernel)](x, codes, scales, extra, format, zeros, group_size, kernel, out)
        return
    K = x.shape[-1] if x.ndim else 0  # of wrong shapes any op may say so
    M, N = x.numel() // K if K else 0, codes.shape[0] if codes.ndim else 0
    if tuned.active.session is not None and K:
        tuned.active.session.see("linear", x, codes, scales, (extra,), format, zeros, group_size)
    problem = (M, N, K, x.dtype, scales.dtype, x.device, format, zeros)
    op, chosen = _chosen(*problem, True)
    if chosen is not None and "__m" in chosen and not on_16_bytes(x, codes):
        op, chosen = _chosen(*problem, False)  # tables are of aligned tensors
    _RUNS[op](x, codes, scales, extra, format, zeros, group_size, chosen, out)


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


register("linear", _run)
torch.library.register_autograd("metal_marlin::linear", _gradient, setup_context=_keep)
