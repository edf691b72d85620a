"""Checkpoints written here by the rules of other libraries' layouts, imported: the same weights, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

from metal_marlin.errors import ArgumentError  # noqa: E402
from metal_marlin.formats import codec  # noqa: E402
from metal_marlin.integrations import transformers as ours  # noqa: E402
from metal_marlin.integrations.transformers.importers import import_checkpoint  # noqa: E402
from metal_marlin.nn.linear import QuantLinear  # noqa: E402

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
Layer = tuple[dict[str, torch.Tensor], torch.Tensor]  # tensors by the ends of their names, weights in float64


def bits_to_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint codes [..., n] to int32 [..., n · bits / 32], least significant first."""
    per = 32 // bits
    parts = codes.long().view(*codes.shape[:-1], -1, per) << torch.arange(0, 32, bits)
    words = parts.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def mlx(bits: int) -> Any:
    def make(N: int, K: int, rng: torch.Generator) -> Layer:
        q = torch.randint(0, 1 << bits, (N, K), generator=rng)
        scales = (torch.rand(N, K // 32, generator=rng) / 50).bfloat16()
        biases = (torch.randn(N, K // 32, generator=rng) / 10).bfloat16()
        weight = q.double() * scales.double().repeat_interleave(32, 1) + biases.double().repeat_interleave(32, 1)
        words = bits_to_words(q, bits).view(torch.uint32)
        return {"weight": words, "scales": scales, "biases": biases}, weight

    return make


def packed(bits: int, symmetric: bool) -> Any:
    def make(N: int, K: int, rng: torch.Generator) -> Layer:
        half = 1 << (bits - 1)
        q = torch.randint(-half, half, (N, K), generator=rng)
        scale = (torch.rand(N, K // 32, generator=rng) / 50).half()
        zero = (
            torch.zeros(N, K // 32, dtype=torch.long)
            if symmetric
            else torch.randint(-half, half, (N, K // 32), generator=rng)
        )
        tensors = {
            "weight_packed": bits_to_words(q + half, bits),
            "weight_scale": scale,
            "weight_shape": torch.tensor([N, K]),
        }
        if not symmetric:  # packed along N
            tensors["weight_zero_point"] = bits_to_words((zero + half).T.contiguous(), bits).T.contiguous()
        weight = (q - zero.repeat_interleave(32, 1)).double() * scale.double().repeat_interleave(32, 1)
        return tensors, weight

    return make


def nibbles(codes: torch.Tensor) -> torch.Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def nvfp4(N: int, K: int, rng: torch.Generator) -> Layer:
    q = torch.randint(0, 16, (N, K), generator=rng)
    scale = (torch.rand(N, K // 16, generator=rng) * 400).to(torch.float8_e4m3fn)
    tensors = {"weight_packed": nibbles(q), "weight_scale": scale, "weight_global_scale": torch.tensor([4096.0])}
    return tensors, E2M1[q] * scale.double().repeat_interleave(16, 1) / 4096


def mxfp4(blocks: bool) -> Any:
    def make(N: int, K: int, rng: torch.Generator) -> Layer:
        q = torch.randint(0, 16, (N, K), generator=rng)
        scale = torch.randint(118, 124, (N, K // 32), generator=rng).to(torch.uint8)
        weight = E2M1[q] * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
        if blocks:
            return {"weight_blocks": nibbles(q).view(N, K // 32, 16), "weight_scales": scale}, weight
        return {"weight_packed": nibbles(q), "weight_scale": scale}, weight

    return make


def compressed(kind: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "compressed-tensors", "format": kind}}


LAYOUTS = {
    "mlx-4": (mlx(4), {"quantization": {"group_size": 32, "bits": 4}}, "int4:32:bias:bf16"),
    "mlx-8": (mlx(8), {"quantization": {"group_size": 32, "bits": 8}}, "uint8:32:bias:bf16"),
    "int4": (packed(4, True), compressed("pack-quantized"), "int4:32:none:half"),
    "int4-zeros": (packed(4, False), compressed("pack-quantized"), "int4:32:packed:half"),
    "int8": (packed(8, True), compressed("pack-quantized"), "int8:32:none:half"),
    "nvfp4": (nvfp4, compressed("nvfp4-pack-quantized"), "nvfp4:16:none:u8"),
    "mxfp4": (mxfp4(True), {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4:32:none:u8"),
    "mxfp4-packed": (mxfp4(False), compressed("mxfp4-pack-quantized"), "mxfp4:32:none:u8"),
}


def checkpoint(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """A tiny Llama in the layout; weights of its linear layers in float64."""
    make, said, _ = LAYOUTS[layout]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    state, weights = {}, {}
    rng = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        embedding = layout.startswith("mlx") and layer.endswith("embed_tokens")  # MLX quantises it too
        if "_proj" in name or embedding:
            tensors, weights[layer] = make(*tensor.shape, rng)
            state |= {f"{layer}.{end}": t for end, t in tensors.items()}
        else:
            state[name] = tensor
    safetensors.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))
    return weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_imported_weights_are_the_same(layout: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    weights = checkpoint(tmp_path / "a", layout)
    found = import_checkpoint(tmp_path / "a", tmp_path / "b")
    assert set(found.layers.values()) == {LAYOUTS[layout][2]}
    assert len(found.layers) == 7
    ours.register()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
    assert layers.keys() == found.layers.keys()
    for name, layer in layers.items():
        wanted = weights[name]
        got = layer.quantized().dequantize(torch.float64)
        assert torch.equal(got, wanted), (name, (got - wanted).abs().max())
        x = torch.randn(3, wanted.shape[1], generator=torch.Generator().manual_seed(2))
        torch.testing.assert_close(layer(x).double(), x.double() @ wanted.T, rtol=1e-4, atol=1e-4)
    if layout.startswith("mlx"):
        embedding = weights["model.embed_tokens"]
        assert torch.equal(model.get_input_embeddings().weight, embedding.bfloat16().float())
    said = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert said.shape == (1, 7)


def test_what_has_no_counterpart_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    checkpoint(tmp_path / "a", "int4")
    config = tmp_path / "a" / "config.json"
    held = json.loads(config.read_text())

    def refused(said: dict[str, Any], message: str) -> None:
        config.write_text(json.dumps({**held, "quantization_config": None, **said}))
        with pytest.raises(ArgumentError, match=message):
            import_checkpoint(tmp_path / "a", tmp_path / "b")
        assert not (tmp_path / "b").exists()

    refused(compressed("float-quantized"), "compressed-tensors format 'float-quantized'")
    refused({"quantization_config": {"quant_method": "gptq"}}, "quantization 'gptq' is none of")
    refused({"quantization": {"bits": 3, "group_size": 32}}, "no layer of layout mlx")
    (tmp_path / "b").mkdir()
    with pytest.raises(ArgumentError, match="exists"):
        import_checkpoint(tmp_path / "a", tmp_path / "b")


def folder_of(path: Path, said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir()
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(said))
    return path


@pytest.mark.parametrize(("K", "group"), [(100, 32), (192, 128), (96, 96)])
def test_groups_that_do_not_divide(K: int, group: int, tmp_path: Path) -> None:
    """Codes fill whole words, the last group is shorter; the config says the group size."""
    rng = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (6, K), generator=rng)
    scale = torch.rand(6, -(-K // group), generator=rng).half()
    words = bits_to_words(torch.nn.functional.pad(q + 8, (0, -K % 8)), 4)
    tensors = {"a.weight_packed": words, "a.weight_scale": scale, "a.weight_shape": torch.tensor([6, K])}
    said = compressed("pack-quantized")
    said["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 4, "group_size": group}}}
    import_checkpoint(folder_of(tmp_path / "a", said, tensors), tmp_path / "b")
    with safetensors.safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    layers = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["layers"]
    size = int(layers["a"].split(":")[1])
    got = codec("int4").decode(made["a.weight"], made["a.weight_scale"], None, size, "none")[:, :K]
    assert torch.equal(got, q.double() * scale.double().repeat_interleave(group, 1)[:, :K])


def test_damaged_layers_are_named(tmp_path: Path) -> None:
    words, scales = torch.zeros(8, 8, dtype=torch.int32), torch.ones(8, 2).half()
    mx = {"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}
    packed_said = compressed("pack-quantized")
    shape = {"a.weight_shape": torch.tensor([8, 64])}
    wrong: list[tuple[dict[str, Any], dict[str, torch.Tensor], str]] = [
        (mx, {"a.weight": words, "a.scales": scales}, "a: MLX mode 'mxfp4'"),
        (packed_said, {"a.weight_packed": words, "a.weight_scale": scales}, r"a\.weight_shape: missing"),
        (packed_said, {"a.weight_packed": words, "a.weight_scale": scales[0, :1], **shape}, r"scales of shape \(1,\)"),
        (
            packed_said,
            {
                "a.weight_packed": words,
                "a.weight_scale": scales,
                "a.weight_zero_point": torch.ones(8, 2).char(),
                **shape,
            },
            r"a\.weight_zero_point: torch\.int8 \(8, 2\)",
        ),
    ]
    for i, (said, tensors, message) in enumerate(wrong):
        with pytest.raises(ArgumentError, match=message):
            import_checkpoint(folder_of(tmp_path / str(i), said, tensors), tmp_path / "b")
        assert not (tmp_path / "b").exists()
