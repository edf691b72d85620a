"""QuantLinear: nn.Linear over quantised weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, MMA16, operands
from metal_marlin.nn.buffers import keep_dtypes, other_dtype
from metal_marlin.ops.linear import linear
from metal_marlin.ops.packed import linear_packed
from metal_marlin.quant.layouts import prepack, unpack
from metal_marlin.quant.rtn import quantize
from metal_marlin.quant.tensor import NAMES, QuantizedTensor

if TYPE_CHECKING:
    from metal_marlin.nn.group import LinearGroup

_BUFFERS = {**NAMES, "powers": "weight_powers"}  # field of the weight -> buffer


class QuantLinear(nn.Module):
    """y [..., N] = x [..., K] · Wᵀ + bias; x half, bfloat16 or float32, y in x's dtype.

    Buffers: weight (codes, int32), weight_scale, weight_extra (None where the format has none), bias (None or [N]).
    Moves between devices; ``.half()`` and ``.to(dtype)`` change the bias alone. ``prepack`` puts the weight in the
    order that a device reads fastest; state dicts hold the canonical order all the same.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_extra: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(self, weight: QuantizedTensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        weight.canonical("QuantLinear")
        self.out_features, self.in_features = weight.shape
        if bias is not None and bias.shape != (self.out_features,):
            raise ArgumentError(f"bias: shape {tuple(bias.shape)}; {self.out_features} rows need {weight.shape[:1]}")
        self.format, self.group_size, self.zeros = weight.format, weight.group_size, weight.zeros
        self.layout = CANONICAL
        self._padding = weight.padded - self.in_features
        self.group: LinearGroup | None = None  # layers of the same input that are computed together
        self.slot = 0  # the layer's place in it
        self.register_buffer("weight", weight.codes)
        self.register_buffer("weight_scale", weight.scales)
        self.register_buffer("weight_extra", weight.extra)
        self.register_buffer("weight_powers", None, persistent=False)  # of a layout
        self.register_buffer("bias", None if bias is None else bias.detach())

    @classmethod
    def from_linear(
        cls,
        layer: nn.Linear,
        format: str = "fp4",
        group_size: int | None = None,
        scale: str = "rtn",
        zeros: str | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> QuantLinear:
        """Quantise a layer's weight; arguments of ``quantize``."""
        made = cls(quantize(layer.weight, format, group_size, scale, zeros, scale_dtype), layer.bias)
        return made.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < 1:
            raise ArgumentError(f"QuantLinear: x has shape (); needs [..., {self.in_features}]")
        if x.shape[-1] != self.in_features:
            raise ArgumentError(f"QuantLinear: x has K = {x.shape[-1]}, the weight has K = {self.in_features}")
        if self.group is not None and not torch.compiler.is_compiling():
            return self.group.take(self, x)
        return self.alone(x)

    def alone(self, x: torch.Tensor) -> torch.Tensor:
        """``forward``, whatever group the layer belongs to."""
        buffers = self._buffers  # an attribute of a module is a search through three dictionaries
        if self._padding:
            x = nn.functional.pad(x, (0, self._padding))
        elif not x.is_contiguous():
            x = x.contiguous()
        if self.layout != CANONICAL:
            y = linear_packed(
                x,
                buffers["weight"],  # type: ignore[arg-type]
                buffers["weight_scale"],  # type: ignore[arg-type]
                buffers["weight_powers"],  # type: ignore[arg-type]
                self.group_size,
                format=self.format,
                zeros=operands.kernel_zeros(self.zeros),
                extra=buffers["weight_extra"],
            )
            bias = buffers["bias"]
            return y if bias is None else y.add_(bias)
        y = linear(
            x,
            buffers["weight"],  # type: ignore[arg-type]
            buffers["weight_scale"],  # type: ignore[arg-type]
            self.group_size,
            format=self.format,
            zeros=self.zeros,
            extra=buffers["weight_extra"],
        )
        bias = buffers["bias"]
        return y if bias is None else y.add_(bias)

    def quantized(self) -> QuantizedTensor:
        """The weight, in the layer's layout; its tensors are the buffers themselves."""
        fields: dict[str, Any] = {field: self._buffers[name] for field, name in _BUFFERS.items()}
        return QuantizedTensor(
            **fields,
            format=self.format,
            group_size=self.group_size,
            zeros=self.zeros,
            shape=(self.out_features, self.in_features),
            layout=self.layout,
        )

    def hold(self, weight: QuantizedTensor) -> None:
        """Take the tensors of a weight that is the layer's own in whatever layout."""
        self.layout = weight.layout
        for field, name in _BUFFERS.items():
            self._buffers[name] = getattr(weight, field)

    def prepack(self, layout: str = MMA16) -> QuantLinear:
        """Put the weight into a layout, in place: ``linear_packed`` multiplies then. x must be half or bfloat16, in the
        dtype of the scales where those are numbers. A layer that leaves its device goes back to the canonical order.
        Raises ArgumentError for weights that cannot have it (N % 16 = 0, K % 64 = 0)."""
        if self.group is not None:
            self.group.prepack(layout)
        else:
            self.hold(prepack(self.quantized(), layout))
        return self

    def extra_repr(self) -> str:
        zeros = "" if self.zeros == "none" else f", zeros={self.zeros!r}"
        bias = self._buffers["bias"] is not None
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, "
            f"format={self.format!r}, group_size={self.group_size}{zeros}"
        )

    def _alone(self) -> None:
        """Leave the group, whose memory the buffers no longer will be, and any layout."""
        self.group = None
        if self.layout != CANONICAL:
            self.hold(unpack(self.quantized()))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != CANONICAL:
            destination.update(unpack(self.quantized()).tensors(prefix))

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: the weight without the group, which ``fuse`` makes anew."""
        state = self.__dict__.copy()
        if self.group is not None:
            state["group"] = None
            state["_buffers"] = {name: None if t is None else t.clone() for name, t in self._buffers.items()}
        return state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantLinear:
        self._alone()
        keep_dtypes(self, NAMES.values(), lambda: super(QuantLinear, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._alone()
        wrong = other_dtype(self, NAMES.values(), state_dict, prefix)
        if wrong is not None:
            args[-1].append(wrong)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
