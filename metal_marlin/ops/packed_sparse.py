"""linear_packed_sparse: y = x · Wᵀ with 2:4 sparse W in operand order, for any number of tokens."""

from __future__ import annotations

import functools
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec, operands, sparse
from metal_marlin.ops import packed_plan, product, tuned
from metal_marlin.ops.linear_sparse import Case, check, weights
from metal_marlin.ops.packed import addresses, by_group, check_order, copies, maps_of
from metal_marlin.ops.packed_plan import Rows
from metal_marlin.ops.packed_tiles import SPARSE
from metal_marlin.ops.selfcheck import rounded_check
from metal_marlin.ops.spec import Check, OpSpec
from metal_marlin.ops.weights import library, read_row
from metal_marlin.runtime.dispatch import dispatch_kernel
from metal_marlin.runtime.tensor_map import NONE, strip_map

FAMILY = "packed_sparse.metal"
FORMATS = ("fp4", "mxfp4", "int4")  # scales of 32 weights at least, no zeros
_OF = sparse.pattern("2:4")
ROWS = Rows("linear_packed_sparse", FAMILY, "packed_sparse", FORMATS, ("none",), SPARSE)
plan = functools.partial(packed_plan.plan, ROWS)


def linear_packed_sparse_ref(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
) -> torch.Tensor:
    """The meaning, in float64: the weights back in canonical order, decoded."""
    form = codec(format)
    codes, places, scales = operands.unpack_sparse(form, codes, places, scales)
    return x.double() @ sparse.decode(form, _OF, codes, places, scales, None, x.shape[-1], group_size).T


def linear_packed_sparse(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    kernel: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., N] = x [..., K] · Wᵀ with 2:4 sparse weights in the layout "mma16" of ``SparseTensor.prepack``.

    x: half or bfloat16, contiguous, K a multiple of 64. codes int32 [N, K / 16], places int32 [N, K / 32], scales
    (x's dtype, or bytes) of groups of 32 or more, powers float32 [N]: the packed tensor's, N a multiple of 16. kernel:
    a tile, for measurements; out: where to write. Sums are float32, y is rounded once. Made for the sparse matrix
    instructions of CUDA devices of compute capability 9.0; others compute it by plain code. The tile that runs is
    chosen as ``linear_packed`` does. Differentiable in x (not with ``out``). Raises ArgumentError naming the argument
    and the numbers.
    """
    more = (places, scales, powers, format, group_size, kernel)
    return product.call("linear_packed_sparse", _run, out, x, codes, *more)


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    format: str,
    group_size: int,
    out: torch.Tensor | None = None,
) -> tuple[int, int, int]:
    M, N, K = check("linear_packed_sparse", x, codes, places, scales, None, _OF, format, "none", group_size)
    check_order("linear_packed_sparse", N, K, powers)
    if group_size < operands.SPARSE_GROUP:
        least = operands.SPARSE_GROUP
        raise ArgumentError(f"linear_packed_sparse: group_size = {group_size}; the layout takes {least} or more")
    product.check_out("linear_packed_sparse", x, N, out)
    return M, N, K


def _run(
    x: torch.Tensor,
    codes: torch.Tensor,
    places: torch.Tensor,
    scales: torch.Tensor,
    powers: torch.Tensor,
    format: str,
    group_size: int,
    kernel: str | None,
    out: torch.Tensor,
) -> None:
    M, N, K = _check(x, codes, places, scales, powers, format, group_size, out)
    if kernel is None and tuned.active.session is not None:
        tuned.active.session.see(ROWS.op, x, codes, scales, (places, powers), format, "none", group_size)
    p = packed_plan.chosen(ROWS, max(M, 1), N, K, x.dtype, scales.dtype, x.device, format, "none", kernel)
    if M == 0 or N == 0:
        return
    scales, maps, tile = by_group(scales), 5 * NONE, SPARSE[p.tile]
    if copies(x.device):
        x = x.clone() if x.data_ptr() % 16 else x
        *tensors, at = addresses("linear_packed_sparse", x=x, codes=codes, scales=scales, extra=None, places=places)
        depth = SPARSE.depths[p.tile]
        maps = maps_of(
            tile, depth, codec(format).bits * _OF.kept // _OF.of, scales.itemsize, M, N, K, group_size, *tensors
        )
        maps += strip_map(at, N // 16, K // 64, 128, tile.rows // 16, depth // 64)
    shape = {"M": M, "N": N, "K": K, "group": group_size, "rows": tile.rows, "tokens": tile.tokens, "aligned": 1}
    dispatch_kernel(
        library(FAMILY, str(x.device)),
        p.kernel,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, places, scales, powers, out, shape, maps),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, codes, places, scales, _, *ctx.said, _ = inputs
    ctx.columns = x.shape[-1]
    ctx.save_for_backward(codes, places, scales)


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Of x: grad [..., N] · W [N, K]."""
    format, group = ctx.said
    form = codec(format)
    codes, places, scales = operands.unpack_sparse(form, *ctx.saved_tensors)
    weight = sparse.decode(form, _OF, codes, places, scales, None, ctx.columns, group, dtype=grad.dtype)
    return (grad @ weight, *(None,) * 7)


product.register(
    "linear_packed_sparse",
    _run,
    "Tensor x, Tensor codes, Tensor places, Tensor scales, Tensor powers, str format, int group_size, str? kernel",
    _check,
)
torch.library.register_autograd("metal_marlin::linear_packed_sparse", _gradient, setup_context=_keep)


def packed(case: Case, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """x, codes, places, scales and powers of a case."""
    x, codes, places, scales, _ = case.tensors()
    codes, places, scales, powers = operands.pack_sparse(codec(case.format), codes, places, scales)
    return tuple(t.to(device) for t in (x, codes, places, scales, powers))


def case_check(case: Case, device: str, kernel: str | None) -> Check:
    x, codes, places, scales, powers = packed(case, device)
    more: dict[str, Any] = {"format": case.format, "kernel": kernel}
    y = linear_packed_sparse(x, codes, places, scales, powers, case.group, **more)
    return rounded_check(y, *weights(case))


def _row_case(name: str) -> tuple[Case, str]:
    base, dtype, _, _ = read_row(name)
    format = base.partition("__m")[0].removeprefix("packed_sparse_")
    return Case(9, 48, 192, 32, dtype, format), base


_HALVES = (torch.float16, torch.bfloat16)
CASES: tuple[Case, ...] = (
    *(Case(M, 80, 320, 64, d) for M in (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 130) for d in _HALVES),
    *(Case(5, N, 128, 64, d) for N in (16, 32, 48, 144) for d in _HALVES),
    *(Case(11, 48, 576, g, d) for g in (32, 64, 576) for d in _HALVES),
    *(Case(3, 32, 1088, g, d) for g in (128, 256) for d in _HALVES),
    *(Case(M, 48, 320, 32, d, f) for f in FORMATS for M in (4, 40) for d in _HALVES),
    *(Case(M, N, K, 128, model="large") for M in (1, 16, 512) for N, K in ((4096, 4096), (14336, 4096), (4096, 14336))),
)
OP = OpSpec(
    "linear_packed_sparse", FAMILY, linear_packed_sparse_ref, CASES, "bench/sparse.py", ("*",), case_check, _row_case
)
