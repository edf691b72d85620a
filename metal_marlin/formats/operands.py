"""Weights in the order of a matrix instruction's operands, and back; src/core/packed.h says what lies where.

A bijection on the bits of codes, scales and zeros; packed zeros become a number each. Twin of ``src/core/packed.h``.
"""

from __future__ import annotations

import torch

from metal_marlin.formats.codec import Codec

_BLOCK = 1 << 24  # codes that are unpacked at a time

# Axes of codes [N, K]: strip of 16 rows, row / 8, row % 8, block of 64 k, steps of 16 k in it (of eight bits: two pairs
# of them), k / 8 of the step, then its pairs and their two numbers. Where they go: src/core/packed.h.
_AXES = {
    4: ((2, 8, -1, 4, 2, 4, 2), (0, 3, 2, 6, 4, 7, 5, 1)),
    8: ((2, 8, -1, 2, 2, 2, 4, 2), (0, 3, 4, 2, 7, 5, 6, 8, 1)),
}
_SPARSE_AXES = ((2, 8, -1, 2, 2, 4, 2), _AXES[4][1])  # of kept weights: a block has two steps


def _reordered(form: Codec, words: torch.Tensor, back: bool, sparse: bool = False) -> torch.Tensor:
    """Codes int32 [N, words] in operand order, or back."""
    split, order = _SPARSE_AXES if sparse else _AXES[form.bits]
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


def _powers(form: Codec, scales: torch.Tensor, biases: torch.Tensor | None) -> torch.Tensor:
    most = form.scale_values(scales).abs().amax(1)
    if biases is not None:
        most = torch.maximum(most, biases.double().abs().amax(1))
    return torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent.clamp(-126, 126)).float()


def fits(form: Codec, N: int, K: int) -> bool:
    """Whether W [N, K] can be in operand order."""
    return form.bits in _AXES and N > 0 and N % 16 == 0 and K % 64 == 0


def pack(
    form: Codec, codes: torch.Tensor, scales: torch.Tensor, extra: torch.Tensor | None, zeros: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Codes, scales and extra of the same shapes (packed zeros: [N, groups], scales' dtype), and powers: float32 [N],
    powers of two that are at least every scale and bias of a row."""
    powers = _powers(form, scales, extra if zeros == "bias" else None)
    if extra is not None and form.scale_kind == "float":
        if zeros == "packed":  # beside the codes they are few
            extra = form.unpack(extra)[:, : scales.shape[1]].to(scales.dtype)
        extra = _paired(extra)
    return _reordered(form, codes, False), _paired(scales), extra, powers


def pack_sparse(
    form: Codec, codes: torch.Tensor, places: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``pack`` for 2:4 sparse weights without zeros: codes, places and scales of the same shapes, and powers."""
    halves = places.contiguous().view(torch.int16)  # [N, K / 16]
    rows = halves.view(-1, 2, 8, halves.shape[1] // 4, 4).permute(0, 3, 2, 4, 1)
    ordered = rows.reshape(halves.shape).contiguous().view(torch.int32)
    return _reordered(form, codes, False, True), ordered, _paired(scales), _powers(form, scales, None)


def unpack_sparse(
    form: Codec, codes: torch.Tensor, places: torch.Tensor, scales: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ``pack_sparse`` was given."""
    halves = places.contiguous().view(torch.int16)
    rows = halves.view(-1, halves.shape[1] // 4, 8, 4, 2).permute(0, 4, 2, 1, 3)
    ordered = rows.reshape(halves.shape).contiguous().view(torch.int32)
    return _reordered(form, codes, True, True), ordered, _unpaired(scales)


def unpack(
    form: Codec, codes: torch.Tensor, scales: torch.Tensor, extra: torch.Tensor | None, zeros: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What ``pack`` was given."""
    if extra is not None and form.scale_kind == "float":
        extra = _unpaired(extra)
        if zeros == "packed":
            extra = form.pack(torch.nn.functional.pad(extra, (0, -extra.shape[1] % form.unit)).to(torch.uint8))
    return _reordered(form, codes, True), _unpaired(scales), extra
