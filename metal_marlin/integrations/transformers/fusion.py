"""fuse(): fewer launches for decoder models whose linear layers are ours.

Projections of one input (q, k, v; gate, up) are computed together where their formats agree, RMS norms and gated
activations by one kernel each. Modules keep their names and weights, so saving and reloading know nothing of it.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metal_marlin.nn.group import LinearGroup
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.nn.norm import RMSNorm
from metal_marlin.ops.activation import gated_activation

# names of layers that read the same input; of the module they are in
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# transformers' names of activations -> ours
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
}
# classes of norms that compute weight * normalised(x) as ours does -> what is added to the weight
NORMS = {"LlamaRMSNorm": 0.0, "MistralRMSNorm": 0.0, "Qwen2RMSNorm": 0.0, "Qwen3RMSNorm": 0.0}


@dataclass(frozen=True)
class Fusion:
    """What fuse() changed: groups of projections, gated MLPs, norms."""

    groups: int
    mlps: int
    norms: int


def fuse(model: nn.Module) -> Fusion:
    """Fuse what can be fused, in place; a model without our layers, or already fused, stays as it is.

    Layers whose weights are elsewhere until they are used (offloaded) are left alone. Copies of a model are not fused.
    """
    groups = mlps = norms = 0
    for module in list(model.modules()):
        for names in PROJECTIONS:
            groups += len(_group(module, names))
        mlps += _fuse_mlp(module)
        children: list[tuple[str, Any]] = list(module.named_children())
        for name, child in children:
            offset = NORMS.get(type(child).__name__)
            if offset is not None and any(isinstance(m, QuantLinear) for m in model.modules()):
                setattr(module, name, RMSNorm(child.weight, child.variance_epsilon, offset).train(child.training))
                norms += 1
    return Fusion(groups, mlps, norms)


def _group(module: nn.Module, names: tuple[str, ...]) -> list[LinearGroup]:
    """Groups of those of the layers that agree in format, group size and zeros."""
    layers: list[Any] = [getattr(module, name, None) for name in names]
    kinds: dict[tuple[object, ...], list[QuantLinear]] = {}
    for layer in layers:
        if type(layer) is QuantLinear and layer.bias is None and layer.group is None and not _offloaded(layer):
            kind = layer.format, layer.group_size, layer.zeros, layer.in_features, layer.weight_scale.dtype
            if layer.format != "nvfp4":  # each has a scale of its own for the whole tensor
                kinds.setdefault(kind, []).append(layer)
    return [LinearGroup(found) for found in kinds.values() if len(found) > 1]


def _offloaded(layer: QuantLinear) -> bool:
    return bool(layer.weight.is_meta) or hasattr(layer, "_hf_hook")


def _standard_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward that is fused: classes whose code is another (clamps, multipliers, dropout) stay as they are."""
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504 (the same code as transformers')


def _is_standard(forward: Any) -> bool:
    ours, theirs = _standard_mlp.__code__, getattr(forward, "__code__", None)
    return theirs is not None and (ours.co_code, ours.co_names) == (theirs.co_code, theirs.co_names)


def _activation(module: Any) -> str | None:
    """Our name of a module's activation."""
    from transformers.activations import ACT2FN

    kind = type(getattr(module, "act_fn", None))
    return next((ours for theirs, ours in ACTIVATIONS.items() if type(ACT2FN[theirs]) is kind), None)


def _fuse_mlp(module: nn.Module) -> bool:
    """Give a gated MLP whose gate and up are one group a forward with one kernel for act(gate) · up."""
    gate: Any = getattr(module, "gate_proj", None)
    up: Any = getattr(module, "up_proj", None)
    down: Any = getattr(module, "down_proj", None)
    if not isinstance(gate, QuantLinear) or not isinstance(up, QuantLinear) or down is None:
        return False
    if gate.group is None or gate.group is not up.group or "forward" in module.__dict__:
        return False
    activation = _activation(module)
    if activation is None or not _is_standard(type(module).forward):
        return False
    module.forward = types.MethodType(_mlp_forward(activation), module)
    return True


def _mlp_forward(activation: str) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        group = getattr(self.gate_proj, "group", None)  # gone when the model has moved or was dequantised
        if group is None or torch.compiler.is_compiling():
            return type(self).forward(self, x)
        return self.down_proj(gated_activation(group.whole(x), activation))

    return forward
