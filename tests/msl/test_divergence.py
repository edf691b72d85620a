"""Random programs of branches, loops and collectives against an interpreter that runs lanes in lockstep."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from metal_marlin.msl import rewrite

Run = Callable[..., dict[str, torch.Tensor]]
Lanes = frozenset[int]
Statement = tuple[Any, ...]
THREADS = 32 + 21
WRAP = 1 << 32


class Writer:
    """A random program as statements, and as MSL."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.loops = 0
        self.budget = 14

    def block(self, depth: int, loops: tuple[int, ...]) -> list[Statement]:
        return [self.statement(depth, loops) for _ in range(self.rng.randint(1, 3))]

    def condition(self, loops: tuple[int, ...]) -> Statement:
        kind = self.rng.choice(["lane", "below", "loop", "value"] if loops else ["lane", "below", "value"])
        modulus = self.rng.randint(2, 5)
        return (kind, self.rng.randrange(modulus), modulus, self.rng.randint(1, 31), loops[-1] if loops else -1)

    def statement(self, depth: int, loops: tuple[int, ...]) -> Statement:
        self.budget -= 1
        kinds = ["sum", "max", "scan", "add", "sum"]
        if depth < 4 and self.budget > 0:
            kinds += ["if", "if", "else", "for", "while", "do"]
        if loops:
            kinds += ["break", "continue"]
        kind = self.rng.choice(kinds)
        if kind in ("sum", "max", "scan", "add"):
            return (kind, self.rng.randint(1, 9))
        if kind in ("if", "else"):
            test = self.condition(loops)
            then = self.block(depth + 1, loops)
            return ("if", test, then, self.block(depth + 1, loops) if kind == "else" else [])
        if kind in ("break", "continue"):
            return ("if", self.condition(loops), [(kind,)], [])
        self.loops += 1
        name, trips, spread = self.loops, self.rng.randint(1, 3), self.rng.choice([1, 1, 2, 3])
        return (kind, name, trips, spread, self.block(depth + 1, (*loops, name)))


def msl_condition(test: Statement) -> str:
    kind, rest, modulus, bound, loop = test
    return {
        "lane": f"lane % {modulus} == {rest}",
        "below": f"lane < {bound}",
        "loop": f"(lane + k{loop}) % {modulus} == {rest}",
        "value": f"r % {modulus} == {rest}",
    }[kind]


def msl_text(block: list[Statement], indent: str = "    ") -> str:
    lines = []
    for statement in block:
        kind = statement[0]
        if kind in ("break", "continue"):
            lines.append(f"{kind};")
        elif kind == "if":
            _, test, then, other = statement
            lines.append(f"if ({msl_condition(test)}) {{\n{msl_text(then, indent + '    ')}\n{indent}}}")
            if other:
                lines[-1] += f" else {{\n{msl_text(other, indent + '    ')}\n{indent}}}"
        elif kind in ("for", "while", "do"):
            _, name, trips, spread, body = statement
            inside = msl_text(body, indent + "    ")
            bound = f"{trips} + lane % {spread}"
            if kind == "for":
                lines.append(f"for (uint k{name} = 0; k{name} < {bound}; ++k{name}) {{\n{inside}\n{indent}}}")
            elif kind == "while":
                lines.append(f"uint k{name} = ~0u; while (++k{name} < {bound}) {{\n{inside}\n{indent}}}")
            else:
                lines.append(f"uint k{name} = 0; do {{\n{inside}\n{indent}}} while (++k{name} < {bound});")
        else:
            lines.append(
                {
                    "sum": "r = r * 3 + simd_sum(lane + {0});",
                    "max": "r = r * 5 + simd_max(r % 1000 + {0});",
                    "scan": "r = r + simd_prefix_exclusive_sum(r % 100 + {0});",
                    "add": "r += {0};",
                }[kind].format(statement[1])
            )
    return "\n".join(indent + line for line in lines)


@dataclass
class Lockstep:
    """A simdgroup of `size` lanes; every statement runs for a set of lanes, which meet again at its end."""

    size: int
    r: dict[int, int] = field(default_factory=dict)
    k: dict[tuple[int, int], int] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)
    continued: set[int] = field(default_factory=set)

    def holds(self, test: Statement, i: int) -> bool:
        kind, rest, modulus, bound, loop = test
        if kind == "below":
            return i < bound
        value = {"lane": lambda: i, "loop": lambda: i + self.k[loop, i], "value": lambda: self.r[i]}[kind]()
        return value % modulus == rest

    def block(self, block: list[Statement], on: Lanes) -> Lanes:
        for statement in block:
            on = self.statement(statement, on) if on else on
        return on

    def statement(self, statement: Statement, on: Lanes) -> Lanes:
        kind = statement[0]
        if kind == "break":
            self.broken |= on
            return frozenset()
        if kind == "continue":
            self.continued |= on
            return frozenset()
        if kind == "if":
            _, test, then, other = statement
            yes = frozenset(i for i in on if self.holds(test, i))
            return self.block(then, yes) | self.block(other, on - yes)
        if kind in ("for", "while", "do"):
            return self.loop(statement, on)
        self.compute(kind, statement[1], sorted(on))
        return on

    def compute(self, kind: str, c: int, on: list[int]) -> None:
        r = self.r
        if kind == "add":
            new = {i: r[i] + c for i in on}
        elif kind == "sum":
            total = sum(i + c for i in on)
            new = {i: r[i] * 3 + total for i in on}
        elif kind == "max":
            top = max(r[i] % 1000 + c for i in on)
            new = {i: r[i] * 5 + top for i in on}
        else:
            new = {i: r[i] + sum(r[j] % 100 + c for j in on if j < i) for i in on}
        r.update({i: value % WRAP for i, value in new.items()})

    def loop(self, statement: Statement, on: Lanes) -> Lanes:
        kind, name, trips, spread, body = statement
        outer, self.broken, self.continued = (self.broken, self.continued), set(), set()
        running = on
        for i in on:
            self.k[name, i] = 0
        while True:
            if kind != "do":
                running = frozenset(i for i in running if self.k[name, i] < trips + i % spread)
            if not running:
                break
            running = self.block(body, running) | self.continued
            self.continued = set()
            for i in running:
                self.k[name, i] += 1
            if kind == "do":
                running = frozenset(i for i in running if self.k[name, i] < trips + i % spread)
        self.broken, self.continued = outer
        return on


@pytest.mark.skipif(not hasattr(rewrite, "rejoin"), reason="the rewriter does not mark loops yet")
@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(i, marks=pytest.mark.slow) for i in range(12, 120))])
def test_random_program(msl: Run, seed: int) -> None:
    program = Writer(seed).block(0, ())
    source = f"""#include <metal_stdlib>
using namespace metal;
kernel void k(device uint* out [[buffer(0)]], uint tid [[thread_position_in_grid]],
              uint lane [[thread_index_in_simdgroup]]) {{
    uint r = lane * 7;
{msl_text(program)}
    out[tid] = r;
}}"""
    out = torch.zeros(64, dtype=torch.int32)
    got = msl(source, "k", {"out": out}, threads=THREADS, threads_per_threadgroup=64)["out"].tolist()
    want = []
    for size in (32, THREADS - 32):
        group = Lockstep(size, {i: i * 7 for i in range(size)})
        group.block(program, frozenset(range(size)))
        want += [group.r[i] for i in range(size)]
    assert [v % WRAP for v in got[:THREADS]] == want, source
