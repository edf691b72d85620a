"""quantize: round a weight matrix to the nearest codes of a format."""

from __future__ import annotations

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.formats.codec import FLOATS
from metal_marlin.quant.tensor import QuantizedTensor

DEFAULT_GROUP = 64


def group_of(format: str, group_size: int | None) -> int:
    """``group_size``, or of a format the usual one: 64, or its only size."""
    if group_size is not None:
        return group_size
    groups = codec(format).groups
    return DEFAULT_GROUP if DEFAULT_GROUP in groups else groups[0]


def quantize(
    weight: torch.Tensor,
    format: str = "fp4",
    group_size: int | None = None,
    scale: str = "rtn",
    zeros: str | None = None,
    scale_dtype: torch.dtype | None = None,
) -> QuantizedTensor:
    """Quantise W [N, K] (half, bfloat16 or float32) on its own device.

    group_size: weights along K that share a scale: 16, 32, 64, 128, 256 or K; None: 64, or the format's only size
    (mxfp4 32, nvfp4 16). A K that is no multiple of it has a shorter last group; one that fills no word of codes is
    padded with zeros. scale: "rtn" takes the largest magnitude, "mse" the scale of least squared error. zeros: None:
    the format's first kind. scale_dtype: half if None.
    Raises ArgumentError for values that are not finite, with the position, and for scales beyond ``scale_dtype``.
    """
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ArgumentError(f"weight: shape {tuple(weight.shape)}; quantize takes [N, K] with K > 0")
    if weight.dtype not in FLOATS:
        raise ArgumentError(f"weight: {weight.dtype}; quantize takes {', '.join(map(str, FLOATS))}")
    if scale not in ("rtn", "mse"):
        raise ArgumentError(f"scale = {scale!r}; it is 'rtn' or 'mse'")
    form, (N, K) = codec(format), weight.shape
    zeros = form.zero_kinds[0] if zeros is None else zeros
    size, padding = group_of(format, group_size), -K % form.unit
    size = K + padding if size == K else size
    padded = torch.nn.functional.pad(weight.detach(), (0, padding)) if padding else weight.detach()
    kind = torch.float16 if scale_dtype is None else scale_dtype
    codes, scales, extra = form.encode(padded, size, scale_dtype=kind, zeros=zeros, method=scale)
    return QuantizedTensor(codes, scales, extra, format, size, zeros, (int(N), int(K)))
