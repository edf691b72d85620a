"""The `msl` fixture: run one kernel of an MSL text on every device present and hand the tensors back.

`--precompile TARGET=DIR` also compiles every kernel that a test runs for TARGET into DIR: rows for a machine that has
no compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.msl.target import Target
from metal_marlin.runtime.cache import RowCache
from metal_marlin.runtime.dispatch import Grid

Run = Callable[..., dict[str, torch.Tensor]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "msl" not in metafunc.fixturenames:
        return
    backends = [pytest.param("cpu32"), pytest.param("cuda", marks=pytest.mark.cuda)]
    if metafunc.definition.get_closest_marker("lane_agnostic"):
        backends.append(pytest.param("cpu1"))
    metafunc.parametrize("msl", backends, indirect=True)


@pytest.fixture
def msl(request: pytest.FixtureRequest) -> Run:
    """msl(source, kernel, args, threads= | threadgroups=, threads_per_threadgroup=, …) -> dict of tensors after the run.

    Tensors in `args` are copied to the device; the copies come back, the originals stay as they were.
    """
    backend: str = request.param
    if backend == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    device, lanes = ("cuda", None) if backend == "cuda" else ("cpu", int(backend.removeprefix("cpu")))
    precompile = request.config.getoption("--precompile")

    def run(source: str, kernel: str, args: dict[str, Any], **launch: Any) -> dict[str, torch.Tensor]:
        if precompile:
            _precompile(precompile, source, kernel, args, launch)
        options = {"constants": launch.pop("constants", None), "include_dirs": launch.pop("include_dirs", ())}
        library = MetalKernelLibrary(source, device=device, lanes=lanes, **options)
        copies = {k: v.to(device, copy=True) if isinstance(v, torch.Tensor) else v for k, v in args.items()}
        dispatch_kernel(library, kernel, args=copies, **launch)
        return {k: v.cpu() for k, v in copies.items() if isinstance(v, torch.Tensor)}

    run.backend = backend  # type: ignore[attr-defined]
    return run


def _precompile(option: str, source: str, kernel: str, args: dict[str, Any], launch: dict[str, Any]) -> None:
    target, _, folder = option.partition("=")
    options = {"constants": launch.get("constants"), "include_dirs": launch.get("include_dirs", ())}
    library = MetalKernelLibrary(source, target=Target.parse(target), cache=RowCache(folder), **options)
    grid = Grid(launch.get("threads"), launch.get("threadgroups"), launch["threads_per_threadgroup"])
    values = {p.name for p in library.kernel(kernel).bound if p.role == "value"}
    library.compile(kernel)
    library.compile(
        kernel,
        tails=grid.tails,
        by_pointer=[k for k in args if k in values and isinstance(args[k], torch.Tensor)],
    )
