"""``metal-marlin selftest``: right ops pass, wrong ones are reported and do not stop it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metal_marlin.cli import selftest
from metal_marlin.errors import ArgumentError
from metal_marlin.ops import norm
from metal_marlin.ops.inventory import op_specs
from metal_marlin.ops.spec import Check, worst


def test_a_right_op_passes_and_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.md"
    assert selftest.run("cpu", ["rms_norm", "activation"], report, False) == 0
    text = capsys.readouterr().out
    assert report.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [report]
    assert "0 failed; 0 kernels not run" in text
    assert f"torch: {torch.__version__}" in text


def test_wrong_results_and_exceptions_are_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch = norm._rms_norm

    def wrong(x: torch.Tensor, *more: object) -> torch.Tensor:
        if x.shape[-1] == 33:
            raise RuntimeError("first line\nsecond line")
        y = launch(x, *more)  # type: ignore[arg-type]
        return y * 1.5 if x.shape[-1] == 31 else y

    monkeypatch.setattr(norm, "_rms_norm", wrong)
    assert selftest.run("cpu", ["rms_norm"], None, True) == 1
    failures = json.loads(capsys.readouterr().out)["failures"]
    assert len(failures) == 6
    assert sum(f["what"] == "RuntimeError: first line" and f["kernel"] == "" for f in failures) == 3
    assert sum(f["what"].startswith("error ") and f["kernel"].startswith("rms_norm") for f in failures) == 3


def test_every_op_has_a_check() -> None:
    assert all(spec.check for spec in op_specs())


def test_nan_fails() -> None:
    assert not worst(torch.tensor([0.0, float("nan")]), torch.tensor([1.0, 1.0])).passed
    assert not Check(float("nan"), 1.0).passed
    assert worst(torch.tensor([]), torch.tensor([])).passed


def test_an_unknown_op() -> None:
    with pytest.raises(ArgumentError, match="--op softmax: there are activation"):
        selftest.run("cpu", ["softmax"], None, False)
