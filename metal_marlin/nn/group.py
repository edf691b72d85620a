"""LinearGroup: quantised layers that read the same input, computed by one launch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL
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
        self.whole = QuantLinear(cat([layer.quantized() for layer in layers]))
        self.layers, self.sizes = list(layers), [layer.out_features for layer in layers]
        self._waiting = _Waiting()
        for slot, layer in enumerate(layers):
            layer.group, layer.slot = self, slot
        self._share()

    def _share(self) -> None:
        """Give each layer of the group its rows of the weight."""
        whole, first = self.whole.quantized(), 0
        for layer, size in zip(self.layers, self.sizes, strict=True):
            part = whole[first : first + size]
            if part.layout != CANONICAL:  # groups come first there, and kernels want them without gaps
                extra = part.extra if part.extra is None or part.extra.ndim < 2 else part.extra.T.contiguous().T
                part = replace(part, scales=part.scales.T.contiguous().T, extra=extra)
            if layer.group is self:
                layer.hold(part)
            first += size

    def prepack(self, layout: str) -> None:
        """Put the weight of all layers into a layout. Raises ArgumentError where a layer's rows cannot have it."""
        if layout != CANONICAL and any(size % 16 for size in self.sizes):
            raise ArgumentError(f"layers: {', '.join(map(str, self.sizes))} rows; layout {layout!r} takes N % 16 = 0")
        self.whole.prepack(layout)
        self._share()

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
