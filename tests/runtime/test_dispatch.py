"""dispatch_kernel: how arguments are bound, what is refused and with which words, threads, grids."""

from __future__ import annotations

import struct
import threading
from typing import Any

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import ArgumentError, UnknownKernelError

SOURCE = """
#include <metal_stdlib>
using namespace metal;

constant bool with_bias [[function_constant(3)]];

kernel void affine(device const float* x, device float* y, constant float& a, constant int& b,
                   uint i [[thread_position_in_grid]]) {
  y[i] = a * x[i] + b;
}

kernel void gaps(device float* y [[buffer(4)]], device const float* x [[buffer(1)]], constant uint& n [[buffer(2)]],
                 uint i [[thread_position_in_grid]]) {
  if (i < n) y[i] = 2 * x[i];
}

struct Inner { uchar tag; float2 v; };
struct Outer { int n; Inner inner; half h; bool flag; float w[3]; long big; };
kernel void fields(device float* y, constant Outer& s, uint i [[thread_position_in_grid]]) {
  float values[] = {float(s.n), float(s.inner.tag), s.inner.v.x, s.inner.v.y, float(s.h), float(s.flag), s.w[0],
                    s.w[1], s.w[2], float(s.big >> 32)};
  y[i] = values[i];
}

kernel void numbers(device float* y, constant uchar& u8, constant short& i16, constant uint& u32, constant half& h,
                    constant bfloat& b, constant bool& t, constant float3& v, constant ulong& u64) {
  float values[] = {float(u8), float(i16), float(u32 >> 16), float(h), float(b), float(t), v.x, v.y, v.z,
                    float(u64 >> 60)};
  for (int i = 0; i < 10; i++) y[i] = values[i];
}

kernel void vectors(device const float4* x, device float4* y, uint i [[thread_position_in_grid]]) { y[i] = x[i] + x[i]; }

kernel void table(device float* y, constant float* w, device const int* at, uint i [[thread_position_in_grid]]) {
  y[i] = w[at[i]];
}

kernel void optional_bias(device float* y, device const float* bias [[function_constant(with_bias)]],
                          uint i [[thread_position_in_grid]]) {
  if (with_bias) y[i] += bias[i];
}

kernel void positions(device uint* y, uint3 p [[thread_position_in_grid]], uint3 n [[threads_per_grid]],
                      uint3 g [[threadgroup_position_in_grid]]) {
  y[(p.z * n.y + p.y) * n.x + p.x] = g.x + 10 * g.y + 100 * g.z + 1000 * (p.x + 10 * p.y + 100 * p.z);
}

[[max_total_threads_per_threadgroup(64)]]
kernel void limited(device float* y, uint i [[thread_position_in_grid]]) { y[i] = i; }

kernel void reversed(device const float* x, device float* y, threadgroup float* a [[threadgroup(0)]],
                     threadgroup char* pad [[threadgroup(2)]], threadgroup float* b [[threadgroup(1)]],
                     uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]],
                     uint n [[threads_per_threadgroup]]) {
  threadgroup float own[64];
  own[t] = x[i];
  a[t] = own[t];
  pad[t] = 7;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  b[n - 1 - t] = a[t] + pad[0] - 7;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[i] = b[t] + own[t] - own[t];
}

struct Sizes { uint global; float local; };
kernel void generic(device float* pipe, constant Sizes& local, uint i [[thread_position_in_grid]]) {
  pipe[i] = local.global * local.local;
}

kernel void bits(device const uint* x, device uint* y, uint i [[thread_position_in_grid]]) { y[i] = x[i] >> 31; }
"""


@pytest.fixture
def library(device: str) -> MetalKernelLibrary:
    return MetalKernelLibrary(SOURCE, device=device, constants={"with_bias": False})


def run(library: MetalKernelLibrary, name: str, args: Any, threads: Any = 8, tptg: Any = 8, **more: Any) -> None:
    dispatch_kernel(library, name, threads=threads, threads_per_threadgroup=tptg, args=args, **more)


def affine_args(device: str, n: int = 8) -> dict[str, Any]:
    return {
        "x": torch.arange(n, dtype=torch.float32, device=device),
        "y": torch.zeros(n, device=device),
        "a": 2,
        "b": -3,
    }


# --- binding


def test_by_name_and_by_index_agree(library: MetalKernelLibrary, device: str) -> None:
    args = affine_args(device)
    want = [2.0 * i - 3 for i in range(8)]
    run(library, "affine", args)
    assert args["y"].tolist() == want
    args["y"].zero_()
    run(library, "affine", [args["x"], args["y"], 2.0, -3])
    assert args["y"].tolist() == want
    args["y"].zero_()
    run(library, "affine", dict(reversed(args.items())))
    assert args["y"].tolist() == want


def test_indices_are_metals_and_may_leave_gaps(library: MetalKernelLibrary, device: str) -> None:
    x, y = torch.rand(8, device=device), torch.zeros(8, device=device)
    run(library, "gaps", [None, x, 5, None, y])
    assert torch.equal(y[:5], 2 * x[:5])
    assert not y[5:].any()
    with pytest.raises(ArgumentError, match=r"takes 5 arguments by buffer index, got 3: y \(4\), x \(1\), n \(2\)"):
        run(library, "gaps", [x, y, 5])
    with pytest.raises(
        ArgumentError, match=r"args\[3\]: kernel 'gaps' has no argument with buffer index 3; it takes y"
    ):
        run(library, "gaps", [None, x, 5, x, y])
    with pytest.raises(ArgumentError, match="x: is None, but kernel 'gaps' uses it"):
        run(library, "gaps", [None, None, 5, None, y])


def test_structs_are_dicts(library: MetalKernelLibrary, device: str) -> None:
    inner = {"tag": 200, "v": (0.5, -1.5)}
    value = {"n": -7, "inner": inner, "h": 0.25, "flag": True, "w": [1, 2, 3], "big": -5 << 32}
    y = torch.zeros(10, device=device)
    run(library, "fields", {"y": y, "s": value}, 10, 10)
    assert y.tolist() == [-7, 200, 0.5, -1.5, 0.25, 1, 1, 2, 3, -5]
    run(library, "fields", [y, {**value, "n": 9, "inner": {**inner, "tag": 0}}], 10, 10)
    assert y.tolist()[:2] == [9, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"tag": 1}}, r"s: missing field inner\.v; the struct has n, inner\.tag, inner\.v, h"),
        ({"inner": {"tag": 1, "v": (1, 2), "z": 0}}, r"s: unknown field inner\.z"),
        ({"extra": 1}, "s: unknown field extra"),
        ({"n": 2**31}, r"s\.n: 2147483648 does not fit int32"),
        ({"n": 0.5}, r"s\.n: 0\.5 does not fit int32"),
        ({"inner": {"tag": -1, "v": (1, 2)}}, r"s\.inner\.tag: -1 does not fit uint8"),
        ({"inner": {"tag": 1, "v": (1, 2, 3)}}, r"s\.inner\.v: needs 2 numbers, got \(1, 2, 3\)"),
        ({"w": [1, 2]}, r"s\.w: needs 3 numbers"),
        ({"h": "x"}, r"s\.h: 'x' does not fit float16"),
    ],
)
def test_wrong_fields_are_named(library: MetalKernelLibrary, device: str, change: dict[str, Any], message: str) -> None:
    value = {"n": 1, "inner": {"tag": 1, "v": (1, 2)}, "h": 1, "flag": 0, "w": (1, 2, 3), "big": 1, **change}
    with pytest.raises(ArgumentError, match=message):
        run(library, "fields", {"y": torch.zeros(10, device=device), "s": value}, 10, 10)


NUMBERS = {"u8": 255, "i16": -32768, "u32": 2**32 - 1, "h": 0.1, "b": 0.1, "t": 3, "v": (1, 2, 3), "u64": 2**64 - 1}
HALF_OF_A_TENTH = struct.unpack("<e", struct.pack("<e", 0.1))[0]
BFLOAT_OF_A_TENTH = struct.unpack("<f", b"\0\0" + struct.pack("<f", 0.1 * (1 + 2**-9))[2:])[0]


def test_numbers_of_every_width(library: MetalKernelLibrary, device: str) -> None:
    y = torch.zeros(10, device=device)
    run(library, "numbers", {"y": y, **NUMBERS}, 1, 1)
    want = [255, -32768, 65535, HALF_OF_A_TENTH, BFLOAT_OF_A_TENTH, 1, 1, 2, 3, 15]
    assert y.tolist() == want


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("u8", 256, "u8: 256 does not fit uint8"),
        ("u8", -1, "u8: -1 does not fit uint8"),
        ("i16", 1.5, r"i16: 1\.5 does not fit int16"),
        ("u32", None, "u32: is None, but kernel 'numbers' uses it"),
        ("h", 1e9, r"h: 1000000000\.0 does not fit float16"),
        ("v", (1, 2), r"v: needs 3 numbers, got \(1, 2\)"),
        ("v", 1.0, r"v: needs 3 numbers, got 1\.0"),
        ("u64", -1, "u64: -1 does not fit uint64"),
        ("u8", "7x", "u8: .*'7x'"),
        ("u8", {"a": 1}, "u8: is uint8, not a struct whose fields are known"),
    ],
)
def test_numbers_that_do_not_fit(library: MetalKernelLibrary, device: str, name: str, value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(library, "numbers", {"y": torch.zeros(10, device=device), **NUMBERS, name: value}, 1, 1)


def test_a_value_may_be_a_tensor(library: MetalKernelLibrary, device: str) -> None:
    args = affine_args(device)
    run(library, "affine", {**args, "a": torch.tensor(0.5, device=device)})
    assert args["y"].tolist() == [0.5 * i - 3 for i in range(8)]
    run(
        library,
        "affine",
        {**args, "a": torch.tensor([4.0, 9.0], device=device), "b": torch.tensor(1, device=device, dtype=torch.int32)},
    )
    assert args["y"].tolist() == [4.0 * i + 1 for i in range(8)]
    with pytest.raises(ArgumentError, match=r"a: tensor is torch\.float64"):
        run(library, "affine", {**args, "a": torch.tensor(0.5, device=device, dtype=torch.float64)})


def test_a_tensor_holds_the_whole_value(library: MetalKernelLibrary, device: str) -> None:
    args = affine_args(device)
    with pytest.raises(ArgumentError, match="a: tensor has 0 bytes, the kernel reads 4"):
        run(library, "affine", {**args, "a": torch.zeros(0, device=device)})
    assert not args["y"].any()
    small = torch.zeros(4, dtype=torch.uint8, device=device)
    with pytest.raises(ArgumentError, match="local: tensor has 4 bytes, the kernel reads 8"):
        run(library, "generic", {"pipe": args["y"], "local": small})
    run(library, "generic", {"pipe": args["y"], "local": small.repeat(2)})


def test_a_constant_array_may_be_a_list(library: MetalKernelLibrary, device: str) -> None:
    y = torch.zeros(8, device=device)
    at = torch.tensor([3, 0, 2, 1, 1, 2, 0, 3], dtype=torch.int32, device=device)
    run(library, "table", {"y": y, "w": [0.5, 1.5, 2.5, 3.5], "at": at})
    assert y.tolist() == [3.5, 0.5, 2.5, 1.5, 1.5, 2.5, 0.5, 3.5]
    with pytest.raises(ArgumentError, match=f"y: kernel 'table' takes a tensor on {device}.* here, not list"):
        run(library, "table", {"y": [0.0] * 8, "w": [1.0], "at": at})


def test_parameters_that_a_constant_switches_off(device: str) -> None:
    y = torch.zeros(8, device=device)
    off = MetalKernelLibrary(SOURCE, device=device, constants={"with_bias": False})
    run(off, "optional_bias", {"y": y})
    assert not y.any()
    on = MetalKernelLibrary(SOURCE, device=device, constants={3: True})
    with pytest.raises(ArgumentError, match="missing argument bias; it takes y, bias"):
        run(on, "optional_bias", {"y": y})
    run(on, "optional_bias", {"y": y, "bias": torch.ones(8, device=device)})
    assert y.tolist() == [1] * 8


def test_words_that_are_only_reserved_elsewhere_are_names(library: MetalKernelLibrary, device: str) -> None:
    y = torch.zeros(4, device=device)
    run(library, "generic", {"pipe": y, "local": {"global": 3, "local": 0.5}}, 4, 4)
    assert y.tolist() == [1.5] * 4


def test_signedness_is_free(library: MetalKernelLibrary, device: str) -> None:
    x = torch.tensor([-1, 1, -(2**31), 0], dtype=torch.int32, device=device)
    y = torch.zeros(4, dtype=torch.int32, device=device)
    run(library, "bits", [x, y], 4, 4)
    assert y.tolist() == [1, 0, 1, 0]


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "x: is None"),
        ({"x": 1.0}, "x: kernel 'affine' takes a tensor on .* here, not float"),
        ({"x": "buffer"}, "not str"),
        ({"x": torch.zeros(8, dtype=torch.float64)}, r"x: tensor is torch\.float64, the kernel's element is float32 \(takes torch\.float32\)"),
        ({"y": torch.zeros(8, dtype=torch.int32)}, r"y: tensor is torch\.int32"),
        ({"x": torch.zeros(8, dtype=torch.float16)}, r"x: tensor is torch\.float16"),
        ({"x": torch.zeros(16)[::2]}, r"x: tensor of shape \(8,\) with strides \(2,\) is not contiguous; call \.contiguous\(\)"),
        ({"y": torch.zeros(4, 2).T}, r"y: tensor of shape \(2, 4\) with strides \(1, 2\) is not contiguous"),
        ({"y": torch.zeros(8, requires_grad=True)}, r"y: the kernel may write this tensor, which requires grad; pass tensor\.detach\(\)"),
        ({"b": 0.5}, r"b: 0\.5 does not fit int32"),
    ],
)  # fmt: skip
def test_arguments_that_are_refused(
    library: MetalKernelLibrary, device: str, change: dict[str, Any], message: str
) -> None:
    # .to() would drop strides and history
    on_device = {
        k: v.detach().to(device, copy=True).requires_grad_(v.requires_grad)
        if isinstance(v, torch.Tensor) and v.is_contiguous()
        else v
        for k, v in change.items()
    }
    if device == "cuda" and any(isinstance(v, torch.Tensor) and not v.is_contiguous() for v in change.values()):
        on_device = {
            k: torch.zeros(16, device=device)[::2] if k == "x" else torch.zeros(4, 2, device=device).T for k in change
        }
    args = affine_args(device)
    with pytest.raises(ArgumentError, match=message):
        run(library, "affine", {**args, **on_device})
    assert not args["y"].any()


@pytest.mark.parametrize("args", [None, 5, "xyab", torch.zeros(4), {1: 2}], ids=lambda a: type(a).__name__)
def test_what_is_no_arguments_at_all(library: MetalKernelLibrary, args: Any) -> None:
    with pytest.raises(ArgumentError, match=r"args: .*takes a dict by name or a sequence|unknown argument 1"):
        run(library, "affine", args)


def test_tensors_without_memory_are_refused(library: MetalKernelLibrary, device: str) -> None:
    with pytest.raises(ArgumentError, match=r"x: takes a dense tensor, which torch\.sparse_coo is not"):
        run(library, "affine", {**affine_args(device), "x": torch.zeros(8, device=device).to_sparse()})


def test_tensors_elsewhere_are_refused(library: MetalKernelLibrary, device: str) -> None:
    elsewhere = torch.zeros(8, device="meta")
    with pytest.raises(ArgumentError, match=f"x: tensor is on meta, the library runs on {device}"):
        run(library, "affine", {**affine_args(device), "x": elsewhere})
    if device == "cuda":
        with pytest.raises(ArgumentError, match="x: tensor is on cpu, the library runs on cuda:0"):
            run(library, "affine", {**affine_args(device), "x": torch.zeros(8)})


def test_what_is_only_read_may_require_grad(library: MetalKernelLibrary, device: str) -> None:
    args = affine_args(device)
    run(library, "affine", {**args, "x": torch.ones(8, device=device, requires_grad=True)})
    assert args["y"].tolist() == [-1] * 8
    with torch.no_grad():
        run(library, "affine", {**args, "y": args["y"].requires_grad_()})


def test_alignment(library: MetalKernelLibrary, device: str) -> None:
    x, y = torch.arange(17, dtype=torch.float32, device=device), torch.zeros(16, device=device)
    run(library, "vectors", [x[:16], y], 4, 4)
    assert torch.equal(y, 2 * x[:16])
    with pytest.raises(
        ArgumentError,
        match=r"x: tensor starts at an address that is not a multiple of 16 bytes, which float32x4 needs \(storage offset 1\)",
    ):
        run(library, "vectors", [x[1:], y], 4, 4)


def test_values_are_as_aligned_as_their_types(compiler: object) -> None:
    """On the CPU, where the kernel reads the host's copies: vector instructions may rely on it."""
    source = "#include <metal_stdlib>\nstruct alignas(256) Wide { uint at; };\n"
    source += "kernel void k(device uint* y, constant Wide& a, constant uint& n) { y[0] = a.at + n; }"
    library, y = MetalKernelLibrary(source, device="cpu"), torch.zeros(1, dtype=torch.int32)
    for n in range(20):
        run(library, "k", [y, struct.pack("I252x", n), n], 1, 1)
        assert y.item() == 2 * n
    addresses = [address for address, _ in library.load("k")[1]._frame.values.values()]
    assert len(addresses) == 40
    assert not any(address % 256 for address in addresses)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"x": 0}, "kernel 'affine': missing argument y, a, b; it takes x, y, a, b"),
        (
            {"x": 0, "y": 0, "a": 1, "c": 2},
            "kernel 'affine': unknown argument c; missing argument b; it takes x, y, a, b",
        ),
        ({"x": 0, "y": 0, "a": 1, "b": 1, "z": 2}, "kernel 'affine': unknown argument z; it takes"),
        ([0, 0, 0], r"kernel 'affine' takes 4 arguments by buffer index, got 3: x \(0\), y \(1\), a \(2\), b \(3\)"),
        ([0] * 5, "takes 4 arguments by buffer index, got 5"),
        ((), "got 0"),
    ],
)
def test_names_and_numbers_of_arguments(library: MetalKernelLibrary, args: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        run(library, "affine", args)


def test_unknown_kernels_name_the_nearest(library: MetalKernelLibrary) -> None:
    with pytest.raises(UnknownKernelError, match="unknown kernel 'afine'; nearest: affine") as caught:
        run(library, "afine", [])
    assert isinstance(caught.value, KeyError)
    with pytest.raises(UnknownKernelError, match="unknown kernel 'qqqq'; there are 12 kernels"):
        library.kernel("qqqq")


# --- grids


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"threads_per_threadgroup": 8}, "give either threads .* or threadgroups"),
        ({"threads": 8, "threadgroups": 1, "threads_per_threadgroup": 8}, "give either threads"),
        ({"threads": -8, "threads_per_threadgroup": 8}, "threads must be 1 to 3 non-negative integers, got -8"),
        ({"threads": (8, 1, 1, 1), "threads_per_threadgroup": 8}, r"threads must be .* got \(8, 1, 1, 1\)"),
        ({"threads": 8.0, "threads_per_threadgroup": 8}, r"threads must be .* got 8\.0"),
        ({"threadgroups": (), "threads_per_threadgroup": 8}, r"threadgroups must be .* got \(\)"),
        ({"threads": 8, "threads_per_threadgroup": 0}, "threads_per_threadgroup must be positive, got 0"),
        ({"threads": 8, "threads_per_threadgroup": (8, 0)}, r"must be positive, got \(8, 0\)"),
        ({"threads": 8, "threads_per_threadgroup": 1025}, "1025"),
        ({"threads": 8, "threads_per_threadgroup": (32, 32, 2)}, r"\(32, 32, 2\)"),
    ],
)
def test_grids_that_are_refused(library: MetalKernelLibrary, device: str, shape: dict[str, Any], message: str) -> None:
    args = affine_args(device)
    with pytest.raises(ArgumentError, match=message):
        dispatch_kernel(library, "affine", args=args, **shape)
    assert not args["y"].any()


@pytest.mark.parametrize(
    "shape",
    [{"threads": 4.0}, {"threads": (4, 1.0)}, {"threads": (4, True)}, {"tptg": True}, {"tptg": (4.0,)}, {"tptg": "4"}],
    ids=str,
)
def test_what_equals_a_grid_seen_before_is_refused_too(
    library: MetalKernelLibrary, device: str, shape: dict[str, Any]
) -> None:
    args = affine_args(device)
    for threads in (4, (4, 1)):
        for tptg in (4, 1, (4,)):
            run(library, "affine", args, threads, tptg)
    with pytest.raises(ArgumentError, match="must be 1 to 3 non-negative integers"):
        run(library, "affine", args, **{"threads": 4, "tptg": 4, **shape})


def test_a_kernels_own_limit(library: MetalKernelLibrary, device: str) -> None:
    y = torch.zeros(128, device=device)
    run(library, "limited", [y], 128, 64)
    assert y.tolist() == list(range(128))
    with pytest.raises(ArgumentError, match=r"65.*(max_total_threads_per_threadgroup = 64|64 at most)"):
        run(library, "limited", [y], 128, 65)


def test_an_empty_grid_launches_nothing(library: MetalKernelLibrary, device: str) -> None:
    args = affine_args(device)
    run(library, "affine", args, 0)
    run(library, "affine", args, (8, 0, 1))
    dispatch_kernel(library, "affine", threadgroups=(0, 5), threads_per_threadgroup=8, args=args)
    assert not args["y"].any()
    with pytest.raises(ArgumentError, match="unknown argument z"):  # but the arguments are checked
        run(library, "affine", {**args, "z": 1}, 0)


@pytest.mark.parametrize(
    ("threads", "tptg"), [((7, 5, 3), (4, 2, 2)), ([9, 2], [4, 4]), ((3,), (1,)), (33, 32), ((1, 1, 9), (1, 1, 4))]
)
def test_edge_threadgroups_are_smaller(library: MetalKernelLibrary, device: str, threads: Any, tptg: Any) -> None:
    nx, ny, nz = (*(threads if not isinstance(threads, int) else [threads]), 1, 1)[:3]
    tx, ty, tz = (*(tptg if not isinstance(tptg, int) else [tptg]), 1, 1)[:3]
    y = torch.full((nx * ny * nz + 8,), -1, dtype=torch.int32, device=device)
    run(library, "positions", [y], threads, tptg)
    want = [
        x // tx + 10 * (j // ty) + 100 * (z // tz) + 1000 * (x + 10 * j + 100 * z)
        for z in range(nz)
        for j in range(ny)
        for x in range(nx)
    ]
    assert y.tolist() == want + [-1] * 8


# --- threadgroup memory


def test_threadgroup_memory_by_name_and_index(library: MetalKernelLibrary, device: str) -> None:
    x, y = torch.arange(128.0, device=device), torch.zeros(128, device=device)
    want = x.view(2, 64).flip(1).reshape(-1)
    for memory in ({"a": 256, "pad": 65, "b": 256}, {0: 256, 2: 65, 1: 256}, {"a": 256, 2: 4096, "b": 1024}):
        y.zero_()
        run(library, "reversed", [x, y], 128, 64, threadgroup_memory=memory)
        assert torch.equal(y, want), memory


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (None, r"needs the bytes of 'a' \(index 0\), got None"),
        ({"a": 256, "b": 256}, r"needs the bytes of 'pad' \(index 2\), got None"),
        ({"a": -1, "b": 256, "pad": 1}, "got -1"),
        ({"a": 256.0, "b": 256, "pad": 64}, r"needs the bytes of 'a' \(index 0\), got 256\.0"),
        ({"a": True, "b": 256, "pad": 64}, "got True"),
        ({"a": 2**33, "b": 256, "pad": 64}, "got 8589934592"),
        ({"a": 2**30, "b": 256, "pad": 64}, r"threadgroup|shared memory"),
        (64, "takes a dict of bytes by name or index, got 64"),
        ({"a": 256, "b": 256, "pad": 64, "c": 1}, r"kernel 'reversed' has no threadgroup argument \['c'\]"),
    ],
)
def test_threadgroup_memory_that_is_refused(
    library: MetalKernelLibrary, device: str, memory: Any, message: str
) -> None:
    x = torch.zeros(64, device=device)
    with pytest.raises(ArgumentError, match=message):
        run(library, "reversed", [x, x.clone()], 64, 64, threadgroup_memory=memory)


def test_threadgroup_memory_has_a_limit_on_the_cpu() -> None:
    library = MetalKernelLibrary(SOURCE, device="cpu", constants={"with_bias": False})
    x = torch.arange(64.0)
    y, own = torch.zeros(64), 64 * 4
    memory = {"a": 256, "b": 256, "pad": 2**18 - own - 512}
    run(library, "reversed", [x, y], 64, 64, threadgroup_memory=memory)
    assert torch.equal(y, x.flip(0))
    message = (
        r"threadgroup_memory: kernel 'reversed' needs 2621\d\d bytes with its own variables; the limit is 262144 on"
    )
    for _ in range(2):
        with pytest.raises(ArgumentError, match=message):
            run(library, "reversed", [x, y], 64, 64, threadgroup_memory={**memory, "pad": memory["pad"] + 16})


# --- several threads at once


def test_python_threads_dispatch_at_once(device: str) -> None:
    """Every thread has its own tensors and values and changes shapes: nothing of one launch may reach another."""
    library = MetalKernelLibrary(SOURCE, device=device, constants={"with_bias": False})  # not loaded yet
    failures: list[str] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        try:
            start.wait()
            for turn in range(40):
                n = 64 * (1 + (seed + turn) % 5)
                x = torch.full((n,), float(seed), device=device) + torch.arange(n, device=device)
                y = torch.zeros(n, device=device)
                run(library, "affine", {"x": x, "y": y, "a": seed, "b": turn}, n, 64)
                if not torch.equal(y, seed * x + turn):
                    failures.append(f"affine {seed} {turn}")
                run(library, "reversed", [x, y], n, 64, threadgroup_memory={0: 256, 1: 256 + 16 * seed, 2: 64})
                if not torch.equal(y, x.view(-1, 64).flip(1).reshape(-1)):
                    failures.append(f"reversed {seed} {turn}")
        except BaseException as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def test_dispatch_does_not_wait_for_the_gpu(device: str) -> None:
    if device == "cpu":
        pytest.skip("a launch on the cpu runs to its end")
    library = MetalKernelLibrary(SOURCE, device=device, constants={"with_bias": False})
    args = affine_args(device)
    run(library, "affine", args)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        run(library, "affine", args)
        assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


def test_dispatch_in_a_cuda_graph(device: str) -> None:
    if device == "cpu":
        pytest.skip("graphs are a thing of GPUs")
    library = MetalKernelLibrary(SOURCE, device=device, constants={"with_bias": False})
    args = affine_args(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(library, "affine", args)
        run(library, "affine", {**args, "x": args["y"]})
    assert not args["y"].any()
    args["x"].fill_(5)
    graph.replay()
    assert args["y"].tolist() == [2 * (2 * 5 - 3) - 3] * 8
