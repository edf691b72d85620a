"""Options and markers of the whole suite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests keep their compiled rows in the checkout: private to it, and warm for the next run. Keys hold the content of
# everything that went into a row, so an old entry can never be taken for a new one.
os.environ.setdefault("METAL_MARLIN_CACHE", str(Path(__file__).parent.parent / ".cache" / "rows"))

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has an OpenMP pool of its own; two threads are enough to find races and do not swamp the machine.
    os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--precompile", help="TARGET=DIR: also compile the kernels of the conformance tests for TARGET")
    parser.addoption("--run-slow", "--all", action="store_true", dest="run_slow", help="run tests marked slow too")


def _no_cuda() -> str | None:
    from metal_marlin.runtime import device_cuda

    return device_cuda.probe()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("run_slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: needs --run-slow"))
    gpu = [item for item in items if item.get_closest_marker("cuda")]
    reason = _no_cuda() if gpu else None
    for item in gpu if reason is not None else ():
        item.add_marker(pytest.mark.skip(reason=f"no CUDA device: {reason}"))
