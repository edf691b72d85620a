"""LinearGroup: quantised layers that read the same input, computed by one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.quant.tensor import NAMES, cat


class LinearGroup:
    """Several QuantLinear layers, such as q, k and v projections, over one weight: theirs along N.

    The layers stay where they are and keep their names, but their buffers become views of the group's. The first layer
    that is called with an input computes all; the others take their part when they are called with the same tensor.
    A layer that is moved or loaded anew leaves the group by itself. Raises ArgumentError for layers with biases and
    where formats, group sizes, zeros or inputs differ.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
            raise ArgumentError(f"layers: {len(layers)}; a group has at least two different ones")
        if any(layer.bias is not None for layer in layers):
            raise ArgumentError("layers: a group takes layers without bias")
        whole = cat([layer.quantized() for layer in layers])
        self.whole = QuantLinear(whole)
        self.sizes = [layer.out_features for layer in layers]
        self._members = [id(layer) for layer in layers]
        self._input: torch.Tensor | None = None
        self._version = -1
        self._parts: dict[int, torch.Tensor] = {}
        first = 0
        for layer, size in zip(layers, self.sizes, strict=True):
            part = whole[first : first + size]
            for field, name in NAMES.items():
                layer._buffers[name] = getattr(part, field)
            layer.group = self
            first += size

    def take(self, layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for x."""
        version = -1 if x.is_inference() else x._version  # which inference tensors do not keep
        if self._input is not x or self._version != version or id(layer) not in self._parts:
            parts = self.whole(x).split(self.sizes, -1)
            self._parts = dict(zip(self._members, parts, strict=True))
            self._input, self._version = x, version
        y = self._parts.pop(id(layer))
        if not self._parts:
            self._input = None  # nothing is kept between steps
        return y
