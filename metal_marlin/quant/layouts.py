"""Orders of a weight that a device reads faster than the canonical one.

A layout is a bijection on the bits of codes, scales and zeros: shapes stay, and dtypes but of packed zeros. It is
undone exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, Codec, codec
from metal_marlin.quant.tensor import QuantizedTensor

MMA16 = "mma16"
_BLOCK = 1 << 24  # codes that are unpacked at a time


@dataclass(frozen=True)
class Layout:
    """``fits`` says whether a canonical tensor has it; ``pack`` makes it, ``unpack`` undoes it."""

    fits: Callable[[QuantizedTensor], bool]
    pack: Callable[[QuantizedTensor], QuantizedTensor]
    unpack: Callable[[QuantizedTensor], QuantizedTensor]


# Axes of codes [N, K]: strip of 16 rows, row / 8, row % 8, block of 64 k, steps of 16 k in it (of eight bits: two pairs
# of them), k / 8 of the step, then its pairs and their two numbers. Where they go: src/core/packed.h.
_AXES = {
    4: ((2, 8, -1, 4, 2, 4, 2), (0, 3, 2, 6, 4, 7, 5, 1)),
    8: ((2, 8, -1, 2, 2, 2, 4, 2), (0, 3, 4, 2, 7, 5, 6, 8, 1)),
}


def _reordered(form: Codec, words: torch.Tensor, back: bool) -> torch.Tensor:
    """Codes int32 [N, words] in operand order, or back."""
    split, order = _AXES[form.bits]
    out = torch.empty_like(words, memory_format=torch.contiguous_format)
    rows = max(16, _BLOCK // max(1, form.columns(words.shape[1])) // 16 * 16)
    for first in range(0, words.shape[0], rows):
        codes = form.unpack(words[first : first + rows].contiguous())
        shape = codes.view(-1, 16, codes.shape[1]).unflatten(2, split[2:]).unflatten(1, split[:2]).shape
        if back:
            undo = [order.index(i) for i in range(len(order))]
            moved = codes.reshape([shape[i] for i in order]).permute(undo)
        else:
            moved = codes.view(shape).permute(order)
        out[first : first + rows] = form.pack(moved.reshape(codes.shape))
    return out


def _paired(rows: torch.Tensor) -> torch.Tensor:
    """[N, groups] with rows r and r + 8 of every 16 next to each other; in memory [groups, N]."""
    ordered = rows.reshape(-1, 2, 8, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
    return ordered.T.contiguous().T


def _unpaired(rows: torch.Tensor) -> torch.Tensor:
    return rows.reshape(-1, 8, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape)


def _powers(tensor: QuantizedTensor) -> torch.Tensor:
    """Float32 [N]: powers of two that are at least every scale and bias of a row."""
    most = codec(tensor.format).scale_values(tensor.scales).abs().amax(1)
    if tensor.zeros == "bias" and tensor.extra is not None:
        most = torch.maximum(most, tensor.extra.double().abs().amax(1))
    return torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent.clamp(-126, 126)).float()


def _fits(tensor: QuantizedTensor) -> bool:
    N, K = tensor.shape
    return codec(tensor.format).bits in _AXES and N > 0 and N % 16 == 0 and K % 64 == 0


def _pack(tensor: QuantizedTensor) -> QuantizedTensor:
    form, extra = codec(tensor.format), tensor.extra
    if extra is not None and form.scale_kind == "float":
        if tensor.zeros == "packed":  # a number each: beside the codes they are few
            extra = form.unpack(extra)[:, : tensor.scales.shape[1]].to(tensor.scales.dtype)
        extra = _paired(extra)
    codes = _reordered(form, tensor.codes, False)
    return replace(
        tensor, codes=codes, scales=_paired(tensor.scales), extra=extra, powers=_powers(tensor), layout=MMA16
    )


def _unpack(tensor: QuantizedTensor) -> QuantizedTensor:
    form, extra = codec(tensor.format), tensor.extra
    if extra is not None and form.scale_kind == "float":
        extra = _unpaired(extra)
        if tensor.zeros == "packed":
            extra = form.pack(torch.nn.functional.pad(extra, (0, -extra.shape[1] % form.unit)).to(torch.uint8))
    codes = _reordered(form, tensor.codes, True)
    return replace(tensor, codes=codes, scales=_unpaired(tensor.scales), extra=extra, powers=None, layout=CANONICAL)


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
            f"layout = {layout!r}; it takes formats of 4 and 8 bits, N a multiple of 16 and K of 64, "
            f"this is {plain.format} {plain.shape}"
        )
    return LAYOUTS[layout].pack(plain)


def unpack(tensor: QuantizedTensor) -> QuantizedTensor:
    """The tensor in canonical order, exactly what ``prepack`` was given."""
    if tensor.layout == CANONICAL:
        return tensor
    if tensor.layout not in LAYOUTS:
        raise ArgumentError(f"layout = {tensor.layout!r}; there are {', '.join((CANONICAL, *LAYOUTS))}")
    return LAYOUTS[tensor.layout].unpack(tensor)
