"""Quantised weights: ``quantize``, ``QuantizedTensor``, device layouts, presets."""

from __future__ import annotations

from metal_marlin.quant.layouts import prepack, unpack
from metal_marlin.quant.presets import PRESETS, Preset
from metal_marlin.quant.rtn import quantize
from metal_marlin.quant.tensor import QuantizedTensor, cat

__all__ = ["PRESETS", "Preset", "QuantizedTensor", "cat", "prepack", "quantize", "unpack"]
