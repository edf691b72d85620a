"""Options and markers of the whole suite."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from metal_marlin.msl.clang import Compiler

    Call = Callable[[], torch.Tensor]

# Tests keep their compiled rows in the checkout: private to it, and warm for the next run. Keys hold the content of
# everything that went into a row, so an old entry can never be taken for a new one.
os.environ.setdefault("METAL_MARLIN_CACHE", str(Path(__file__).parent.parent / ".cache" / "rows"))

# What somebody has tuned on this machine must not decide what the tests see.
os.environ["METAL_MARLIN_TUNED"] = "off"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker has an OpenMP pool of its own; two threads are enough to find races and do not swamp the machine.
    os.environ.setdefault("OMP_NUM_THREADS", "2")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--precompile", help="TARGET=DIR: also compile the kernels of the conformance tests for TARGET")
    parser.addoption("--run-slow", "--all", action="store_true", dest="run_slow", help="run tests marked slow too")


def _no_cuda() -> str | None:
    from metal_marlin.runtime import device_cuda

    return device_cuda.probe()


_Left = dict[str, tuple[int, str]]  # marker: how many tests are left out for it, and why
_LEFT = pytest.StashKey[_Left]()


@pytest.hookimpl(trylast=True)  # of those that -k and -m leave
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this run cannot or should not do: thousands of tests, which are not worth setting up to be skipped.
    A line at the end says how many."""
    why = {} if config.getoption("run_slow") else {"slow": "they run with --run-slow"}
    if any(item.get_closest_marker("cuda") for item in items) and (reason := _no_cuda()) is not None:
        why["cuda"] = f"no CUDA device: {reason}"
    first = [next((name for name in why if item.get_closest_marker(name)), None) for item in items]
    config.stash[_LEFT] = {name: (first.count(name), why[name]) for name in why if name in first}
    config.hook.pytest_deselected(items=[item for item, name in zip(items, first, strict=True) if name])
    items[:] = [item for item, name in zip(items, first, strict=True) if name is None]


def pytest_sessionfinish(session: pytest.Session) -> None:
    left = session.config.stash.get(_LEFT, {})
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = left
    if left and session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # nothing to do is no failure
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Every worker of xdist has collected, and left out, the same."""
    node.config.stash[_LEFT] = getattr(node, "workeroutput", {}).get("left", {})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, (count, why) in config.stash.get(_LEFT, {}).items():
        terminalreporter.write_line(f"LEFT OUT [{count}] tests marked {name}: {why}")


@pytest.fixture
def compiler() -> Compiler:
    """For tests of what only a compiler can tell; skipped on a machine without one."""
    from metal_marlin.errors import CompilerNotFound
    from metal_marlin.msl.clang import find_compiler

    try:
        return find_compiler()
    except CompilerNotFound as error:
        pytest.skip(str(error))


@pytest.fixture
def recorded() -> Callable[[Call], Call]:
    """recorded(call) records a call in a CUDA graph; each call of what it returns clears the output and replays."""
    import torch

    def record(call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()

        def replay() -> torch.Tensor:
            y.zero_()
            graph.replay()
            return y

        return replay

    return record


@pytest.fixture(autouse=True)
def precompile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--precompile TARGET=DIR` every row that a test loads on the CPU is compiled for TARGET into DIR as well: the
    same tests then find their rows on a machine without a compiler. (The `msl` fixture and `metal-marlin compile` do
    this for the conformance tests and the shipped kernels.)"""
    option = request.config.getoption("--precompile")
    if not option or request.path.parent.name not in ("runtime", "formats"):
        return
    from metal_marlin.msl.target import Target
    from metal_marlin.runtime.cache import RowCache
    from metal_marlin.runtime.library import MetalKernelLibrary

    target, _, folder = option.partition("=")
    load = MetalKernelLibrary.load

    def load_and_compile(self: MetalKernelLibrary, name: str, *args: object, **options: object) -> object:
        found = load(self, name, *args, **options)  # type: ignore[arg-type]
        if self.target.kind != "cpu" or self.compiler is None:
            return found
        twin = copy.copy(self)
        twin.target, twin._cache, twin._loaded, twin._owner = Target.parse(target), RowCache(folder), {}, {}
        values = [p.name for p in twin.kernel(name).bound if p.role == "value"][:2]
        pointers = [c for n in range(len(values) + 1) for c in itertools.combinations(values, n)]
        for tails, by_pointer in itertools.product((False, True), pointers):
            twin.compile(name, tails=tails, by_pointer=by_pointer)
        return found

    monkeypatch.setattr(MetalKernelLibrary, "load", load_and_compile)
