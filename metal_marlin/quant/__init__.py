"""Quantised weights: ``quantize``, ``QuantizedTensor``, device layouts, presets, pruning, ``SparseTensor``."""

from __future__ import annotations

from metal_marlin.quant.layouts import prepack, unpack
from metal_marlin.quant.presets import PRESETS, Preset
from metal_marlin.quant.prune import prune_2_4, prune_n_m
from metal_marlin.quant.rtn import quantize
from metal_marlin.quant.sparse import SparseTensor, quantize_sparse
from metal_marlin.quant.tensor import QuantizedTensor, cat

__all__ = [
    "PRESETS",
    "Preset",
    "QuantizedTensor",
    "SparseTensor",
    "cat",
    "prepack",
    "prune_2_4",
    "prune_n_m",
    "quantize",
    "quantize_sparse",
    "unpack",
]
