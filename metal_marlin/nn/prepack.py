"""prepack_layers: the weights of a model in the order that its device reads fastest."""

from __future__ import annotations

import torch
from torch import nn

from metal_marlin.formats import CANONICAL, MMA16
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.nn.sparse import SparseLinear
from metal_marlin.ops.marlin_gemm import is_hopper
from metal_marlin.ops.packed import has_rows
from metal_marlin.quant.layouts import LAYOUTS


def prepack_layers(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Put every layer whose device has kernels for it into operand order, and name all that are in it.

    Those are, on GPUs of compute capability 9.0, layers with inputs in ``dtype`` (half or bfloat16) whose scales have
    that dtype or are bytes and whose weight can be in that order (``QuantLinear.prepack``). Others stay as they are.
    Layers of a group (``LinearGroup``) go together.
    """
    for layer in model.modules():
        if not isinstance(layer, QuantLinear | SparseLinear) or layer.layout != CANONICAL:
            continue
        scales = layer.weight_scale
        if not (has_kernels(scales.device) and has_rows(dtype, scales.dtype, layer.format)):
            continue
        if isinstance(layer, SparseLinear):
            fits = layer.sparse().fits()
        else:
            of = [layer] if layer.group is None else layer.group.layers
            fits = all(LAYOUTS[MMA16].fits(one.quantized()) for one in of)
        if fits:
            layer.prepack()
    return [n for n, m in model.named_modules() if isinstance(m, QuantLinear | SparseLinear) and m.layout != CANONICAL]


def has_kernels(device: torch.device) -> bool:
    """Whether a device reads operand order faster than the canonical one."""
    return device.type == "cuda" and is_hopper(device.index or 0)
