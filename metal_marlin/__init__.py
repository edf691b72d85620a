"""Metal Shading Language kernels for PyTorch, on CPUs, NVIDIA GPUs and Apple GPUs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metal_marlin._version import __version__

if TYPE_CHECKING:
    from metal_marlin.integrations.replace import replace_linear_layers
    from metal_marlin.nn.linear import QuantLinear
    from metal_marlin.nn.prepack import prepack_layers
    from metal_marlin.nn.sparse import SparseLinear
    from metal_marlin.ops.activation import gated_activation
    from metal_marlin.ops.batched import batched_linear, grouped_scores
    from metal_marlin.ops.dense import dense_linear, linear_split
    from metal_marlin.ops.dense_few import linear_few
    from metal_marlin.ops.dequantize import dequantize
    from metal_marlin.ops.epilogue import epilogue, linear_epilogue
    from metal_marlin.ops.gated_mlp import gated_mlp
    from metal_marlin.ops.gated_up import gated_up
    from metal_marlin.ops.linear import linear
    from metal_marlin.ops.linear_decode import linear_decode
    from metal_marlin.ops.linear_residual import linear_residual
    from metal_marlin.ops.linear_sparse import linear_sparse
    from metal_marlin.ops.norm import layer_norm, rms_norm, rms_norm_residual
    from metal_marlin.ops.norm_linear import norm_linear
    from metal_marlin.ops.norm_qkv import norm_qkv
    from metal_marlin.ops.packed import linear_packed
    from metal_marlin.ops.packed_sparse import linear_packed_sparse
    from metal_marlin.ops.tuning import tune
    from metal_marlin.quant.prune import prune_2_4, prune_n_m
    from metal_marlin.quant.rtn import quantize
    from metal_marlin.quant.sparse import SparseTensor, quantize_sparse
    from metal_marlin.quant.tensor import QuantizedTensor
    from metal_marlin.runtime.device_mps import mps_tensor_to_metal_buffer
    from metal_marlin.runtime.dispatch import dispatch_kernel
    from metal_marlin.runtime.inline import metal_kernel
    from metal_marlin.runtime.library import MetalKernelLibrary, get_shader_source

# imported on first use, so that `import metal_marlin` costs little more than nothing
_HOMES = {
    "MetalKernelLibrary": "metal_marlin.runtime.library",
    "get_shader_source": "metal_marlin.runtime.library",
    "dispatch_kernel": "metal_marlin.runtime.dispatch",
    "metal_kernel": "metal_marlin.runtime.inline",
    "QuantLinear": "metal_marlin.nn.linear",
    "QuantizedTensor": "metal_marlin.quant.tensor",
    "dequantize": "metal_marlin.ops.dequantize",
    "gated_activation": "metal_marlin.ops.activation",
    "gated_mlp": "metal_marlin.ops.gated_mlp",
    "gated_up": "metal_marlin.ops.gated_up",
    "layer_norm": "metal_marlin.ops.norm",
    "batched_linear": "metal_marlin.ops.batched",
    "grouped_scores": "metal_marlin.ops.batched",
    "dense_linear": "metal_marlin.ops.dense",
    "linear_split": "metal_marlin.ops.dense",
    "linear_few": "metal_marlin.ops.dense_few",
    "linear_epilogue": "metal_marlin.ops.epilogue",
    "epilogue": "metal_marlin.ops.epilogue",
    "linear_packed": "metal_marlin.ops.packed",
    "linear_packed_sparse": "metal_marlin.ops.packed_sparse",
    "linear_sparse": "metal_marlin.ops.linear_sparse",
    "SparseLinear": "metal_marlin.nn.sparse",
    "SparseTensor": "metal_marlin.quant.sparse",
    "prepack_layers": "metal_marlin.nn.prepack",
    "prune_2_4": "metal_marlin.quant.prune",
    "prune_n_m": "metal_marlin.quant.prune",
    "quantize_sparse": "metal_marlin.quant.sparse",
    "linear": "metal_marlin.ops.linear",
    "linear_decode": "metal_marlin.ops.linear_decode",
    "linear_residual": "metal_marlin.ops.linear_residual",
    "norm_linear": "metal_marlin.ops.norm_linear",
    "norm_qkv": "metal_marlin.ops.norm_qkv",
    "quantize": "metal_marlin.quant.rtn",
    "rms_norm": "metal_marlin.ops.norm",
    "rms_norm_residual": "metal_marlin.ops.norm",
    "tune": "metal_marlin.ops.tuning",
    "replace_linear_layers": "metal_marlin.integrations.replace",
    "mps_tensor_to_metal_buffer": "metal_marlin.runtime.device_mps",
}

__all__ = [
    "MetalKernelLibrary",
    "QuantLinear",
    "QuantizedTensor",
    "SparseLinear",
    "SparseTensor",
    "__version__",
    "batched_linear",
    "dense_linear",
    "dequantize",
    "dispatch_kernel",
    "epilogue",
    "gated_activation",
    "gated_mlp",
    "gated_up",
    "get_shader_source",
    "grouped_scores",
    "layer_norm",
    "linear",
    "linear_decode",
    "linear_epilogue",
    "linear_few",
    "linear_packed",
    "linear_packed_sparse",
    "linear_residual",
    "linear_sparse",
    "linear_split",
    "metal_kernel",
    "mps_tensor_to_metal_buffer",
    "norm_linear",
    "norm_qkv",
    "prepack_layers",
    "prune_2_4",
    "prune_n_m",
    "quantize",
    "quantize_sparse",
    "replace_linear_layers",
    "rms_norm",
    "rms_norm_residual",
    "tune",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'metal_marlin' has no attribute '{name}'")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
