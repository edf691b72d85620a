"""RMSNorm over our kernel."""

from __future__ import annotations

import torch
from torch import nn

from metal_marlin.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """y [..., width] = x / sqrt(mean(x²) + eps) · (weight + offset), for inference; x and weight of one dtype.

    offset 0: as the Llama family's RMSNorm, 1: as Gemma's.
    """

    def __init__(self, weight: torch.Tensor, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight, requires_grad=False)
        self.variance_epsilon, self.offset = eps, offset

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states if hidden_states.is_contiguous() else hidden_states.contiguous()
        return rms_norm(x, self._parameters["weight"], self.variance_epsilon, offset=self.offset)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}" + f", offset={self.offset}" * bool(
            self.offset
        )
