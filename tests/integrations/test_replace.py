"""replace_linear_layers on small models."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from metal_marlin.errors import ArgumentError
from metal_marlin.integrations.replace import matches, replace_linear_layers
from metal_marlin.nn.linear import QuantLinear


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v_proj = nn.Linear(64, 32)
        self.down_proj = nn.Linear(32, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(self.v_proj(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(48, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(4, 4, 3)
        self.lm_head = nn.Linear(64, 48, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def test_patterns() -> None:
    assert matches("layers.0.v_proj", "v_proj")
    assert matches("layers.0.v_proj", "layers.*")
    assert matches("layers.0.v_proj", r"re:layers\.[01]\.v")
    assert not matches("layers.0.kv_proj", "v_proj")


def test_default_preset_and_tied_head() -> None:
    model = Model()
    before = copy.deepcopy(model)
    calls: list[tuple[int, int, str]] = []
    report = replace_linear_layers(model, preset="default", progress=lambda *a: calls.append(a))
    assert {r.name: r.format for r in report.layers} == {
        "layers.0.v_proj": "int8",
        "layers.0.down_proj": "int8",
        "layers.1.v_proj": "int8",
        "layers.1.down_proj": "int8",
        "lm_head": "int8",
    }
    assert calls[-1] == (5, 5, "lm_head")
    assert torch.equal(model.embed.weight, before.embed.weight)
    assert isinstance(model.embed.weight, nn.Parameter)
    assert set(report.skipped) == {"embed", "conv"}
    ids = torch.arange(48).view(2, 24)
    assert (model(ids) - before(ids)).norm() < 0.02 * before(ids).norm()
    for r in report.layers:
        weight, made = before.get_submodule(r.name).weight.detach(), model.get_submodule(r.name)
        assert isinstance(made, QuantLinear)
        wrong = made.quantized().dequantize(torch.float64) - weight
        assert r.error == pytest.approx(float(wrong.norm() / weight.double().norm()), rel=1e-4)
        assert r.bytes_before == 4 * weight.numel()
    assert report.bytes_after < 0.3 * report.bytes_before
    with pytest.raises(ArgumentError, match="5 linear layers are quantised already"):
        replace_linear_layers(model)


def test_per_layer_and_skip() -> None:
    model = Model()
    report = replace_linear_layers(model, per_layer={"layers.1.v_proj": "int4:K"}, skip=["lm_head", "down_proj"])
    found = {r.name: (r.format, r.group_size) for r in report.layers}
    assert found == {"layers.0.v_proj": ("fp4", 64), "layers.1.v_proj": ("int4", 64)}
    assert report.skipped["lm_head"] == "skip"
    assert type(model.lm_head) is nn.Linear


def test_errors_come_before_changes() -> None:
    for options, said in [
        ({"per_layer": {"q_proj": "int8"}}, "'q_proj' matches no linear layer"),
        ({"per_layer": {"v_proj": "int9"}}, r"layers\.0\.v_proj: format = 'int9'"),
        ({"group_size": 48}, "group_size = 48"),
        ({"preset": "best"}, "'best'; there are"),
        ({"skip": ["*"]}, "nothing to replace"),
    ]:
        model = Model()
        with pytest.raises(ArgumentError, match=said):
            replace_linear_layers(model, **options)  # type: ignore[arg-type]
        assert not any(isinstance(m, QuantLinear) for m in model.modules())


def test_shared_layers_stay_shared_and_old_weights_go() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8)})
    model["c"] = model["a"]
    old = [weakref.ref(model[name].weight) for name in "ab"]
    alive: list[bool] = []
    report = replace_linear_layers(model, progress=lambda *_: (gc.collect(), alive.append(old[0]() is not None)))
    assert model["c"] is model["a"]
    assert len(report.layers) == 2
    assert alive == [False, False]
    assert old[1]() is None


def test_what_reads_its_own_weight_is_left_alone() -> None:
    class Odd(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"odd": Odd(64, 8), "plain": nn.Linear(64, 8), "mha": nn.MultiheadAttention(64, 2)})
    report = replace_linear_layers(model)
    assert [r.name for r in report.layers] == ["plain"]
    assert set(report.skipped) == {"odd", "mha", "mha.out_proj"}


def test_a_value_that_is_not_finite_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    with pytest.raises(ArgumentError, match=r"0: weight\[1, 2\] is nan"):
        replace_linear_layers(model)


def test_a_transformers_model_generates() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    twin, decoded = copy.deepcopy(model), copy.deepcopy(model)
    report = replace_linear_layers(model, preset="default")
    assert len(report.layers) == 15
    decoded.lm_head.weight = nn.Parameter(decoded.lm_head.weight.detach().clone())
    with torch.no_grad():
        for r in report.layers:
            made = model.get_submodule(r.name).quantized()
            decoded.get_submodule(r.name).weight.copy_(made.dequantize(torch.float32))
    ids = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, decoded(ids).logits, rtol=2e-3, atol=2e-3)
        new = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert new.shape == (1, 16)
    replace_linear_layers(twin, preset="default")
    twin.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
