"""Orders of a weight that a device reads faster than the canonical one.

A layout is a bijection on the bits of codes, scales and zeros: shapes stay, and dtypes but of packed zeros. It is
undone exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, MMA16, codec, operands
from metal_marlin.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Layout:
    """``fits`` says whether a canonical tensor has it; ``pack`` makes it, ``unpack`` undoes it."""

    fits: Callable[[QuantizedTensor], bool]
    pack: Callable[[QuantizedTensor], QuantizedTensor]
    unpack: Callable[[QuantizedTensor], QuantizedTensor]


def _fits(tensor: QuantizedTensor) -> bool:
    return operands.fits(codec(tensor.format), *tensor.shape)


def _pack(tensor: QuantizedTensor) -> QuantizedTensor:
    form = codec(tensor.format)
    codes, scales, extra, powers = operands.pack(form, tensor.codes, tensor.scales, tensor.extra, tensor.zeros)
    return replace(tensor, codes=codes, scales=scales, extra=extra, powers=powers, layout=MMA16)


def _unpack(tensor: QuantizedTensor) -> QuantizedTensor:
    form = codec(tensor.format)
    codes, scales, extra = operands.unpack(form, tensor.codes, tensor.scales, tensor.extra, tensor.zeros)
    return replace(tensor, codes=codes, scales=scales, extra=extra, powers=None, layout=CANONICAL)


LAYOUTS: dict[str, Layout] = {MMA16: Layout(_fits, _pack, _unpack)}


def prepack(tensor: QuantizedTensor, layout: str) -> QuantizedTensor:
    """The tensor in another layout. Raises ArgumentError for a layout that there is not, or that it cannot have."""
    if layout != CANONICAL and layout not in LAYOUTS:
        raise ArgumentError(f"layout = {layout!r}; there are {', '.join((CANONICAL, *LAYOUTS))}")
    if layout == tensor.layout:
        return tensor
    plain = unpack(tensor)
    if layout == CANONICAL:
        return plain
    if not LAYOUTS[layout].fits(plain):
        raise ArgumentError(
            f"layout = {layout!r}; it takes N a multiple of 16 and K of 64, this is {plain.format} {plain.shape}"
        )
    return LAYOUTS[layout].pack(plain)


def unpack(tensor: QuantizedTensor) -> QuantizedTensor:
    """The tensor in canonical order, exactly what ``prepack`` was given."""
    if tensor.layout == CANONICAL:
        return tensor
    if tensor.layout not in LAYOUTS:
        raise ArgumentError(f"layout = {tensor.layout!r}; there are {', '.join((CANONICAL, *LAYOUTS))}")
    return LAYOUTS[tensor.layout].unpack(tensor)
