// Part of mm_lanes.h: lanes that are fibres. What all lanes need the same of is worked out once per meeting, by the
// first lane that continues, in place in the published values.

template <int Bytes> struct _raw { typedef ulong type __attribute__((ext_vector_type(Bytes / 8))); };
template <> struct _raw<8> { typedef ulong type; };
template <> struct _raw<4> { typedef uint type; };
template <> struct _raw<2> { typedef ushort type; };
template <> struct _raw<1> { typedef uchar type; };
// values meet as raw bits, so that kernels hold few kinds of meetings
template <class T> MM_FN auto _meet(T x) { return mm_meet(__builtin_bit_cast(typename _raw<sizeof(T)>::type, x)); }

MM_FN uint _present(__private uint& lane) {
  const auto m = mm_meet();
  lane = (uint)m.lane;
  return m.group->active;
}

MM_OUTLINE void _count_votes(mm_simdgroup* group) {
  uint votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (uint)(group->published[i] != 0) << i;
  group->fresh = 0;
  *(uint*)group->published = votes & group->active;
}
MM_FN uint _votes(bool vote, __private uint& lane) {
  const auto m = mm_meet((uchar)vote);
  if (m.group->fresh != 0) _count_votes(m.group);
  lane = (uint)m.lane;
  return *(uint*)m.group->published;
}

template <class T, class From> MM_FN T _shuffled(T x, From from, __private uint& lane) {
  const auto m = _meet(x);
  lane = (uint)m.lane;
#ifdef METAL_MARLIN_CHECKED
  mm_check_lane(m.group->active, from(lane, m.group->active) & 31);
#endif
  return ((T*)m.group->published)[from(lane, m.group->active) & 31];
}

template <class Op, class T> MM_OUTLINE void _fold(mm_simdgroup* group) {
  T* v = (T*)group->published;
  group->fresh = 0;
  uint left = group->active;
  if (left == ~0u) {
    T half_way[16];
    for (int i = 0; i < 16; ++i) half_way[i] = Op::of(v[i], v[i + 16]);
    for (int i = 0; i < 8; ++i) half_way[i] = Op::of(half_way[i], half_way[i + 8]);
    for (int i = 0; i < 4; ++i) half_way[i] = Op::of(half_way[i], half_way[i + 4]);
    for (int i = 0; i < 2; ++i) half_way[i] = Op::of(half_way[i], half_way[i + 2]);
    v[0] = Op::of(half_way[0], half_way[1]);
    return;
  }
  T total = v[__builtin_ctz(left)];
  while ((left &= left - 1) != 0) total = Op::of(total, v[__builtin_ctz(left)]);
  v[0] = total;
}

template <class Op, bool Exclusive, class T> MM_OUTLINE void _accumulate(mm_simdgroup* group) {
  T* v = (T*)group->published;
  group->fresh = 0;
  if (group->active == ~0u) {
    for (int d = 1; d < 32; d *= 2) {
      T sums[32];
      for (int i = d; i < 32; ++i) sums[i] = Op::of(v[i - d], v[i]);
      for (int i = d; i < 32; ++i) v[i] = sums[i];
    }
    if constexpr (Exclusive) {
      for (int i = 31; i > 0; --i) v[i] = v[i - 1];
      v[0] = Op::template identity<T>();
    }
    return;
  }
  T total = Op::template identity<T>();
  for (uint left = group->active; left != 0; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const T next = Op::of(total, v[i]);
    v[i] = Exclusive ? total : next;
    total = next;
  }
}

template <class Op, class T> MM_FN T _quad_reduced(const __private T* v, uint in);
template <class Op, bool Exclusive, class T> MM_FN T _quad_scanned(const __private T* v, uint in, uint lane);

template <class Op, uint W, class T> MM_FN T _reduced(T x) {
  const auto m = _meet(x);
  const T* all = (const T*)m.group->published;
  if constexpr (W == 4) {
    const ulong base = m.lane & ~3ul;
    const T v[4] = {all[base], all[base + 1], all[base + 2], all[base + 3]};
    return _quad_reduced<Op>(v, m.group->active >> base & 15);
  } else {
    if (m.group->fresh != 0) _fold<Op, T>(m.group);
    return all[0];
  }
}
template <class Op, uint W, bool Exclusive, class T> MM_FN T _scanned(T x) {
  const auto m = _meet(x);
  const T* all = (const T*)m.group->published;
  if constexpr (W == 4) {
    const ulong base = m.lane & ~3ul;
    const T v[4] = {all[base], all[base + 1], all[base + 2], all[base + 3]};
    return _quad_scanned<Op, Exclusive>(v, m.group->active >> base & 15, (uint)m.lane & 3);
  } else {
    if (m.group->fresh != 0) _accumulate<Op, Exclusive, T>(m.group);
    return all[m.lane];
  }
}
