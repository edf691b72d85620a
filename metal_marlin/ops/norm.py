"""Norms of the last dimension: rms_norm, rms_norm_residual, layer_norm."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.ops.gradient import differentiable
from metal_marlin.ops.spec import Check, OpSpec, worst
from metal_marlin.ops.weights import library, plan_kind
from metal_marlin.runtime.dispatch import dispatch_kernel

FAMILY = "norm.metal"
KEYS = {torch.float16: "", torch.bfloat16: "__tbf16", torch.float32: "__tf32"}


@dataclass(frozen=True)
class Case:
    """x [rows, width]. ``mean``: added to every element."""

    rows: int
    width: int
    dtype: torch.dtype = torch.float16
    mean: float = 0.0
    model: bool = False  # a model's shape, for the bench

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}-{str(self.dtype).removeprefix('torch.')}" + f"-mean{self.mean:g}" * bool(
            self.mean
        )

    def tensors(
        self, device: str = "cpu", seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, residual [rows, width], weight, bias [width]."""
        rng = torch.Generator().manual_seed(seed)
        x, residual = (torch.randn(self.rows, self.width, generator=rng) + self.mean for _ in range(2))
        weight, bias = (torch.randn(self.width, generator=rng) for _ in range(2))
        return tuple(t.to(self.dtype).to(device) for t in (x, residual, weight, bias))  # type: ignore[return-value]


CASES: tuple[Case, ...] = (
    *(Case(rows, 576, d) for rows in (0, 1, 3, 257) for d in KEYS),
    *(Case(2, width, d) for width in (1, 2, 31, 32, 33, 1000, 4096, 8192, 16400) for d in KEYS),
    *(Case(3, 600, d, 100.0) for d in KEYS),
    Case(2, 4096, torch.float32, 1e4),
    Case(1, 576, torch.float32, model=True),
    Case(1, 4096, model=True),
    Case(512, 4096, model=True),
    Case(512, 4096, torch.bfloat16, model=True),
)


@functools.lru_cache(maxsize=1024)
def plan(width: int, dtype: torch.dtype, device: str) -> tuple[str, int]:
    """Suffix of the row's name and threads of a threadgroup, for x [..., width] on "cpu", "cuda" or "mps"."""
    if dtype not in KEYS:
        raise ArgumentError(f"x is {dtype}; norms take {', '.join(map(str, KEYS))}")
    # on GPUs about eight elements a thread
    return KEYS[dtype], 1 if device == "cpu" else min(1024, max(32, -(-width // 256) * 32))


@functools.lru_cache(maxsize=256)
def _numbers(width: int, bias: bool, eps: float, offset: float) -> tuple[bytes, bytes]:
    return struct.pack("=2q", width, bias), struct.pack("=2f", eps, offset)


def _launch(
    kernel: str, x: torch.Tensor, args: tuple[torch.Tensor, ...], eps: float, offset: float, bias: bool = False
) -> None:
    width = x.shape[-1]
    suffix, threads = plan(width, x.dtype, plan_kind(x.device.type))
    rows = x.numel() // width if width else 0
    if rows:
        dispatch_kernel(
            library(FAMILY, str(x.device)),
            kernel + suffix,
            threadgroups=rows,
            threads_per_threadgroup=threads,
            args=(*args, *_numbers(width, bias, eps, offset)),
        )


def _check(op: str, x: torch.Tensor, like: dict[str, torch.Tensor | None], rows: dict[str, torch.Tensor]) -> None:
    """``like``: tensors [width]; ``rows``: tensors of x's shape. Raises ArgumentError."""
    if x.ndim < 1:
        raise ArgumentError(f"{op}: x has shape (); needs [..., width]")
    for name, t in (*like.items(), *rows.items()):
        wanted = x.shape if name in rows else x.shape[-1:]
        if t is not None and (t.shape != wanted or t.dtype != x.dtype):
            raise ArgumentError(
                f"{op}: {name} is {t.dtype} {tuple(t.shape)}; x {x.dtype} {tuple(x.shape)} needs {x.dtype} "
                f"{tuple(wanted)}"
            )


def _direct(x: torch.Tensor, *more: torch.Tensor) -> bool:
    """Whether a call needs nothing of torch's dispatcher, which costs as much as a small kernel."""
    if type(x) is not torch.Tensor or torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled() or not (x.requires_grad or any(t.requires_grad for t in more))


def rms_norm_ref(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: float = 0.0) -> torch.Tensor:
    """The meaning, in float64."""
    return _rms(x.double(), weight.double(), eps, offset)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + offset)


def rms_norm_residual_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning; the sum is rounded to x's dtype first."""
    h = (x.double() + residual.double()).to(x.dtype)
    return rms_norm_ref(h, weight, eps, offset), h


def layer_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """The meaning, in float64."""
    return _layer(x.double(), weight.double(), None if bias is None else bias.double(), eps)


def _layer(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    d = x - x.mean(-1, keepdim=True)
    y = d / (d.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return y if bias is None else y + bias


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """y [..., width] = x / sqrt(mean(x²) + eps) · (weight + offset); sums in float32 (arXiv 1910.07467).

    x, weight [width]: half, bfloat16 or float32, contiguous. offset 0: the normalised x is rounded to x's dtype before
    the weight multiplies it, as Llama's is; 1: Gemma's norm. out: where to write.
    Differentiable (not with ``out``). Raises ArgumentError.
    """
    if _direct(x, weight):
        return _rms_norm(x, weight, eps, offset, out)
    if out is not None:
        torch.ops.metal_marlin.rms_norm_out(x, weight, eps, offset, out)
        return out
    return torch.ops.metal_marlin.rms_norm(x, weight, eps, offset)


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    if x.ndim < 1 or weight.shape != x.shape[-1:] or weight.dtype != x.dtype or out is not None:
        _check("rms_norm", x, {"weight": weight}, {} if out is None else {"out": out})
    out = torch.empty_like(x) if out is None else out
    _launch("rms_norm", x, (x, weight, out), eps, offset)
    return out


def rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(h), h) with h = x + residual rounded to x's dtype; arguments as ``rms_norm``, residual like x."""
    if _direct(x, residual, weight):
        return _rms_norm_residual(x, residual, weight, eps, offset)
    return torch.ops.metal_marlin.rms_norm_residual(x, residual, weight, eps, offset)


def _rms_norm_residual(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    _check("rms_norm_residual", x, {"weight": weight}, {"residual": residual})
    y, h = torch.empty_like(x), torch.empty_like(x)
    _launch("rms_norm_residual", x, (x, residual, weight, y, h), eps, offset)
    return y, h


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [..., width] = (x − mean) / sqrt(variance + eps) · weight + bias; sums in float32 (arXiv 1607.06450).

    x, weight, bias [width]: half, bfloat16 or float32, contiguous. out: where to write. Raises ArgumentError.
    """
    if out is not None:
        torch.ops.metal_marlin.layer_norm_out(x, weight, bias, eps, out)
        return out
    return torch.ops.metal_marlin.layer_norm(x, weight, bias, eps)


def _layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    _check("layer_norm", x, {"weight": weight, "bias": bias}, {} if out is None else {"out": out})
    out = torch.empty_like(x) if out is None else out
    _launch("layer_norm", x, (x, weight, weight if bias is None else bias, out), eps, 0.0, bias is not None)
    return out


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
_torch.define("rms_norm(Tensor x, Tensor weight, float eps, float offset) -> Tensor")
_torch.define("rms_norm_out(Tensor x, Tensor weight, float eps, float offset, Tensor(a!) out) -> ()")
_torch.define(
    "rms_norm_residual(Tensor x, Tensor residual, Tensor weight, float eps, float offset) -> (Tensor, Tensor)"
)
_torch.define("layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor")
_torch.define("layer_norm_out(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor(a!) out) -> ()")


def _rms_norm_out(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, out: torch.Tensor) -> None:
    _rms_norm(x, weight, eps, offset, out)


def _layer_norm_out(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, out: torch.Tensor
) -> None:
    _layer_norm(x, weight, bias, eps, out)


for _key in ("CPU", "CUDA", "MPS"):
    _torch.impl("rms_norm", _rms_norm, _key)
    _torch.impl("rms_norm_out", _rms_norm_out, _key)
    _torch.impl("rms_norm_residual", _rms_norm_residual, _key)
    _torch.impl("layer_norm", _layer_norm, _key)
    _torch.impl("layer_norm_out", _layer_norm_out, _key)
_fakes: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, *_: torch.empty_like(x),
    "rms_norm_out": lambda *_: None,
    "rms_norm_residual": lambda x, *_: (torch.empty_like(x), torch.empty_like(x)),
    "layer_norm": lambda x, *_: torch.empty_like(x),
    "layer_norm_out": lambda *_: None,
}
for _name, _fake in _fakes.items():
    torch.library.register_fake(f"metal_marlin::{_name}", _fake, lib=_torch)
differentiable("rms_norm", _rms, 2)
differentiable("layer_norm", _layer, 3)
differentiable("rms_norm_residual", lambda x, r, w, eps, offset: (_rms(x + r, w, eps, offset), x + r), 3)


def _compare(op: Callable[..., Any], reference: Callable[..., Any], case: Case, device: str) -> Check:
    """Per row: the rounding of the result, and of a mean that the row is large against."""
    x, residual, weight, bias = case.tensors()
    args = {rms_norm: (x, weight), rms_norm_residual: (x, residual, weight), layer_norm: (x, weight, bias)}[op]
    y, exact = op(*(t.to(device) for t in args), eps=1e-5), reference(*args, eps=1e-5)
    y, exact = (t[0] if isinstance(t, tuple) else t for t in (y, exact))
    size = exact.norm(dim=-1)
    if op is layer_norm:
        size = size + 2.0**-23 / torch.finfo(x.dtype).eps * x.double().norm(dim=-1)
    return worst((y.cpu().double() - exact).norm(dim=-1), 4 * torch.finfo(x.dtype).eps * size)


def _checks(op: Callable[..., Any], reference: Callable[..., Any]) -> Callable[[Any, str, str | None], Check]:
    return lambda case, device, _: _compare(op, reference, case, device)


OP = tuple(
    OpSpec(name, FAMILY, reference, CASES, "bench/norm.py", (name, f"{name}__*"), _checks(op, reference))
    for name, op, reference in (
        ("rms_norm", rms_norm, rms_norm_ref),
        ("rms_norm_residual", rms_norm_residual, rms_norm_residual_ref),
        ("layer_norm", layer_norm, layer_norm_ref),
    )
)
