"""Products of other libraries on NVIDIA GPUs, with data of their own that is checked first: humming and gemlite.

    pip install humming-kernels gemlite

humming compiles a kernel for every shape and number of tokens with NVRTC (HUMMING_COMPILER=nvcc: with nvcc) and keeps
it in ~/.humming; its own heuristics say which. gemlite times a few configurations of its Triton kernels for every
shape, but for those in the file it has for a kind of GPU; for all of compute capability 9.0 that is the H100's here.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from common import Candidate, require_correct

GROUP = 128
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LIMIT = 5e-3
_CHECKED = 64  # rows of x


def has_humming(N: int, K: int, device: str) -> bool:
    """Whether humming is installed and has tiles for W [N, K]."""
    return _on_cuda("humming", device) and N % 128 == K % GROUP == 0


def humming(M: int, N: int, K: int, device: str, sets: int) -> tuple[Candidate, int, float]:
    """humming's product: x half, w = e2m1 * scale with half scales in groups of 128; bytes of W; its error."""
    from humming.forward import humming_forward
    from humming.tune import get_heuristics_config

    weight, config, copies = _humming_weight(N, K, device, sets)
    with torch.cuda.device(device):
        tuning = json.dumps(get_heuristics_config(config, shape_m=M))
    x, out = _x(M, K, device), torch.empty(M, N, dtype=torch.float16, device=device)

    def run(i: int) -> torch.Tensor:
        humming_forward(config, inputs=x, outputs=out, tuning_config=tuning, **copies[i])
        return out

    error = _error("humming", run, x, weight, sets)
    return run, N * K // 2 + 2 * N * K // GROUP, error


@functools.lru_cache(maxsize=1)
def _humming_weight(N: int, K: int, device: str, sets: int) -> tuple[torch.Tensor, Any, list[dict[str, torch.Tensor]]]:
    """W, how humming has it, and copies of what it is made of."""
    from humming.layer import HummingLayer

    weight = _e2m1_weight(N, K, device)
    with torch.cuda.device(device):
        described = {"dtype": "float4e2m1", "group_size": GROUP}
        layer = HummingLayer(shape_n=N, shape_k=K, weight_config=described, torch_dtype=torch.float16).to(device)
        layer.load_from_unquantized(weight)  # exactly: every group has a largest value
        layer.transform()
    names = ("weight", "weight_scale", "weight_scale_2", "locks")
    held = {name: t.detach() for name in names if (t := getattr(layer, name, None)) is not None}
    return weight, layer.humming_config, [held, *({n: t.clone() for n, t in held.items()} for _ in range(sets - 1))]


def has_gemlite(N: int, K: int, device: str) -> bool:
    """Whether gemlite is installed and takes W [N, K]."""
    return _on_cuda("gemlite", device) and N % 32 == K % GROUP == 0


def gemlite(M: int, N: int, K: int, device: str, sets: int) -> tuple[Candidate, int, float]:
    """gemlite's product: x half, w = (q - 8) * scale with four bits and half scales in groups of 128; bytes of W; its
    error."""
    library, (weight, meta, copies) = _gemlite(), _gemlite_weight(N, K, device, sets)
    x = _x(M, K, device)

    def run(i: int) -> torch.Tensor:
        return library.forward_functional(x, None, copies[i], meta)

    return run, N * K // 2 + 4 * N * K // GROUP, _error("gemlite", run, x, weight, sets)


@functools.lru_cache(maxsize=1)
def _gemlite_weight(N: int, K: int, device: str, sets: int) -> tuple[torch.Tensor, Any, list[list[torch.Tensor]]]:
    """W, how gemlite has it, and copies of what it is made of."""
    library, rng = _gemlite(), torch.Generator(device).manual_seed(1)
    q = torch.randint(0, 16, (N, K), generator=rng, dtype=torch.uint8, device=device)
    scales = (0.002 + 0.02 * torch.rand(N, K // GROUP, generator=rng, device=device)).half()
    half = library.DType.FP16
    sizes = {"group_size": GROUP, "in_features": K, "out_features": N}
    layer = library.GemLiteLinear(4, **sizes, input_dtype=half, output_dtype=half)
    layer.pack(q, scales, torch.full_like(scales, 8), None)
    held = [t.detach() for t in layer.get_tensor_args()]
    weight = (q.float() - 8) * scales.float().repeat_interleave(GROUP, 1)
    return weight, layer.get_meta_args(), [held, *([t.clone() for t in held] for _ in range(sets - 1))]


def _on_cuda(package: str, device: str) -> bool:
    return device.startswith("cuda") and importlib.util.find_spec(package) is not None


def _x(M: int, K: int, device: str) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(2)).half().to(device)


def _e2m1_weight(N: int, K: int, device: str) -> torch.Tensor:
    """Float32 weights that four bits and half scales hold exactly, if a group's scale is its largest value over 6."""
    rng = torch.Generator(device).manual_seed(1)
    codes = torch.randint(0, 16, (N, K // GROUP, GROUP), generator=rng, device=device)
    codes[:, :, 0] = 7
    values = torch.tensor([*_E2M1, *(-v for v in _E2M1)], device=device)[codes]
    scales = (0.002 + 0.02 * torch.rand(N, K // GROUP, 1, generator=rng, device=device)).half().float()
    return (values * scales).view(N, K)


def _error(name: str, run: Candidate, x: torch.Tensor, weight: torch.Tensor, sets: int) -> float:
    """The largest error of the first and the last copy against float64."""
    wanted = x[:_CHECKED].double() @ weight.double().T
    got = [run(i)[:_CHECKED].clone() for i in {0, sets - 1}]  # type: ignore[index]
    return max(require_correct(name, y, wanted, _LIMIT) for y in got)


@functools.cache
def _gemlite() -> Any:
    import gemlite as library
    from gemlite import core

    if not core.GEMLITE_TRITON_CONFIG_CACHE and torch.cuda.get_device_capability() == (9, 0):
        library.load_config(str(Path(library.__file__).parent / "configs" / "h100.json"))
    return library
