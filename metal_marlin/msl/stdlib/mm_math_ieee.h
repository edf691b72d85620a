#pragma once
// Functions with exact or correctly rounded results: square roots, remainders, and the ones that take a
// number's representation apart. F is float or a vector of float; T any floating-point scalar or vector.
#include "mm_math_base.h"
MM_STRICT_BEGIN

namespace metal {
namespace _math {

template <class F> MM_FN F rsqrt(F x) {
#ifdef __METAL_MARLIN_CUDA__
  const F y = _hardware::rsqrt(x);
#else
  const F y = 1.0f / __builtin_elementwise_sqrt(x);
#endif
  // One Newton step with the residual 1 - x y² in two parts: correctly rounded but for ties closer than 2^-20
  // ulp.
  const F h = x * y;
  const F residual = _fused(-h, y, (F)1.0f) - _fused(x, y, -h) * y;
  const F better = _fused(residual * 0.5f, y, y);
  return ((x > 0.0f) & (x < MM_INF)) ? better : y;
}

// p + w rounded to odd, which keeps a second, narrower rounding from going astray. I: integers as wide as D's
// elements.
template <class I, class D> MM_FN D _odd_sum(D p, D w) {
  const D s = p + w;
  const D seen = s - p;
  const D lost = (p - (s - seen)) + (w - seen);
  const I b = _from_bits<I>(s);
  const auto inexact = (lost != 0) & (s - s == 0) & ((b & 1) == 0);
  const auto outwards = (lost > 0) == (s > 0);
  return _from_bits<D>(inexact ? (outwards ? b + 1 : b - 1) : b);
}
// x y + z in T. The product of two half is exact in float, that of two bfloat in double.
template <class T> MM_FN T fma(T x, T y, T z) {
#ifdef __METAL_MARLIN_CPU__
  typedef _floats<T> F;
  if constexpr (__is_same(_elem<T>, half)) {
    return _to<T>(_odd_sum<_ints<T>>(_to<F>(x) * _to<F>(y), _to<F>(z)));
  } else if constexpr (__is_same(T, bfloat)) {
    return static_cast<bfloat>(_odd_sum<long>((double)_to<float>(x) * _to<float>(y), (double)_to<float>(z)));
  } else if constexpr (__is_same(_elem<T>, bfloat)) {
    for (int i = 0; i < _components<T>; i++) x[i] = _math::fma((bfloat)x[i], (bfloat)y[i], (bfloat)z[i]);
    return x;
  }
#endif
  return __builtin_elementwise_fma(x, y, z);
}

template <class F> MM_FN F floor(F x) { return __builtin_elementwise_floor(x); }
template <class F> MM_FN F ceil(F x) { return __builtin_elementwise_ceil(x); }
template <class F> MM_FN F trunc(F x) { return __builtin_elementwise_trunc(x); }
template <class F> MM_FN F rint(F x) { return __builtin_elementwise_rint(x); }
template <class F> MM_FN F sqrt(F x) { return __builtin_elementwise_sqrt(x); }
template <class F> MM_FN F divide(F x, F y) { return x / y; }
template <class F> MM_FN F fdim(F x, F y) { return x <= y ? (F)0.0f : x - y; }
template <class F> MM_FN F round(F x) { return __builtin_elementwise_round(x); }

// Binary exponent of |x| > 0 such that the significand is in [1, 2).
template <class F> MM_FN _ints<F> _exponent(F x) {
  const F a = _absolute(x);
  const auto tiny = a < 0x1p-126f;
  const _uints<F> u = _bits(tiny ? a * 0x1p24f : a);
  return _from_bits<_ints<F>>(u >> 23) - (tiny ? (_ints<F>)151 : (_ints<F>)127);
}
template <class F> MM_FN _ints<F> ilogb(F x) {
  const F a = _absolute(x);
  const _ints<F> e = a < MM_INF ? _exponent(a) : (_ints<F>)0x7fffffff;
  return a == 0.0f ? (_ints<F>)(-0x7fffffff - 1) : e;
}
template <class F> MM_FN F ldexp(F x, _ints<F> n) {
  // The significand alone first: only the last product can round.
  const _ints<F> e = _exponent(x);
  n = n > 400 ? (_ints<F>)400 : n;
  n = n < -400 ? (_ints<F>)-400 : n;
  _ints<F> sum = e + n;
  sum = sum > 200 ? (_ints<F>)200 : sum;
  sum = sum < -200 ? (_ints<F>)-200 : sum;
  const _ints<F> down = -e;
  const _ints<F> down_half = down >> 1;
  const F significand = x * _two_to<F>(down_half) * _two_to<F>(down - down_half);
  const F a = _absolute(x);
  return ((a == 0.0f) | !(a < MM_INF)) ? x : _scaled(significand, sum);
}
template <class F> struct _significand {
  F part;
  _ints<F> exponent;
};
template <class F> MM_FN _significand<F> frexp(F x) {
  const F a = _absolute(x);
  const auto plain = (a > 0.0f) & (a < MM_INF);
  const _ints<F> e = plain ? _exponent(x) + 1 : (_ints<F>)0;
  return {plain ? _math::ldexp(x, -e) : x, e};
}
template <class F> struct _parts {
  F rest, whole;
};
template <class F> MM_FN _parts<F> modf(F x) {
  const F whole = __builtin_elementwise_trunc(x);
  const F rest = _absolute(x) == MM_INF ? (F)0.0f : x - whole;
  return {_with_sign(rest, x), whole};
}

// The next value of T after x in the direction of y.
template <class T> MM_FN T nextafter(T x, T y) {
  typedef _floats<T> F;
  typedef _ints<T> I;
  constexpr int width = 8 * sizeof(_elem<T>);
  constexpr uint sign = 1u << (width - 1);
  const F fx = _to<F>(x), fy = _to<F>(y);
  const I b = __builtin_bit_cast(I, _to<_uints<T>>(_bits(x)));
  const I target = __builtin_bit_cast(I, _to<_uints<T>>(_bits(y)));
  const I first = fy > fx ? (I)1 : (I)(int)(sign | 1u);
  const I step = (fy > fx) == (fx > 0.0f) ? (I)1 : (I)-1;
  I r = fx == 0.0f ? first : b + step;
  r = fx == fy ? target : r;
  r = fy != fy ? target : r;
  r = fx != fx ? b : r;
  return _from_bits<T>(_to<_same_uint<T>>(__builtin_bit_cast(_uints<T>, r)));
}

// The quotient's integer is exact while it has fewer than 24 bits; larger ones are taken off 22 bits at a
// time.
template <class F> MM_FN F _remainder_once(F a, F b) {
  const F r = _fused(-__builtin_elementwise_trunc(a / b), b, a);
  return r < 0.0f ? r + b : r;
}
template <class F> MM_FN F fmod(F x, F y) {
  F a = _absolute(x);
  const F b = _absolute(y);
  const auto valid = (a < MM_INF) & (b > 0.0f);
  auto large = valid & (a >= b * 0x1p23f);
  while (__builtin_expect(_any_of(large), false)) {
    const F t = _scaled(b, _exponent(a) - _exponent(b) - 22);
    a = large ? _remainder_once(a, t) : a;
    large = valid & (a >= b * 0x1p23f);
  }
  const F r = a < b ? a : _remainder_once(a, b);
  return valid ? _with_sign(r, x) : (F)MM_NAN;
}

}  // namespace _math
}  // namespace metal

MM_STRICT_END
