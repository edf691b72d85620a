"""QuantLinear against the product with its weights decoded, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from metal_marlin.errors import ArgumentError
from metal_marlin.nn.group import LinearGroup
from metal_marlin.nn.linear import QuantLinear


def make(K: int = 96, N: int = 24, bias: bool = True, format: str = "fp4") -> tuple[nn.Linear, QuantLinear]:
    torch.manual_seed(0)
    layer = nn.Linear(K, N, bias)
    return layer, QuantLinear.from_linear(layer, format)


DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("format", ["fp4", "int8", "uint8", "nvfp4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("K", [96, 83])
def test_forward(format: str, bias: bool, K: int, device: str) -> None:
    layer, quant = make(K, 24, bias, format)
    weight = quant.quantized().dequantize(torch.float64)
    quant = quant.to(device)
    torch.testing.assert_close(quant.quantized().dequantize(torch.float32).cpu(), weight.float())
    for shape in ((K,), (1, K), (2, 3, K), (20, K)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = x.double() @ weight.T + (layer.bias.detach().double() if bias else 0)
        torch.testing.assert_close(quant(x.to(device)).cpu().double(), expected, rtol=1e-4, atol=1e-4)
    turned = torch.randn(K, 3, device=device).T
    torch.testing.assert_close(quant(turned), quant(turned.contiguous()))


def test_wrong_width() -> None:
    with pytest.raises(ArgumentError, match="x has K = 90, the weight has K = 83"):
        make(83)[1](torch.zeros(2, 90))
    layers = [make(83, 24, False)[1] for _ in range(3)]
    LinearGroup(layers[1:])
    for layer in layers:
        with pytest.raises(ArgumentError, match=r"QuantLinear: x has shape \(\); needs \[\.\.\., 83\]"):
            layer(torch.tensor(1.0))


def test_dtypes_survive_to() -> None:
    quant = make()[1]
    before = copy.deepcopy(quant.quantized())
    for move in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.to("cpu")):
        assert move(quant) is quant
        assert quant.quantized().equal(before)
    assert quant.bias is not None
    assert quant.bias.dtype == torch.float64
    wide = QuantLinear.from_linear(nn.Linear(64, 8), scale_dtype=torch.float32).to(torch.bfloat16)
    assert wide.weight_scale.dtype == torch.float32
    assert wide(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert quant.to("meta").weight.is_meta


def test_copies_and_state_dict() -> None:
    quant, x = make()[1], torch.randn(2, 96)
    for twin in (copy.deepcopy(quant), pickle.loads(pickle.dumps(quant))):
        assert torch.equal(twin(x), quant(x))
    state = quant.state_dict()
    assert list(state) == ["weight", "weight_scale", "bias"]
    other = QuantLinear.from_linear(nn.Linear(96, 24))
    assert not torch.equal(other(x), quant(x))
    other.load_state_dict(state)
    assert torch.equal(other(x), quant(x))
    with pytest.raises(RuntimeError, match=r"weight_scale: torch\.float32; this fp4 layer needs torch\.float16"):
        other.load_state_dict({**state, "weight_scale": state["weight_scale"].float()})
    assert "format='fp4', group_size=64" in repr(quant)


def test_gradient_of_x() -> None:
    quant = make()[1]
    x = torch.randn(3, 96, requires_grad=True)
    quant(x).sum().backward()
    expected = quant.quantized().dequantize(torch.float64).sum(0).expand(3, 96)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("K", [96, 83])
def test_compiles_as_one_graph_and_takes_no_tokens(K: int, device: str) -> None:
    quant = make(K)[1].to(device)
    whole = torch.compile(lambda x: quant(x * 2) + quant(x), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((1, K), (2, 3, K), (40, K)):
            x = torch.randn(shape, device=device)
            assert torch.equal(whole(x), quant(x * 2) + quant(x))
    for shape in ((0, K), (2, 0, K)):
        assert quant(torch.empty(shape, device=device)).shape == (*shape[:-1], 24)


@pytest.mark.cuda
@pytest.mark.parametrize("M", [1, 5, 40])
def test_in_a_cuda_graph(M: int, recorded: Callable[..., Callable[[], torch.Tensor]]) -> None:
    quant, x = make()[1].to("cuda"), torch.randn(M, 96, device="cuda").half()
    quant.half()
    y = quant(x)
    assert torch.equal(recorded(lambda: quant(x))(), y)
