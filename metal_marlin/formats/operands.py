"""Weights in the order of a matrix instruction's operands, and back; src/core/packed.h says what lies where.

A bijection on the bits of codes, scales and zeros; packed zeros become a number each. Twin of ``src/core/packed.h``.
"""

from __future__ import annotations

import torch

from metal_marlin.formats.codec import Codec
from metal_marlin.formats.fp4 import VALUES
from metal_marlin.formats.nf3 import NF3

_BLOCK = 1 << 24  # codes that are unpacked at a time

# Axes of codes [N, K]: strip of 16 rows, row / 8, row % 8, block of 64 k, steps of 16 k in it (of eight bits: two pairs
# of them), k / 8 of the step, then its pairs and their two numbers. Where they go: src/core/packed.h.
_AXES = {
    4: ((2, 8, -1, 4, 2, 4, 2), (0, 3, 2, 6, 4, 7, 5, 1)),
    8: ((2, 8, -1, 2, 2, 2, 4, 2), (0, 3, 4, 2, 7, 5, 6, 8, 1)),
}
_SPARSE_AXES = ((2, 8, -1, 2, 2, 4, 2), _AXES[4][1])  # of kept weights: a block has two steps
_FEW_AXES = (_AXES[4][0], (0, 3, 2, 6, 4, 5, 1, 7))  # of two and three bits: a lane's 32 codes together


# Of FP4's codes i and i + 4 of a word, the bits of its halves where their signs are and where their sizes begin.
_SIGNS, _SIZES = (15, 12, 14, 13), (9, 6, 3, 0)

SPARSE_GROUP = 32  # weights of a group, at least, of sparse weights in operand order


def _signs_apart(words: torch.Tensor) -> torch.Tensor:
    """Words of FP4 codes in the order of a matrix instruction's numbers."""
    out = torch.zeros_like(words)
    for i in range(4):
        out |= (words >> 4 * i + 3 & 0x00010001) << _SIGNS[i] | (words >> 4 * i & 0x00070007) << _SIZES[i]
    return out


def _signs_joined(words: torch.Tensor) -> torch.Tensor:
    """What ``_signs_apart`` was given."""
    out = torch.zeros_like(words)
    for i in range(4):
        out |= (words >> _SIGNS[i] & 0x00010001) << 4 * i + 3 | (words >> _SIZES[i] & 0x00070007) << 4 * i
    return out


def _place(form: Codec, i: int, bit: int) -> tuple[int, int]:
    """Which of a lane's words has a bit of its code i, and where."""
    pair, e = divmod(i, 2)
    step, j = divmod(pair, 4)
    if form.bits == 2:
        return step // 2, 16 * e + 8 * (step % 2) + 2 * j + bit
    if form is NF3:
        at = 4 * (2 * j + e)
        return (step, at + bit) if step < 3 else (bit, at + 3)
    if pair == 15:
        return bit, 16 * e
    word, field = (step, j) if step < 3 else (j, 4)
    return word, 16 * e + 1 + 3 * field + bit


def _runs(form: Codec) -> list[tuple[int, int, int, int, int]]:
    """What lies together: code, its lowest bit of those, their mask, word, bit of the word."""
    runs: list[tuple[int, int, int, int, int]] = []
    for i in range(32):
        for bit in range(form.bits):
            word, at = _place(form, i, bit)
            code, low, mask, same, start = runs[-1] if runs else (-1, 0, 0, 0, 0)
            if (code, same, start + bit - low) == (i, word, at):
                runs[-1] = (i, low, mask << 1 | 1, word, start)
            else:
                runs.append((i, bit, 1, word, at))
    return runs


def _planes(form: Codec) -> tuple[slice, ...]:
    """A lane's words that are read at once; such words of all lanes lie together."""
    return tuple(slice(i, min(i + 2, form.bits)) for i in range(0, form.bits, 2))


def _few_packed(form: Codec, codes: torch.Tensor) -> torch.Tensor:
    """Words [blocks * 32 * bits] of codes uint8 [blocks, lanes, 32]."""
    by_code = codes.permute(2, 0, 1).int().contiguous()
    words = by_code.new_zeros(form.bits, *codes.shape[:2])
    for i, low, mask, word, at in _runs(form):
        words[word] |= (by_code[i] >> low & mask) << at
    return torch.cat([words[part].permute(1, 2, 0).flatten(1) for part in _planes(form)], 1).flatten()


def _few_unpacked(form: Codec, words: torch.Tensor) -> torch.Tensor:
    """The codes that ``_few_packed`` was given."""
    blocks = words.reshape(-1, 32 * form.bits)
    parts = [blocks[:, 32 * p.start : 32 * p.stop].unflatten(1, (32, -1)) for p in _planes(form)]
    by_word = torch.cat(parts, 2).permute(2, 0, 1).contiguous()
    codes = torch.zeros(32, *by_word.shape[1:], dtype=torch.uint8, device=words.device)
    for i, low, mask, word, at in _runs(form):
        codes[i] |= ((by_word[word] >> at & mask) << low).to(torch.uint8)
    return codes.permute(1, 2, 0).contiguous()


def _reordered(form: Codec, words: torch.Tensor, back: bool, sparse: bool = False) -> torch.Tensor:
    """Codes int32 [N, words] in operand order, or back."""
    few = form.bits < 4
    split, order = _FEW_AXES if few else _SPARSE_AXES if sparse else _AXES[form.bits]
    undo = [order.index(i) for i in range(len(order))]
    out = torch.empty_like(words, memory_format=torch.contiguous_format)
    rows = max(16, _BLOCK // max(1, form.columns(words.shape[1])) // 16 * 16)
    for first in range(0, words.shape[0], rows):
        part = words[first : first + rows].contiguous()
        if back and form.values is VALUES:
            part = _signs_joined(part)
        codes = _few_unpacked(form, part) if back and few else form.unpack(part)
        whole = codes.view(-1, 16, form.columns(words.shape[1]))
        shape = whole.unflatten(2, split[2:]).unflatten(1, split[:2]).shape
        moved = codes.reshape([shape[i] for i in order]).permute(undo) if back else whole.view(shape).permute(order)
        if few and not back:
            made = _few_packed(form, moved.reshape(-1, 32, 32)).view(part.shape)
        else:
            made = form.pack(moved.reshape(part.shape[0], -1))
        if not back and form.values is VALUES:
            made = _signs_apart(made)
        out[first : first + rows] = made
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


def kernel_zeros(zeros: str) -> str:
    """What kernels find of a weight's zeros."""
    return "point" if zeros == "packed" else zeros


def fits(form: Codec, N: int, K: int) -> bool:
    """Whether W [N, K] can be in operand order."""
    return form.bits in (2, 3, *_AXES) and N > 0 and N % 16 == 0 and K % 64 == 0


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
