"""gated_mlp: a gated feed-forward layer with FP4 weights, down(act(x · Wgᵀ) ⊙ (x · Wuᵀ)), and its residual."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.ops import gated_up as ups
from metal_marlin.ops import product
from metal_marlin.ops.activation import ACTIVATIONS
from metal_marlin.ops.epilogue import epilogue, linear_epilogue
from metal_marlin.ops.linear import linear
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.marlin_gemm import plan as gemm_plan
from metal_marlin.ops.spec import Check, OpSpec
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = ups.FAMILY
DOWN = ("gated_mlp_fp4", "gated_mlp_residual_fp4")  # without and with a residual
_GRID = "marlin_gemm_fused_fp4"  # whose pipeline it is


@dataclass(frozen=True)
class Case:
    """x [M, K], gate and up [F, K], down [N, F]."""

    M: int
    K: int
    F: int
    N: int
    group: int = 32
    dtype: torch.dtype = torch.float16
    activation: str = "silu"
    residual: bool = False
    kernel: str | None = None
    model: bool = False

    def __str__(self) -> str:
        tail = ("-residual" if self.residual else "") + (f"-{self.kernel}" if self.kernel else "")
        return f"{self.M}x{self.K}x{self.F}x{self.N}-g{self.group}-{KEYS[self.dtype]}-{self.activation}{tail}"

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, ...]:
        """x, codes and scales of gate, up and down, the residual: what follows the products is around 1."""
        first = ups.Case(self.M, self.F, self.K, self.group, self.dtype).tensors(device, seed)
        rest, *down = Product(self.N, self.N, self.F, self.group, self.dtype).tensors(device, seed + 7)[:3]
        rng = torch.Generator().manual_seed(seed)
        return (*first, *down, torch.randn(self.M, self.N, generator=rng).to(rest))

    def options(self, residual: torch.Tensor) -> dict[str, object]:
        """Keyword arguments of the op and of its reference."""
        return {"activation": self.activation, "residual": residual if self.residual else None}


def gated_mlp_ref(
    x: torch.Tensor,
    gate_codes: torch.Tensor,
    gate_scales: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    group_size: int,
    *,
    down_group_size: int | None = None,
    activation: str = "silu",
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64."""
    h = ups.gated_up_ref(x, gate_codes, gate_scales, up_codes, up_scales, group_size, activation)
    y = product.product_ref(h, down_codes, down_scales, down_group_size or group_size)
    return y if residual is None else residual.double() + y


def gated_mlp(
    x: torch.Tensor,
    gate_codes: torch.Tensor,
    gate_scales: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    group_size: int,
    *,
    down_group_size: int | None = None,
    activation: str = "silu",
    residual: torch.Tensor | None = None,
    kernel: str | None = None,
) -> torch.Tensor:
    """y [..., N] = (act(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ [+ residual]: gate and up FP4 [F, K], down FP4 [N, F].

    x [..., K] half or bfloat16, contiguous; codes and scales (x's dtype) as ``marlin_gemm``'s; residual: x's dtype,
    shape of y. down_group_size: of down, where it is not ``group_size``. activation: "silu", "gelu" (erf) or
    "gelu_tanh". ``gated_up``, whose result is rounded to x's dtype, then ``linear``, or ``linear_epilogue`` with the
    residual; of up to 8 tokens two launches, "gated_mlp_fp4_decode" (or its "_batched") and ``linear``'s, and the
    residual's. kernel: what ``gated_up`` takes, of which those two are for up to 8 tokens; or "gated_mlp_fp4", with a
    residual "gated_mlp_residual_fp4": ``linear`` for gate and up, and a product with down that joins them as it reads.
    Sums are float32. Not differentiable. Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.gated_mlp(
        *(x, gate_codes, gate_scales, up_codes, up_scales, down_codes, down_scales, group_size),
        *(down_group_size or group_size, activation, residual, kernel),
    )


def _check(
    x: torch.Tensor,
    gate: tuple[torch.Tensor, torch.Tensor],
    up: tuple[torch.Tensor, torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor],
    groups: tuple[int, int],
    activation: str,
    residual: torch.Tensor | None,
    kernel: str | None,
) -> int:
    """M."""
    ups.plan("gated_mlp", x.dtype, gate[1].dtype, activation, None if kernel in DOWN else kernel)
    M, F, _ = ups.check_pair("gated_mlp", x, gate, up, groups[0])
    inner = torch.empty(1, F, device="meta", dtype=x.dtype)
    product.check("gated_mlp, down", inner, *down, None, "fp4", "none", groups[1])
    if down[1].dtype != x.dtype:
        raise ArgumentError(f"gated_mlp: x is {x.dtype}, down_scales are {down[1].dtype}; they are the same")
    wanted = (*x.shape[:-1], down[0].shape[0])
    if residual is not None and (residual.shape != wanted or residual.dtype != x.dtype):
        given = f"{residual.dtype} {tuple(residual.shape)}"
        raise ArgumentError(f"gated_mlp: residual is {given}; needs {x.dtype} {wanted}")
    if kernel in DOWN and kernel != DOWN[residual is not None]:
        said = "None" if residual is None else "given"
        raise ArgumentError(
            f"gated_mlp: kernel is {kernel!r}, residual is {said}; that takes {DOWN[residual is not None]!r}"
        )
    if (kernel or "").startswith(ups.DECODE) and M > ups.FEW:
        raise ArgumentError(f"gated_mlp: kernel is {kernel!r}, M = {M}; it takes at most {ups.FEW} tokens")
    return M


def _new(
    x: torch.Tensor,
    gate_codes: torch.Tensor,
    gate_scales: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
    group_size: int,
    down_group_size: int,
    activation: str,
    residual: torch.Tensor | None,
    kernel: str | None,
) -> torch.Tensor:
    gate, up, down = (gate_codes, gate_scales), (up_codes, up_scales), (down_codes, down_scales)
    M = _check(x, gate, up, down, (group_size, down_group_size), activation, residual, kernel)
    if kernel in DOWN:
        products = [linear(x, *weight, group_size) for weight in (gate, up)]
        return _down(products, down, down_group_size, activation, residual, kernel)
    h = ups._new(x, *gate, *up, group_size, activation, kernel)
    if residual is None:
        return linear(h, *down, down_group_size)
    if M <= ups.FEW:  # the pipelines of linear_epilogue are for more
        return epilogue(linear(h, *down, down_group_size), residual=residual)
    return linear_epilogue(h, *down, down_group_size, residual=residual)


@functools.lru_cache(maxsize=64)
def row_of(kernel: str, dtype: torch.dtype, activation: str) -> str:
    """The row of one of ``DOWN``."""
    return ups.keyed(row_name("gated_mlp", kernel, DOWN, dtype, dtype, "fp4", "none"), activation, ups.ACTS[0])


def _down(
    products: list[torch.Tensor],
    down: tuple[torch.Tensor, torch.Tensor],
    group_size: int,
    activation: str,
    residual: torch.Tensor | None,
    kernel: str,
) -> torch.Tensor:
    """(act(gate) ⊙ up) · downᵀ [+ residual] of both products [..., F]."""
    x, (codes, scales) = products[0], down
    row = row_of(kernel, x.dtype, activation)
    out = x.new_empty((*x.shape[:-1], codes.shape[0]))
    if out.numel() == 0:
        return out
    kind, K, N = plan_kind(x.device.type), x.shape[-1], out.shape[-1]
    pool = torch.get_num_threads() if kind == "cpu" else 1
    p = gemm_plan(x.numel() // K, N, K, x.dtype, x.dtype, kind, pool=pool, kernel=_GRID)
    aligned = K % 32 == 0 and on_16_bytes(x, codes) and on_16_bytes(x, products[1])
    shape = struct.pack("=7q", x.numel() // K, N, K, group_size, p.rows, p.tokens, aligned)
    dispatch_kernel(
        library(FAMILY, str(x.device), p.lanes),
        row,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(*products, codes, scales, out, shape, x if residual is None else residual),
    )
    return out


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(
    "gated_mlp(Tensor x, Tensor gate_codes, Tensor gate_scales, Tensor up_codes, Tensor up_scales, Tensor down_codes, "
    "Tensor down_scales, int group_size, int down_group_size, str activation, Tensor? residual, str? kernel) -> Tensor"
)
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("gated_mlp", _new, _key)
torch.library.register_fake(
    "metal_marlin::gated_mlp", lambda x, *more: x.new_empty((*x.shape[:-1], more[4].shape[0])), lib=_torch
)

_16 = (torch.float16, torch.bfloat16)
CASES: tuple[Case, ...] = (
    *(
        Case(M, 96, 160, 67, 16, d, "silu", r)
        for M in (1, 2, 7, 8, 9, 33)
        for d, r in zip(_16, (True, False), strict=True)
    ),
    *(Case(M, 64, 96, 33, 32, d, a, True) for M, d in ((3, _16[0]), (11, _16[1])) for a in ups.ACTS),
    *(Case(M, 72, 40, 9, 16, torch.float16, "gelu") for M in (1, 12)),
    *(Case(66, 40, 328, 130, 16, d, "gelu_tanh", r) for d, r in zip(_16, (False, True), strict=True)),
    *(Case(M, 4096, 14336, 4096, 128, residual=r, model=True) for M, r in ((1, False), (8, False), (512, True))),
)


def _compare(case: Case, device: str, kernel: str | None) -> Check:
    *tensors, residual = case.tensors()
    *moved, other = case.tensors(device)
    y = gated_mlp(*moved, case.group, kernel=kernel or case.kernel, **case.options(other))  # type: ignore[arg-type, call-arg]
    exact = gated_mlp_ref(*tensors, case.group, **case.options(residual))  # type: ignore[arg-type, call-arg]
    return ups.within(y, exact, composed(case, (*tensors, residual)))


def composed(case: Case, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What torch makes of decoded weights, in x's dtype."""
    decode = codec("fp4").decode
    weights = [decode(tensors[i], tensors[i + 1], None, case.group, "none", case.dtype) for i in (1, 3, 5)]
    gate, up = (tensors[0] @ W.T for W in weights[:2])
    y = (ACTIVATIONS[case.activation](gate) * up) @ weights[2].T  # type: ignore[operator]
    return tensors[7] + y if case.residual else y


def _row_case(name: str) -> tuple[Case, str]:
    case, base = ups._row_case(name)
    M = 1 if base == ups.DECODE else 5 if base.startswith(ups.DECODE) else 9
    return Case(M, 64, 96, 37, 32, case.dtype, case.activation, base == DOWN[1]), base


OP = OpSpec("gated_mlp", FAMILY, gated_mlp_ref, CASES, "bench/gated.py", ("gated_mlp_*",), _compare, _row_case)
