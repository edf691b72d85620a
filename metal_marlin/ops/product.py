"""What ops that multiply by quantised weights share: their meaning, their checks, and what torch is told of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec

# (x, codes, … , kernel, out): x, tensors of the weights, what they are; the second without out
Run = Callable[..., None]
New = Callable[..., torch.Tensor]

_ARGUMENTS = "Tensor x, Tensor codes, Tensor scales, Tensor? extra, str format, str zeros, int group_size, str? kernel"


def product_ref(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    *,
    format: str = "fp4",
    zeros: str = "none",
    extra: torch.Tensor | None = None,
) -> torch.Tensor:
    """The meaning, in float64: x [..., K] times the decoded weights [N, K], transposed."""
    return x.double() @ codec(format).decode(codes, scales, extra, group_size, zeros).T


@functools.lru_cache(maxsize=4096)
def layout(
    format: str, zeros: str, N: int, K: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[tuple[int, int], tuple[tuple[int, ...], torch.dtype] | None]:
    """Shape of the scales; shape and dtype of extra, None where there is none."""
    form = codec(format)
    form.check(K, group_size)
    form.check_zeros(zeros)
    groups = form.groups_of(K, group_size)
    more = form.extra_shape(N, groups, zeros)
    return (N, groups), None if more is None else (more, form.extra_dtype(scale_dtype, zeros))


def check(
    op: str,
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    extra: torch.Tensor | None,
    format: str,
    zeros: str,
    group_size: int,
    out: torch.Tensor | None = None,
) -> tuple[int, int, int]:
    """M, N, K. Raises ArgumentError, in the name of ``op``, for shapes that do not belong together."""
    form = codec(format)
    if x.ndim < 1 or codes.ndim != 2 or scales.ndim != 2:
        raise ArgumentError(
            f"{op}: shapes x {tuple(x.shape)}, codes {tuple(codes.shape)}, scales {tuple(scales.shape)}; "
            f"needs x [..., K], codes [N, K·{form.bits}/32], scales [N, groups]"
        )
    # whole numbers: a weight's shape is no variable, though torch.compile may ask
    K, N = int(x.shape[-1]), int(codes.shape[0])
    held = form.columns(int(codes.shape[1]))
    if held != K:
        raise ArgumentError(f"{op}: x has K = {K}, codes have K = {held}")
    wanted, more = layout(format, zeros, N, K, group_size, scales.dtype)
    if scales.shape != wanted:
        raise ArgumentError(
            f"{op}: scales have shape {tuple(scales.shape)}; N = {N}, K = {K}, group_size = {group_size} need {wanted}"
        )
    given = None if extra is None else (tuple(extra.shape), extra.dtype)
    if given != more:
        said = ["None" if e is None else f"{e[1]} {e[0]}" for e in (given, more)]
        raise ArgumentError(f"{op}: extra is {said[0]}; {format} with zeros = {zeros!r} needs {said[1]}")
    check_out(op, x, N, out)
    return x.numel() // K, N, K


def check_out(op: str, x: torch.Tensor, N: int, out: torch.Tensor | None) -> None:
    """Raises ArgumentError where ``out`` is given and cannot be y [..., N]."""
    if out is not None and (out.shape != (*x.shape[:-1], N) or out.dtype != x.dtype):
        raise ArgumentError(f"{op}: out is {out.dtype} {tuple(out.shape)}; needs {x.dtype} {(*x.shape[:-1], N)}")


def call(op: str, run: Run, out: torch.Tensor | None, x: torch.Tensor, codes: torch.Tensor, *more: Any) -> torch.Tensor:
    """y of an op that ``register`` made, in ``out`` or a new tensor: for a plain tensor without a gradient by ``run``
    itself, since torch's dispatcher costs as much as a small kernel. Raises ArgumentError for ``out`` with a
    gradient."""
    differentiated = x.requires_grad and torch.is_grad_enabled()
    if out is not None and differentiated:
        raise ArgumentError(f"{op}: out is given, and x requires a gradient, which flows through new tensors")
    if type(x) is torch.Tensor and not differentiated and not torch.compiler.is_compiling():
        rows = codes.shape[0] if codes.ndim else 0  # of wrong shapes the op itself says so
        out = x.new_empty((*x.shape[:-1], rows)) if out is None else out
        run(x, codes, *more, out)
        return out
    if out is None:
        return getattr(torch.ops.metal_marlin, op)(x, codes, *more)
    getattr(torch.ops.metal_marlin, f"{op}_out")(x, codes, *more, out)
    return out


def register(op: str, run: Run, arguments: str = _ARGUMENTS, sizes: Callable[..., Any] | None = None) -> New:
    """Tell torch of ``metal_marlin::<op>`` and ``<op>_out``, which ``run`` computes into its last argument; returns the
    first as a function. ``sizes`` checks all arguments but the kernel, as ``check`` does."""
    checked = sizes or functools.partial(check, op)

    def new(x: torch.Tensor, codes: torch.Tensor, *more: Any) -> torch.Tensor:
        out = x.new_empty((*x.shape[:-1], codes.shape[0]))
        run(x, codes, *more, out)
        return out

    def fake(x: torch.Tensor, codes: torch.Tensor, *more: Any) -> torch.Tensor:
        checked(x, codes, *more[:-1])
        return x.new_empty((*x.shape[:-1], codes.shape[0]))

    _torch.define(f"{op}({arguments}) -> Tensor")
    _torch.define(f"{op}_out({arguments}, Tensor(a!) out) -> ()")
    for key in ("CPU", "CUDA", "MPS"):
        _torch.impl(op, new, key)
        _torch.impl(f"{op}_out", run, key)
    torch.library.register_fake(f"metal_marlin::{op}", fake, lib=_torch)
    torch.library.register_fake(f"metal_marlin::{op}_out", lambda *_: None, lib=_torch)
    return new


_torch = torch.library.Library("metal_marlin", "FRAGMENT")
