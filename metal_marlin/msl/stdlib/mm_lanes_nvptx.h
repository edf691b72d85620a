// Part of mm_lanes.h: lanes of a warp. Every instruction names the lanes that execute it now; where those are all, a
// constant mask spares a synchronisation per instruction.

MM_FN uint _lane() { return (uint)__nvvm_read_ptx_sreg_laneid(); }
MM_FN uint _present(__private uint& lane) { return lane = _lane(), (uint)__nvvm_activemask(); }
MM_FN uint _votes(bool vote, __private uint& lane) {
  return (uint)__nvvm_vote_ballot_sync(_present(lane), vote);
}

struct _pull {
  uint mask, lane;
  MM_METHOD uint operator()(uint word) const { return (uint)__nvvm_shfl_sync_idx_i32(mask, (int)word, (int)lane, 31); }
};
struct _cross {
  uint lane;
  MM_METHOD uint operator()(uint word) const { return (uint)__nvvm_shfl_sync_bfly_i32(~0u, (int)word, (int)lane, 31); }
};
// x, each 32-bit word of it moved between lanes
template <class T, class Move> MM_FN T _moved(T x, Move move) {
  constexpr uint bytes = (_components<T> == 0 ? 1 : _components<T>) * sizeof(_elem<T>), words = (bytes + 3) / 4;
  uint word[words] = {};
  __builtin_memcpy(word, &x, bytes);
#pragma unroll
  for (uint i = 0; i < words; ++i) word[i] = move(word[i]);
  __builtin_memcpy(&x, word, bytes);
  return x;
}

template <class T, class From> MM_FN T _shuffled(T x, From from, __private uint& lane) {
  const uint mask = _present(lane), source = from(lane, mask);
  return mask == ~0u ? _moved(x, _pull{~0u, source}) : _moved(x, _pull{mask, source});
}

// redux.sync of 32-bit integers, for any set of lanes
#define MM_REDUX(Op, signed_name, unsigned_name)                                                         \
  MM_FN int _redux(Op, int x, uint mask) { return (int)__nvvm_redux_sync_##signed_name(x, (int)mask); } \
  MM_FN uint _redux(Op, uint x, uint mask) { return (uint)__nvvm_redux_sync_##unsigned_name(x, (int)mask); }
MM_REDUX(_sum, add, add)
MM_REDUX(_min, min, umin)
MM_REDUX(_max, max, umax)
MM_REDUX(_and, and, and)
MM_REDUX(_or, or, or)
MM_REDUX(_xor, xor, xor)
#undef MM_REDUX
template <class Op, class T>
inline constexpr bool _has_redux = (__is_same(T, int) || __is_same(T, uint)) && !__is_same(Op, _product);

template <class Op, class T> MM_FN T _quad_reduced(const __private T* v, uint in);
template <class Op, bool Exclusive, class T> MM_FN T _quad_scanned(const __private T* v, uint in, uint lane);

template <class Op, uint W, class T> MM_FN T _reduced(T x) {
  uint lane;
  const uint mask = _present(lane);
  if constexpr (W == 32 && _has_redux<Op, T>) return _redux(Op{}, x, mask);
  if (mask == ~0u) {
#pragma unroll
    for (uint d = W / 2; d != 0; d /= 2) x = Op::of(x, _moved(x, _cross{d}));
    return x;
  }
  if constexpr (W == 4) {
    const uint base = lane & ~3u;
    T v[4];
#pragma unroll
    for (uint i = 0; i < 4; ++i) v[i] = _moved(x, _pull{mask, base + i});
    return _quad_reduced<Op>(v, mask >> base & 15);
  } else {
    T total = _moved(x, _pull{mask, (uint)__builtin_ctz(mask)});
#pragma unroll 1
    for (uint left = mask & (mask - 1); left != 0; left &= left - 1) {
      total = Op::of(total, _moved(x, _pull{mask, (uint)__builtin_ctz(left)}));
    }
    return total;
  }
}

template <class Op, uint W, bool Exclusive, class T> MM_FN T _scanned(T x) {
  uint lane;
  const uint mask = _present(lane);
  if constexpr (W == 4) {
    const uint base = lane & ~3u;
    T v[4];
#pragma unroll
    for (uint i = 0; i < 4; ++i) v[i] = _moved(x, _pull{mask, base + i});
    return _quad_scanned<Op, Exclusive>(v, mask >> base & 15, lane & 3);
  } else if (mask == ~0u) {
#pragma unroll
    for (uint d = 1; d < 32; d *= 2) {
      const T lower = _moved(x, _pull{~0u, lane - d});
      if (lane >= d) x = Op::of(lower, x);
    }
    if constexpr (Exclusive) {
      x = _moved(x, _pull{~0u, lane - 1});
      if (lane == 0) x = Op::template identity<T>();
    }
    return x;
  } else {
    T total = Op::template identity<T>();
#pragma unroll 1
    for (uint left = mask; left != 0; left &= left - 1) {
      const uint i = (uint)__builtin_ctz(left);
      const T other = _moved(x, _pull{mask, i});
      if (Exclusive ? i < lane : i <= lane) total = Op::of(total, other);
    }
    return total;
  }
}
