"""linear_packed: y = x · Wᵀ with W in operand order, for any number of tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec, operands
from metal_marlin.ops import packed_plan, product, tuned
from metal_marlin.ops.dequantize import dequantize
from metal_marlin.ops.gemm_tiles import Tile
from metal_marlin.ops.linear_decode_cases import Case
from metal_marlin.ops.marlin_gemm import is_hopper
from metal_marlin.ops.packed_plan import Rows
from metal_marlin.ops.packed_tiles import TILES
from metal_marlin.ops.selfcheck import product_check
from metal_marlin.ops.spec import Check, OpSpec
from metal_marlin.ops.weights import library, read_row
from metal_marlin.runtime.dispatch import dispatch_kernel
from metal_marlin.runtime.tensor_map import NONE, blocked_map, group_map, strip_map

FAMILY = "packed_gemm.metal"
FORMATS = ("fp4", "mxfp4", "nvfp4", "int4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "int2", "int3", "nf3")
ROWS = Rows("linear_packed", FAMILY, "packed_gemm", FORMATS, ("none", "point", "bias"), TILES)
has_rows, plan = ROWS.has, functools.partial(packed_plan.plan, ROWS)


def linear_packed_ref(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64: the weights back in canonical order, decoded."""
    codes, scales, extra = operands.unpack(codec(format), codes, scales, extra, zeros)
    return product.product_ref(x, codes, scales, group_size, format=format, zeros=zeros, extra=extra)


def linear_packed(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
    kernel: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ with weights that ``metal_marlin.quant.prepack(…, "mma16")`` made.

    x: half or bfloat16, contiguous, K a multiple of 64. codes, scales (x's dtype, or bytes), powers and extra: the
    packed tensor's; zeros: its ``kernel_zeros``. kernel: a tile, for measurements; out: where to write. Sums are
    float32, y is rounded once. Made for CUDA devices of compute capability 9.0; others compute it by plain code.
    A table of measured choices says which tile runs (ops/tuned.py), or else their fitted times.
    Differentiable in x (not with ``out``): the gradient is that of the decoded weights.
    Raises ArgumentError naming the argument and the numbers.
    """
    more = (scales, powers, extra, format, zeros, group_size, kernel)
    return product.call("linear_packed", _run, out, x, codes, *more)


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    out: torch.Tensor | None = None,
) -> tuple[int, int, int]:
    M, N, K = product.check("linear_packed", x, codes, scales, extra, format, zeros, group_size, out)
    check_order("linear_packed", N, K, powers)
    return M, N, K


def check_order(op: str, N: int, K: int, powers: torch.Tensor) -> None:
    """Raises ArgumentError, in the name of ``op``, for W [N, K] and powers that cannot be in operand order."""
    if N % 16 or K % 64:
        raise ArgumentError(f"{op}: W is [{N}, {K}]; the layout takes N % 16 = 0 and K % 64 = 0")
    if powers.shape != (N,) or powers.dtype != torch.float32:
        raise ArgumentError(f"{op}: powers is {powers.dtype} {tuple(powers.shape)}; needs torch.float32 {(N,)}")


def copies(device: torch.device) -> bool:
    """Whether a device has the tensor copy unit, which reads what descriptors say."""
    return device.type == "cuda" and is_hopper(device.index or 0)


def addresses(op: str, **tensors: torch.Tensor | None) -> tuple[int, ...]:
    """Where tensors are, 0 for None. Raises ArgumentError for one that the tensor copy unit cannot read there."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.data_ptr() % 16:
            raise ArgumentError(
                f"{op}: {name} starts {tensor.data_ptr() % 16} bytes after a multiple of 16; it has to be at one"
            )
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors.values())


def by_group(rows: torch.Tensor) -> torch.Tensor:
    """[groups, N], contiguous; a view of what ``prepack`` made."""
    return rows.T if rows.T.is_contiguous() else rows.T.contiguous()


@functools.lru_cache(maxsize=4096)
def maps_of(
    t: Tile,
    depth: int,
    bits: int,
    size: int,
    M: int,
    N: int,
    K: int,
    group: int,
    x: int,
    codes: int,
    scales: int,
    extra: int,
) -> bytes:
    """Descriptors of x, codes, scales and extra (0: none) at these addresses, for stages of ``depth`` k; ``bits`` that
    codes have for every k, ``size`` of a scale, in bytes."""
    held, strips, groups = max(1, depth // group), N // 16, -(-K // group)
    return b"".join(
        (
            blocked_map(x, M, K, t.tokens // 2, 1) if t.halves else blocked_map(x, M, K, t.tokens, depth // 64),
            strip_map(codes, strips, K // 64, 128 * bits, t.rows // 16, depth // 64),
            group_map(scales, groups, N * size, t.rows * size, held),
            group_map(extra, groups, N * size, t.rows * size, held) if extra else NONE,
        )
    )


def _run(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    kernel: str | None,
    out: torch.Tensor,
) -> None:
    M, N, K = _check(x, codes, scales, powers, extra, format, zeros, group_size, out)
    if kernel is None and tuned.active.session is not None:
        tuned.active.session.see("linear_packed", x, codes, scales, (powers, extra), format, zeros, group_size)
    p = packed_plan.chosen(ROWS, max(M, 1), N, K, x.dtype, scales.dtype, x.device, format, zeros, kernel)
    if M == 0 or N == 0:
        return
    scales, extra = by_group(scales), extra if extra is None or zeros == "none" else by_group(extra)
    maps, tile = 4 * NONE, TILES[p.tile]
    if copies(x.device):
        x = x.clone() if x.data_ptr() % 16 else x
        affine = extra if zeros != "none" else None
        tensors = addresses("linear_packed", x=x, codes=codes, scales=scales, extra=affine)
        maps = maps_of(tile, TILES.depths[p.tile], codec(format).bits, scales.itemsize, M, N, K, group_size, *tensors)
    shape = {"M": M, "N": N, "K": K, "group": group_size, "rows": tile.rows, "tokens": tile.tokens, "aligned": 1}
    dispatch_kernel(
        library(FAMILY, str(x.device)),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, scales, scales if extra is None else extra, powers, out, shape, maps),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, codes, scales, _, extra, *ctx.said, _ = inputs
    ctx.save_for_backward(codes, scales, extra)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of x: grad [..., N] · W [N, K]."""
    codes, scales, extra = ctx.saved_tensors
    format, zeros, group = ctx.said
    codes, scales, extra = operands.unpack(codec(format), codes, scales, extra, zeros)
    weight = dequantize(codes, scales.contiguous(), group, format=format, zeros=zeros, extra=extra, dtype=grad.dtype)
    return (grad @ weight, *(None,) * 8)


product.register(
    "linear_packed",
    _run,
    "Tensor x, Tensor codes, Tensor scales, Tensor powers, Tensor? extra, str format, str zeros, int group_size, "
    "str? kernel",
    _check,
)
torch.library.register_autograd("metal_marlin::linear_packed", _gradient, setup_context=_keep)


@dataclass(frozen=True)
class Packed:
    """A case's weights in operand order, as ``linear_packed`` takes them."""

    codes: torch.Tensor
    scales: torch.Tensor
    extra: torch.Tensor | None
    powers: torch.Tensor
    kernel_zeros: str


def packed(case: Case, device: str = "cpu") -> tuple[torch.Tensor, Packed]:
    """x and W of a case."""
    x, codes, scales, extra = case.tensors(device)
    tensors = operands.pack(codec(case.format), codes, scales, extra, case.zeros)
    return x, Packed(*tensors, operands.kernel_zeros(case.zeros))


def _of_case(case: Case, device: str, kernel: str | None) -> Check:
    def op(x: torch.Tensor, *_: Any, extra: torch.Tensor | None, kernel: str | None, **__: Any) -> torch.Tensor:
        w = packed(case, device)[1]
        more: dict[str, Any] = {"format": case.format, "zeros": w.kernel_zeros, "extra": w.extra, "kernel": kernel}
        return linear_packed(x, w.codes, w.scales, w.powers, case.group, **more)

    return product_check(op, case, device, kernel)


def _row_case(name: str) -> tuple[Case, str]:
    base, dtype, _, zeros = read_row(name)
    format = base.partition("__m")[0].removeprefix("packed_gemm_")
    group = next(g for g in (64, 32, 16) if g in codec(format).groups)
    return Case(9, 48, 192, group, dtype, None, format, zeros), base


_HALVES = (torch.float16, torch.bfloat16)
_KINDS = tuple((f, z) for f in FORMATS for z in codec(f).zero_kinds)
CASES: tuple[Case, ...] = (
    *(Case(M, 80, 320, 64, d) for M in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 130) for d in _HALVES),
    *(Case(5, N, 128, 64, d) for N in (16, 32, 48, 144) for d in _HALVES),
    *(Case(11, 48, 576, g, d) for g in (16, 32, 64, 576) for d in _HALVES),
    *(Case(3, 32, 1088, g, d) for g in (128, 256) for d in _HALVES),
    *(
        Case(M, 48, 320, (codec(f).groups or (64,))[0], d, None, f, z)
        for f, z in _KINDS
        for M in (4, 40)
        for d in _HALVES
    ),
    *(Case(512, N, K, 128, model="large") for N, K in ((4096, 4096), (14336, 4096), (4096, 14336))),
)
OP = OpSpec("linear_packed", FAMILY, linear_packed_ref, CASES, "bench/gemm.py", ("*",), _of_case, _row_case)
