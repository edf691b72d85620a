"""Every lint rule has an example that breaks it and a neighbour that does not; correct kernels have no findings."""

from __future__ import annotations

from pathlib import Path

import pytest

from metal_marlin.cli.lint import lint_file, measured
from metal_marlin.msl.clang import Compiler
from metal_marlin.msl.lint import RULES, lint_ascii

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = "kernel void k(device float* y [[buffer(0)]], uint i [[thread_position_in_grid]]) {{ {} }}\n"

# rule: (what breaks it, what does not)
EXAMPLES = {
    "double": [
        (KERNEL.format("double d = 1; y[i] = float(d);"), KERNEL.format("float doubled = 1; y[i] = doubled;")),
        (KERNEL.format("long long n = 1; y[i] = n;"), KERNEL.format("long n = 1; y[i] = n;")),
    ],
    "recursion": [
        (
            "int f(int n) { return n < 2 ? n : f(n - 1); }\n" + KERNEL.format("y[i] = f(3);"),
            "int f(int n) { return n; }\nint g(int n) { return f(n) + f(n + 1); }\n" + KERNEL.format("y[i] = g(3);"),
        ),
        (
            "int g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return f(n); }\n"
            + KERNEL.format("y[i] = f(1);"),
            "float f(float n) { return n; }\nfloat f(int n) { return f(float(n)); }\n" + KERNEL.format("y[i] = f(1);"),
        ),
    ],
    "lambda": [
        (
            KERNEL.format("auto f = [](float v) { return v; }; y[i] = f(1);"),
            KERNEL.format("float v[2] = {1, 2}; y[i] = v[0];"),
        ),
    ],
    "virtual": [
        (
            "struct S { virtual float f() { return 1; } };\n" + KERNEL.format("y[i] = 1;"),
            "struct S { float f() { return 1; } };\n" + KERNEL.format("y[i] = 1;"),
        ),
    ],
    "exceptions": [(KERNEL.format("try { y[i] = 1; } catch (int) {}"), KERNEL.format("int tries = 1; y[i] = tries;"))],
    "allocation": [
        (
            KERNEL.format("thread float* p = new float[4]; y[i] = p[0];"),
            "struct S { S() = default; S(float) = delete; };\n" + KERNEL.format("float newer = 1; y[i] = newer;"),
        ),
    ],
    "rtti": [(KERNEL.format("y[i] = typeid(float) == typeid(int);"), KERNEL.format("y[i] = 1;"))],
    "goto": [(KERNEL.format("goto end; end: y[i] = 1;"), KERNEL.format("y[i] = 1;"))],
    "storage": [(KERNEL.format("register float r = 1; y[i] = r;"), KERNEL.format("float r = 1; y[i] = r;"))],
    "static-local": [
        (
            KERNEL.format("static int n = 0; y[i] = n;"),
            "static float f() { return 1; }\n" + KERNEL.format("y[i] = f();"),
        ),
        (
            KERNEL.format("static float t[2] = {1, 2}; y[i] = t[0];"),
            "struct S { static float f(float x) { struct T { static float g() { return 1; } }; return T::g(); } };\n"
            + KERNEL.format("y[i] = S::f(1);"),
        ),
    ],
    "program-scope": [
        (
            "float table[2] = {1, 2};\n" + KERNEL.format("y[i] = table[0];"),
            "constant float table[2] = {1, 2};\n" + KERNEL.format("y[i] = table[0];"),
        ),
        (
            "static const int n = 3;\n" + KERNEL.format("y[i] = n;"),
            "constant constexpr int n = 3;\nenum E { a = 1 };\ntemplate <int N> struct S { int v; };\n"
            + KERNEL.format("y[i] = n;"),
        ),
    ],
    "address-space": [
        (
            "float f(float* p) { return *p; }\n" + KERNEL.format("float v = 1; y[i] = f(&v);"),
            "float f(thread float* p) { return *p; }\n" + KERNEL.format("float v = 1; y[i] = f(&v);"),
        ),
        (
            "float f(const float& p) { return p; }\n" + KERNEL.format("y[i] = f(1);"),
            "float f(const thread float& p) { return p; }\n" + KERNEL.format("y[i] = f(1);"),
        ),
        (KERNEL.format("y[i] = *(float*)(y + 1);"), KERNEL.format("y[i] = *(device float*)(y + 1);")),
        (
            KERNEL.format("y[i] = *reinterpret_cast<float*>(y);"),
            KERNEL.format("y[i] = *reinterpret_cast<device float*>(y);"),
        ),
        (
            KERNEL.format("float v; float* p = &v; y[i] = *p;"),
            KERNEL.format("float v; thread float* p = &v; y[i] = v * *p;"),
        ),
    ],
    "function-constant": [
        (
            "constant int n [[function_constant(0)]];\n" + KERNEL.format("y[i] = n;"),
            "constant int n = 1;\n" + KERNEL.format("y[i] = n;"),
        ),
    ],
    "dynamic-threadgroup": [
        (
            "kernel void k(device float* y [[buffer(0)]], threadgroup float* t [[threadgroup(0)]]) { y[0] = t[0]; }\n",
            "kernel void k(device float* y [[buffer(0)]]) { threadgroup float t[1]; t[0] = 1; y[0] = t[0]; }\n",
        ),
    ],
    "struct-argument": [
        (
            "struct P { long n; float a; };\nkernel void k(device float* y [[buffer(0)]], constant P& p [[buffer(1)]]) { y[p.n] = p.a; }\n",
            "struct P { long n; long m; };\nkernel void k(device float* y [[buffer(0)]], constant P& p [[buffer(1)]]) { y[p.n] = p.m; }\n",
        ),
        (
            "struct O { float a; }; struct P { long n; O o; };\nkernel void k(device float* y [[buffer(0)]], constant P& p [[buffer(1)]]) { y[p.n] = p.o.a; }\n",
            "struct O { long a; }; struct P { long n; O o; };\nkernel void k(device float* y [[buffer(0)]], constant P& p [[buffer(1)]]) { y[p.n] = p.o.a; }\n",
        ),
    ],
}
CASES = [(rule, i) for rule, pairs in EXAMPLES.items() for i in range(len(pairs))]


def findings(folder: Path, text: str) -> list[tuple[str, int]]:
    path = folder / "example.metal"
    path.write_text(HEAD + text)
    return [(f.rule, f.line) for f in lint_file(path, torch_rules=True)]


@pytest.mark.parametrize(("rule", "example"), CASES)
def test_rules(rule: str, example: int, tmp_path: Path) -> None:
    wrong, right = EXAMPLES[rule][example]
    found = findings(tmp_path, wrong)
    assert rule in {r for r, _ in found}
    assert all(line >= 1 for _, line in found)
    assert findings(tmp_path, right) == []


def test_every_rule_has_an_example() -> None:
    assert RULES.keys() == EXAMPLES.keys() | {"ascii", "threadgroup-memory"}


def test_ascii() -> None:
    found = lint_ascii("float a;\n// caf\u00e9\n", "f.metal")
    assert [(f.rule, f.line) for f in found] == [("ascii", 2)]
    assert "U+00E9" in found[0].message


def test_threadgroup_memory(tmp_path: Path, compiler: Compiler) -> None:
    path = tmp_path / "big.metal"
    text = (
        HEAD + "kernel void {}(device float* y [[buffer(0)]]) {{ threadgroup float t[{}]; t[0] = 1; y[0] = t[0]; }}\n"
    )
    path.write_text(text.format("fits", 8192) + text.format("big", 8193).partition(HEAD)[2])
    found = measured(path, every_row=True)
    assert [f.rule for f in found] == ["threadgroup-memory"]
    assert "'big' has 32772 bytes" in found[0].message


def test_torch_rules_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "example.metal"
    path.write_text(HEAD + EXAMPLES["function-constant"][0][0])
    assert lint_file(path, torch_rules=False) == []
