"""Language features of MSL: how kernels are declared, instantiated and given arguments; threadgroup memory; constants."""

from __future__ import annotations

import numpy as np
import pytest
import torch

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def test_template_rows_by_host_name(msl):
    source = (
        HEAD
        + """
    template <typename T, int N>
    [[kernel]] void scale(device const T* x [[buffer(0)]], device T* y [[buffer(1)]], uint i [[thread_position_in_grid]]) {
      y[i] = x[i] * T(N);
    }
    template [[host_name("scale_half_3")]] [[kernel]] void scale<half, 3>(device const half*, device half*, uint);
    template [[host_name("scale_float_5")]] [[kernel]] decltype(scale<float, 5>) scale<float, 5>;
    """
    )
    x = torch.arange(40, dtype=torch.float32)
    out = msl(source, "scale_float_5", {"x": x, "y": torch.zeros(40)}, threads=40, threads_per_threadgroup=32)
    assert torch.equal(out["y"], x * 5)
    half = {"x": x.half(), "y": torch.zeros(40, dtype=torch.float16)}
    assert torch.equal(msl(source, "scale_half_3", half, threads=40, threads_per_threadgroup=32)["y"], x.half() * 3)


def test_rows_from_macros(msl):
    source = (
        HEAD
        + """
    #include "core/instantiate.h"
    #define ROW(name, type, n) template [[host_name(#name "_" #type)]] [[kernel]] void add<type, n>(device type*, uint);
    template <typename T, int N> kernel void add(device T* x, uint i [[thread_position_in_grid]]) { x[i] += T(N); }
    ROW(add, int, 4)
    INSTANTIATE("add_seven", add<float, 7>)
    """
    )
    ints = msl(source, "add_int", {"x": torch.arange(8, dtype=torch.int32)}, threads=8, threads_per_threadgroup=8)
    assert ints["x"].tolist() == list(range(4, 12))
    floats = msl(source, "add_seven", {"x": torch.arange(8.0)}, threads=8, threads_per_threadgroup=8)
    assert floats["x"].tolist() == [float(v) for v in range(7, 15)]


def test_explicit_and_implicit_buffer_indices(msl):
    source = (
        HEAD
        + """
    kernel void mix3(device const float* a [[buffer(2)]], device float* out, constant float& k, device const float* b [[buffer(0)]],
                     uint i [[thread_position_in_grid]]) { out[i] = a[i] - k * b[i]; }
    """
    )
    a, b = torch.randn(10), torch.randn(10)
    # explicit 2 and 0 leave 1 for out and 3 for k
    from metal_marlin import MetalKernelLibrary

    library = MetalKernelLibrary(source, device="cpu")
    assert {p.name: p.index for p in library.kernel("mix3").bound} == {"a": 2, "out": 1, "k": 3, "b": 0}
    out = msl(
        source,
        "mix3",
        {"a": a, "b": b, "k": 3.0, "out": torch.zeros(10)},
        threads=10,
        threads_per_threadgroup=4,
    )
    assert torch.allclose(out["out"], a - 3 * b, atol=1e-6)


POSITIONS = [
    ("thread_position_in_grid", 3),
    ("thread_position_in_threadgroup", 3),
    ("thread_index_in_threadgroup", 1),
    ("threadgroup_position_in_grid", 3),
    ("threadgroups_per_grid", 3),
    ("threads_per_grid", 3),
    ("threads_per_threadgroup", 3),
    ("dispatch_threads_per_threadgroup", 3),
    ("thread_index_in_simdgroup", 1),
    ("simdgroup_index_in_threadgroup", 1),
    ("simdgroups_per_threadgroup", 1),
    ("dispatch_simdgroups_per_threadgroup", 1),
    ("threads_per_simdgroup", 1),
    ("thread_execution_width", 1),
    ("thread_index_in_quadgroup", 1),
    ("quadgroup_index_in_threadgroup", 1),
    ("quadgroups_per_threadgroup", 1),
    ("dispatch_quadgroups_per_threadgroup", 1),
    ("grid_size", 3),
    ("grid_origin", 3),
]


def _expected_positions(threads, tptg):
    """Per thread in row-major grid order, as the specification defines each attribute."""
    groups = [-(-n // t) for n, t in zip(threads, tptg, strict=True)]
    table = {name: [] for name, _ in POSITIONS}
    for z, y, x in np.ndindex(threads[2], threads[1], threads[0]):
        at = (x, y, z)
        tg = tuple(p // t for p, t in zip(at, tptg, strict=True))
        local = tuple(p % t for p, t in zip(at, tptg, strict=True))
        size = tuple(min(t, n - g * t) for t, n, g in zip(tptg, threads, tg, strict=True))
        linear = local[0] + size[0] * (local[1] + size[1] * local[2])
        total, full = int(np.prod(size)), int(np.prod(tptg))
        values = {
            "thread_position_in_grid": at,
            "thread_position_in_threadgroup": local,
            "thread_index_in_threadgroup": linear,
            "threadgroup_position_in_grid": tg,
            "threadgroups_per_grid": groups,
            "threads_per_grid": threads,
            "threads_per_threadgroup": size,
            "dispatch_threads_per_threadgroup": tptg,
            "thread_index_in_simdgroup": linear % 32,
            "simdgroup_index_in_threadgroup": linear // 32,
            "simdgroups_per_threadgroup": -(-total // 32),
            "dispatch_simdgroups_per_threadgroup": -(-full // 32),
            "threads_per_simdgroup": 32,
            "thread_execution_width": 32,
            "thread_index_in_quadgroup": linear % 4,
            "quadgroup_index_in_threadgroup": linear // 4,
            "quadgroups_per_threadgroup": -(-total // 4),
            "dispatch_quadgroups_per_threadgroup": -(-full // 4),
            "grid_size": threads,
            "grid_origin": (0, 0, 0),
        }
        for name, value in values.items():
            table[name].append(value)
    return {name: np.array(rows).reshape(len(rows), -1) for name, rows in table.items()}


@pytest.mark.parametrize(
    ("threads", "tptg"), [((24, 10, 6), (8, 5, 2)), ((21, 7, 5), (8, 4, 2)), ((70, 1, 1), (32, 1, 1))]
)
@pytest.mark.parametrize(("name", "width"), POSITIONS)
def test_every_position_attribute(msl, name, width, threads, tptg):
    kind, store = ("uint3", "o[3*n] = v.x; o[3*n+1] = v.y; o[3*n+2] = v.z;") if width == 3 else ("uint", "o[n] = v;")
    extra = "" if name == "thread_position_in_grid" else ", uint3 p [[thread_position_in_grid]]"
    source = (
        HEAD
        + f"""
    kernel void show(device uint* o, constant uint2& size, {kind} v [[{name}]]{extra}) {{
      {"uint3 p = v;" if not extra else ""}
      uint n = p.x + size.x * (p.y + size.y * p.z);
      {store}
    }}"""
    )
    count = int(np.prod(threads))
    out = torch.full((count * width,), -1, dtype=torch.int32)
    got = msl(source, "show", {"o": out, "size": threads[:2]}, threads=threads, threads_per_threadgroup=tptg)["o"]
    assert np.array_equal(got.numpy().reshape(count, width), _expected_positions(threads, tptg)[name])


def test_positions_in_narrow_types(msl):
    source = (
        HEAD
        + """
    kernel void show(device ushort* o, ushort2 p [[thread_position_in_grid]], ushort lane [[thread_index_in_simdgroup]],
                     uint2 n [[threads_per_grid]], ushort3 tg [[threadgroup_position_in_grid]]) {
      o[p.x + p.y * n.x] = ushort(p.x * 1000 + p.y * 100 + lane + tg.x * 10000);
    }"""
    )
    out = torch.zeros(6 * 2, dtype=torch.int16)
    got = msl(source, "show", {"o": out}, threads=(6, 2), threads_per_threadgroup=(3, 2))["o"].view(2, 6)
    expected = [[(x % 65536) * 1000 + y * 100 + (x % 3 + 3 * y) + (x // 3) * 10000 for x in range(6)] for y in range(2)]
    assert got.tolist() == expected


def test_structs_by_value_and_in_memory(msl):
    source = (
        HEAD
        + """
    struct Inner { half a; float3 v; };
    struct Params {
      int n; uint8_t flags[4]; Inner inner; packed_float3 p; bool on; ulong big;
      float sum() const constant { return inner.v.x + inner.v.y + inner.v.z + p.x + p.y + p.z; }
    };
    struct Pair { float key; int value; };
    kernel void use(constant Params& params, device Pair* pairs, device float* out, uint i [[thread_position_in_grid]]) {
      Pair mine = pairs[i];
      mine.value += params.n + params.flags[i % 4];
      pairs[i] = mine;
      device Pair& same = pairs[i];
      same.key *= 2.0f;
      out[i] = params.sum() + float(params.inner.a) + (params.on ? 1000.0f : 0.0f) + float(params.big >> 40);
    }"""
    )
    pairs = torch.stack([torch.arange(6.0), torch.arange(6, dtype=torch.int32).view(torch.float32)], 1).contiguous()
    params = {
        "n": -5, "flags": [1, 2, 3, 4], "inner": {"a": 0.5, "v": (1.0, 2.0, 3.0)}, "p": (10.0, 20.0, 30.0), "on": True, "big": 7 << 40,
    }  # fmt: skip
    out = msl(
        source,
        "use",
        {"params": params, "pairs": pairs, "out": torch.zeros(6)},
        threads=6,
        threads_per_threadgroup=2,
    )
    assert out["out"].tolist() == [1.0 + 2 + 3 + 60 + 0.5 + 1000 + 7] * 6
    assert out["pairs"][:, 0].tolist() == [2.0 * i for i in range(6)]
    assert out["pairs"][:, 1].contiguous().view(torch.int32).tolist() == [i - 5 + (i % 4 + 1) for i in range(6)]


def test_value_argument_from_device_memory(msl):
    source = (
        HEAD
        + "kernel void put(constant int& n, device int* y, uint i [[thread_position_in_grid]]) { y[i] = n + int(i); }"
    )
    args = {"n": torch.tensor([41], dtype=torch.int32), "y": torch.zeros(5, dtype=torch.int32)}
    assert msl(source, "put", args, threads=5, threads_per_threadgroup=5)["y"].tolist() == [
        41,
        42,
        43,
        44,
        45,
    ]


def test_constant_pointer_from_a_list(msl):
    source = (
        HEAD
        + """
    kernel void strided(device const float* x, constant int64_t* strides, device float* y, uint2 p [[thread_position_in_grid]]) {
      y[p.y * 3 + p.x] = x[p.y * strides[0] + p.x * strides[1]];
    }"""
    )
    x = torch.randn(3, 2)
    out = msl(
        source,
        "strided",
        {"x": x, "strides": [1, 2], "y": torch.zeros(6)},
        threads=(3, 2),
        threads_per_threadgroup=(3, 1),
    )
    assert torch.equal(out["y"].view(2, 3), x.t())


def test_threadgroup_arrays_in_every_place(msl):
    source = (
        HEAD
        + """
    struct Tile { float rows[4][8]; int count; };
    template <typename T, int N>
    kernel void shuffle(device T* x, uint t [[thread_index_in_threadgroup]], uint g [[threadgroup_position_in_grid]]) {
      threadgroup T first[N], second[2][N / 2];
      threadgroup Tile tile;
      constexpr int half_n = N / 2;
      first[t] = x[g * N + t];
      if (t == 0) { tile.count = 0; }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int round = 0; round < 2; round++) {
        threadgroup T inner[half_n * 2];
        inner[N - 1 - t] = first[t];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        second[t / half_n][t % half_n] = inner[t] + T(round);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        first[t] = second[t / half_n][t % half_n];
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      tile.rows[t % 4][t / 4] = float(first[t]);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      x[g * N + t] = T(tile.rows[t % 4][t / 4]) + T(tile.count);
    }
    template [[host_name("shuffle32")]] kernel void shuffle<float, 32>(device float*, uint, uint);
    """
    )
    x = torch.randn(96)
    out = msl(source, "shuffle32", {"x": x}, threadgroups=3, threads_per_threadgroup=32)
    assert torch.allclose(out["x"], x + 1)  # reversed twice, plus 0 plus 1


def test_dynamic_threadgroup_arguments(msl):
    source = (
        HEAD
        + """
    kernel void rotate(device float* x, threadgroup float* a [[threadgroup(1)]], threadgroup int* b [[threadgroup(0)]],
                       uint t [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]], uint i [[thread_position_in_grid]]) {
      threadgroup float fixed[64];
      a[t] = x[i]; b[t] = int(t) * 3; fixed[t] = 0.5f;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      uint s = (t + 1) % n;
      x[i] = a[s] + float(b[s]) + fixed[s];
    }"""
    )
    x = torch.randn(128)
    out = msl(
        source,
        "rotate",
        {"x": x},
        threads=128,
        threads_per_threadgroup=64,
        threadgroup_memory={"a": 64 * 4, 0: 64 * 4},
    )["x"]
    shift = torch.arange(1, 65) % 64
    expected = x.view(2, 64)[:, shift] + shift * 3.0 + 0.5
    assert torch.allclose(out.view(2, 64), expected)


CONSTANTS = (
    HEAD
    + """
constant bool use_bias [[function_constant(0)]];
constant int rounds [[function_constant(1)]];
constant float scale_in [[function_constant(2)]];
constant float factor = is_function_constant_defined(scale_in) ? scale_in : 0.25f;
constant bool plain = !use_bias;
kernel void apply(device float* x, device const float* bias [[buffer(1), function_constant(use_bias)]],
                  uint i [[thread_position_in_grid]]) {
  float v = x[i];
  for (int r = 0; r < rounds; r++) v *= factor;
  if (use_bias) v += bias[i];
  if (plain) v -= 1.0f;
  x[i] = v;
}"""
)


def test_function_constants(msl):
    x, bias = torch.randn(16), torch.randn(16)
    by_name = {"use_bias": True, "rounds": 2, "scale_in": 3.0}
    out = msl(CONSTANTS, "apply", {"x": x, "bias": bias}, constants=by_name, threads=16, threads_per_threadgroup=16)
    assert torch.allclose(out["x"], x * 9 + bias, atol=1e-5)
    without = msl(CONSTANTS, "apply", {"x": x}, constants={0: False, 1: 1}, threads=16, threads_per_threadgroup=16)
    assert torch.allclose(without["x"], x * 0.25 - 1)


def test_program_scope_constants_and_address_space_overloads(msl):
    source = (
        HEAD
        + """
    constant float lut[4] = {1.0f, 10.0f, 100.0f, 1000.0f};
    constant float4 offset = float4(1, 2, 3, 4);
    namespace helpers {
      constant constexpr int kTwo = 2;
      inline int space(device const float* p) { return 1; }
      inline int space(threadgroup const float* p) { return 2; }
      inline int space(constant float* p) { return 3; }
      inline int space(thread const float* p) { return 4; }
    }
    template <typename T> struct Traits { using vec4 = metal::vec<T, 4>; static constexpr constant int width = 4; };
    kernel void show(device float* x, constant float& k, uint i [[thread_position_in_grid]]) {
      threadgroup float tg[4];
      tg[i] = 0.0f;
      float mine = 0.0f;
      int spaces = helpers::space(x) * 1000 + helpers::space(tg) * 100 + helpers::space(lut) * 10 + helpers::space(&mine);
      typename Traits<float>::vec4 v = typename Traits<float>::vec4(offset.xyz, k);
      x[i] = lut[i] + v[i] + float(spaces) + float(helpers::kTwo * Traits<half>::width);
    }"""
    )
    out = msl(source, "show", {"x": torch.zeros(4), "k": 0.5}, threads=4, threads_per_threadgroup=4)
    assert out["x"].tolist() == [
        1 + 1 + 1234 + 8,
        10 + 2 + 1234 + 8,
        100 + 3 + 1234 + 8,
        1000 + 0.5 + 1234 + 8,
    ]


def test_nested_templates_and_dependent_names(msl):
    source = (
        HEAD
        + """
    template <typename T> struct Sum { T total = T(0); METAL_FUNC void add(T v) { total += v; } METAL_FUNC T get() const { return total; } };
    template <typename T> struct Max { T total = numeric_limits<T>::lowest(); void add(T v) { total = max(total, v); } T get() const { return total; } };
    template <typename T, template <typename> class Op, int N> struct Reduce {
      template <int K> static T part(const device T* x) { Op<T> op; for (int i = 0; i < N / K; i++) op.add(x[i * K]); return op.get(); }
    };
    template <typename R, int K> [[kernel]] void reduce(const device float* x, device float* y, uint i [[thread_position_in_grid]]) {
      y[i] = R::template part<K>(x + i);
    }
    typedef Reduce<float, Sum, 8> Sum8;
    using Max8 = Reduce<float, Max, 8>;
    template [[host_name("sum")]] [[kernel]] void reduce<Sum8, 2>(const device float*, device float*, uint);
    template [[host_name("largest")]] [[kernel]] void reduce<Max8, 1>(const device float*, device float*, uint);
    """
    )
    x = torch.randn(16)
    out = msl(source, "sum", {"x": x, "y": torch.zeros(2)}, threads=2, threads_per_threadgroup=2)
    assert torch.allclose(out["y"], torch.stack([x[0:8:2].sum(), x[1:9:2].sum()]))
    out = msl(source, "largest", {"x": x, "y": torch.zeros(2)}, threads=2, threads_per_threadgroup=2)
    assert torch.equal(out["y"], torch.stack([x[0:8].max(), x[1:9].max()]))


def test_names_that_opencl_reserves(msl):
    source = (
        HEAD
        + """
    kernel void names(device float* global, uint i [[thread_position_in_grid]]) {
      float local = global[i], pipe = 2.0f, generic = local * pipe; int vec_step = 1;
      global[i] = generic + float(vec_step);
    }"""
    )
    x = torch.randn(4)
    assert torch.equal(msl(source, "names", {"global": x}, threads=4, threads_per_threadgroup=4)["global"], x * 2 + 1)


@pytest.mark.slow
def test_offsets_beyond_32_bits(msl):
    source = (
        HEAD
        + """
    kernel void far(device uchar* x, constant ulong& base, uint i [[thread_position_in_grid]]) { x[base + ulong(i)] = uchar(i + 1); }
    """
    )
    base = (1 << 32) + 12345
    x = torch.zeros(base + 8, dtype=torch.uint8)
    out = msl(source, "far", {"x": x, "base": base}, threads=4, threads_per_threadgroup=4)["x"]
    assert out[base : base + 5].tolist() == [1, 2, 3, 4, 0]
    assert out[12345 : 12345 + 4].tolist() == [0] * 4


def test_kernels_without_arguments_and_macros_with_conditionals(msl):
    source = (
        HEAD
        + """
    #if defined(__METAL_VERSION__) && __METAL_VERSION__ >= 310
    #define STORE(p, v) *(p) = (v)
    #else
    #error "not Metal"
    #endif
    kernel void nothing() {}
    [[kernel, max_total_threads_per_threadgroup(64)]] void put(device int* x, uint i [[thread_position_in_grid]]) { STORE(x + i, int(i)); }
    """
    )
    assert msl(source, "nothing", {}, threads=8, threads_per_threadgroup=4) == {}
    out = msl(source, "put", {"x": torch.zeros(8, dtype=torch.int32)}, threads=8, threads_per_threadgroup=4)
    assert out["x"].tolist() == list(range(8))


@pytest.mark.lane_agnostic
def test_lane_agnostic_reduction(msl):
    source = (
        "// metal-marlin: lanes=any\n"
        + HEAD
        + """
    #ifndef METAL_MARLIN_LANES
    #define METAL_MARLIN_LANES 32
    #endif
    kernel void total(device const float* x, device float* y, constant uint& n, uint g [[threadgroup_position_in_grid]],
                      uint lane [[thread_index_in_simdgroup]]) {
      float sum = 0.0f;
      for (uint i = lane; i < n; i += METAL_MARLIN_LANES) sum += x[g * n + i];
      sum = simd_sum(sum);
      if (lane == 0) y[g] = sum;
    }"""
    )
    x = torch.randint(-8, 8, (5, 101)).float()
    lanes = 1 if msl.backend == "cpu1" else 32
    out = msl(
        source,
        "total",
        {"x": x, "y": torch.zeros(5), "n": 101},
        threadgroups=5,
        threads_per_threadgroup=lanes,
    )
    assert torch.equal(out["y"], x.sum(1))


@pytest.mark.lane_agnostic
def test_methods_that_return_thread_references(msl):
    source = """#include <metal_stdlib>
    using namespace metal;
    template <typename T, int N> struct Tile {
      T values[N];
      METAL_FUNC thread T& at(short i) { return values[i]; }
      METAL_FUNC const thread T& at(short i) const { return values[i]; }
      thread T* data() { return &values[0]; }
      thread T& operator[](int i) { return values[i]; }
    };
    template <typename T> void add(thread T& to, T v) { to += v; }
    kernel void tiles(device float* y, uint i [[thread_position_in_grid]]) {
      Tile<float, 4> tile;
      for (short k = 0; k < 4; k++) tile.at(k) = float(k);
      add(tile.at(1), 10.0f);
      tile.data()[2] += 20.0f;
      tile[3] *= 2.0f;
      const Tile<float, 4> same = tile;
      for (short k = 0; k < 4; k++) y[k] = same.at(k);
    }"""
    out = msl(source, "tiles", {"y": torch.zeros(4)}, threads=1, threads_per_threadgroup=1)
    assert out["y"].tolist() == [0.0, 11.0, 22.0, 6.0]
