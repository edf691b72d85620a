"""LinearGroup: quantised layers that read the same input, computed by one launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.quant.tensor import NAMES, cat


class LinearGroup:
    """Several QuantLinear layers, such as q, k and v projections, over one weight: theirs along N.

    The layers stay where they are and keep their names, but their buffers become views of the group's. The first layer
    that is called with an input computes all; the others take their part when they are called with the same tensor in
    the same thread, and neither it nor the weights have changed. Tensors of inference mode do not say whether they
    have: of them each layer computes its own part. A layer that is moved, copied or loaded anew leaves the group.
    Raises ArgumentError for layers with biases and where formats, group sizes, zeros or inputs differ.
    """

    def __init__(self, layers: Sequence[QuantLinear]) -> None:
        if len(layers) < 2 or len({id(layer) for layer in layers}) < len(layers):
            raise ArgumentError(f"layers: {len(layers)}; a group has at least two different ones")
        if any(layer.bias is not None for layer in layers):
            raise ArgumentError("layers: a group takes layers without bias")
        whole = cat([layer.quantized() for layer in layers])
        self.whole = QuantLinear(whole)
        self.sizes = [layer.out_features for layer in layers]
        self._waiting = _Waiting()
        first = 0
        for slot, (layer, size) in enumerate(zip(layers, self.sizes, strict=True)):
            part = whole[first : first + size]
            for field, name in NAMES.items():
                layer._buffers[name] = getattr(part, field)
            layer.group, layer.slot = self, slot
            first += size

    def take(self, layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for x."""
        if x.is_inference():
            return layer.alone(x)
        waiting, versions = self._waiting, (x._version, *self._versions())
        if waiting.x is not x or waiting.versions != versions or layer.slot not in waiting.parts:
            waiting.parts = dict(enumerate(self.whole(x).split(self.sizes, -1)))
            waiting.x, waiting.versions = x, versions
        y = waiting.parts.pop(layer.slot)
        if not waiting.parts:
            waiting.x = None  # nothing is kept between steps
        return y

    def _versions(self) -> tuple[int, ...]:
        tensors = (self.whole._buffers[name] for name in NAMES.values())
        return tuple(t._version for t in tensors if t is not None and not t.is_inference())


class _Waiting(threading.local):
    """Parts of the output for x that layers have not yet taken, by slot; of one thread."""

    def __init__(self) -> None:
        self.x: torch.Tensor | None = None
        self.versions: tuple[int, ...] = ()
        self.parts: dict[int, torch.Tensor] = {}
