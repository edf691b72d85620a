"""Orders of code words that a device reads faster than the canonical one.

A layout is a bijection on the 32-bit words of the codes: same shape, dtype and bytes. Scales stay canonical.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL
from metal_marlin.quant.tensor import QuantizedTensor


@dataclass(frozen=True)
class Layout:
    """``pack`` makes the layout of canonical words int32 [N, words], ``unpack`` undoes it."""

    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor], torch.Tensor]


def _mma16(words: torch.Tensor, back: bool) -> torch.Tensor:
    """Fragment order of the 16-row matrix instruction: tiles of 16 rows x 8 words, 128 words one after the other.

    Lane L of a tile has 4 words, 16 bytes: (row, word) = (L/4, L%4), (L/4 + 8, L%4), (L/4, L%4 + 4),
    (L/4 + 8, L%4 + 4). A dot product may take k in any order, so with 4-bit codes these are its operands of four steps
    of 16, with 8-bit codes of two. Tiles of a band of 16 rows come first, then the words left over, by row; rows
    beyond the last band stay where they are.
    """
    out = words.clone(memory_format=torch.contiguous_format)
    N, W = words.shape
    bands, tiles = N // 16, W // 8
    if not bands or not tiles:
        return out
    whole = tiles * 8
    source, band = words[: bands * 16], out[: bands * 16].view(bands, 16 * W)
    if back:
        flat = source.reshape(bands, 16 * W)
        # [band, tile, row % 8, word % 4, word / 4, row / 8] -> [band, row / 8, row % 8, tile, word / 4, word % 4]
        ordered = flat[:, : 16 * whole].reshape(bands, tiles, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3)
        rows = band.view(bands, 16, W)
        rows[..., :whole] = ordered.reshape(bands, 16, whole)
        rows[..., whole:] = flat[:, 16 * whole :].reshape(bands, 16, W - whole)
        return out
    rows = source.reshape(bands, 16, W)
    split = rows[..., :whole].reshape(bands, 2, 8, tiles, 2, 4).permute(0, 3, 2, 5, 4, 1)
    band[:, : 16 * whole] = split.reshape(bands, 16 * whole)
    band[:, 16 * whole :] = rows[..., whole:].reshape(bands, -1)
    return out


LAYOUTS: dict[str, Layout] = {"mma16": Layout(lambda w: _mma16(w, back=False), lambda w: _mma16(w, back=True))}


def prepack(tensor: QuantizedTensor, layout: str) -> QuantizedTensor:
    """The tensor with its code words in another order. Raises ArgumentError for a layout that there is not."""
    if layout != CANONICAL and layout not in LAYOUTS:
        raise ArgumentError(f"layout = {layout!r}; there are {', '.join((CANONICAL, *LAYOUTS))}")
    if layout == tensor.layout:
        return tensor
    plain = unpack(tensor)
    return plain if layout == CANONICAL else replace(plain, codes=LAYOUTS[layout].pack(plain.codes), layout=layout)


def unpack(tensor: QuantizedTensor) -> QuantizedTensor:
    """The tensor in canonical order, exactly what ``prepack`` was given."""
    if tensor.layout == CANONICAL:
        return tensor
    if tensor.layout not in LAYOUTS:
        raise ArgumentError(f"layout = {tensor.layout!r}; there are {', '.join((CANONICAL, *LAYOUTS))}")
    return replace(tensor, codes=LAYOUTS[tensor.layout].unpack(tensor.codes), layout=CANONICAL)
