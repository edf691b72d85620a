"""SparseLinear: nn.Linear over n:m sparse quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, MMA16
from metal_marlin.nn.buffers import keep_dtypes, other_dtype
from metal_marlin.ops.linear_sparse import linear_sparse
from metal_marlin.ops.packed_sparse import linear_packed_sparse
from metal_marlin.quant.sparse import SparseTensor

# field of the weight -> buffer
_BUFFERS = {
    "codes": "weight",
    "places": "weight_places",
    "scales": "weight_scale",
    "extra": "weight_extra",
    "powers": "weight_powers",
}


class SparseLinear(nn.Module):
    """y [..., N] = x [..., K] · Wᵀ + bias; x half, bfloat16 or float32 in the dtype of the scales where those are
    numbers, y in x's dtype.

    Buffers: weight (kept codes, int32), weight_places, weight_scale, weight_extra (None where the format has none),
    bias (None or [N]). Moves between devices; dtypes but the bias's never change. ``prepack`` puts the weight in
    operand order; state dicts hold the canonical order all the same.
    """

    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, weight: SparseTensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ArgumentError(f"bias: shape {tuple(bias.shape)}; {self.out_features} rows need {weight.shape[:1]}")
        self.format, self.group_size, self.zeros = weight.format, weight.group_size, weight.zeros
        self.pattern, self._padding = weight.pattern, weight.padded - self.in_features
        self.layout = CANONICAL
        for name in _BUFFERS.values():
            self.register_buffer(name, None, persistent=name != "weight_powers")
        self._hold(weight)
        self.register_buffer("bias", None if bias is None else bias.detach())

    def _hold(self, weight: SparseTensor) -> None:
        self.layout = weight.layout
        for field, name in _BUFFERS.items():
            self._buffers[name] = getattr(weight, field)

    def sparse(self) -> SparseTensor:
        """The weight, in the layer's layout; its tensors are the buffers themselves."""
        fields: dict[str, Any] = {field: self._buffers[name] for field, name in _BUFFERS.items()}
        return SparseTensor(
            **fields,
            format=self.format,
            group_size=self.group_size,
            zeros=self.zeros,
            pattern=self.pattern,
            shape=(self.out_features, self.in_features),
            layout=self.layout,
        )

    def prepack(self, layout: str = MMA16) -> SparseLinear:
        """Put the weight into a layout, in place: ``linear_packed_sparse`` multiplies then. A layer that is moved goes
        back to the canonical order. Raises ArgumentError for weights that cannot have it."""
        self._hold(self.sparse().prepack(layout))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < 1:
            raise ArgumentError(f"SparseLinear: x has shape (); needs [..., {self.in_features}]")
        if x.shape[-1] != self.in_features:
            raise ArgumentError(f"SparseLinear: x has K = {x.shape[-1]}, the weight has K = {self.in_features}")
        x = nn.functional.pad(x, (0, self._padding)) if self._padding else x.contiguous()
        w: dict[str, Any] = self._buffers
        tensors = (w["weight"], w["weight_places"], w["weight_scale"])
        if self.layout != CANONICAL:
            y = linear_packed_sparse(x, *tensors, w["weight_powers"], self.group_size, format=self.format)
        else:
            y = linear_sparse(
                x,
                *tensors,
                self.group_size,
                pattern=self.pattern,
                format=self.format,
                zeros=self.zeros,
                extra=w["weight_extra"],
            )
        return y if w["bias"] is None else y.add_(w["bias"])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self._buffers['bias'] is not None}, pattern={self.pattern!r}, format={self.format!r}, "
            f"group_size={self.group_size}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseLinear:
        self.prepack(CANONICAL)
        keep_dtypes(self, _BUFFERS.values(), lambda: super(SparseLinear, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        whole = self.sparse().unpack()
        for field, name in _BUFFERS.items():
            if prefix + name in destination:
                destination[prefix + name] = getattr(whole, field)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.prepack(CANONICAL)
        wrong = other_dtype(self, _BUFFERS.values(), state_dict, prefix)
        if wrong is not None:
            args[-1].append(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
