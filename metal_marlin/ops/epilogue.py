"""linear_epilogue: a product with FP4 weights whose outputs are finished in the same launch; epilogue: that step."""

from __future__ import annotations

import functools
import itertools
import struct
from dataclasses import dataclass

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops import product
from metal_marlin.ops.activation import ACTIVATIONS
from metal_marlin.ops.linear import linear
from metal_marlin.ops.marlin_gemm import Case as Product
from metal_marlin.ops.marlin_gemm import plan as gemm_plan
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import KEYS, library, on_16_bytes, plan_kind, read_row, row_name
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "gemm_epilogue.metal"
ACTS = ("none", *ACTIVATIONS)  # in the order of core/epilogue.h
_FUSED = "marlin_gemm_fused_fp4"  # whose grid the rows have
_GENERAL = f"{_FUSED}_epilogue"
_FIXED = f"{_GENERAL}_fc"
_JOINS = ("", "residual", "gate")


@dataclass(frozen=True)
class Case:
    """An epilogue of a product [M, K] by [N, K]; the product's ``str`` and the epilogue's key are the id."""

    M: int
    N: int
    K: int
    group: int = 32
    dtype: torch.dtype = torch.float16
    activation: str = "none"
    bias: bool = False
    join: str = ""
    kernel: str | None = None
    model: bool = False

    def __str__(self) -> str:
        parts = [self.activation, *(["bias"] if self.bias else []), *([self.join] if self.join else [])]
        return (
            f"{self.M}x{self.N}x{self.K}-g{self.group}-{KEYS[self.dtype]}-{'-'.join(parts)}-{self.kernel or 'chosen'}"
        )

    def tensors(self, device: str = "cpu", seed: int = 0) -> tuple[torch.Tensor, ...]:
        """x, codes, scales, bias and the other operand; weights such that outputs are around 1."""
        x, codes, scales, _ = Product(self.M, self.N, self.K, self.group, self.dtype).tensors(device, seed)
        rng = torch.Generator().manual_seed(seed + 1)
        bias, other = (torch.randn(s, generator=rng).to(self.dtype).to(device) for s in (self.N, (self.M, self.N)))
        return x, codes, scales, bias, other

    def product(self, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y [M, N] of no product, bias and the other operand."""
        rng = torch.Generator().manual_seed(seed)
        y, bias, other = (torch.randn(s, generator=rng) for s in ((self.M, self.N), (self.N,), (self.M, self.N)))
        return (3 * y).to(self.dtype), bias.to(self.dtype), other.to(self.dtype)

    def options(self, bias: torch.Tensor, other: torch.Tensor) -> dict[str, object]:
        """Keyword arguments of both ops."""
        found: dict[str, object] = {"activation": self.activation, "bias": bias if self.bias else None}
        if self.join:
            found[self.join] = other
        return {**found, **({"scale": 0.5} if self.join == "residual" else {})}


def _key(activation: str, bias: bool, join: str) -> str:
    key = f"{activation.replace('_', '')}{'bias' if bias else ''}{join}"
    return "" if key == "none" else key


def plan(dtype: torch.dtype, activation: str, bias: bool, join: str, kernel: str | None = None) -> str:
    """The row for x in ``dtype``: of the epilogue, or ``kernel``, that of any. Raises ArgumentError."""
    if activation not in ACTS:
        raise ArgumentError(f"linear_epilogue: activation = {activation!r}; there are {', '.join(ACTS)}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ArgumentError(f"linear_epilogue: x is {dtype}; it is torch.float16 or torch.bfloat16")
    row = row_name("linear_epilogue", kernel or _FIXED, (_GENERAL, _FIXED), dtype, dtype, "fp4", "none")
    key = _key(activation, bias, join) if row.startswith(_FIXED) else ""
    return f"{row}{'_' if '__' in row else '__'}e{key}" if key else row


@functools.lru_cache(maxsize=1024)
def _choice(activation: str, bias: bool, join: str) -> bytes:
    return struct.pack("=3q", ACTS.index(activation), bias, _JOINS.index(join))


def _joined(op: str, residual: torch.Tensor | None, gate: torch.Tensor | None) -> str:
    if residual is not None and gate is not None:
        raise ArgumentError(f"{op}: residual and gate are both given; an epilogue has one of them")
    return "residual" if residual is not None else "gate" if gate is not None else ""


def _check(op: str, like: torch.Tensor, bias: torch.Tensor | None, **others: torch.Tensor | None) -> None:
    """``like``: y, of which ``others`` have the shape."""
    for name, tensor in {"bias": bias, **others}.items():
        wanted = (like.shape[-1],) if name == "bias" else tuple(like.shape)
        if tensor is not None and (tensor.shape != wanted or tensor.dtype != like.dtype):
            raise ArgumentError(f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}; needs {like.dtype} {wanted}")


def epilogue_ref(
    y: torch.Tensor,
    activation: str = "none",
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The meaning, in float64."""
    v = y.double() if bias is None else y.double() + bias.double()
    v = v if activation == "none" else ACTIVATIONS[activation](v)  # type: ignore[operator]
    if residual is not None:
        return residual.double() + scale * v
    return v if gate is None else v * gate.double()


def linear_epilogue_ref(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, group_size: int, **options: object
) -> torch.Tensor:
    """The meaning, in float64."""
    return epilogue_ref(product.product_ref(x, codes, scales, group_size), **options)  # type: ignore[arg-type]


def linear_epilogue(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    activation: str = "none",
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    scale: float = 1.0,
    kernel: str | None = None,
) -> torch.Tensor:
    """y [..., N] of v = act(x · Wᵀ + bias): v itself, residual + scale · v, or v · gate; FP4 weights.

    x [..., K] half or bfloat16, contiguous; codes and scales (x's dtype) as ``marlin_gemm``'s. activation: "none" or
    one of ``metal_marlin.activation``'s. bias [N]; residual, gate: x's dtype, shape of y. Sums and the epilogue are
    float32, y is rounded once. kernel: "marlin_gemm_fused_fp4_epilogue_fc", where the epilogue is compiled in, or
    "marlin_gemm_fused_fp4_epilogue", which takes any by arguments; None: the first, but on cuda ``linear`` and
    ``epilogue``, which measured faster there (the product is rounded in between).
    Not differentiable. Raises ArgumentError naming the argument and the numbers.
    """
    join = _joined("linear_epilogue", residual, gate)
    other = residual if gate is None else gate
    return torch.ops.metal_marlin.linear_epilogue(
        x, codes, scales, group_size, activation, bias, other, join, float(scale), kernel
    )


def _new_linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    activation: str,
    bias: torch.Tensor | None,
    other: torch.Tensor | None,
    join: str,
    scale: float,
    kernel: str | None,
) -> torch.Tensor:
    M, N, K = product.check("linear_epilogue", x, codes, scales, None, "fp4", "none", group_size)
    if scales.dtype != x.dtype:
        raise ArgumentError(f"linear_epilogue: scales is {scales.dtype}, x is {x.dtype}; they are the same")
    row = plan(x.dtype, activation, bias is not None, join, kernel)
    out = x.new_empty((*x.shape[:-1], N))
    _check("linear_epilogue", out, bias, **{join or "other": other})
    if out.numel() == 0:
        return out
    kind = plan_kind(x.device.type)
    if kind == "cuda" and kernel is None:
        linear(x, codes, scales, group_size, out=out)
        return _new(out, activation, bias, other, join, scale)
    pool = torch.get_num_threads() if kind == "cpu" else 1
    p = gemm_plan(M, N, K, x.dtype, x.dtype, kind, pool=pool, kernel=_FUSED)
    aligned = int(K % 32 == 0 and on_16_bytes(x, codes))
    shape = {"M": M, "N": N, "K": K, "group": group_size, "rows": p.rows, "tokens": p.tokens, "aligned": aligned}
    choice = _choice(activation, bias is not None, join)
    more = (x if bias is None else bias, x if other is None else other)
    dispatch_kernel(
        library(FAMILY, str(x.device), p.lanes),
        row,
        threadgroups=p.threadgroups,
        threads_per_threadgroup=p.threads,
        args=(x, codes, scales, out, shape, *more, choice, scale),
    )
    return out


def epilogue(
    y: torch.Tensor,
    *,
    activation: str = "none",
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """What ``linear_epilogue`` does to a product, of one that is in memory: y [..., N] half, bfloat16 or float32,
    contiguous; bias [N], residual and gate of y's dtype. Returns a new tensor. Raises ArgumentError."""
    join = _joined("epilogue", residual, gate)
    return torch.ops.metal_marlin.epilogue(y, activation, bias, residual if gate is None else gate, join, float(scale))


def _new(
    y: torch.Tensor, activation: str, bias: torch.Tensor | None, other: torch.Tensor | None, join: str, scale: float
) -> torch.Tensor:
    if activation not in ACTS or y.dtype not in KEYS or y.ndim < 1:
        raise ArgumentError(
            f"epilogue: activation = {activation!r}, y is {y.dtype} {tuple(y.shape)}; "
            f"activations are {', '.join(ACTS)}, y is [..., N] and one of {', '.join(map(str, KEYS))}"
        )
    _check("epilogue", y, bias, **{join or "other": other})
    out = torch.empty_like(y)
    if y.numel() == 0:
        return out
    width, cpu = y.shape[-1], plan_kind(y.device.type) == "cpu"
    run = 4096 if cpu else 1024
    dispatch_kernel(
        library(FAMILY, str(y.device)),
        row_name("epilogue", "epilogue_standalone", ("epilogue_standalone",), y.dtype, y.dtype, "fp4", "none"),
        threadgroups=(-(-width // run), y.numel() // width),
        threads_per_threadgroup=1 if cpu else 256,
        args=(
            *(y, out, struct.pack("=2q", width, run), y if bias is None else bias, y if other is None else other),
            _choice(activation, bias is not None, join),
            scale,
        ),
    )
    return out


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define(
    "linear_epilogue(Tensor x, Tensor codes, Tensor scales, int group_size, str activation, Tensor? bias, "
    "Tensor? other, str join, float scale, str? kernel) -> Tensor"
)
_torch.define("epilogue(Tensor y, str activation, Tensor? bias, Tensor? other, str join, float scale) -> Tensor")
for _device in ("CPU", "CUDA", "MPS"):
    _torch.impl("linear_epilogue", _new_linear, _device)
    _torch.impl("epilogue", _new, _device)
torch.library.register_fake(
    "metal_marlin::linear_epilogue",
    lambda x, codes, *_: x.new_empty((*x.shape[:-1], codes.shape[0])),
    lib=_torch,
)
torch.library.register_fake("metal_marlin::epilogue", lambda y, *_: torch.empty_like(y), lib=_torch)

_HALVES = (torch.float16, torch.bfloat16)
CASES: tuple[Case, ...] = (
    *(
        Case(9, 37, 96, 32, d, act, bias, join, kernel)
        for act, bias, join in itertools.product(ACTS, (False, True), _JOINS)
        for d, kernel in ((torch.float16, None), (torch.bfloat16, _GENERAL))
    ),
    *(Case(M, 67, 160, 16, d, "silu", True, "gate") for M in (1, 2, 7, 17, 33, 64, 65) for d in _HALVES),
    *(
        Case(5, N, K, g, torch.float16, "gelu", True, "residual")
        for N, K, g in ((1, 8, 8), (130, 264, 128), (3, 520, 520))
    ),
    Case(512, 14336, 4096, 128, torch.float16, "silu", False, "gate", model=True),
    Case(512, 4096, 4096, 128, torch.float16, "none", True, "residual", model=True),
)
STANDALONE: tuple[Case, ...] = tuple(
    Case(3, N, 8, 8, d, act, bias, join)
    for act, bias, join in itertools.product(ACTS, (False, True), _JOINS)
    for N, d in ((70, torch.float16), (33, torch.bfloat16), (5000, torch.float32))
)


def _row_case(name: str) -> tuple[Case, str]:
    """The case of a row with a fixed epilogue, or one of any."""
    found = ((c, c.kernel or _FIXED) for c in _every() if plan(c.dtype, c.activation, c.bias, c.join, c.kernel) == name)
    return next(found)


def _every() -> list[Case]:
    kinds = itertools.product(_HALVES, (None, _GENERAL), ACTS, (False, True), _JOINS)
    return [Case(9, 37, 96, 32, d, act, bias, join, kernel) for d, kernel, act, bias, join in kinds]


def _linear_check(case: Case, device: str, kernel: str | None) -> Check:
    x, codes, scales, bias, other = case.tensors()
    exact = linear_epilogue_ref(x, codes, scales, case.group, **case.options(bias, other))
    sums = product.product_ref(x.abs(), codes, scales.abs(), case.group).abs()
    moved = [t.to(device) for t in (x, codes, scales, bias, other)]
    options = {**case.options(*moved[3:]), "kernel": kernel or case.kernel}
    y = linear_epilogue(moved[0], moved[1], moved[2], case.group, **options).cpu()  # type: ignore[arg-type]
    return worst((y.double() - exact).abs(), _allowed(case, exact, sums.max(), other))


def _check_alone(case: Case, device: str, _: str | None) -> Check:
    y, bias, other = case.product()
    exact = epilogue_ref(y, **case.options(bias, other))  # type: ignore[arg-type]
    moved = [t.to(device) for t in (y, bias, other)]
    got = epilogue(moved[0], **case.options(*moved[1:])).cpu()  # type: ignore[arg-type]
    return worst((got.double() - exact).abs(), _allowed(case, exact, torch.tensor(0.0), other))


def _allowed(case: Case, exact: torch.Tensor, sums: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Roundings of y, of weights in the sums, of float32 activations: each as large as the other operand makes it."""
    eps = torch.finfo(case.dtype).eps
    before = 2 * eps * sums + 1e-5
    return 2 * eps * exact.abs() + before * (other.double().abs() if case.join == "gate" else 1)


OP = (
    OpSpec(
        "linear_epilogue",
        FAMILY,
        linear_epilogue_ref,
        CASES,
        "bench/epilogue.py",
        ("marlin_gemm_*",),
        _linear_check,
        _row_case,
    ),
    OpSpec(
        "epilogue",
        FAMILY,
        epilogue_ref,
        STANDALONE,
        "bench/epilogue.py",
        ("epilogue_standalone*",),
        _check_alone,
        lambda name: (Case(3, 70, 8, 8, read_row(name)[1], "silu", True, "gate"), "epilogue_standalone"),
    ),
)
