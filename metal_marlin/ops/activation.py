"""Activation functions, alone or gating the second half of the last dimension."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from metal_marlin.errors import ArgumentError
from metal_marlin.ops.gradient import differentiable
from metal_marlin.ops.norm import KEYS
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import library, plan_kind
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "activation.metal"
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


@dataclass(frozen=True)
class Case:
    """x [rows, width], or twice as wide where it gates itself."""

    rows: int
    width: int
    activation: str = "silu"
    dtype: torch.dtype = torch.float16
    model: bool = False  # a model's shape, for the bench

    def __str__(self) -> str:
        return f"{self.activation}-{self.rows}x{self.width}-{str(self.dtype).removeprefix('torch.')}"

    def tensor(self, halves: int, device: str = "cpu", seed: int = 0) -> torch.Tensor:
        rng = torch.Generator().manual_seed(seed)
        return (3 * torch.randn(self.rows, halves * self.width, generator=rng)).to(self.dtype).to(device)


CASES: tuple[Case, ...] = (
    *(Case(3, 70, name, d) for name in ACTIVATIONS for d in KEYS),
    *(Case(rows, width, "silu", d) for rows, width in ((0, 8), (1, 1), (1, 1536), (5, 33), (2, 5000)) for d in KEYS),
    Case(1, 1536, "silu", torch.float32, model=True),
    Case(1, 14336, model=True),
    Case(512, 14336, model=True),
)


@functools.lru_cache(maxsize=1024)
def plan(width: int, dtype: torch.dtype, device: str, activation: str) -> tuple[str, int, int]:
    """End of the row's name, outputs of a threadgroup, its threads."""
    if dtype not in KEYS:
        raise ArgumentError(f"x is {dtype}; activations take {', '.join(map(str, KEYS))}")
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"activation = {activation!r}; there are {', '.join(ACTIVATIONS)}")
    name = f"{activation}{KEYS[dtype]}"
    return (name, 4096, 1) if device == "cpu" else (name, 1024, 256)


@functools.lru_cache(maxsize=1024)
def _shape(width: int, run: int) -> bytes:
    return struct.pack("=2q", width, run)


def _run(kernel: str, x: torch.Tensor, activation: str, out: torch.Tensor) -> None:
    width = out.shape[-1]
    name, run, threads = plan(width, x.dtype, plan_kind(x.device.type), activation)
    if out.numel() == 0:
        return
    dispatch_kernel(
        library(FAMILY, str(x.device)),
        f"{kernel}_{name}",
        threadgroups=(-(-width // run), out.numel() // width),
        threads_per_threadgroup=threads,
        args=(x, out, _shape(width, run)),
    )


def activation_ref(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """The meaning, in float64."""
    return ACTIVATIONS[activation](x.double())  # type: ignore[operator]


def gated_activation_ref(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """The meaning, in float64."""
    return _gated(x.double(), activation)


def _gated(x: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[activation](gate) * up  # type: ignore[operator]


def _halves(x: torch.Tensor) -> int:
    if x.ndim < 1 or x.shape[-1] % 2:
        raise ArgumentError(f"gated_activation: x has shape {tuple(x.shape)}; needs [..., 2 F]")
    return x.shape[-1] // 2


def activation(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """act(x), computed in float32 and rounded once; x [...] half, bfloat16 or float32, contiguous.

    activation: silu, gelu (with erf), gelu_tanh, quick_gelu or relu. Raises ArgumentError.
    """
    return torch.ops.metal_marlin.activation(x, activation)


def _activation(x: torch.Tensor, activation: str) -> torch.Tensor:
    if x.ndim < 1:
        raise ArgumentError("activation: x has shape (); needs [..., width]")
    out = torch.empty_like(x)
    _run("activation", x, activation, out)
    return out


def gated_activation(x: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """y [..., F] = act(x[..., :F]) · x[..., F:], computed in float32 and rounded once; x [..., 2 F].

    dtypes and activations as ``activation``'s. Raises ArgumentError.
    """
    if (
        type(x) is torch.Tensor
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
    ):
        return _gated_activation(x, activation)
    return torch.ops.metal_marlin.gated_activation(x, activation)


def _gated_activation(x: torch.Tensor, activation: str) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], _halves(x)))
    _run("gated_activation", x, activation, out)
    return out


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define("activation(Tensor x, str activation) -> Tensor")
_torch.define("gated_activation(Tensor x, str activation) -> Tensor")
for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("activation", _activation, _key)
    _torch.impl("gated_activation", _gated_activation, _key)
torch.library.register_fake("metal_marlin::activation", lambda x, _: torch.empty_like(x), lib=_torch)
torch.library.register_fake(
    "metal_marlin::gated_activation", lambda x, _: x.new_empty((*x.shape[:-1], _halves(x))), lib=_torch
)
differentiable("activation", lambda x, activation: ACTIVATIONS[activation](x), 1)  # type: ignore[operator]
differentiable("gated_activation", _gated, 1)


def _compare(op: str, case: Case, device: str) -> Check:
    call, reference = (activation, activation_ref) if op == "activation" else (gated_activation, gated_activation_ref)
    x = case.tensor(1 if op == "activation" else 2)
    exact = reference(x, case.activation)
    error = (call(x.to(device), case.activation).cpu().double() - exact).abs()
    return worst(error, 2 * torch.finfo(case.dtype).eps * exact.abs() + 1e-5)


OP = (
    OpSpec(
        "activation",
        FAMILY,
        activation_ref,
        CASES,
        "bench/norm.py",
        ("activation_*",),
        lambda c, d, _: _compare("activation", c, d),
    ),
    OpSpec(
        "gated_activation",
        FAMILY,
        gated_activation_ref,
        CASES,
        "bench/norm.py",
        ("gated_activation_*",),
        lambda c, d, _: _compare("gated_activation", c, d),
    ),
)
