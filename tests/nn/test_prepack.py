"""Layers in operand order: one, a group's, a model's; what state dicts, copies and moves make of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from metal_marlin.errors import ArgumentError
from metal_marlin.nn import prepack as home
from metal_marlin.nn.group import LinearGroup
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.nn.prepack import prepack_layers
from metal_marlin.nn.sparse import SparseLinear
from metal_marlin.quant import prune_2_4, quantize_sparse
from metal_marlin.runtime.counters import counters

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
X = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)).half()


def make(N: int = 48, K: int = 128, format: str = "fp4", bias: bool = False, zeros: str | None = None) -> QuantLinear:
    torch.manual_seed(N)
    return QuantLinear.from_linear(nn.Linear(K, N, bias).half(), format, 64 if format != "nvfp4" else 16, zeros=zeros)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("format", "zeros"),
    [
        *(("fp4", None), ("nvfp4", None), ("int4", "packed"), ("int4", "bias"), ("uint8", "point")),
        *(("int2", None), ("int3", None), ("nf3", None)),
    ],
)
def test_a_layer(format: str, zeros: str | None, device: str) -> None:
    layer, x = make(format=format, bias=True, zeros=zeros).to(device), X.to(device)
    plain, state = layer(x), layer.state_dict()
    before = counters()
    close(layer.prepack()(x), plain)
    assert any(row.startswith(f"packed_gemm_{format}") for row in counters() - before)
    assert list(layer.state_dict()) == list(state)
    for name, t in layer.state_dict().items():
        assert torch.equal(t, state[name]), name
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    whole = torch.compile(layer, fullgraph=True, backend="eager")(x)
    assert torch.equal(whole, layer(x))
    other = make(format=format, bias=True, zeros=zeros).to(device).prepack()
    other.load_state_dict(state)
    assert other.layout == "canonical"
    assert torch.equal(other(x), plain)
    assert layer.float().layout == "canonical"
    assert torch.equal(layer.half()(x), plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["fp4", "int3"])
def test_a_layer_takes_views_and_no_tokens(format: str, device: str) -> None:
    layer, x = make(format=format, bias=True).to(device).prepack(), torch.cat([X, X[:3]]).to(device)
    y = layer(x)
    with torch.no_grad():
        whole = torch.compile(lambda x: layer(x) + 1, fullgraph=True, backend="aot_eager")
        assert torch.equal(whole(x.view(2, 4, 128)), (y + 1).view(2, 4, 48))
    assert torch.equal(layer(x.T.contiguous().T), y)
    close(layer(x[::3]), y[::3])  # fewer tokens: another tile
    shifted = torch.empty(8 * 128 + 1, dtype=x.dtype, device=device)[1:].view(8, 128).copy_(x)
    assert torch.equal(layer(shifted), y)
    assert layer(x[:0]).shape == (0, 48)
    assert layer(x.view(2, 4, 128)[:, :0]).shape == (2, 0, 48)


@pytest.mark.cuda
@pytest.mark.parametrize("format", ["fp4", "mxfp4", "int3"])
def test_a_layer_in_a_cuda_graph(format: str, recorded: Callable[..., Callable[[], torch.Tensor]]) -> None:
    torch.manual_seed(0)
    group = 32 if format == "mxfp4" else 64
    layer, x = QuantLinear.from_linear(nn.Linear(128, 48).half(), format, group).to("cuda").prepack(), X.cuda()
    y = layer(x)
    assert torch.equal(recorded(lambda: layer(x))(), y)


def test_a_layer_that_cannot() -> None:
    for layer in (make(40), make(K=96), make(K=96, format="int3")):
        with pytest.raises(ArgumentError, match="N a multiple of 16"):
            layer.prepack()
        assert layer.layout == "canonical"


@pytest.mark.parametrize("device", DEVICES)
def test_a_group(device: str) -> None:
    layers, x = [make(N).to(device) for N in (48, 32, 16)], X.to(device)
    plain = [layer(x) for layer in layers]
    group = LinearGroup(layers)
    layers[1].prepack()
    assert [layer.layout for layer in layers] == ["mma16"] * 3
    before = counters()
    for layer, y in zip(layers, plain, strict=True):
        close(layer(x), y)
    assert sum((counters() - before).values()) == 1
    for layer, y in zip(layers, plain, strict=True):
        close(layer.alone(x), y)
        assert layer.group is group
    with torch.inference_mode():
        close(layers[2](x.clone()), plain[2])
    left = layers[0].float().half()
    assert (left.group, left.layout) == (None, "canonical")
    assert torch.equal(left(x), plain[0])
    close(layers[1](x), plain[1])
    group.prepack("canonical")
    assert left.group is None
    assert torch.equal(layers[1](x), plain[1])
    odd = [make(N).to(device) for N in (48, 24)]
    LinearGroup(odd)
    with pytest.raises(ArgumentError, match="48, 24 rows"):
        odd[0].prepack()


def model() -> nn.ModuleDict:
    parts = {
        "plain": make(),
        "odd": make(40),
        "three": make(format="int3"),
        "q": make(32),
        "k": make(16),
        "wide": QuantLinear.from_linear(nn.Linear(128, 32, bias=False), scale_dtype=torch.float32),
        "sparse": SparseLinear(quantize_sparse(prune_2_4(torch.randn(32, 128)))),
        "dense": nn.Linear(128, 32),
    }
    LinearGroup([parts["q"], parts["k"]])  # type: ignore[list-item]
    return nn.ModuleDict(parts)


def test_a_model_where_no_device_has_kernels_for_it() -> None:
    assert prepack_layers(model(), torch.float16) == []


def check_model(made: nn.ModuleDict, x: torch.Tensor) -> None:
    usual = [name for name in made if name not in ("wide", "dense")]
    plain = {name: made[name](x) for name in usual}
    assert prepack_layers(made, torch.float32) == []
    assert prepack_layers(made, torch.bfloat16) == []
    assert prepack_layers(made, torch.float16) == ["plain", "three", "q", "k", "sparse"]
    assert prepack_layers(made, torch.float16) == ["plain", "three", "q", "k", "sparse"]
    for name, y in plain.items():
        close(made[name](x), y)


def test_a_model_as_if_there_were_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(home, "has_kernels", lambda _: True)
    check_model(model(), X)


@pytest.mark.cuda
def test_a_model_on_a_gpu() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("compute capability 9.0")
    made = model()
    for layer in made.values():
        if isinstance(layer, nn.Linear):
            layer.half()
    check_model(made.to("cuda"), X.cuda())
