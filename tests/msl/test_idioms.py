"""Idioms of well-known Metal code bases, in kernels of our own: what a front end meets outside its conformance tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
CASES: list[Any] = []


def case(name: str, source: str, kernel: str, args: dict[str, Any], expected: dict[str, Any], **launch: Any) -> None:
    CASES.append(pytest.param(HEAD + source, kernel, args, expected, launch, id=name))


torch.manual_seed(0)

# fragments of matrices through thread_elements, tiles of fragments
A, B = torch.randn(8, 8), torch.randn(8, 8)
case(
    "fragments",
    """
#define UNROLLED _Pragma("clang loop unroll(full)")
#define CONSTANT static constant constexpr const
template <typename T, int kSize> struct Fragment {
  static_assert(kSize == 8, "matrices are 8x8");
  CONSTANT int kOwn = kSize * kSize / 32;
  typedef metal::simdgroup_matrix<T, kSize, kSize> Matrix;
  typedef metal::vec<T, kOwn> Values;
  METAL_FUNC static constexpr short2 place(ushort lane) {
    return short2{short(lane / 8 % 2 * 4 + lane % 2 * 2), short(lane / 16 * 4 + lane / 2 % 4)};
  }
  template <typename Pointer, typename Stride> METAL_FUNC static void fetch(thread Values& to, Pointer from, Stride step) {
    UNROLLED for (short i = 0; i < kOwn; i++) to[i] = static_cast<T>(from[i * step]);
  }
  METAL_FUNC static constexpr thread Values& own(thread Matrix& m) {
    return reinterpret_cast<thread Values&>(m.thread_elements());
  }
  METAL_FUNC static void multiply(thread Values& sum, thread Values& left, thread Values& right) {
    Matrix a, b, c, d;
    reinterpret_cast<thread Values&>(a.thread_elements()) = left;
    own(b) = right;
    own(c) = sum;
    simdgroup_multiply_accumulate(d, a, b, c);
    sum = own(d);
  }
};
template <typename T, int kRows, int kColumns, class Part = Fragment<T, 8>> struct Grid {
  typedef typename Part::Values Values;
  Values parts[kRows * kColumns] = {Values(0)};
  METAL_FUNC Grid() thread {}
  METAL_FUNC constexpr void clear() { UNROLLED for (short i = 0; i < kRows * kColumns; ++i) parts[i] = Values(0); }
  METAL_FUNC constexpr thread Values& part(const short r, const short c) { return parts[r * kColumns + c]; }
  METAL_FUNC constexpr const thread Values& part(const short r, const short c) const { return parts[r * kColumns + c]; }
  METAL_FUNC thread T* scalars() { return reinterpret_cast<thread T*>(parts); }
};
[[kernel]] void product(const device float* A [[buffer(0)]], const device float* B, device float* D,
                        uint lane [[thread_index_in_simdgroup]]) {
  typedef Fragment<float, 8> F;
  Grid<float, 1, 1> a, b, d;
  d.clear();
  const short2 at = F::place(lane);
  F::fetch(a.part(0, 0), A + at.y * 8 + at.x, 1);
  F::fetch(b.part(0, 0), B + at.y * 8 + at.x, 1);
  F::multiply(d.part(0, 0), a.part(0, 0), b.part(0, 0));
  for (short k = 0; k < 2; k++) D[at.y * 8 + at.x + k] = d.scalars()[k];
}""",
    "product",
    {"A": A, "B": B, "D": torch.zeros(8, 8)},
    {"D": A @ B},
    threads=32,
    threads_per_threadgroup=32,
)

# blocks of a file format, their decoder as a template parameter, one dynamic buffer carved up
scale, nibbles = torch.rand(4, 1).half(), torch.randint(0, 256, (4, 16), dtype=torch.uint8)
blocks = torch.cat([scale.view(torch.uint8), nibbles], 1)
values = torch.cat([nibbles & 15, nibbles >> 4], 1).float() - 8
case(
    "blocks",
    """
#define COUNT 32
#define UNROLLED(x) _Pragma("clang loop unroll(full)") for (x)
typedef struct { half scale; uint8_t nibbles[COUNT / 2]; } Block;
static_assert(sizeof(Block) == sizeof(half) + COUNT / 2, "a block has no padding");
typedef struct { int32_t count; uint64_t stride; } Layout;
template <typename M> void decode(device const Block* block, short high, thread M& values) {
  device const uint16_t* pairs = (device const uint16_t*)block + 1;
  float4x4 wide;
  for (int i = 0; i < 8; i++) {
    const ushort pair = high ? pairs[i] >> 4 : pairs[i];
    wide[i / 2][2 * (i % 2)] = block->scale * (float(pair & 0xF) - 8.h);
    wide[i / 2][2 * (i % 2) + 1] = block->scale * (float(pair >> 8 & 0xF) - 8.h);
  }
  values = (M) wide;
}
template <typename B, short kParts, void (*decoder)(device const B*, short, thread half4x4&)>
kernel void unpack(constant Layout & layout, device const char * file, device float * y,
                   threadgroup char * scratch [[threadgroup(0)]], uint3 group[[threadgroup_position_in_grid]],
                   ushort t[[thread_index_in_threadgroup]]) {
  threadgroup half * halves = (threadgroup half *)(scratch);
  threadgroup float * floats = (threadgroup float *)(scratch + 4096);
  half4x4 values;
  decoder((device const B *)(file + layout.stride * group.x), t, values);
  UNROLLED (short i = 0; i < 16; i++) { *(halves + 16 * t + i) = values[i / 4][i % 4]; }
  floats[t] = t;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (t == 0) for (short i = 0; i < 16 * kParts; i++) y[layout.count * group.x + i] = halves[i] + floats[1] - 1;
}
typedef decltype(unpack<Block, 2, decode>) unpack_t;
template [[host_name("unpack_blocks")]] kernel unpack_t unpack<Block, 2, decode>;
""",
    "unpack_blocks",
    {"layout": {"count": 32, "stride": 18}, "file": blocks.view(torch.int8), "y": torch.zeros(4, 32)},
    {"y": (values * scale.float()).half()},
    threadgroups=4,
    threads_per_threadgroup=2,
    threadgroup_memory={0: 8192},
)

# unions, enums, operators, tables of constants
case(
    "misc",
    """
enum class Op : uint { add, mul = 5 };
enum Mode { fast_mode, slow_mode };
union Bits { float f; uint u; uchar b[4]; };
struct Complex { float real, imag;
  constexpr Complex(float r, float i) : real(r), imag(i) {}
  constexpr Complex() thread : real(0), imag(0) {}
  template <typename T, typename = typename metal::enable_if<!is_same_v<T, Complex>>::type> constexpr Complex(T x) thread : real(x), imag(0) {}
  constexpr operator float() const thread { return real; }
};
constexpr Complex operator+(Complex a, Complex b) { return {a.real + b.real, a.imag + b.imag}; }
constexpr Complex operator*(Complex a, Complex b) { return {a.real*b.real - a.imag*b.imag, a.real*b.imag + a.imag*b.real}; }
constant constexpr float table[2][3] = {{1,2,3},{4,5,6}};
constant float4 vecs[] = {float4(1,2,3,4), {5,6,7,8}};
struct Sum { template <typename T> T operator()(T a, T b) { return a + b; } static constexpr constant float init = 0.0f; };
template <typename T, typename O, int N = 4> T reduce(const thread T (&x)[N], O op) { T r = O::init; for (int i = 0; i < N; ++i) r = op(r, x[i]); return r; }
template <typename... Ts> constexpr int count(Ts...) { return sizeof...(Ts); }
kernel void misc(device float* y, constant uint& mode [[buffer(1)]], uint i [[thread_position_in_grid]]) {
  Bits b; b.f = 1.0f;
  y[0] = (b.u >> 23) == 127 ? 1 : 0;
  switch (Op(mode)) { case Op::add: y[1] = 1; break; case Op::mul: y[1] = 5; break; default: y[1] = -1; }
  Complex c = Complex(1, 2) * Complex(3, 4) + Complex(1.0f, 0.0f);
  y[2] = c.real; y[3] = c.imag;
  y[4] = table[1][i + 2]; y[5] = vecs[1].z;
  float v[4] = {1, 2, 3, 4}; y[6] = reduce(v, Sum());
  y[7] = count(1, 2.0f, 3u);
  float4 q = {1, 2, 3, 4}; q.xy = q.zw; q.z += 1; y[8] = q.x + q.y * 10 + q.z * 100;
  float3 s = float3(0.5); s = select(s, float3(2.0), s < 1.0); y[9] = s.x + s.y + s.z;
  const auto m = metal::max(1, 3); y[10] = m > 2 ? float(m) : 0.0f;
  y[11] = any(q > 3.5f) ? 1.0f : 0.0f;
  ushort4 h = ushort4(1, 2, 3, 4) << 2; y[12] = h.w;
  int2 k = int2(7, -7) / 2; y[13] = k.x * 10 + k.y;
  y[14] = as_type<half2>(0x3c004000u).x + fast::exp(0.0f) + precise::sqrt(4.0f);
  uint8_t u8 = 200; u8 += 100; y[15] = u8;
}""",
    "misc",
    {"y": torch.zeros(16), "mode": 5},
    {"y": [1, 5, -4, 10, 6, 7, 10, 3, 3 + 40 + 400, 6, 3, 1, 16, 27, 2 + 1 + 2, 44]},
    threads=1,
    threads_per_threadgroup=1,
)

# function constants that depend on each other
case(
    "fc",
    """
constant int N [[function_constant(0)]]; constant bool has [[function_constant(1)]];
constant int M = N * 2;
constant bool both = has && N > 1;
template <bool A, typename T> T f(T x) { if constexpr (A) return x + 1; else return x; }
kernel void fc(device float* y, device const float* bias [[buffer(1), function_constant(both)]], uint i [[thread_position_in_grid]]) {
  float acc = 0; for (int k = 0; k < M; k++) acc += f<true>(float(k));
  if (both) acc += bias[0];
  y[i] = acc;
}""",
    "fc",
    {"y": torch.zeros(2), "bias": torch.tensor([100.0])},
    {"y": [110.0, 110.0]},
    threads=2,
    threads_per_threadgroup=2,
    constants={"N": 2, "has": True},
)

# threadgroup structs, pointers to them, padded tiles, atomics by reference
case(
    "tg",
    """
struct Item { float v; int n; };
void bump(threadgroup Item* it, threadgroup atomic_int& c) { it->n += 1; atomic_fetch_add_explicit(&c, 1, memory_order_relaxed); }
kernel void tg(device float* y, device atomic_uint* count [[buffer(1)]], device atomic<float>* fsum, uint t [[thread_index_in_threadgroup]], uint2 tsz [[threads_per_threadgroup]]) {
  threadgroup Item items[64]; threadgroup float tile[8][8 + 1]; threadgroup atomic_int c;
  threadgroup Item (*p)[64] = &items;
  if (t == 0) atomic_store_explicit(&c, 0, memory_order_relaxed);
  items[t] = {float(t), 0}; tile[t / 8][t % 8] = t;
  threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
  bump(&(*p)[t], c);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  y[t] = tile[t % 8][t / 8] + items[63 - t].n;
  atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
  atomic_fetch_add_explicit(fsum, 0.5f, memory_order_relaxed);
  if (t == 0) y[64] = atomic_load_explicit(&c, memory_order_relaxed);
}""",
    "tg",
    {"y": torch.zeros(65), "count": torch.zeros(1, dtype=torch.int32), "fsum": torch.zeros(1)},
    {"y": [(t % 8) * 8 + t // 8 + 1 for t in range(64)] + [64], "count": [64], "fsum": [32.0]},
    threadgroups=1,
    threads_per_threadgroup=64,
)
# casts of pointers and values
case(
    "casts",
    """
kernel void casts(device const uchar* raw, device float* y, device packed_float3* p, uint i [[thread_position_in_grid]]) {
  device const half4* h = (device const half4*)raw;
  device const uint2* u = reinterpret_cast<device const uint2*>(raw + 8);
  float4 f = float4(h[0]); y[0] = dot(f, float4(1.0f)); y[1] = float(u->x);
  p[i] = packed_float3(1, 2, 3); p[i][1] = 5; float3 v = p[i]; y[2] = v.x + v.y + v.z; p[i] += 1.0f; y[3] = float3(p[i]).y;
  char4 c = char4(int4(-1, 2, -3, 4)); y[4] = int(c.x) * c.z;
  uint packed = uint(c.y) | (uint(c.w) << 8); y[5] = packed;
  half hh = 1.5h; bfloat bb = bfloat(hh); y[6] = float(bb) + (float)(half)2.5 + half(bb) + (int)-(half)2.5 + 2;

  y[7] = v.x; float arr[3] = {}; for (auto& a : arr) a = 2; y[8] = arr[0] + arr[2];
  size_t big = size_t(i) * 10000000000ul + 3ul; y[9] = big % 10;
  bool2 b2 = bool2(true, false); y[10] = all(b2) ? 1 : (any(b2) ? 2 : 3); y[11] = int(b2.x) + (b2.y ? 1 : 0);
  int x = 5; x <<= 2; x ^= 3; y[12] = x; y[13] = popcount(uint(x)) + clz(1u) + ctz(8u); y[14] = float(ulong2(1, 2).y); y[15] = fract(2.75f);
}""",
    "casts",
    {
        "raw": torch.cat(
            [
                torch.tensor([1, 2, 3, 4]).half().view(torch.uint8),
                torch.tensor([77, 0], dtype=torch.int32).view(torch.uint8),
            ]
        ),
        "y": torch.zeros(16),
        "p": torch.zeros(3),
    },
    {"y": [10, 77, 9, 6, 3, 2 + 4 * 256, 1.5 + 2.5 + 1.5, 1, 4, 3, 2, 1, 23, 4 + 31 + 3, 2, 0.75]},
    threads=1,
    threads_per_threadgroup=1,
)


@pytest.mark.parametrize(("source", "kernel", "args", "expected", "launch"), CASES)
def test_idiom(
    msl: Run, source: str, kernel: str, args: dict[str, Any], expected: dict[str, Any], launch: dict[str, Any]
) -> None:
    out = msl(source, kernel, args, **launch)
    for name, value in expected.items():
        wanted = torch.as_tensor(value).to(out[name].dtype)
        torch.testing.assert_close(out[name], wanted, rtol=1e-5, atol=1e-5, check_stride=False)
