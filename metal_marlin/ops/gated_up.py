"""gated_up: act(x · Wgᵀ) ⊙ (x · Wuᵀ) with two FP4 weights, the first half of a gated feed-forward layer."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from typing import NamedTuple

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import product
from metal_marlin.ops.activation import ACTIVATIONS
from metal_marlin.ops.dense import FAMILY as DENSE_FAMILY
from metal_marlin.ops.epilogue import epilogue
from metal_marlin.ops.linear import linear
from metal_marlin.ops.linear import plan as linear_plan
from metal_marlin.ops.linear_decode import Plan as DecodePlan
from metal_marlin.ops.linear_decode import plan as decode_plan
from metal_marlin.ops.linear_decode_cases import Case as Product
from metal_marlin.ops.marlin_gemm import Plan
from metal_marlin.ops.marlin_gemm import plan as gemm_plan
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "gated_mlp.metal"
ACTS = ("silu", "gelu", "gelu_tanh")
_SILU, _GELU, _DENSE = "gated_up_fp4", "gated_up_geglu_fp4", "dense_fused_gate_up_fp4"
DECODE = "gated_mlp_fp4_decode"
# kernel -> its activations, the first without a key; its file
KERNELS: dict[str, tuple[tuple[str, ...], str]] = {
    _SILU: (("silu",), FAMILY),
    _GELU: (("gelu", "gelu_tanh"), FAMILY),
    _DENSE: (ACTS, DENSE_FAMILY),
    DECODE: (ACTS, FAMILY),
    f"{DECODE}_batched": (ACTS, FAMILY),
}
FEW = 8  # tokens of a _batched row in one reading of the weights
_GRID = "marlin_gemm_fused_fp4"  # whose tiles have 64 rows, as all of these do: 32 of each matrix

# x, codes and scales of the gate, codes and scales of up
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """x [M, K], gate and up [N, K]."""

    M: int
    N: int
    K: int
    group: int = 32
    dtype: torch.dtype = torch.float16
    activation: str = "silu"
    kernel: str | None = None
    model: bool = False

    def __str__(self) -> str:
        tail = f"-{self.kernel}" if self.kernel else ""
        return f"{self.M}x{self.N}x{self.K}-g{self.group}-{KEYS[self.dtype]}-{self.activation}{tail}"

    def tensors(self, device: str = "cpu", seed: int = 0) -> Operands:
        """x, codes and scales of the gate, codes and scales of up; products are around 1."""
        one = Product(self.M, self.N, self.K, self.group, self.dtype)
        x, *gate = one.tensors(device, 2 * seed)[:3]
        return (x, gate[0], gate[1], *one.tensors(device, 2 * seed + 1)[1:3])


class Row(NamedTuple):
    """A row, its kernel and file."""

    name: str
    kernel: str
    file: str


@functools.lru_cache(maxsize=256)
def plan(op: str, dtype: torch.dtype, scale_dtype: torch.dtype, activation: str, kernel: str | None = None) -> Row:
    """The row of ``kernel``, or of the activation. Raises ArgumentError in the name of ``op``."""
    if activation not in ACTS:
        raise ArgumentError(f"{op}: activation = {activation!r}; there are {', '.join(ACTS)}")
    if dtype not in (torch.float16, torch.bfloat16) or scale_dtype != dtype:
        raise ArgumentError(
            f"{op}: x is {dtype}, scales are {scale_dtype}; both are torch.float16 or both torch.bfloat16"
        )
    known = [name for name, (acts, _) in KERNELS.items() if activation in acts]
    base = kernel or known[0]
    row = row_name(op, base, known, dtype, dtype, "fp4", "none")
    return Row(keyed(row, activation, KERNELS[base][0][0]), base, KERNELS[base][1])


def keyed(row: str, activation: str, default: str) -> str:
    """The row's name with the key of an activation that is not the kernel's usual one."""
    if activation == default:
        return row
    return f"{row}{'_' if '__' in row else '__'}e{activation.replace('_', '')}"


def check_pair(
    op: str,
    x: torch.Tensor,
    gate: tuple[torch.Tensor, torch.Tensor],
    up: tuple[torch.Tensor, torch.Tensor],
    group_size: int,
) -> tuple[int, int, int]:
    """M, N, K. Raises ArgumentError in the name of ``op``."""
    found = product.check(f"{op}, gate", x, *gate, None, "fp4", "none", group_size)
    other = product.check(f"{op}, up", x, *up, None, "fp4", "none", group_size)
    if found != other or gate[1].dtype != up[1].dtype:
        raise ArgumentError(
            f"{op}: gate has N = {found[1]}, scales {gate[1].dtype}, up N = {other[1]}, scales {up[1].dtype}; "
            "they are the same"
        )
    return found


def gated_up_ref(
    x: torch.Tensor,
    gate_codes: torch.Tensor,
    gate_scales: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    group_size: int,
    activation: str = "silu",
) -> torch.Tensor:
    """The meaning, in float64."""
    gate = product.product_ref(x, gate_codes, gate_scales, group_size)
    up = product.product_ref(x, up_codes, up_scales, group_size)
    return ACTIVATIONS[activation](gate) * up  # type: ignore[operator]


def gated_up(
    x: torch.Tensor,
    gate_codes: torch.Tensor,
    gate_scales: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    group_size: int,
    *,
    activation: str = "silu",
    kernel: str | None = None,
) -> torch.Tensor:
    """y [..., N] = act(x · gateᵀ) ⊙ (x · upᵀ), both weights FP4 [N, K], in one launch: SwiGLU, GeGLU.

    x [..., K] half or bfloat16, contiguous; codes and scales (x's dtype) as ``marlin_gemm``'s; halves of one matrix
    [2 N, K] are views. activation: "silu", "gelu" (erf) or "gelu_tanh". Sums and what follows are float32, y is rounded
    once (arXiv 2002.05202). kernel: "gated_up_fp4" (silu) or "gated_up_geglu_fp4" (the others), or
    "dense_fused_gate_up_fp4" (any), which decodes weights in registers, or "gated_mlp_fp4_decode" or its "_batched"
    (any, for few tokens). None: of up to 8 tokens, on a cpu of as many as ``linear`` gives to ``linear_decode``, one of
    the last, of more one of the first, but on cuda ``linear`` twice and ``epilogue``: other pipelines are faster there
    (both products are rounded in between).
    Not differentiable. Raises ArgumentError naming the argument and the numbers.
    """
    return torch.ops.metal_marlin.gated_up(
        x, gate_codes, gate_scales, up_codes, up_scales, group_size, activation, kernel
    )


def _new(
    x: torch.Tensor,
    gate_codes: torch.Tensor,
    gate_scales: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    group_size: int,
    activation: str,
    kernel: str | None,
) -> torch.Tensor:
    M, N, K = check_pair("gated_up", x, (gate_codes, gate_scales), (up_codes, up_scales), group_size)
    kind = plan_kind(x.device.type)
    if kernel is None and (
        M <= FEW or (kind == "cpu" and linear_plan(M, 2 * N, K, x.dtype, x.dtype, kind) == "linear_decode")
    ):
        kernel = DECODE if M == 1 else f"{DECODE}_batched"
    row = plan("gated_up", x.dtype, gate_scales.dtype, activation, kernel)
    if kind == "cuda" and kernel is None:
        gate = linear(x, gate_codes, gate_scales, group_size)
        return epilogue(gate, activation=activation, gate=linear(x, up_codes, up_scales, group_size))
    y = x.new_empty((*x.shape[:-1], N))
    if y.numel() == 0:
        return y
    pool = torch.get_num_threads() if kind == "cpu" else 1
    aligned = K % 32 == 0 and on_16_bytes(x, gate_codes) and on_16_bytes(x, up_codes)
    p: Plan | DecodePlan  # of 2 N rows: those of both matrices
    if row.kernel.startswith(DECODE):
        p = decode_plan(M, 2 * N, K, x.dtype, x.dtype, kind, pool, row.kernel.replace(DECODE, "decode_gemv_fp4"))
        shape = struct.pack("=6q", M, N, K, group_size, p.rows // 2, aligned)
    else:
        p = gemm_plan(M, 2 * N, K, x.dtype, x.dtype, kind, pool=pool, kernel=_GRID)
        shape = struct.pack("=7q", M, N, K, group_size, p.rows // 2, p.tokens, aligned)
    dispatch_kernel(
        library(row.file, str(x.device), p.lanes),
        row.name,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, gate_codes, gate_scales, up_codes, up_scales, y, shape),
    )
    return y


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(
    "gated_up(Tensor x, Tensor gate_codes, Tensor gate_scales, Tensor up_codes, Tensor up_scales, int group_size, "
    "str activation, str? kernel) -> Tensor"
)
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("gated_up", _new, _key)
torch.library.register_fake(
    "metal_marlin::gated_up", lambda x, codes, *_: x.new_empty((*x.shape[:-1], codes.shape[0])), lib=_torch
)

_16 = (torch.float16, torch.bfloat16)
CASES: tuple[Case, ...] = (
    *(Case(M, 67, 160, 16, d) for M in (1, 2, 7, 17, 33, 64, 65) for d in _16),
    *(Case(9, N, 96, 32, d, a) for N in (1, 8, 31, 32, 33, 130) for a, d in zip(ACTS, (*_16, _16[0]), strict=True)),
    *(Case(5, 19, K, g, d, "gelu_tanh") for K, g in ((8, 8), (264, 128), (1000, 128), (520, 520)) for d in _16),
    *(Case(260, 40, 288, 32, d, "gelu") for d in _16),
    *(Case(M, N, K, 64, d) for M, N, K in ((1, 9, 16448), (2, 1100, 256)) for d in _16),
    *(Case(M, 14336, 4096, 128, model=True) for M in (16, 512)),
)


def composed(case: Case, tensors: Operands, weights: list[torch.Tensor]) -> torch.Tensor:
    """What torch makes of decoded weights, in x's dtype."""
    gate, up = (tensors[0] @ W.to(case.dtype).T for W in weights)
    return ACTIVATIONS[case.activation](gate) * up  # type: ignore[operator]


def within(y: torch.Tensor, exact: torch.Tensor, theirs: torch.Tensor) -> Check:
    """Per row twice the error of torch's composition, and a rounding."""
    allowed = 2 * (theirs.double() - exact).norm(dim=-1) + torch.finfo(theirs.dtype).eps * exact.norm(dim=-1) + 1e-6
    return worst((y.cpu().double() - exact).norm(dim=-1), allowed)


def _check(case: Case, device: str, kernel: str | None) -> Check:
    tensors = case.tensors()
    weights = [
        product.product_ref(torch.eye(case.K), tensors[i], tensors[i + 1], case.group).T.contiguous() for i in (1, 3)
    ]
    y = gated_up(*case.tensors(device), case.group, activation=case.activation, kernel=kernel or case.kernel)
    exact = gated_up_ref(*tensors, case.group, case.activation)
    return within(y, exact, composed(case, tensors, weights))


def _row_case(name: str) -> tuple[Case, str]:
    base, _, key = name.partition("__")
    keys = {part[0]: part[1:] for part in key.split("_") if part}
    activation = {a.replace("_", ""): a for a in ACTS}[keys["e"]] if "e" in keys else KERNELS.get(base, (ACTS,))[0][0]
    return Case(9, 37, 264, 64, torch.bfloat16 if "t" in keys else torch.float16, activation), base


OP = (
    OpSpec("gated_up", FAMILY, gated_up_ref, CASES, "bench/gated.py", ("gated_up_*",), _check, _row_case),
    OpSpec("gated_up", DENSE_FAMILY, gated_up_ref, CASES, "bench/gated.py", (f"{_DENSE}*",), _check, _row_case),
)
