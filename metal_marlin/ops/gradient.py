"""Gradients of ops whose backward pass has no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def differentiable(op: str, formula: Callable[..., Any], tensors: int) -> None:
    """``metal_marlin::<op>`` gets the gradients of ``formula``, worked out again in float32 and rounded once.

    The op's first ``tensors`` arguments are what is differentiated (None allowed); formula takes all of the op's.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:tensors])
        ctx.more = inputs[tensors:]

    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            given = [None if t is None else t.detach().float().requires_grad_() for t in ctx.saved_tensors]
            made = formula(*given, *ctx.more)
            made = made if isinstance(made, tuple) else (made,)
            pairs = [(y, grad.float()) for y, grad in zip(made, grads, strict=True) if grad is not None]
            wanted = [t for t in given if t is not None]
            found = iter(
                torch.autograd.grad([y for y, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
            )
        of_tensors = [None if t is None else next(found) for t in given]
        rounded = [
            None if grad is None else grad.to(t.dtype) for grad, t in zip(of_tensors, ctx.saved_tensors, strict=True)
        ]
        return (*rounded, *(None,) * len(ctx.more))

    torch.library.register_autograd(f"metal_marlin::{op}", backward, setup_context=keep)
