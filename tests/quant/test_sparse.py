"""Pruning and SparseTensor: n of m by magnitude and with a Hessian, storage, layouts, SparseLinear."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats.sparse import FORMATS, PATTERNS, pattern
from metal_marlin.nn.sparse import SparseLinear
from metal_marlin.quant import prune_2_4, prune_n_m, quantize, quantize_sparse

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def random(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def inputs(K: int) -> torch.Tensor:
    """Correlated, of different sizes."""
    rng = torch.Generator().manual_seed(3)
    mixed = torch.randn(4 * K, K, generator=rng) @ (torch.eye(K) + 0.7 * torch.randn(K, K, generator=rng) / K**0.5)
    return mixed * (0.2 + 2 * torch.rand(K, generator=rng))


def test_two_of_four_by_hand() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0, 0.5, 1.0, 1.0, 1.0, 1.0, 7.0, 0.0]])
    assert prune_2_4(weight).tolist() == [[0, -3, 2, 0, 1, 1, 0, 0, 7, 0]]
    assert prune_n_m(weight, 1, 4).tolist() == [[0, -3, 0, 0, 1, 0, 0, 0, 7, 0]]
    assert prune_n_m(weight[:, :8], 2, 8).tolist() == [[0, -3, 2, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (2, 8), (4, 8)])
@pytest.mark.parametrize("K", [256, 130])
def test_error_feedback_loses_less(n: int, m: int, K: int) -> None:
    weight, x = random(24, K), inputs(K)
    hessian = x.T @ x
    plain, better = prune_n_m(weight, n, m), prune_n_m(weight, n, m, hessian)
    for pruned in (plain, better):
        whole = torch.nn.functional.pad(pruned != 0, (0, -K % m)).unflatten(1, (-1, m)).sum(-1)
        assert int(whole.max()) == n
    lost = [((weight - pruned) @ x.T).square().sum() for pruned in (plain, better)]
    assert lost[1] < 0.8 * lost[0]
    # with uncorrelated inputs of one size there is nothing to make up for
    torch.testing.assert_close(prune_n_m(weight, n, m, torch.eye(K)), plain)


def test_error_feedback_beats_every_choice_without_it() -> None:
    weight, x = random(1, 4, 5).double(), inputs(4).double()
    found = prune_2_4(weight, x.T @ x, damping=0.0)
    plain = [prune(weight, kept) for kept in itertools.combinations(range(4), 2)]
    lost = [float((x @ (weight - w).T).square().sum()) for w in (found, *plain)]
    assert lost[0] < min(lost[1:])


def prune(weight: torch.Tensor, kept: tuple[int, ...]) -> torch.Tensor:
    mask = torch.zeros_like(weight)
    mask[:, list(kept)] = 1
    return weight * mask


def test_inputs_that_are_never_there() -> None:
    weight, x = random(8, 64), inputs(64)
    x[:, 5] = 0
    pruned = prune_2_4(weight, x.T @ x)
    assert torch.isfinite(pruned).all()
    assert (pruned[:, 5] == 0).float().mean() > 0.4


def test_damping_is_of_the_columns_that_there_are() -> None:
    """And not of those that fill the last group."""
    weight, x = random(8, 66), inputs(66)
    hessian = torch.block_diag(x.T @ x, torch.eye(2) * 1e9)[:68, :68]
    mean = float((x.T @ x).diagonal().mean())
    share = 0.1 * mean / float(hessian.diagonal().mean())
    wider = prune_2_4(torch.nn.functional.pad(weight, (0, 2)), hessian, share)
    torch.testing.assert_close(prune_2_4(weight, x.T @ x, 0.1), wider[:, :66])


def test_bad_pruning() -> None:
    weight = random(4, 16)
    with pytest.raises(ArgumentError, match="n = 4, m = 4"):
        prune_n_m(weight, 4, 4)
    with pytest.raises(ArgumentError, match="1 values are not finite"):
        prune_2_4(torch.where(weight == weight[0, 0], torch.nan, weight))
    with pytest.raises(ArgumentError, match=r"\(8, 8\); a weight with K = 16 needs \(16, 16\)"):
        prune_2_4(weight, torch.eye(8))
    with pytest.raises(ArgumentError, match="not positive definite"):
        prune_2_4(weight, -torch.eye(16))


@pytest.mark.parametrize("of", PATTERNS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("K", [128, 75])
def test_what_is_stored_is_what_was_kept(format: str, of: str, K: int) -> None:
    p = pattern(of)
    weight = prune_n_m(random(6, K), p.kept, p.of)
    found, dense = quantize_sparse(weight, of, format), quantize(weight, format)
    assert found.shape == (6, K)
    W = found.dequantize(torch.float64)
    torch.testing.assert_close(W, dense.dequantize(torch.float64), rtol=0, atol=0)
    assert (W[weight == 0] == 0).all()


BITS = {  # groups of 128 (mxfp4: 32, nvfp4: 16), as the documentation states them
    ("fp4", "2:4"): 3.125, ("int4", "2:4"): 3.125, ("mxfp4", "2:4"): 3.25, ("nvfp4", "2:4"): 3.5,
    ("fp4", "1:4"): 1.625, ("fp4", "2:8"): 1.875, ("fp4", "4:8"): 3.625,
}  # fmt: skip


@pytest.mark.parametrize(("format", "of"), BITS)
def test_stored_bits(format: str, of: str) -> None:
    p = pattern(of)
    group = {"mxfp4": 32, "nvfp4": 16}.get(format, 128)
    found = quantize_sparse(prune_n_m(random(64, 4096), p.kept, p.of), of, format, group)
    assert found.bits_per_weight == pytest.approx(BITS[format, of], abs=2e-3)  # nvfp4 has one factor more
    assert f"{of} {format}" in repr(found)


def test_zeros_are_no_weights() -> None:
    weight = prune_2_4(random(16, 64) + 0.8)
    found = quantize_sparse(weight, "2:4", "int4", 32, zeros="packed")
    assert (found.dequantize(torch.float64)[weight == 0] == 0).all()
    assert (found.dequantize(torch.float64) - weight).abs().max() < 0.2


def test_bad_sparse_weights() -> None:
    weight = random(4, 64)
    with pytest.raises(ArgumentError, match="row 0 has 4 weights that are not 0 in columns 0 to 3; 2:4 keeps 2"):
        quantize_sparse(weight)
    pruned = prune_2_4(weight)
    with pytest.raises(ArgumentError, match="int8"):
        quantize_sparse(pruned, format="int8")
    with pytest.raises(ArgumentError, match="3:4"):
        quantize_sparse(pruned, "3:4")
    with pytest.raises(ArgumentError, match=r"\(4, 0\); quantize_sparse takes \[N, K\] with K > 0"):
        quantize_sparse(pruned[:, :0])
    with pytest.raises(ArgumentError, match="N % 16"):
        quantize_sparse(pruned).prepack()
    assert quantize_sparse(pruned[:0]).shape == (0, 64)


GOOD = quantize_sparse(prune_2_4(random(4, 64)), group_size=32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"places": GOOD.places[:, :1]}, r"places: torch.int32 \(4, 1\); 2:4 of \(4, 64\) needs torch.int32 \(4, 2\)"),
        ({"places": GOOD.places.float()}, "places: torch.float32"),
        ({"codes": GOOD.codes.long()}, r"codes: torch.int64 \(4, 4\); .* needs torch.int32 \(4, 4\)"),
        ({"format": "int8"}, "format = 'int8'; sparse weights have fp4, mxfp4, nvfp4, int4"),
        ({"group_size": 48}, "group_size = 48; fp4 takes"),
        ({"zeros": "packed"}, "zeros = 'packed'; fp4 takes 'none'"),
        ({"pattern": "3:4"}, "pattern = '3:4'"),
        ({"layout": "mma8"}, "layout = 'mma8' with no powers"),
        ({"layout": "mma16"}, "layout = 'mma16' with no powers"),
        ({"scales": GOOD.scales.to("meta")}, "are on cpu, meta; they need one device"),
    ],
)
def test_tensors_that_do_not_belong_together(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(GOOD, **change)


def test_operand_order_is_undone() -> None:
    good = quantize_sparse(prune_2_4(random(48, 192)), group_size=32)
    packed = good.prepack()
    assert packed.prepack() is packed
    assert packed.layout == "mma16"
    back = packed.unpack()
    for name in ("codes", "places", "scales"):
        assert torch.equal(getattr(back, name), getattr(good, name)), name
    assert torch.equal(packed.dequantize(), good.dequantize())
    assert torch.equal(packed.prepack("canonical").codes, good.codes)


def test_what_can_be_in_operand_order() -> None:
    weight = prune_2_4(random(32, 128))
    for format, more in (("fp4", {}), ("int4", {}), ("mxfp4", {}), ("fp4", {"group_size": 128})):
        assert quantize_sparse(weight, "2:4", format, **({"group_size": 32} | more)).fits()
    for format, more in (("nvfp4", {}), ("fp4", {"group_size": 16}), ("int4", {"group_size": 32, "zeros": "point"})):
        found = quantize_sparse(weight, "2:4", format, **more)
        assert not found.fits(), found
        with pytest.raises(ArgumentError, match="groups of 32 or more"):
            found.prepack()
    for N, K in ((24, 128), (32, 96), (0, 128)):
        assert not quantize_sparse(weight.new_zeros(N, K), group_size=32).fits()
    assert not quantize_sparse(prune_n_m(random(32, 128), 1, 4), "1:4").fits()


def layer(of: str = "2:4", K: int = 192, bias: bool = True, dtype: torch.dtype = torch.float16) -> SparseLinear:
    p = pattern(of)
    weight = quantize_sparse(prune_n_m(random(48, K), p.kept, p.of), of, group_size=32, scale_dtype=dtype)
    return SparseLinear(weight, random(1, 48, 1)[0].to(dtype) if bias else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("of", "K"), [("2:4", 192), ("2:4", 83), ("1:4", 100), ("4:8", 64)])
def test_layer(of: str, K: int, device: str) -> None:
    made = layer(of, K, dtype=torch.float32).to(device)
    x = random(6, K, 2).view(2, 3, K)
    W = made.sparse().to("cpu").dequantize(torch.float64)
    want = x.double() @ W.T + made.bias.cpu().double()  # type: ignore[union-attr]
    torch.testing.assert_close(made(x.to(device)).cpu().double(), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArgumentError, match=f"the weight has K = {K}"):
        made(x[..., :5].to(device))
    with pytest.raises(ArgumentError, match=rf"SparseLinear: x has shape \(\); needs \[\.\.\., {K}\]"):
        made(x[0, 0, 0].to(device))


@pytest.mark.parametrize("device", DEVICES)
def test_layer_in_operand_order(device: str) -> None:
    made = layer().to(device)
    x = random(5, 192, 2).half().to(device)
    plain, state = made(x), made.state_dict()
    assert made.prepack() is made
    assert made.layout == "mma16"
    torch.testing.assert_close(made(x), plain, rtol=2e-3, atol=2e-3)
    for name, t in made.state_dict().items():
        assert torch.equal(t, state[name]), name
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x))
    other = SparseLinear(quantize_sparse(torch.zeros(48, 192), group_size=32), torch.zeros(48).half()).to(device)
    other.prepack().load_state_dict(state)
    assert torch.equal(other(x), plain)
    assert made.to(torch.bfloat16).layout == "canonical"
    assert made.weight_scale.dtype == torch.float16
    assert "pattern='2:4'" in repr(made)
    for dtype in (torch.bfloat16, torch.float32):  # loading would round
        with pytest.raises(RuntimeError, match=f"weight_scale: torch.float16; this fp4 layer needs {dtype}"):
            layer(dtype=dtype).to(device).load_state_dict(state)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", ["canonical", "mma16"])
def test_layer_compiles_takes_views_and_no_tokens(order: str, device: str) -> None:
    made = layer().to(device).prepack(order)
    x = random(12, 192, 2).half().to(device)
    y = made(x)
    whole = torch.compile(lambda x: made(x) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(whole(x.view(3, 4, 192)), (y + 1).view(3, 4, 48))
    assert torch.equal(made(x.T.contiguous().T), y)
    torch.testing.assert_close(made(x[::3]), y[::3], rtol=2e-3, atol=2e-3)  # fewer tokens: another tile
    shifted = torch.empty(12 * 192 + 1, dtype=x.dtype, device=device)[1:].view(12, 192).copy_(x)
    assert torch.equal(made(shifted), y)
    with torch.inference_mode():
        assert torch.equal(made(x), y)
    assert made(x[:0]).shape == (0, 48)
    assert made(x.view(3, 4, 192)[:, :0]).shape == (3, 0, 48)
    x.requires_grad_()
    made(x).sum().backward()
    exact = made.sparse().to("cpu").dequantize(torch.float64).sum(0)
    assert (x.grad.cpu().double() - exact).norm() <= 2e-3 * exact.norm() * 12**0.5  # type: ignore[union-attr]


@pytest.mark.cuda
@pytest.mark.parametrize("order", ["canonical", "mma16"])
def test_layer_in_a_cuda_graph(order: str, recorded: Callable[..., Callable[[], torch.Tensor]]) -> None:
    made, x = layer().to("cuda").prepack(order), random(5, 192, 2).half().cuda()
    y = made(x)
    assert torch.equal(recorded(lambda: made(x))(), y)
