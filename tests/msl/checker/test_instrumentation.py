"""No access escapes the checker: every width, copies, atomics, constants; and nothing but accesses is reported."""

from __future__ import annotations

import struct

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import KernelCheckError, MetalMarlinError
from metal_marlin.runtime.checked import Finding

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
# a type, and its bytes
TYPES = {
    "uchar": 1, "char": 1, "bool": 1, "half": 2, "bfloat": 2, "ushort": 2, "float": 4, "uint": 4, "ulong": 8,
    "uchar2": 2, "uchar4": 4, "half2": 4, "half4": 8, "float2": 8, "float4": 16, "uint4": 16, "ulong2": 16, "ulong4": 32,
    "packed_float3": 12, "packed_half3": 6, "packed_uchar3": 3, "float4x4": 64, "Pair": 8, "Large": 48,
}  # fmt: skip
STRUCTS = "struct Pair { uint a; float b; };\nstruct Large { uint at[12]; };\n"


def findings(source: str, args: dict[str, object], **launch: object) -> tuple[Finding, ...]:
    library = MetalKernelLibrary(HEAD + STRUCTS + source, device="cpu", checked=True)
    try:
        dispatch_kernel(library, "k", args=args, **{"threads": 1, "threads_per_threadgroup": 1, **launch})  # type: ignore[arg-type]
    except KernelCheckError as error:
        return error.findings  # type: ignore[return-value]
    return ()


WIDTHS = """kernel void k(device {0}* a, device {0}* b, constant uint4& at) {{
  a[at.x] = b[at.y];
  threadgroup {0} t[4];
  for (uint i = 0; i < 4; ++i) t[i] = b[i];
  threadgroup {0}* p = t;
  p[at.z] = p[at.w];
  a[1] = t[1];
}}"""
ACCESSES = [("a", "write", 6), ("b", "read", 6), ("threadgroup t", "write", 10), ("threadgroup t", "read", 10)]


@pytest.mark.parametrize(("which", "access"), list(enumerate(ACCESSES)), ids=lambda v: v[1] if type(v) is tuple else v)
@pytest.mark.parametrize("type_", TYPES)
def test_every_width(type_: str, which: int, access: tuple[str, str, int]) -> None:
    """An access of the element behind the last one is seen, at its address and with a line; the last one is fine."""
    size, source, (where, verb, line) = TYPES[type_], WIDTHS.format(type_), access
    buffers = {"a": torch.zeros(4 * size, dtype=torch.uint8), "b": torch.zeros(4 * size, dtype=torch.uint8)}
    as_type = {k: v.view(torch.bool) if type_ == "bool" else v for k, v in buffers.items()}
    typed = {k: viewed(v, type_) for k, v in as_type.items()}
    assert findings(source, {**typed, "at": [3, 3, 3, 3]}) == ()
    found = findings(source, {**typed, "at": [4 if i == which else 3 for i in range(4)]})
    assert {f.kind for f in found} == {"out-of-bounds"}
    assert found[0].message.startswith(f"{verb} of ")
    assert found[0].where.startswith(where)
    assert found[0].line == line


def viewed(data: torch.Tensor, type_: str) -> torch.Tensor:
    dtypes = {"half": torch.float16, "bfloat": torch.bfloat16, "float": torch.float32, "uint": torch.int32,
              "ulong": torch.int64, "ushort": torch.int16, "char": torch.int8, "uchar": torch.uint8}  # fmt: skip
    base = type_.removeprefix("packed_").rstrip("0123456789x")
    return data.view(dtypes[base]) if base in dtypes else data


def test_struct_copies_and_array_copies() -> None:
    source = """kernel void k(device Large* a [[buffer(0)]], device Large* b [[buffer(1)]], constant uint& n [[buffer(2)]]) {
  thread Large local = b[n];
  a[n] = local;
}"""
    data = {"a": torch.zeros(96, dtype=torch.uint8), "b": torch.zeros(96, dtype=torch.uint8)}
    assert findings(source, {**data, "n": 1}) == ()
    found = findings(source, {**data, "n": 2})
    assert {(f.kind, f.where) for f in found} == {("out-of-bounds", "a[2]"), ("out-of-bounds", "b[2]")}


ATOMICS = {
    "load": "y[0] = atomic_load_explicit(&a[n], memory_order_relaxed);",
    "store": "atomic_store_explicit(&a[n], 1, memory_order_relaxed);",
    "exchange": "y[0] = atomic_exchange_explicit(&a[n], 1, memory_order_relaxed);",
    "compare": "uint e = 0; y[0] = atomic_compare_exchange_weak_explicit(&a[n], &e, 1, memory_order_relaxed, memory_order_relaxed);",
    **{
        f: f"y[0] = atomic_fetch_{f}_explicit(&a[n], 1, memory_order_relaxed);"
        for f in "add sub and or xor min max".split()
    },
}


@pytest.mark.parametrize("operation", ATOMICS)
def test_atomics(operation: str) -> None:
    source = f"""kernel void k(device atomic_uint* a [[buffer(0)]], device uint* y [[buffer(1)]], constant uint& n [[buffer(2)]]) {{
  {ATOMICS[operation]}
}}"""
    args = {"a": torch.zeros(4, dtype=torch.int32), "y": torch.zeros(1, dtype=torch.int32)}
    assert findings(source, {**args, "n": 3}) == ()
    found = findings(source, {**args, "n": 4})
    assert {(f.kind, f.line) for f in found} == {("out-of-bounds", 6)}
    # the atomic access itself is no race, a plain one beside it is
    both = source.replace("uint* y", "uint* y").replace(
        ATOMICS[operation], ATOMICS[operation] + " ((device uint*)a)[n] += 1;"
    )
    assert "race" in {f.kind for f in findings(both, {**args, "n": 0}, threads=64, threads_per_threadgroup=64)}


def test_float_add_is_atomic() -> None:
    source = "kernel void k(device atomic_float* a [[buffer(0)]]) { atomic_fetch_add_explicit(&a[0], 1.0f, memory_order_relaxed); }"
    sums = torch.zeros(1)
    assert findings(source, {"a": sums}, threads=64, threads_per_threadgroup=32) == ()
    assert sums.item() == 64


def test_a_read_before_a_write_of_the_same_address_counts() -> None:
    """Two threads that add to one word: the read of the later one races with the write of the earlier one."""
    source = "kernel void k(device uint* a [[buffer(0)]]) {\n  a[0] = a[0] + 1;\n}"
    found = findings(source, {"a": torch.zeros(1, dtype=torch.int32)}, threads=2, threads_per_threadgroup=2)
    assert {f.kind for f in found} == {"race"}
    assert any("read of 4 bytes" in f.message for f in found)


def test_constant_tables_and_locals_are_no_buffers() -> None:
    source = """constant float table[4] = {1, 2, 3, 4};
kernel void k(device float* a [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  float local[4];
  for (uint j = 0; j < 4; ++j) local[j] = table[(i + j) & 3];
  thread float* p = local + (i & 3);
  a[i] = *p;
}"""
    out = torch.zeros(64)
    assert findings(source, {"a": out}, threads=64, threads_per_threadgroup=64) == ()
    assert out[:5].tolist() == [1, 3, 1, 3, 1]


def test_overlapping_arguments_are_one_buffer() -> None:
    memory = torch.arange(8.0)
    source = "kernel void k(device float* a [[buffer(0)]], device const float* b [[buffer(1)]], uint i [[thread_position_in_grid]]) { a[i] = b[i]; }"
    found = findings(source, {"a": memory[:4], "b": memory[1:5]}, threads=4, threads_per_threadgroup=4)
    assert {f.kind for f in found} == {"race"}
    assert findings(source, {"a": memory[:4], "b": memory[4:]}, threads=4, threads_per_threadgroup=4) == ()
    assert memory[:4].tolist() == [4, 5, 6, 7]


def test_what_does_not_end_is_ended() -> None:
    from metal_marlin.runtime import checked

    source = "kernel void k(device atomic_uint* a [[buffer(0)]]) { while (atomic_load_explicit(a, memory_order_relaxed) == 0) {} }"
    before = checked._BUDGET
    checked._BUDGET = 10_000
    try:
        found = findings(source, {"a": torch.zeros(1, dtype=torch.int32)})
    finally:
        checked._BUDGET = before
    assert {f.kind for f in found} == {"endless"}


def test_only_the_cpu_with_32_lanes_is_checked() -> None:
    with pytest.raises(MetalMarlinError, match="cpu with 32 lanes"):
        MetalKernelLibrary("kernel void k() {}", device="cpu", lanes=1, checked=True)


def test_the_environment_asks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAL_MARLIN_CHECKED", "1")
    assert MetalKernelLibrary("kernel void k() {}", device="cpu").checked
    assert not MetalKernelLibrary("kernel void k() {}", device="cpu", checked=False).checked


ALIGNED = """struct alignas(64) Wide { uint at[16]; }; struct alignas(256) Wider { uint at; };
kernel void k(device uint* y, constant uint& n, constant Wide& a, constant Wider& b, constant Wide& c, constant Wider& d) {
  y[0] = n + a.at[3] + b.at + c.at[15] + d.at;
}"""


def test_values_are_as_aligned_as_their_types() -> None:
    y, wide, wider = torch.zeros(1, dtype=torch.int32), struct.pack("16I", *range(16)), struct.pack("I252x", 100)
    for n in range(8):
        assert findings(ALIGNED, {"y": y, "n": n, "a": wide, "b": wider, "c": wide, "d": wider}) == ()
        assert y.item() == n + 3 + 15 + 200
