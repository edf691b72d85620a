#pragma once
// Exponentials, logarithms, powers and hyperbolic functions of F = float or a vector of float; branch-free.
// The polynomials are weighted minimax fits whose coefficients were rounded to float one by one, lowest
// first.
#include "mm_math_base.h"
MM_STRICT_BEGIN

namespace metal {
namespace _math {

// Adding 1.5·2^23 rounds to an integer whose value then stands in the low bits: no conversion that NaN could
// upset.
#define MM_ROUNDER 0x1.8p23f
#define MM_ROUNDER_BITS 0x4b400000u

// e^x = (1 + p) 2^n, for x limited to where float's exponent range ends.
template <class F> struct _exp_split {
  F p;
  _ints<F> n;
};

template <class F> MM_FN F _limited(F x, float low, float high) {
  x = x > high ? (F)high : x;
  return x < low ? (F)low : x;
}

template <class F> MM_FN _exp_split<F> _exp_parts(F x) {
  const F t = _fused(x, 0x1.715476p0f, (F)MM_ROUNDER);
  const F n = t - MM_ROUNDER;
  F r = _fused(n, -0x1.62e43p-1f, x);
  r = _fused(n, 0x1.05c61p-29f, r);
  const F q = _poly(r, 0x1p-1f, 0x1.55549p-3f, 0x1.5554bep-5f, 0x1.123afep-7f, 0x1.6d7cbap-10f);
  return {_fused(r * r, q, r), _from_bits<_ints<F>>(_bits(t) - MM_ROUNDER_BITS)};
}
// e^x / 2, which overflows only where sinh and cosh do.
template <class F> MM_FN F _half_exp(F x) {
  const _exp_split<F> e = _exp_parts(_limited(x, -104.5f, 90.0f));
  return _scaled(e.p + 1.0f, e.n - 1);
}

// 2^r for |r| <= 1/2.
template <class F> MM_FN F _exp2_near_zero(F r) {
  const F q = _poly(r, 0x1.62e43p-1f, 0x1.ebfbep-3f, 0x1.c6af78p-5f, 0x1.3b2a26p-7f, 0x1.5f0ad6p-10f,
                    0x1.444a06p-13f);
  return _fused(r, q, (F)1.0f);
}
#ifdef __METAL_MARLIN_CUDA__
// b^x, given log2(b) in two parts, the first too small, lest it rounds x log2(b) up to 128.
template <class F> MM_FN F _power_of(F x, float log_high, float log_low) {
  const F z = x * log_high;
  const F rest = _fused(x, log_low, _fused(x, log_high, -z));
  // of infinities and what is far beyond the result's range the rest may be NaN
  return _hardware::exp2(z) * _fused(_absolute(z) < 200.0f ? rest : (F)0.0f, 0x1.62e43p-1f, (F)1.0f);
}
template <class F> MM_FN F exp(F x) { return _power_of(x, 0x1.715474p0f, 0x1.295c18p-23f); }
template <class F> MM_FN F exp10(F x) { return _power_of(x, 0x1.a934eep1f, 0x1.4bcd1cp-22f); }
template <class F> MM_FN F exp2(F x) { return _hardware::exp2(x); }
#else
template <class F> MM_FN F exp(F x) {
  const _exp_split<F> e = _exp_parts(_limited(x, -104.5f, 89.0f));
  return _scaled(e.p + 1.0f, e.n);
}
template <class F> MM_FN F exp2(F x) {
  x = _limited(x, -151.0f, 129.0f);
  const F t = x + MM_ROUNDER;
  return _scaled(_exp2_near_zero(x - (t - MM_ROUNDER)), _from_bits<_ints<F>>(_bits(t) - MM_ROUNDER_BITS));
}
template <class F> MM_FN F exp10(F x) {
  x = _limited(x, -45.5f, 39.0f);
  const F t = _fused(x, 0x1.a934fp1f, (F)MM_ROUNDER);
  const F n = t - MM_ROUNDER;
  F r = _fused(n, -0x1.344136p-2f, x);
  r = _fused(n, 0x1.ec10cp-27f, r);
  const F q = _poly(r, 0x1.26bb1cp1f, 0x1.53524cp1f, 0x1.046ffep1f, 0x1.2bd7b4p0f, 0x1.14a12ap-1f,
                    0x1.a87bf2p-3f, 0x1.7cb9f6p-5f);
  return _scaled(_fused(r, q, (F)1.0f), _from_bits<_ints<F>>(_bits(t) - MM_ROUNDER_BITS));
}
#endif

// v = 2^k m with m in [2/3, 4/3): f = m - 1 and log(m) = f + s.
template <class F> struct _log_split {
  F k, f, s;
};
// `missing` is what v lacks of the argument meant (|missing| at most an ulp of v), if anything.
template <class F, class... M> MM_FN _log_split<F> _log_parts(F v, M... missing) {
  const auto tiny = v < 0x1p-126f;
  const _uints<F> u = _bits(tiny ? v * 0x1p23f : v);
  const _ints<F> k = _from_bits<_ints<F>>(u - 0x3f2aaaabu) >> 23;
  const _ints<F> down = -k;
  F f = _from_bits<F>(u - (_from_bits<_uints<F>>(k) << 23)) - 1.0f;
  f = (f + ... + (missing * _two_to<F>(down < -60 ? (_ints<F>)(-60) : down)));
  const F square = f * f;
  const F q = _poly(f, 0x1.555558p-2f, -0x1.ffff16p-3f, 0x1.999666p-3f, -0x1.5597dcp-3f, 0x1.251798p-3f,
                    -0x1.f3a846p-4f, 0x1.b54992p-4f, -0x1.06d2b4p-3f, 0x1.f854aep-4f);
  return {_to<F>(k) - (tiny ? (F)23.0f : (F)0.0f), f, _fused(f * square, q, square * -0.5f)};
}
// The logarithm's values outside (0, inf) in place of r.
template <class F> MM_FN F _log_edges(F x, F r) {
  r = x > 0.0f ? r : (x == 0.0f ? (F)-MM_INF : (F)MM_NAN);
  return x == MM_INF ? x : r;
}
template <class F> MM_FN F _log_sum(_log_split<F> l) {
  return _fused(l.k, 0x1.62e43p-1f, l.f + _fused(l.k, -0x1.05c61p-29f, l.s));
}
template <class F> MM_FN F log(F x) { return _log_edges(x, _log_sum(_log_parts(x))); }
template <class F> MM_FN F log2(F x) {
  const _log_split<F> l = _log_parts(x);
  const F low = _fused(l.f, 0x1.4ae0cp-26f, l.s * 0x1.715476p0f);
  return _log_edges(x, l.k + _fused(l.f, 0x1.715476p0f, low));
}
template <class F> MM_FN F log10(F x) {
  const _log_split<F> l = _log_parts(x);
  F low = _fused(l.f, -0x1.5b235ep-27f, l.s * 0x1.bcb7b2p-2f);
  low = _fused(l.k, -0x1.ec10cp-27f, low);
  return _log_edges(x, _fused(l.k, 0x1.344136p-2f, _fused(l.f, 0x1.bcb7b2p-2f, low)));
}
// log(1 + u), u >= 0; log(2 a) in its place where `large`.
template <class F, class M> MM_FN F _log_plus_one(F u, F a, M large) {
  F v = u + 1.0f;
  F missing = u > 1.0f ? 1.0f - (v - u) : u - (v - 1.0f);
  v = large ? a : v;
  missing = large ? (F)0.0f : missing;
  _log_split<F> l = _log_parts(v, missing);
  l.k = large ? l.k + 1.0f : l.k;
  return _log_sum(l);
}

// |x|^y as 2^z: log2|x| to some 31 bits from the odd series in s = (m - 1)/(m + 1), both halves carried
// along.
template <class F> MM_FN F _pow_magnitude(F a, F y) {
  const auto tiny = a < 0x1p-126f;
  const _uints<F> u = _bits(tiny ? a * 0x1p24f : a);
  const _ints<F> k = _from_bits<_ints<F>>(u - 0x3f3504f3u) >> 23;
  const F m = _from_bits<F>(u - (_from_bits<_uints<F>>(k) << 23));
  const F e = _to<F>(k) - (tiny ? (F)24.0f : (F)0.0f);

  const F top = m - 1.0f;
  const F bottom = m + 1.0f;
  const F bottom_low = m - (bottom - 1.0f);
  const F inverse = 1.0f / bottom;
  const F s = top * inverse;
  const F s_low = _fused(-s, bottom_low, _fused(-s, bottom, top)) * inverse;
  const F t = s * s;
  const F tail = s * t * _poly(t, 0x1.ec709ep-1f, 0x1.27766ep-1f, 0x1.a627dcp-2f, 0x1.50c9c4p-2f);
  const F high = s * 0x1.715476p1f;
  F low = _fused(s, 0x1.715476p1f, -high);
  low = low + _fused(s_low, 0x1.715476p1f, _fused(s, 0x1.4ae0cp-25f, tail));

  // e and high + low: e is 0 or larger than what is added
  const F sum = e + high;
  const F rest = (e - sum) + high + low;
  F log_high = sum + rest;
  F log_low = (sum - log_high) + rest;
  const auto edge = (a == 0.0f) | (a == MM_INF);
  log_high = edge ? (a == 0.0f ? (F)-MM_INF : (F)MM_INF) : log_high;
  log_low = edge ? (F)0.0f : log_low;

  F z = y * log_high;
  F z_low = _fused(y, log_low, _fused(y, log_high, -z));
  z = log_high == 0.0f ? (F)0.0f : z;
  const auto beyond = (z > 160.0f) | (z < -160.0f) | (log_high == 0.0f);
  z_low = beyond ? (F)0.0f : z_low;
  z = _limited(z, -160.0f, 160.0f);
  const F n = z + MM_ROUNDER;
  const F p = _exp2_near_zero((z - (n - MM_ROUNDER)) + z_low);
  return _scaled(p, _from_bits<_ints<F>>(_bits(n) - MM_ROUNDER_BITS));
}
// pow(x, y) from r = |x|^y: the sign, and what pow's special values have instead.
template <class F> MM_FN F _pow_edges(F x, F y, F r) {
  const F a = _absolute(x);
  // Every float of 2^24 and more is even; halving keeps an even integer's integrality.
  const F whole = __builtin_elementwise_trunc(y);
  const F halved = y * 0.5f;
  const auto odd = (whole == y) & (__builtin_elementwise_trunc(halved) != halved);
  const auto negative = _from_bits<_ints<F>>(_bits(x)) < 0;
  r = (negative & odd) ? -r : r;
  r = ((x < 0.0f) & (a < MM_INF) & (whole != y)) ? (F)MM_NAN : r;
  r = ((x != x) | (y != y)) ? x + y : r;
  return ((x == 1.0f) | (y == 0.0f)) ? (F)1.0f : r;
}
template <class F> MM_FN F pow(F x, F y) { return _pow_edges(x, y, _pow_magnitude(_absolute(x), y)); }
template <class F> MM_FN F powr(F x, F y) {
  const F a = _absolute(x);
  F r = _pow_magnitude(a, y);
  const auto undefined = (x < 0.0f) | ((x == 0.0f) & (y == 0.0f)) | ((x == MM_INF) & (y == 0.0f)) |
                         ((x == 1.0f) & (_absolute(y) == MM_INF));
  r = undefined ? (F)MM_NAN : r;
  return ((x != x) | (y != y)) ? x + y : r;
}

template <class F> MM_FN F sinh(F x) {
  const F a = _absolute(x);
  const F t = x * x;
  const F near = _fused(x * t, _poly(t, 0x1.555556p-3f, 0x1.1110e4p-7f, 0x1.a01fa6p-13f, 0x1.75f992p-19f), x);
  const F e = _half_exp(a);
  return a < 1.0f ? near : _with_sign(e - 0.25f / e, x);
}
template <class F> MM_FN F cosh(F x) {
  const F e = _half_exp(_absolute(x));
  return e + 0.25f / e;
}
template <class F> MM_FN F tanh(F x) {
  const F a = _absolute(x);
  const F t = x * x;
  const F q = _poly(t, -0x1.555554p-2f, 0x1.11107cp-3f, -0x1.b9f212p-5f, 0x1.63abd6p-6f, -0x1.0c801ep-7f,
                    0x1.1aa266p-9f);
  const F near = _fused(x * t, q, x);
  const _exp_split<F> e = _exp_parts(_limited(a + a, 0.0f, 20.0f));
  const F far = 1.0f - 2.0f / ((e.p + 1.0f) * _two_to<F>(e.n) + 1.0f);
  return _with_sign(a < 0.625f ? near : far, x);
}
template <class F> MM_FN F asinh(F x) {
  const F a = _absolute(x);
  const auto large = a > 0x1p12f;
  const F t = large ? (F)0.0f : a * a;
  const F u = a + t / (__builtin_elementwise_sqrt(t + 1.0f) + 1.0f);
  const F r = _log_plus_one(u, a, large);
  return _with_sign(a < MM_INF ? r : a, x);
}
template <class F> MM_FN F acosh(F x) {
  const auto large = x > 0x1p12f;
  const F d = large ? (F)0.0f : x - 1.0f;
  const F r = _log_plus_one(d + __builtin_elementwise_sqrt(_fused(d, d, d + d)), x, large);
  return x >= 1.0f ? (x == MM_INF ? x : r) : (F)MM_NAN;
}
template <class F> MM_FN F atanh(F x) {
  const F a = _absolute(x);
  const F r = 0.5f * _log_plus_one((a + a) / (1.0f - a), a, a < 0.0f);
  return _with_sign(a < 1.0f ? r : (a == 1.0f ? (F)MM_INF : (F)MM_NAN), x);
}

}  // namespace _math
}  // namespace metal

MM_STRICT_END
