"""What every format's codec shares: words of codes, groups along K, scales, zeros, rounding to the nearest code.

A weight matrix [N, K] is ``codes`` int32 [N, K·bits/32] (the bits of unsigned words, least significant code first: code
k of a row is bits k·bits … (k+1)·bits − 1, so that one of three bits may lie in two words),
``scales`` [N, ⌈K/g⌉] and, for some formats, ``extra``:

    weight = scale · (value(code) − zero) + bias

``zeros`` names what ``extra`` holds: "none", "point" (zeros in the scales' dtype [N, ⌈K/g⌉]), "packed" (integers packed
like codes, int32 [N, ⌈⌈K/g⌉·bits/32⌉]) or "bias" (biases in the scales' dtype). NVFP4's extra is its per-tensor scale,
float32 [1]. K here is a multiple of the codes that fill whole words, ``unit``. Twin of ``src/formats/quantized.h``.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from metal_marlin.errors import ArgumentError

GROUPS = (16, 32, 64, 128, 256)  # or K
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CLIPS = 21  # parts of the largest magnitude that "mse" tries, 1.5 % apart, of few bits 3 %
_BLOCK = 1 << 20  # weights encoded at a time


class Encoded(NamedTuple):
    """codes int32 [N, K·bits/32], scales, extra (None where the format has none)."""

    codes: torch.Tensor
    scales: torch.Tensor
    extra: torch.Tensor | None


@dataclass(frozen=True)
class Codec:
    """A format. ``values``: of each code (of int4 with zeros "none", less 8). ``scale_kind``: float, e8m0 or e4m3."""

    name: str
    bits: int
    values: tuple[float, ...]
    scale_kind: str = "float"
    groups: tuple[int, ...] = GROUPS
    zero_kinds: tuple[str, ...] = ("none",)
    middle: int = 0  # zero of unsigned codes that have no other
    largest: float = 0.0  # magnitude that the largest weight of a group is scaled to

    @property
    def unit(self) -> int:
        """Codes of the fewest that fill 32-bit words: 16 of two bits, 32 of three, 8 of four, 4 of eight."""
        return 32 // math.gcd(32, self.bits)

    @property
    def per_word(self) -> int:
        """Codes that kernels read together, ``kPerWord`` of the policy: 4 of eight bits, else 8."""
        return min(8, self.unit)

    def words(self, K: int) -> int:
        """32-bit words of K codes; the last may be filled in part."""
        return -(-K // self.unit) * self.unit * self.bits // 32

    def columns(self, words: int) -> int:
        """Codes of a row of so many words. Raises ArgumentError where codes do not fill them."""
        if words * 32 % (self.unit * self.bits):
            raise ArgumentError(f"codes: {words} words a row; {self.name} has multiples of {self.words(self.unit)}")
        return words * 32 // self.bits

    @property
    def scale_dtypes(self) -> tuple[torch.dtype, ...]:
        return FLOATS if self.scale_kind == "float" else (torch.uint8,)

    def check(self, K: int, group_size: int) -> None:
        """Raise ArgumentError unless K fills words and the format has groups of that size."""
        if K <= 0 or K % self.unit:
            raise ArgumentError(f"K = {K}; {self.name} needs a positive multiple of {self.unit}")
        if group_size not in self.groups and not (self.scale_kind == "float" and group_size == K):
            whole = f" or K = {K}" if self.scale_kind == "float" else ""
            raise ArgumentError(
                f"group_size = {group_size}; {self.name} takes {', '.join(map(str, self.groups))}{whole}"
            )

    def check_zeros(self, zeros: str) -> None:
        """Raise ArgumentError for a kind of zeros that the format does not have."""
        if zeros not in self.zero_kinds:
            raise ArgumentError(f"zeros = {zeros!r}; {self.name} takes {', '.join(map(repr, self.zero_kinds))}")

    def groups_of(self, K: int, group_size: int) -> int:
        """Scales of a row of K weights."""
        return -(-K // group_size)

    def extra_shape(self, N: int, groups: int, zeros: str) -> tuple[int, ...] | None:
        """Shape of ``extra``; None where there is none."""
        if self.scale_kind == "e4m3":
            return (1,)
        return {"none": None, "packed": (N, self.words(groups))}.get(zeros, (N, groups))

    def extra_dtype(self, scale_dtype: torch.dtype, zeros: str) -> torch.dtype:
        """Dtype of ``extra`` where there is one."""
        if self.scale_kind == "e4m3":
            return torch.float32
        return torch.int32 if zeros == "packed" else scale_dtype

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [..., K] to int32 words [..., K·bits/32]. Raises ArgumentError where K does not fill words."""
        if codes.shape[-1] % self.unit:
            raise ArgumentError(f"codes: K = {codes.shape[-1]} is not a multiple of {self.unit}")
        parts = codes.to(torch.int32).unflatten(-1, (-1, self.unit))
        words = parts.new_zeros(*parts.shape[:-1], self.words(self.unit))
        for i in range(self.unit):
            word, shift = divmod(self.bits * i, 32)
            words[..., word] |= parts[..., i] << shift
            if shift + self.bits > 32:
                words[..., word + 1] |= parts[..., i] >> (32 - shift)
        return words.flatten(-2)

    def unpack(self, words: torch.Tensor) -> torch.Tensor:
        """int32 words [..., K·bits/32] to uint8 codes [..., K]."""
        mask, parts = (1 << self.bits) - 1, words.view(torch.int32).unflatten(-1, (-1, self.words(self.unit)))
        if self.unit * self.bits == 32:
            shifts = torch.arange(0, 32, self.bits, device=words.device, dtype=torch.int32)
            return ((parts >> shifts) & mask).to(torch.uint8).flatten(-2)
        codes = torch.empty(*parts.shape[:-1], self.unit, dtype=torch.uint8, device=words.device)
        for i in range(self.unit):
            word, shift = divmod(self.bits * i, 32)
            code = parts[..., word] >> shift & ((1 << min(self.bits, 32 - shift)) - 1)
            if shift + self.bits > 32:
                code |= parts[..., word + 1] << (32 - shift)
            codes[..., i] = (code & mask).to(torch.uint8)
        return codes.flatten(-2)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """uint8 codes of the nearest values, ties to the even code; beyond the largest it is that, and none is −0."""
        grid, codes, whole = _grid(self.values, values.dtype, values.device)
        if whole:  # integers one apart; round() takes ties to the even one
            place = (values.round() - grid[0]).clamp(0, len(grid) - 1).to(torch.int32)
            return codes[place]
        halfway = (grid[1:] + grid[:-1]) / 2
        below = torch.bucketize(values, halfway, out_int32=True)
        found = codes[below]
        tie = values == torch.nn.functional.pad(halfway, (0, 1), value=torch.inf)[below]
        return torch.where(tie & (found % 2 == 1), codes[(below + 1).clamp(max=len(grid) - 1)], found)

    def encode(
        self,
        weight: torch.Tensor,
        group_size: int,
        *,
        scale_dtype: torch.dtype = torch.float16,
        zeros: str | None = None,
        method: str = "rtn",
    ) -> Encoded:
        """Quantise [N, K]. zeros None: the format's first kind. method: "rtn" scales by the largest magnitude of a
        group (fp4 amax/6, int8 amax/127, …); "mse" tries smaller ones and keeps the least squared error.

        Codes are nearest under the scale as stored. An all-zero group has scale 0. Raises ArgumentError for shapes,
        group sizes and kinds that do not fit, values that are not finite, and scales beyond ``scale_dtype``.
        """
        zeros = self.zero_kinds[0] if zeros is None else zeros
        self._check_encode(weight, group_size, scale_dtype, zeros, method)
        tensor_scale = self._tensor_scale(weight)
        parts = []
        for rows in weight.split(max(1, _BLOCK // weight.shape[1])):
            parts.append(self._encode_rows(rows, group_size, scale_dtype, zeros, method, tensor_scale))
        if not parts:
            parts.append(self._encode_rows(weight, group_size, scale_dtype, zeros, method, tensor_scale))
        codes, scales, extra = (torch.cat([p[i] for p in parts]) for i in range(3))
        if self.scale_kind == "float" and weight.numel():
            largest, least = weight.abs().max(), 4 * torch.finfo(scale_dtype).smallest_normal
            least *= torch.finfo(scale_dtype).eps  # a subnormal of two bits
            if largest > 0 and scales.max() < least:
                raise ArgumentError(
                    f"weight: largest value {largest:g} needs a scale below {least:g}, which {scale_dtype} would round "
                    f"away: pass scale_dtype=torch.float32 or torch.bfloat16"
                )
        if zeros == "packed":
            padding = -extra.shape[1] % self.unit
            extra = self.pack(torch.nn.functional.pad(extra.to(torch.uint8), (0, padding)))
        if tensor_scale is not None:
            return Encoded(codes, scales, tensor_scale)
        return Encoded(codes, scales, None if zeros == "none" else extra)

    def _check_encode(
        self, weight: torch.Tensor, group_size: int, scale_dtype: torch.dtype, zeros: str, method: str
    ) -> None:
        if weight.ndim != 2:
            raise ArgumentError(f"weight: shape {tuple(weight.shape)}; {self.name} encodes [N, K]")
        if method not in ("rtn", "mse"):
            raise ArgumentError(f"method = {method!r}; it is 'rtn' or 'mse'")
        if self.scale_kind == "float" and scale_dtype not in FLOATS:
            raise ArgumentError(f"scale_dtype = {scale_dtype}; {self.name} takes {', '.join(map(str, FLOATS))}")
        self.check(weight.shape[1], group_size)
        self.check_zeros(zeros)
        finite = torch.isfinite(weight)
        if not bool(finite.all()):
            wrong = (~finite).nonzero()
            n, k = wrong[0].tolist()
            raise ArgumentError(f"weight[{n}, {k}] is {weight[n, k].item()}; {len(wrong)} values are not finite")

    def _tensor_scale(self, weight: torch.Tensor) -> torch.Tensor | None:
        """NVFP4's t = amax / (largest code · largest scale), as stored; 1 for a tensor of zeros."""
        if self.scale_kind != "e4m3":
            return None
        amax = weight.abs().max().double() if weight.numel() else torch.zeros((), device=weight.device)
        t = (amax / (self.largest * 448)).float().reshape(1)
        return torch.where(t > 0, t, torch.ones_like(t))

    def _encode_rows(
        self,
        weight: torch.Tensor,
        group_size: int,
        scale_dtype: torch.dtype,
        zeros: str,
        method: str,
        tensor_scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """codes (packed), scales as stored, and zeros or biases ("packed": not yet packed)."""
        N, K = weight.shape
        count = self.groups_of(K, group_size)
        exact = torch.nn.functional.pad(weight.double(), (0, count * group_size - K)).view(N, count, group_size)
        if method == "mse" and K % group_size:  # padding must not weigh
            inside = torch.arange(count * group_size, device=weight.device).view(1, count, group_size) < K
        else:
            inside = torch.ones((), dtype=torch.bool, device=weight.device)
        scales, offsets = self._scales(exact, 1.0, scale_dtype, zeros, tensor_scale)
        if self.scale_kind == "float" and not bool(torch.isfinite(scales).all() and torch.isfinite(offsets).all()):
            raise ArgumentError(
                f"weight: largest value {weight.abs().max():g} needs a scale or bias beyond {scale_dtype}: "
                f"pass scale_dtype=torch.float32 or torch.bfloat16"
            )
        if method == "mse":
            near, least = exact.float(), None
            for i in range(CLIPS):
                clip = 1 - i * (0.03 if self.bits < 4 else 0.015)
                tried = self._scales(exact, clip, scale_dtype, zeros, tensor_scale)
                error = self._error(near, *tried, zeros, tensor_scale, inside)
                better = torch.ones_like(error, dtype=torch.bool) if least is None else error < least
                least = error if least is None else torch.minimum(error, least)
                scales, offsets = (
                    torch.where(better, new, old) for new, old in zip(tried, (scales, offsets), strict=True)
                )
        targets, s, _, _ = self._targets(exact, scales, offsets, zeros, tensor_scale)
        codes = torch.where(s > 0, self.nearest(targets), 0).to(torch.uint8)
        return self.pack(codes.view(N, count * group_size)[:, :K]), scales, offsets

    def _scales(
        self, grouped: torch.Tensor, clip: float, dtype: torch.dtype, zeros: str, tensor_scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored scales and zeros (or biases) of groups [N, groups, g]."""
        amax = grouped.abs().amax(-1) * clip
        nothing = torch.zeros_like(amax, dtype=torch.uint8)
        if self.scale_kind == "e8m0":
            return _e8m0(amax), nothing
        if self.scale_kind == "e4m3":
            assert tensor_scale is not None
            return (amax / (self.largest * tensor_scale.double())).clamp(max=448).to(torch.float8_e4m3fn).view(
                torch.uint8
            ), nothing
        if zeros == "none":
            return (amax / self.largest).to(dtype), nothing
        top = (1 << self.bits) - 1
        low, high = grouped.amin(-1) * clip, grouped.amax(-1) * clip
        if zeros != "bias":  # zero must be a code, so the range holds it
            low, high = low.clamp(max=0), high.clamp(min=0)
        scales = ((high - low) / top).to(dtype)
        divisor = scales.double()
        if zeros == "bias":
            return scales, low.to(dtype)
        point = torch.where(divisor > 0, -low / divisor.clamp_min(1e-300), 0.0)
        if zeros == "packed":
            return scales, point.round().clamp(0, top).to(torch.uint8)
        return scales, point.clamp(0, top).to(dtype)

    def _targets(
        self,
        grouped: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        zeros: str,
        tensor_scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float, torch.Tensor | float]:
        """What the codes' values should be under what is stored; scale, zero and bias, all in grouped's dtype."""
        s = self.scale_values(scales, tensor_scale).unsqueeze(-1).to(grouped.dtype)
        o = offsets.unsqueeze(-1).to(grouped.dtype)
        bias = o if zeros == "bias" else 0.0
        zero = o if zeros in ("point", "packed") else float(self.middle) if zeros == "none" else 0.0
        reciprocal = torch.where(s > 0, 1 / s, 0.0) if grouped.dtype == torch.float32 else None
        ratio = (grouped - bias) / torch.where(s > 0, s, 1.0) if reciprocal is None else (grouped - bias) * reciprocal
        return torch.where(s > 0, ratio, 0.0) + zero, s, zero, bias

    def _error(
        self,
        grouped: torch.Tensor,
        scales: torch.Tensor,
        offsets: torch.Tensor,
        zeros: str,
        tensor_scale: torch.Tensor | None,
        inside: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error of each group."""
        target, s, zero, bias = self._targets(grouped, scales, offsets, zeros, tensor_scale)
        values = _table(self.values, grouped.device).to(grouped.dtype)[self.nearest(target).long()]
        error = (s * (values - zero) + bias - grouped).square_()
        return torch.where(inside, error, 0.0).sum(-1)

    def scale_values(self, scales: torch.Tensor, tensor_scale: torch.Tensor | None = None) -> torch.Tensor:
        """Stored scales as float64."""
        if self.scale_kind == "float":
            return scales.double()
        if self.scale_kind == "e8m0":
            exponent = scales.to(torch.float64) - 127
            return torch.where(scales == 255, torch.nan, torch.exp2(exponent))
        values = scales.view(torch.float8_e4m3fn).double()
        return values if tensor_scale is None else values * tensor_scale.double()

    def decode(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        extra: torch.Tensor | None,
        group_size: int,
        zeros: str = "none",
        dtype: torch.dtype = torch.float64,
    ) -> torch.Tensor:
        """Weights [N, K] in ``dtype``, worked out in float64 (exact but for biases) and rounded once."""
        self.check_zeros(zeros)
        N, K = codes.shape[0], self.columns(codes.shape[1])
        self.check(K, group_size)
        count = self.groups_of(K, group_size)
        self.check_tensors(N, count, scales, extra, zeros)
        parts = []
        for first in range(0, N, max(1, _BLOCK // K)):
            rows = slice(first, first + max(1, _BLOCK // K))
            weight = _table(self.values, codes.device)[self.unpack(codes[rows]).long()]
            s = self.scale_values(scales[rows], extra if self.scale_kind == "e4m3" else None)
            o = self._offsets(extra, rows, count, zeros)
            weight -= float(self.middle) if zeros == "none" else 0.0 if zeros == "bias" else _spread(o, group_size, K)
            weight *= _spread(s, group_size, K)
            weight += _spread(o, group_size, K) if zeros == "bias" else 0.0
            parts.append(weight.to(dtype))
        return torch.cat(parts) if parts else torch.empty(0, K, dtype=dtype, device=codes.device)

    def _offsets(self, extra: torch.Tensor | None, rows: slice, count: int, zeros: str) -> torch.Tensor:
        """Zeros or biases of some rows in float64; an empty tensor where there are none."""
        if extra is None or zeros == "none":
            return torch.empty(0)
        return self.unpack(extra[rows])[:, :count].double() if zeros == "packed" else extra[rows].double()

    def check_tensors(self, N: int, groups: int, scales: torch.Tensor, extra: torch.Tensor | None, zeros: str) -> None:
        """Raise ArgumentError unless scales and extra have the shapes and dtypes of [N, groups]."""
        if scales.shape != (N, groups) or scales.dtype not in self.scale_dtypes:
            wanted = " or ".join(map(str, self.scale_dtypes))
            raise ArgumentError(
                f"scales: {scales.dtype} {tuple(scales.shape)}; {self.name} of {N} rows with {groups} groups needs "
                f"{wanted} {(N, groups)}"
            )
        shape = self.extra_shape(N, groups, zeros)
        if shape is None:
            if extra is not None:
                raise ArgumentError(f"extra: {self.name} with zeros {zeros!r} has none, got {tuple(extra.shape)}")
            return
        wanted_dtype = self.extra_dtype(scales.dtype, zeros)
        if extra is None or extra.shape != shape or extra.dtype != wanted_dtype:
            got = "None" if extra is None else f"{extra.dtype} {tuple(extra.shape)}"
            raise ArgumentError(f"extra: {got}; {self.name} with zeros {zeros!r} needs {wanted_dtype} {shape}")


def _spread(per_group: torch.Tensor, group_size: int, K: int) -> torch.Tensor:
    return per_group.repeat_interleave(group_size, -1)[:, :K]


def _e8m0(amax: torch.Tensor) -> torch.Tensor:
    """OCP MX rule for E2M1: e − 127 = ⌊log2 amax⌋ − 2, clamped to the byte; an all-zero group has the least scale."""
    exponent = torch.frexp(amax).exponent - 1  # amax = m · 2^e, 1 ≤ m < 2
    return torch.where(amax > 0, (exponent - 2 + 127).clamp(0, 254), 0).to(torch.uint8)


@lru_cache(maxsize=64)
def _grid(
    values: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Finite values in ascending order, their codes, whether they are integers one apart; of +0 and −0, +0."""
    order = sorted(
        (value, code)
        for code, value in enumerate(values)
        if value == value and abs(value) != float("inf") and str(value) != "-0.0"
    )
    grid = torch.tensor([value for value, _ in order], dtype=dtype, device=device)
    codes = torch.tensor([code for _, code in order], dtype=torch.uint8, device=device)
    whole = all(b[0] - a[0] == 1 for a, b in itertools.pairwise(order)) and order[0][0].is_integer()
    return grid, codes, whole


@lru_cache(maxsize=64)
def _table(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)
