"""bench/device.sh as far as it goes without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from metal_marlin.runtime import device_cuda

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="a bash script")


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "bench" / "device.sh"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        timeout=120,
    )


def test_usage() -> None:
    assert script("--help").returncode == 0
    wrong = script("test")
    assert wrong.returncode == 2
    assert "usage: bench/device.sh" in wrong.stdout


def test_no_gpu_is_said_and_fails(tmp_path: Path) -> None:
    reason = device_cuda.probe()
    if reason is None:
        pytest.skip("there is a GPU")
    result = script("tests", OUT=str(tmp_path))
    assert result.returncode == 1
    assert f"no CUDA device: {reason}" in result.stderr
