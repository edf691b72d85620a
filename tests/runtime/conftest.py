"""Fixtures of the runtime's tests. With `--precompile TARGET=DIR` every row that a test loads on the CPU is compiled
for TARGET into DIR as well: the same tests then find their rows on a machine without a compiler."""

from __future__ import annotations

import copy
import itertools

import pytest

from metal_marlin.msl.clang import Compiler, find_compiler
from metal_marlin.msl.target import Target
from metal_marlin.runtime.cache import RowCache
from metal_marlin.runtime.library import MetalKernelLibrary


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def compiler() -> Compiler:
    from metal_marlin.errors import CompilerNotFound

    try:
        return find_compiler()
    except CompilerNotFound as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def precompile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    option = request.config.getoption("--precompile")
    if not option:
        return
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
