"""The quantizer: load, run, save, reload, dequantise; fusion; what we rely on in transformers."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from metal_marlin.errors import ArgumentError, MetalMarlinError  # noqa: E402
from metal_marlin.formats import codec  # noqa: E402
from metal_marlin.integrations import transformers as ours  # noqa: E402
from metal_marlin.integrations.replace import replace_linear_layers  # noqa: E402
from metal_marlin.integrations.transformers.config import MetalMarlinConfig  # noqa: E402
from metal_marlin.integrations.transformers.fusion import Fusion, fuse  # noqa: E402
from metal_marlin.nn.group import LinearGroup  # noqa: E402
from metal_marlin.nn.linear import QuantLinear  # noqa: E402
from metal_marlin.nn.norm import RMSNorm  # noqa: E402
from metal_marlin.runtime.counters import counters, reset_counters  # noqa: E402

SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 32,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")


@pytest.fixture(autouse=True)
def registered() -> None:
    ours.register()


def tiny(kind: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def load(folder: str, **config: Any) -> Any:
    options = {"quantization_config": MetalMarlinConfig(**config)} if config else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


IDS = torch.arange(22).view(2, 11) * 7 % 300


def logits(model: Any, ids: torch.Tensor = IDS, **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "recipe",
    [{"preset": "default"}, {"format": "nvfp4"}, {"format": "int8", "skip": []}, {"format": "int4", "scale": "mse"}],
    ids=str,
)
def test_load_save_reload(recipe: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    source = saved(tiny(tie_word_embeddings=tied), tmp_path / "a")
    model = load(source, **recipe)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    head = "lm_head" in layers
    assert head == ("format" not in recipe or recipe.get("skip") == [])
    assert len(layers) == 14 + head
    # the weights are those that the codec makes of the source's
    weights = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    for name, layer in layers.items():
        form = codec(layer.format)
        made = form.encode(weights[f"{name}.weight"], layer.group_size, method=recipe.get("scale", "rtn"))
        assert torch.equal(layer.weight, made.codes), name
        assert torch.equal(layer.weight_scale, made.scales), name
    folder = saved(model, tmp_path / "b")
    held = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert held["quant_method"] == "metal_marlin"
    again = load(folder)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.get_input_embeddings().weight, weights["model.embed_tokens.weight"])
    twice = load(saved(again, tmp_path / "c"))
    assert torch.equal(logits(twice), logits(model))
    plain = load(folder, dequantize=True)
    assert not [m for m in plain.modules() if isinstance(m, QuantLinear)]
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_model_dequantize(tmp_path: Path) -> None:
    model = load(saved(tiny(), tmp_path), preset="default")
    wanted = logits(model)
    plain = model.dequantize()
    assert not [m for m in plain.modules() if isinstance(m, QuantLinear)]
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_keep_codes_and_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(tiny(), tmp_path / "a")
    wide, narrow = (
        transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=d, quantization_config=MetalMarlinConfig(format="int8")
        ).eval()
        for d in (torch.float32, dtype)
    )
    layer = narrow.model.layers[0].mlp.down_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype) == (torch.int32, torch.float16)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(saved(narrow, tmp_path / "b"), dtype=dtype).eval()
    assert torch.equal(reloaded.model.layers[0].mlp.down_proj.weight_scale, layer.weight_scale)
    assert torch.equal(logits(reloaded), logits(narrow))
    error = (logits(narrow).float() - logits(wide)).norm() / logits(wide).norm()
    assert error < 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_fused_models_compute_the_same(kind: str) -> None:
    model = tiny(kind)
    replace_linear_layers(model, preset="default")
    ids, mask = IDS, torch.ones_like(IDS)
    mask[0, :4] = 0  # left padding
    before = logits(model), logits(model, attention_mask=mask)
    generate = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    said = model.generate(ids, **generate)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    found = fuse(model)
    biased = kind == "Qwen2"  # its q, k and v have biases
    assert found == Fusion(2 if biased else 4, 2, 5 if kind != "Qwen3" else 9)
    for first, second in zip(before, (logits(model), logits(model, attention_mask=mask)), strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(ids, **generate), said)
    static = model.generate(ids, cache_implementation="static", **generate)
    assert torch.equal(static, said)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert fuse(model) == Fusion(0, 0, 0)


def test_rules_that_overlap_are_kept_in_order(tmp_path: Path) -> None:
    source = saved(tiny(), tmp_path / "a")
    rules = {"layers.1.*": "int8:32", "down_proj": "fp4:64", "*_proj": "fp4:32"}
    model = load(source, preset="default", per_layer=rules)
    assert [layer.mlp.down_proj.format for layer in model.model.layers] == ["fp4", "int8"]
    assert model.model.layers[0].self_attn.v_proj.group_size == 32
    again = load(saved(model, tmp_path / "b"))
    assert torch.equal(logits(again), logits(model))


def test_replaced_models_are_saved_whole(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    replace_linear_layers(model, preset="default", per_layer={"layers.0.*": "int8:32", "*_proj": "fp4:32"})
    again = load(saved(model, tmp_path))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)  # one of them is fused
    with pytest.raises(ArgumentError, match="15 linear layers are quantised already"):
        replace_linear_layers(again)


def test_copies_of_fused_models() -> None:
    model = tiny()
    replace_linear_layers(model, preset="default")
    fuse(model)
    wanted = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(m.group is None for m in twin.modules() if isinstance(m, QuantLinear))
        torch.testing.assert_close(logits(twin), wanted, rtol=1e-4, atol=1e-5)
        twin.model.layers[0].mlp.gate_proj.weight_scale.zero_()
        assert torch.equal(logits(model), wanted)
        fuse(twin)
        assert not torch.allclose(logits(twin), wanted)
    plain = copy.deepcopy(model).dequantize()
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_fused_models() -> None:
    model = tiny()
    replace_linear_layers(model, preset="default")
    grads = []
    for _ in range(2):
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits.sum().backward()
        grads.append(x.grad)
        fuse(model)
    assert grads[0].norm() > 0
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)


def test_groups_do_not_give_what_is_out_of_date() -> None:
    torch.manual_seed(0)
    layers = [QuantLinear.from_linear(torch.nn.Linear(64, n, bias=False)) for n in (32, 48)]
    LinearGroup(layers)
    with torch.no_grad():
        x = torch.randn(2, 64)
        layers[0](x)
        x.mul_(0)
        assert not layers[1](x).any()
        x = torch.randn(2, 64)
        layers[0](x)
        layers[1].weight_scale.zero_()
        assert not layers[1](x).any()
    with torch.inference_mode():
        x = torch.randn(2, 64)
        assert layers[0](x).any()
        x.mul_(0)
        assert not layers[0](x).any()


def test_groups_are_safe_for_threads() -> None:
    torch.manual_seed(0)
    layers = [QuantLinear.from_linear(torch.nn.Linear(64, n, bias=False)) for n in (32, 48)]
    xs = [torch.randn(1, 64) for _ in range(3)]
    with torch.no_grad():
        wanted = [[layer(x) for layer in layers] for x in xs]
    LinearGroup(layers)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(i: int) -> bool:
        with torch.no_grad():
            pairs = list(zip(layers, wanted[i], strict=True))
            return all(torch.equal(layer(xs[i]), y) for _ in range(500) for layer, y in pairs)

    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(work, range(3)))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("change", ["multiplier", "activation"])
def test_other_mlps_are_left_alone(change: str) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    class Other(LlamaMLP):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(0.5 * self.gate_proj(x)) * self.up_proj(x))

    torch.manual_seed(0)
    config = tiny().config
    mlp = Other(config) if change == "multiplier" else LlamaMLP(config)
    if change == "activation":
        mlp.act_fn = torch.nn.Mish()
    model = torch.nn.Sequential(mlp)
    replace_linear_layers(model)
    x = torch.randn(2, config.hidden_size)
    with torch.no_grad():
        wanted = model(x)
        assert fuse(model).mlps == 0
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_offloaded_models_are_not_fused(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    source = saved(load(saved(tiny(tie_word_embeddings=False), tmp_path / "a"), preset="default"), tmp_path / "b")
    wanted = logits(load(source))
    places = {f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
    places |= {"model.layers.1": "disk", "lm_head": "cpu"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, device_map=places, offload_folder=str(tmp_path / "off")
    )
    for _ in range(2):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_fusion_saves_launches() -> None:
    model = tiny()
    replace_linear_layers(model, preset="default")
    step = IDS[:1, :1]
    counts = []
    for _ in range(2):
        reset_counters()
        logits(model, step)
        counts.append(sum(counters().values()))
        fuse(model)
    assert counts == [15, 2 * 5 + 1 + 2 + 5]  # q with k, gate with up; two gates, five norms


def test_moving_a_fused_model_takes_it_apart() -> None:
    model = tiny()
    replace_linear_layers(model, preset="default")
    fuse(model)
    wanted = logits(model)
    model.to(torch.float32)
    assert all(m.group is None for m in model.modules() if isinstance(m, QuantLinear))
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    assert [m for m in model.modules() if isinstance(m, RMSNorm)]


def test_the_config(tmp_path: Path) -> None:
    config = MetalMarlinConfig(preset="default", per_layer={"o_proj": "int8"})
    assert config.per_layer == {"o_proj": "int8", "down_proj": "int8:64", "v_proj": "int8:64", "lm_head": "int8:64"}
    config = MetalMarlinConfig(preset="default", per_layer={"layers.1.*": "int8:32", "down_proj": "fp4:64"})
    assert list(config.per_layer.items())[:2] == [("layers.1.*", "int8:32"), ("down_proj", "fp4:64")]
    assert list(MetalMarlinConfig.from_dict(config.to_dict()).per_layer) == list(config.per_layer)
    with pytest.raises(ArgumentError, match="foo"):
        MetalMarlinConfig(per_layer={"down_proj": "foo"})
    with pytest.raises(ArgumentError, match="'nonsense' matches no linear layer"):
        load(saved(tiny(), tmp_path / "plain"), per_layer={"nonsense": "int8"})
    assert MetalMarlinConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    with pytest.raises(ArgumentError, match="format = 'int5'"):
        MetalMarlinConfig(format="int5")
    with pytest.raises(ArgumentError, match="scale = 'best'"):
        MetalMarlinConfig(scale="best")
    with pytest.raises(ArgumentError, match=r"layers\.0\.self_attn\.q_proj: group_size = 48"):
        load(saved(tiny(), tmp_path), format="fp4", group_size=48)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: Any) -> None:
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(saved(model, tmp_path), format="fp4")
    said = capfd.readouterr()
    assert "weight[3, 5] is nan" in said.out + said.err + caplog.text


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_registered", False)
    monkeypatch.setattr(ours, "OLDEST", (9, 1))
    with pytest.raises(MetalMarlinError, match=r"transformers \S+ is installed; .* >= 9\.1, < 5\.25"):
        ours.register()


class TestPrivateNames:
    """Each name that is not part of transformers' public interface, and what we rely on of it."""

    def test_loading_attributes(self) -> None:
        from transformers.quantizers import auto

        assert MetalMarlinConfig in auto.LOADING_ATTRIBUTES_CONFIG_TYPES, "dequantize=True would be dropped at load"
        assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["metal_marlin"] is MetalMarlinConfig
        assert "metal_marlin" in auto.AUTO_QUANTIZER_MAPPING

    def test_quantizer_hooks(self) -> None:
        from transformers.quantizers.base import HfQuantizer

        for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading", "_dequantize",
                     "param_needs_quantization", "get_quantize_ops", "is_serializable"):  # fmt: skip
            assert callable(getattr(HfQuantizer, name)), f"{name} is gone: the quantizer would do nothing"

    def test_conversion_ops_get_names_and_model(self) -> None:
        from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

        assert callable(ConversionOps.convert)
        source = inspect.getsource(WeightRenaming.convert) + inspect.getsource(WeightConverter.convert)
        assert "full_layer_name" in source, "quantising needs the layer's name"
        assert "quantization_operation" in source, "on-the-fly quantisation would not be called"

    def test_tied_keys(self) -> None:
        model = tiny(tie_word_embeddings=True)
        assert "lm_head.weight" in model.all_tied_weights_keys, "a tied head would be quantised before it has a weight"
