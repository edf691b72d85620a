"""QuantizedTensor, quantize and layouts, against values worked out by hand or by numpy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CODECS
from metal_marlin.nn.linear import QuantLinear
from metal_marlin.quant import QuantizedTensor, cat, prepack, quantize, unpack
from metal_marlin.quant.layouts import LAYOUTS

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
FORMATS = ["fp4", "mxfp4", "nvfp4", "int4", "int8", "uint8", "fp8_e4m3", "fp8_e5m2", "int2", "int3", "nf3"]


def random(N: int, K: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def fp4_by_hand(q: QuantizedTensor) -> np.ndarray:
    N, K = q.shape
    words = q.codes.numpy().view(np.uint32)
    nibbles = (words[:, :, None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    scales = np.repeat(q.scales.double().numpy(), q.group_size, 1)
    return E2M1[nibbles.reshape(N, -1)][:, :K] * scales[:, :K]


@pytest.mark.parametrize(("N", "K", "group"), [(3, 64, 16), (5, 77, 32), (1, 8, 64), (7, 200, 64)])
def test_fp4_decodes_by_the_definition(N: int, K: int, group: int) -> None:
    weight = random(N, K)
    q = quantize(weight, "fp4", group)
    assert q.shape == (N, K)
    assert q.codes.shape == (N, -(-K // 8))
    assert q.scales.shape == (N, -(-q.padded // group))
    assert q.nbytes == 4 * q.codes.numel() + 2 * q.scales.numel()
    assert q.bits_per_weight == 8 * q.nbytes / (N * K)
    np.testing.assert_array_equal(q.dequantize(torch.float64).numpy(), fp4_by_hand(q))
    for first in range(0, K, group):  # half the widest step of the grid, 1/6 of amax, and the scale's rounding
        part = weight[:, first : first + group].double().numpy()
        error = np.abs(part - fp4_by_hand(q)[:, first : first + group])
        assert (error <= np.abs(part).max(1, keepdims=True) * (1 / 6 + 2e-3)).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("K", [64, 83])
def test_every_format_comes_near_the_weight(name: str, K: int) -> None:
    weight = random(9, K)
    limit = {"int8": 0.01, "uint8": 0.01, "fp8_e4m3": 0.04, "fp8_e5m2": 0.08}.get(name, 0.2)
    limit = {"int2": 0.6, "int3": 0.25, "nf3": 0.25}.get(name, limit)
    for scale in ("rtn", "mse"):
        made = quantize(weight, name, scale=scale).dequantize(torch.float32)
        assert made.shape == (9, K)
        assert (made - weight).norm() <= limit * weight.norm()


@pytest.mark.parametrize(("name", "unit"), [("int2", 16), ("int3", 32), ("nf3", 32)])
@pytest.mark.parametrize("K", [1, 31, 32, 65])
def test_rows_are_padded_to_whole_words(K: int, name: str, unit: int) -> None:
    """By weights of 0, whose codes x of 0 meets; the largest weight of a row is among the values."""
    weight, bits = random(3, K), 2 if name == "int2" else 3
    q = quantize(weight, name, scale_dtype=torch.float32)
    columns = -(-K // unit) * unit
    assert (q.shape, q.padded, tuple(q.codes.shape)) == ((3, K), columns, (3, columns * bits // 32))
    made = q.dequantize(torch.float32)
    for first in range(0, K, 64):
        part, ours = weight[:, first : first + 64], made[:, first : first + 64]
        place = part.abs().argmax(1, keepdim=True)
        assert torch.allclose(ours.gather(1, place), part.gather(1, place), rtol=1e-6)
    x = random(2, K, 7)
    y = QuantLinear(q)(x)
    assert torch.allclose(y.double(), x.double() @ made.double().T, rtol=1e-5, atol=1e-5)


def test_mse_is_no_worse() -> None:
    weight = random(16, 256)
    near = [(quantize(weight, "fp4", 32, s).dequantize(torch.float64) - weight).norm() for s in ("mse", "rtn")]
    assert near[0] < near[1]


@pytest.mark.parametrize(("bad", "said"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_values_that_are_not_finite(bad: float, said: str) -> None:
    weight = random(4, 20)
    weight[2, 17] = bad
    with pytest.raises(ArgumentError, match=rf"weight\[2, 17\] is {said}; 1 values"):
        quantize(weight)


def test_no_rows() -> None:
    for format in ("fp4", "nvfp4", "int4"):
        q = quantize(torch.empty(0, 64), format)
        assert q.dequantize(torch.float32).shape == (0, 64)


def test_bad_arguments() -> None:
    for weight, options, said in [
        (torch.zeros(8), {}, r"shape \(8,\)"),
        (torch.zeros(2, 8, dtype=torch.int32), {}, "torch.int32"),
        (torch.zeros(2, 8), {"scale": "best"}, "'best'"),
        (torch.zeros(2, 64), {"group_size": 48}, "48"),
        (torch.zeros(2, 64), {"format": "fp5"}, "'fp5'"),
        (torch.full((2, 64), 1e9), {}, "scale_dtype=torch.float32"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            quantize(weight, **options)  # type: ignore[arg-type]
    assert quantize(torch.full((2, 64), 1e9), scale_dtype=torch.float32).dequantize(torch.float32)[0, 0] == 1e9
    q = quantize(random(4, 64))
    with pytest.raises(ArgumentError, match=r"codes: torch.int32 \(4, 8\)"):
        QuantizedTensor(q.codes, q.scales, None, "fp4", 64, "none", (4, 80))
    with pytest.raises(ArgumentError, match="scales"):
        QuantizedTensor(q.codes, q.scales[:2], None, "fp4", 64, "none", (4, 64))


@pytest.mark.parametrize("name", FORMATS)
def test_slices_and_cat_are_exact(name: str) -> None:
    q = quantize(random(11, 96), name)
    whole = q.dequantize(torch.float64)
    parts = [q[:4], q[4:4], q[4:-2], q[-2:]]
    assert [p.shape[0] for p in parts] == [4, 0, 5, 2]
    assert torch.equal(torch.cat([p.dequantize(torch.float64) for p in parts]), whole)
    assert q[4:].codes.data_ptr() == q.codes[4:].data_ptr()
    assert cat(parts).equal(q)
    with pytest.raises(ArgumentError, match="step 1"):
        q[::2]


def test_cat_refuses_what_does_not_agree() -> None:
    a = quantize(random(2, 64))
    for b, said in [
        (quantize(random(2, 64), "int4"), "format"),
        (quantize(random(2, 64), group_size=32), "group_size"),
        (quantize(random(2, 128)), "K = 128"),
        (quantize(random(2, 64), scale_dtype=torch.float32), "float32"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            cat([a, b])
    with pytest.raises(ArgumentError, match="scale of the whole tensor"):
        cat([quantize(random(2, 64), "nvfp4"), quantize(9 * random(2, 64), "nvfp4")])


@pytest.mark.parametrize("name", FORMATS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    q = quantize(random(5, 83), name)
    path = tmp_path / "w.safetensors"
    q.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    back = QuantizedTensor.load(path)
    assert back.equal(q)
    assert torch.equal(back.dequantize(torch.float64), q.dequantize(torch.float64))
    assert not quantize(random(5, 83, 1), name).equal(q)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ArgumentError, match="not a saved QuantizedTensor"):
        QuantizedTensor.load(tmp_path / "other")
    q = quantize(random(4, 64))
    tensors, said = q.tensors("a."), q.metadata()
    assert QuantizedTensor.from_tensors(tensors, said, "a.").equal(q)
    with pytest.raises(ArgumentError, match=r"missing: a\.weight_scale"):
        QuantizedTensor.from_tensors({"a.weight": q.codes}, said, "a.")
    for change, words in [
        ({"format_version": 9}, "format_version = 9"),
        ({"format": "fp5"}, "fp5"),
        ({"shape": [4, 99]}, "codes"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            QuantizedTensor.from_tensors(tensors, {**said, **change}, "a.")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("N", "K"), [(16, 64), (48, 192), (32, 1088)])
@pytest.mark.parametrize(("format", "zeros"), [(f, z) for f in FORMATS for z in CODECS[f].zero_kinds])
def test_layouts_are_bijections(layout: str, N: int, K: int, format: str, zeros: str) -> None:
    q = quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(N)), format, zeros=zeros)
    packed = prepack(q, layout)
    assert packed.codes.shape == q.codes.shape
    assert packed.scales.shape == q.scales.shape
    assert unpack(packed).equal(q)
    assert prepack(packed, layout) is packed
    if N > 16:
        assert unpack(packed[16:]).equal(q[16:])
    for use in (packed.tensors, packed.dequantize, lambda: packed[:1], lambda: cat([packed])):
        with pytest.raises(ArgumentError, match="unpack"):
            use()


@pytest.mark.parametrize(("format", "N", "K"), [("fp4", 8, 64), ("fp4", 16, 72), ("int3", 16, 96), ("int2", 24, 64)])
def test_layouts_do_not_fit_everything(format: str, N: int, K: int) -> None:
    with pytest.raises(ArgumentError, match=rf"{format} \({N}, {K}\)"):
        prepack(quantize(torch.randn(N, K), format, 16), "mma16")


def three_bits(format: str, words: list[int], step: int, pair: int, e: int) -> int:
    """A lane's code, of its three words."""
    if format == "nf3":
        digits = words[step] if step < 3 else sum((w >> 3 & 0x11111111) << i for i, w in enumerate(words))
        return digits >> (8 * pair + 4 * e) & 7
    halves = [w >> 16 * e & 0xFFFF for w in words]
    if step < 3:
        return halves[step] >> (1 + 3 * pair) & 7
    return halves[pair] >> 13 if pair < 3 else sum((w & 1) << i for i, w in enumerate(halves))


@pytest.mark.parametrize("format", FORMATS)
def test_mma16_is_operand_order(format: str) -> None:
    """Lane 4r + c of a block of 64 k has, of each step, rows r and r + 8 and k 2c, 2c + 1, 2c + 8, 2c + 9."""
    form, (N, K) = CODECS[format], (32, 128)
    q = quantize(torch.randn(N, K, generator=torch.Generator().manual_seed(0)), format)
    canonical, words = form.unpack(q.codes), prepack(q, "mma16").codes.flatten().tolist()
    for n, k in itertools.product(range(N), range(K)):
        block, lane, step = n // 16 * (K // 64) + k // 64, n % 8 * 4 + k % 8 // 2, k % 64 // 16
        pair, e = n % 16 // 8 + k % 16 // 8 * 2, k % 2
        if form.values == CODECS["fp4"].values:
            half = words[(block * 32 + lane) * 4 + step] >> 16 * e
            code = half >> (9 - 3 * pair) & 7 | (half >> (15, 12, 14, 13)[pair] & 1) << 3
        elif form.bits == 4:
            code = words[(block * 32 + lane) * 4 + step] >> (4 * (pair + 4 * e)) & 15
        elif form.bits == 8:
            word = words[((block * 2 + step // 2) * 32 + lane) * 4 + step % 2 * 2 + pair // 2]
            code = word >> (8 * (pair % 2 + 2 * e)) & 255
        elif form.bits == 2:
            code = words[(block * 32 + lane) * 2 + step // 2] >> (2 * (step % 2 * 4 + pair) + 16 * e) & 3
        else:
            first = block * 96
            mine = [words[first + lane * 2], words[first + lane * 2 + 1], words[first + 64 + lane]]
            code = three_bits(format, mine, step, pair, e)
        assert code == canonical[n, k], (n, k)


def test_powers_bound_scales() -> None:
    q = quantize(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)) * 1e-6, "fp4", 64)
    q.scales[3] = 0
    q.scales[4] = 60000
    powers = prepack(q, "mma16").powers
    assert powers is not None
    most = q.scales.float().amax(1)
    assert (powers.log2() == powers.log2().round()).all()
    assert ((most <= powers) & (powers <= 2 * most) | (most == 0)).all()


def test_unknown_layout() -> None:
    q = quantize(torch.zeros(16, 64))
    with pytest.raises(ArgumentError, match="'tiles'; there are canonical, mma16"):
        prepack(q, "tiles")
