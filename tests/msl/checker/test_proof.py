"""The checker finds every mistake of programs.py, whatever the schedule, and none in the programs themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import KernelCheckError
from metal_marlin.runtime import checked
from tests.msl.checker.programs import PROGRAMS, Mistake, Program

SEEDS = (0, 1, 6)


def run(program: Program, source: str, monkeypatch: pytest.MonkeyPatch, seed: int, **sizes: int) -> dict[str, Any]:
    monkeypatch.setenv(checked.SEED, str(seed))
    library = MetalKernelLibrary(source, device="cpu", checked=True)
    args = program.args()
    launch = dict(program.launch)
    for name, size in sizes.items():
        if name in args:
            args[name] = args[name].flatten()[:size].clone()
        else:
            launch["threadgroup_memory"] = {name: size}
    library.load("k")[1].uninitialised = frozenset(program.uninitialised)  # type: ignore[attr-defined]
    dispatch_kernel(library, "k", args=args, **launch)
    return args


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_correct_programs_are_clean(program: Program, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = run(program, program.source, monkeypatch, seed)
    for name, value in program.expected(program.args()).items():
        torch.testing.assert_close(args[name], value)


@dataclass(frozen=True)
class Wrong:
    program: Program
    mistake: Mistake

    def __str__(self) -> str:
        return f"{self.program.name}: {self.mistake.name}".replace(" ", "-")


ALL = [Wrong(p, m) for p in PROGRAMS for m in p.mistakes]


@pytest.mark.parametrize("wrong", ALL, ids=str)
def test_mistakes_are_found(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    program, mistake = wrong.program, wrong.mistake
    source = program.source
    if mistake.old:
        assert source.count(mistake.old) == 1
        source = source.replace(mistake.old, mistake.new)
    for seed in SEEDS[: 1 if mistake.buffers else 2]:
        with pytest.raises(KernelCheckError) as caught:
            run(program, source, monkeypatch, seed, **(mistake.buffers or {}))
        found = caught.value.findings
        assert {f.kind for f in found} & set(mistake.kinds), str(caught.value)
        assert all(f.line > 2 and f.file == "<source>" and f.kernel == "k" for f in found)


def test_there_are_enough_of_every_class() -> None:
    assert len(ALL) >= 40
    for kind in ("race", "out-of-bounds", "uninitialised-read", "array-index"):
        assert sum(kind in wrong.mistake.kinds for wrong in ALL) >= 3, kind
