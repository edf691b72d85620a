#pragma once
// What metal_simdgroup and metal_quadgroup are made of: lanes that exchange values, vote, reduce and scan. Only
// active lanes take part. Where all 32 are active, a reduction combines lane i with i ^ 16, 8, 4, 2, 1 and a scan
// lane i with i - 1, 2, 4, 8, 16, else both go through the active lanes in ascending order: floating-point results
// are the same on every device with 32 lanes.
#include "metal_type_traits"
#include "metal_compute"

namespace metal {
namespace _lanes {

constexpr uint _simd_width = METAL_MARLIN_LANES, _quad_width = METAL_MARLIN_LANES == 1 ? 1 : 4;

// --- source lanes: which lane a lane reads, given its own and the active ones
template <uint W> struct _at {
  uint i;
  MM_METHOD uint operator()(uint lane, uint) const { return (lane & ~(W - 1)) | (i & (W - 1)); }
};
template <uint W> struct _first {
  MM_METHOD uint operator()(uint lane, uint active) const {
    const uint base = lane & ~(W - 1);
    return base + __builtin_ctz(active >> base);
  }
};
template <uint W> struct _across {
  uint mask;
  MM_METHOD uint operator()(uint lane, uint) const { return lane ^ (mask & (W - 1)); }
};
template <uint W> struct _below {
  uint delta;
  MM_METHOD uint operator()(uint lane, uint) const { return (lane & (W - 1)) < delta ? lane : lane - delta; }
};
template <uint W> struct _above {
  uint delta;
  MM_METHOD uint operator()(uint lane, uint) const { return (lane & (W - 1)) + delta < W ? lane + delta : lane; }
};
// around within aligned runs of `run` lanes
struct _turned {
  uint by, run;
  MM_METHOD uint operator()(uint lane, uint) const { return (lane & ~(run - 1)) | ((lane + by) & (run - 1)); }
};

// --- operators
#define MM_REDUCER(name, expression, start)                                          \
  struct name {                                                                      \
    template <class T> MM_METHOD static T of(T a, T b) {                             \
      _Pragma("clang fp reassociate(off) contract(off)") return expression;          \
    }                                                                                \
    template <class T> MM_METHOD static T identity() { return (T)(_elem<T>)(start); } \
  };
MM_REDUCER(_sum, a + b, 0)
MM_REDUCER(_product, a * b, 1)
MM_REDUCER(_min, __builtin_elementwise_min(a, b), 0)
MM_REDUCER(_max, __builtin_elementwise_max(a, b), 0)
MM_REDUCER(_and, a & b, ~0)
MM_REDUCER(_or, a | b, 0)
MM_REDUCER(_xor, a ^ b, 0)
#undef MM_REDUCER

// Reductions and scans work on 32-bit or wider elements: half and bfloat are rounded once, at the end.
template <class E> struct _lane_word { typedef E type; };
template <> struct _lane_word<half> { typedef float type; };
template <> struct _lane_word<bfloat> { typedef float type; };
template <> struct _lane_word<char> { typedef int type; };
template <> struct _lane_word<signed char> { typedef int type; };
template <> struct _lane_word<short> { typedef int type; };
template <> struct _lane_word<uchar> { typedef uint type; };
template <> struct _lane_word<ushort> { typedef uint type; };
template <> struct _lane_word<bool> { typedef uint type; };
template <class T> MM_FN auto _widen(T x) { return _components_as<typename _lane_word<_elem<T>>::type>(x); }

#if defined(__METAL_MARLIN_CUDA__)
#include "mm_lanes_nvptx.h"
#elif METAL_MARLIN_LANES == 32
#include "mm_lanes_cpu.h"
#else

MM_FN uint _present(__private uint& lane) { return lane = 0, 1u; }
MM_FN uint _votes(bool vote, __private uint& lane) { return lane = 0, (uint)vote; }
template <class T, class From> MM_FN T _shuffled(T x, From, __private uint& lane) { return lane = 0, x; }
template <class Op, uint W, class T> MM_FN T _reduced(T x) { return x; }
template <class Op, uint W, bool Exclusive, class T> MM_FN T _scanned(T x) {
  if constexpr (Exclusive) return Op::template identity<T>();
  else return x;
}

#endif

#if METAL_MARLIN_LANES == 32
// A quad's four values `v`; `in` tells which of them count.
template <class Op, class T> MM_FN T _quad_reduced(const __private T* v, uint in) {
  if (in == 15) return Op::of(Op::of(v[0], v[2]), Op::of(v[1], v[3]));
  T total = v[0];
  bool any = (in & 1) != 0;
  for (int i = 1; i < 4; ++i) {
    if ((in >> i & 1) != 0) total = any ? Op::of(total, v[i]) : v[i], any = true;
  }
  return total;
}
template <class Op, bool Exclusive, class T> MM_FN T _quad_scanned(const __private T* v, uint in, uint lane) {
  T total = Op::template identity<T>();
  for (uint i = 0; i < 4; ++i) {
    if ((in >> i & 1) != 0 && (Exclusive ? i < lane : i <= lane)) total = Op::of(total, v[i]);
  }
  return total;
}
#endif

template <class T, class From> MM_FN T _shuffled(T x, From from) {
  uint lane;
  return _shuffled(x, from, lane);
}
// `data` of the lane `delta` higher (up: lower), or `filling` where that leaves the run
template <bool Up, class T> MM_FN T _filled(T data, T filling, uint delta, uint run) {
  uint lane;
  const _turned from = {Up ? 0u - delta : delta, run};
  const T near = _shuffled(data, from, lane), far = _shuffled(filling, from, lane);
  const uint at = lane & (run - 1);
  return (Up ? at >= delta : at + delta < run) ? near : far;
}
template <class Op, uint W, class T> MM_FN T _reduce(T x) { return _make<T>(_reduced<Op, W>(_widen(x))); }
template <class Op, uint W, bool Exclusive, class T> MM_FN T _scan(T x) {
  return _make<T>(_scanned<Op, W, Exclusive>(_widen(x)));
}

// The lanes that voted yes, of a simdgroup or quadgroup of W.
template <uint W, class Bits> struct _vote {
  typedef Bits vote_t;
  explicit MM_METHOD constexpr _vote(vote_t votes = 0) : v(votes) {}
  explicit MM_METHOD constexpr operator vote_t() const { return v; }
  MM_METHOD constexpr bool all() const { return (v & every) == every; }
  MM_METHOD constexpr bool any() const { return (v & every) != 0; }

 private:
  static constexpr vote_t every = (vote_t)((1ul << W) - 1);
  vote_t v;
};
// one group's part of the lanes' bits
template <uint W> MM_FN uint _part(uint bits, uint lane) {
  if constexpr (W >= METAL_MARLIN_LANES) return bits;
  else return bits >> (lane & ~(W - 1)) & ((1u << W) - 1);
}
template <uint W> MM_FN uint _ballot(bool vote) {
  uint lane;
  const uint votes = _votes(vote, lane);
  return _part<W>(votes, lane);
}
template <uint W> MM_FN uint _active() {
  uint lane;
  const uint active = _present(lane);
  return _part<W>(active, lane);
}
template <uint W> MM_FN bool _is_first() {
  uint lane;
  const uint active = _present(lane);
  return (_part<W>(active, lane) & ((1u << (lane & (W - 1))) - 1)) == 0;
}

}  // namespace _lanes

// The functions of one kind of group.
#define MM_COLLECTIVES(name, W, Bits)                                                                         \
  typedef _lanes::_vote<W, Bits> name##_vote;                                                                 \
  MM_FN name##_vote name##_ballot(bool vote) { return name##_vote(_lanes::_ballot<W>(vote)); }                \
  MM_FN name##_vote name##_active_threads_mask() { return name##_vote(_lanes::_active<W>()); }                \
  MM_FN bool name##_any(bool vote) { return _lanes::_ballot<W>(vote) != 0; }                                  \
  MM_FN bool name##_all(bool vote) { return _lanes::_ballot<W>(!vote) == 0; }                                 \
  MM_FN bool name##_is_first() { return _lanes::_is_first<W>(); }                                             \
  MM_FN bool name##_is_helper_thread() { return false; }                                                      \
  MM_SHUFFLE(name##_broadcast, ushort lane, (_lanes::_at<W>{lane}))                                           \
  MM_SHUFFLE(name##_shuffle, ushort lane, (_lanes::_at<W>{lane}))                                             \
  MM_SHUFFLE(name##_shuffle_xor, ushort mask, (_lanes::_across<W>{mask}))                                     \
  MM_SHUFFLE(name##_shuffle_up, ushort delta, (_lanes::_below<W>{delta}))                                     \
  MM_SHUFFLE(name##_shuffle_down, ushort delta, (_lanes::_above<W>{delta}))                                   \
  MM_SHUFFLE(name##_shuffle_rotate_up, ushort delta, (_lanes::_turned{0u - delta, W}))                        \
  MM_SHUFFLE(name##_shuffle_rotate_down, ushort delta, (_lanes::_turned{delta, W}))                           \
  template <class T> MM_FN T name##_broadcast_first(T data) { return _lanes::_shuffled(data, _lanes::_first<W>{}); }\
  MM_FILL(name##_shuffle_and_fill_up, true, W)                                                                \
  MM_FILL(name##_shuffle_and_fill_down, false, W)                                                             \
  MM_REDUCE(name##_sum, (_lanes::_reduce<_lanes::_sum, W>(data)))                                             \
  MM_REDUCE(name##_product, (_lanes::_reduce<_lanes::_product, W>(data)))                                     \
  MM_REDUCE(name##_min, (_lanes::_reduce<_lanes::_min, W>(data)))                                             \
  MM_REDUCE(name##_max, (_lanes::_reduce<_lanes::_max, W>(data)))                                             \
  MM_REDUCE(name##_and, (_lanes::_reduce<_lanes::_and, W>(data)))                                             \
  MM_REDUCE(name##_or, (_lanes::_reduce<_lanes::_or, W>(data)))                                               \
  MM_REDUCE(name##_xor, (_lanes::_reduce<_lanes::_xor, W>(data)))                                             \
  MM_REDUCE(name##_prefix_inclusive_sum, (_lanes::_scan<_lanes::_sum, W, false>(data)))                       \
  MM_REDUCE(name##_prefix_exclusive_sum, (_lanes::_scan<_lanes::_sum, W, true>(data)))                        \
  MM_REDUCE(name##_prefix_inclusive_product, (_lanes::_scan<_lanes::_product, W, false>(data)))               \
  MM_REDUCE(name##_prefix_exclusive_product, (_lanes::_scan<_lanes::_product, W, true>(data)))
#define MM_SHUFFLE(name, parameter, from)                                                                     \
  template <class T> MM_FN T name(T data, parameter) { return _lanes::_shuffled(data, from); }
#define MM_REDUCE(name, result)                                                                               \
  template <class T> MM_FN T name(T data) { return result; }
#define MM_FILL(name, up, W)                                                                                  \
  template <class T> MM_FN T name(T data, typename type_identity<T>::type filling, ushort delta, ushort run = W) {\
    return _lanes::_filled<up>(data, (T)filling, delta, run < W ? run : W);                                   \
  }

}  // namespace metal
