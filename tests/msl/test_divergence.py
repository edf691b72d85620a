"""Collectives where only some lanes are active: in branches, in loops, and in random programs of both."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from metal_marlin.msl import rewrite

Run = Callable[..., dict[str, torch.Tensor]]
Lanes = frozenset[int]
Statement = tuple[Any, ...]
THREADS = 32 + 21
WRAP = 1 << 32

HEAD = """#include <metal_stdlib>
using namespace metal;
"""

# --- some lanes only
DIVERGENT: dict[str, tuple[str, Callable[[int, int], int]]] = {
    # body (v = lane + 1, result in r), expected (lane, size of the simdgroup)
    "both branches": (
        "if (lane % 3 == 0) r = simd_sum(v); else r = simd_max(v);",
        lambda i, n: sum(j + 1 for j in range(0, n, 3)) if i % 3 == 0 else max(j + 1 for j in range(n) if j % 3),
    ),
    "nested": (
        "if (lane < 20) { if (lane & 1) r = simd_sum(v); r += 1000 * simd_sum(1); }",
        lambda i, n: (
            0 if i >= 20 else 1000 * min(n, 20) + (sum(j + 1 for j in range(1, min(n, 20), 2)) if i & 1 else 0)
        ),
    ),
    "loop with different trip counts": (
        "for (uint i = 0; i <= lane % 5; ++i) r += simd_sum(1);",
        lambda i, n: sum(sum(1 for j in range(n) if j % 5 >= t) for t in range(i % 5 + 1)),
    ),
    "loop left early": (
        "for (uint i = 0; i < 8; ++i) { if (i > lane) break; r = r * 2 + simd_sum(1); } r = r * 3 + simd_sum(1);",
        lambda i, n: 3 * _broken_loop(i, n) + n,
    ),
    "shuffle inside a branch": (
        "if (lane >= 8 && lane < 16) r = simd_shuffle_xor(v, 3) + 100 * simd_broadcast_first(v);",
        lambda i, n: (i ^ 3) + 1 + 900 if 8 <= i < 16 else 0,
    ),
    "scan inside a branch": (
        "if (lane % 2) r = simd_prefix_exclusive_sum(v) + 10000 * simd_prefix_inclusive_sum(1);",
        lambda i, n: sum(j + 1 for j in range(1, i, 2)) + 10000 * ((i + 1) // 2) if i % 2 else 0,
    ),
    "switch": (
        "switch (lane % 4) { case 0: r = simd_min(v); break; case 1: r = simd_sum(v); break; default: r = simd_or(v); }",
        lambda i, n: _switched(i, n),
    ),
    "different functions, one call site": (
        "r = helper(lane % 2 ? v : 2 * v); if (lane % 2) r += helper(v);",
        lambda i, n: (
            sum((j + 1) * (1 if j % 2 else 2) for j in range(n)) + (sum(j + 1 for j in range(1, n, 2)) if i % 2 else 0)
        ),
    ),
    "return before": (
        "if (lane % 4 == 2) { out[tid] = -1; return; } r = simd_sum(v) + 10000 * simd_prefix_inclusive_sum(1);",
        lambda i, n: (
            -1
            if i % 4 == 2
            else sum(j + 1 for j in range(n) if j % 4 != 2) + 10000 * sum(1 for j in range(i + 1) if j % 4 != 2)
        ),
    ),
}


def _broken_loop(lane: int, n: int) -> int:
    r = 0
    for i in range(8):
        if i > lane:
            break
        r = r * 2 + sum(1 for j in range(n) if j >= i)
    return r


def _switched(lane: int, n: int) -> int:
    kind = min(lane % 4, 2)
    values = [j + 1 for j in range(n) if min(j % 4, 2) == kind]
    return int((min, sum, np.bitwise_or.reduce)[kind](values))


def run_divergent(msl: Run, body: str, threads: int) -> list[int]:
    """r of every thread (64 places, -7 where no thread is) after `body`, with v = lane + 1 and r = 0 before it."""
    source = f"""{HEAD}
inline int helper(int v) {{ return simd_sum(v); }}
inline int maybe(int v, uint part) {{ if (v % 4 != int(part)) return 0; return simd_sum(v) * int(part + 1); }}
kernel void k(device int* out [[buffer(0)]], uint tid [[thread_position_in_grid]],
              uint lane [[thread_index_in_simdgroup]]) {{
    const int v = int(lane) + 1;
    int r = 0;
    {body}
    out[tid] = r;
}}"""
    out = torch.full((64,), -7, dtype=torch.int32)
    return msl(source, "k", {"out": out}, threads=threads, threads_per_threadgroup=64)["out"].tolist()


MARKED = pytest.mark.skipif(not hasattr(rewrite, "rejoin"), reason="the rewriter does not mark loops yet")
FULL_AND_TAIL = pytest.mark.parametrize("threads", [64, 50], ids=["full", "tail"])


@FULL_AND_TAIL
@pytest.mark.parametrize("case", DIVERGENT)
def test_active_lanes_only(msl: Run, case: str, threads: int) -> None:
    body, expected = DIVERGENT[case]
    sizes = [32, threads - 32]
    want = [expected(i % 32, sizes[i // 32]) for i in range(threads)] + [-7] * (64 - threads)
    assert run_divergent(msl, body, threads) == want


# --- lanes that skip a branch wait for the others before the next iteration: each step is (lanes that take it, update
# of r from r and the number of lanes that take it)
Steps = list[tuple[Callable[[int], bool], Callable[[int, list[int]], int]]]
LOOPS: dict[str, tuple[str, Steps]] = {
    "branch in a for": (
        "for (uint k = 0; k < 4; ++k) { if (lane < 8 * (k + 1)) r += simd_sum(int(k + 1)); }",
        [(lambda i, k=k: i < 8 * (k + 1), lambda r, on, k=k: r + len(on) * (k + 1)) for k in range(4)],
    ),
    "loop in a for": (
        "for (int k = 0; k < 3; ++k) for (uint j = 0; j <= lane % 3; ++j) r = r * 2 + simd_sum(1 + k);",
        [(lambda i, j=j: j <= i % 3, lambda r, on, k=k: r * 2 + len(on) * (1 + k)) for k in range(3) for j in range(3)],
    ),
    "continue": (
        "for (int k = 0; k < 5; k++) { if ((lane + k) % 3 == 0) continue; r = r * 3 + simd_sum(1 + k); }",
        [(lambda i, k=k: (i + k) % 3 != 0, lambda r, on, k=k: r * 3 + len(on) * (1 + k)) for k in range(5)],
    ),
    "while": (
        "uint k = 0; while (k < 5) { ++k; if (lane % k == 0) r = r * 2 + simd_sum(int(k)); }",
        [(lambda i, k=k: i % k == 0, lambda r, on, k=k: r * 2 + len(on) * k) for k in range(1, 6)],
    ),
    "do": (
        "int k = 0; do { if (lane >> k & 1) r = r * 3 + simd_sum(v); } while (++k < 4);",
        [(lambda i, k=k: i >> k & 1 == 1, lambda r, on: r * 3 + sum(i + 1 for i in on)) for k in range(4)],
    ),
    "else in nested loops": (
        "for (int a = 0; a < 2; ++a) { for (int b = 0; b < 3; ++b) { if (lane >> b & 1) r += a; else r = r * 2 + simd_max(v); } }",
        [
            step
            for a in range(2)
            for b in range(3)
            for step in (
                (lambda i, b=b: i >> b & 1 == 0, lambda r, on: r * 2 + max(on) + 1),
                (lambda i, b=b: i >> b & 1 == 1, lambda r, on, a=a: r + a),
            )
        ],
    ),
    "function that returns early": (
        "for (uint k = 0; k < 4; ++k) r += maybe(v, k);",
        [(lambda i, k=k: (i + 1) % 4 == k, lambda r, on, k=k: r + sum(i + 1 for i in on) * (k + 1)) for k in range(4)],
    ),
    "conditional expression": (
        "for (uint k = 0; k < 3; ++k) r += lane % 3 == k ? simd_sum(int(k + 1)) : 0;",
        [(lambda i, k=k: i % 3 == k, lambda r, on, k=k: r + len(on) * (k + 1)) for k in range(3)],
    ),
    "one lane after the other": (
        "bool done = false; while (!done) { if (simd_is_first()) { r = simd_broadcast_first(v); done = true; } }",
        [(lambda i, k=k: i == k, lambda r, on: on[0] + 1) for k in range(32)],
    ),
}


@MARKED
@FULL_AND_TAIL
@pytest.mark.parametrize("case", LOOPS)
def test_iterations_do_not_mix(msl: Run, case: str, threads: int) -> None:
    body, steps = LOOPS[case]
    want = [0] * threads + [-7] * (64 - threads)
    for group in (range(32), range(32, threads)):
        for takes, update in steps:
            on = [t - group.start for t in group if takes(t - group.start)]
            for i in on:
                want[group.start + i] = update(want[group.start + i], on)
    assert run_divergent(msl, body, threads) == want


# --- random programs against an interpreter that runs lanes in lockstep
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
    """A simdgroup; every statement runs for a set of lanes, which meet again at its end. r, k: values by lane."""

    r: dict[int, int]
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


@MARKED
@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(i, marks=pytest.mark.slow) for i in range(12, 120))])
def test_random_program(msl: Run, seed: int) -> None:
    if msl.backend == "cuda":  # type: ignore[attr-defined]
        pytest.skip("NVIDIA GPUs need not bring lanes together again after every break and continue")
    program = Writer(seed).block(0, ())
    source = f"""{HEAD}
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
        group = Lockstep({i: i * 7 for i in range(size)})
        group.block(program, frozenset(range(size)))
        want += [group.r[i] for i in range(size)]
    assert [v % WRAP for v in got[:THREADS]] == want, source
