"""Linear layers of a model on quantised weights: each runs in one kernel of the library."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch

from metal_marlin.formats import codec
from metal_marlin.ops.linear import linear

# Rules of a recipe: (pattern of layer names, format, group size); the first that fits counts.
Recipe = tuple[tuple[str, str, int], ...]
INT8: Recipe = (("*", "int8", 64),)
FP4: Recipe = (("lm_head", "int8", 64), ("*", "fp4", 64))
PRESET: Recipe = (("lm_head", "int8", 64), ("*.v_proj", "int8", 64), ("*.down_proj", "int8", 64), ("*", "fp4", 64))


class QuantisedLinear(torch.nn.Module):
    """y = x · Wᵀ with W in ``format``; the weight of a torch layer rounded to nearest."""

    def __init__(self, layer: torch.nn.Linear, name: str, group_size: int) -> None:
        super().__init__()
        if layer.bias is not None:
            raise ValueError("this example has no bias")
        encoded = codec(name).encode(layer.weight.detach().float(), group_size, scale_dtype=torch.float16)
        self.format, self.group_size = name, group_size
        self.register_buffer("codes", encoded.codes)
        self.register_buffer("scales", encoded.scales)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x.contiguous(), self.codes, self.scales, self.group_size, format=self.format)

    def decoded(self) -> torch.nn.Linear:
        """The same weights as a float32 torch layer: what the kernels are compared with."""
        weight = codec(self.format).decode(self.codes, self.scales, None, self.group_size, dtype=torch.float32)
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        return layer


def rule(recipe: Recipe, name: str) -> tuple[str, int]:
    """Format and group size of a layer."""
    for pattern, form, group_size in recipe:
        if fnmatchcase(name, pattern):
            return form, group_size
    raise ValueError(f"no rule for {name}")


def quantise(model: torch.nn.Module, recipe: Recipe) -> int:
    """Replace every torch linear of ``model`` in place; how many there were."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name, layer in layers:
        model.set_submodule(name, QuantisedLinear(layer, *rule(recipe, name)))
    return len(layers)


def decode(model: torch.nn.Module) -> None:
    """Put the decoded torch layers in the place of the quantised ones."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantisedLinear)]:
        model.set_submodule(name, layer.decoded())
