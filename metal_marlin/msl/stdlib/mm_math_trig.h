#pragma once
// Trigonometric functions and their inverses of F = float or a vector of float.
#include "mm_math_base.h"
MM_STRICT_BEGIN

namespace metal {
namespace _math {

// 2/pi in three pieces for each sixteen binary exponents of the argument: the bits that only add whole turns
// are left out; the first two pieces have 29 bits, so that their products with a float are exact in double.
static __constant const ulong _two_over_pi[24] = {
    0x3fe4000000000000ul, 0x3f87cc1b70000000ul, 0x3dd391054a7f09d5ul,
    0x3fe45f3000000000ul, 0x3e8b727220000000ul, 0x3cb529fc2757d1f4ul,
    0x3f6f306dc8000000ul, 0x3dac882a53000000ul, 0x3bdf09d5f47d4d37ul,
    0x3e76e4e441000000ul, 0x3c94a7f09c000000ul, 0x3ad5f47d4d377036ul,
    0x3d51054a7c000000ul, 0x3ba84eafa3000000ul, 0x39dd4d377036d8a5ul,
    0x3c729fc275000000ul, 0x3a9f47d4d2000000ul, 0x38d77036d8a5664ful,
    0x3b43abe8f8000000ul, 0x3994d37702000000ul, 0x37d6d8a5664f10e4ul,
    0x3a7d1f534d000000ul, 0x38ab81b6c5000000ul, 0x36b5993c439041fcul,
};

MM_FN double _less_turns(double y) { return y - 4.0f * _rounded(y * 0.25f); }

// x = (quadrant + 4 i) pi/2 + r with |r| <= pi/4, for any finite x.
struct _reduced_scalar {
  float r;
  int quadrant;
};
MM_FN _reduced_scalar _reduce_any(float x) {
  const int group = ((int)((_bits(x) >> 23) & 0xffu) - 127) >> 4;
  const int row = 3 * (group < 0 ? 0 : group > 7 ? 7 : group);
  const double y = (double)x;
  const double a = _less_turns(y * __builtin_bit_cast(double, _two_over_pi[row]));
  const double b = _less_turns(y * __builtin_bit_cast(double, _two_over_pi[row + 1]));
  const double rounder = 0x1.8p52f;
  const double t = (a + b) + rounder;
  const double n = t - rounder;
  const double f = __builtin_fma(y, __builtin_bit_cast(double, _two_over_pi[row + 2]), (a - n) + b);
  return {(float)(f * __builtin_bit_cast(double, 0x3ff921fb54442d18ul)), (int)__builtin_bit_cast(ulong, t)};
}

template <class F> struct _reduced {
  F r;
  _ints<F> quadrant;
};
// Three-part reduction in float, good below 2^15.
template <class F> MM_FN _reduced<F> _reduce_small(F x) {
  const F t = _fused(x, 0x1.45f306p-1f, (F)0x1.8p23f);
  const F n = t - 0x1.8p23f;
  F r = _fused(n, -0x1.921fb6p0f, x);
  r = _fused(n, 0x1.777a5cp-25f, r);
  r = _fused(n, 0x1.ee59dap-50f, r);
  return {r, _from_bits<_ints<F>>(_bits(t))};
}
template <class F> MM_FN _reduced<F> _reduce(F x) {
  _reduced<F> out = _reduce_small(x);
  const auto large = _absolute(x) > 0x1p15f;
#ifdef __METAL_MARLIN_CPU__
  // Both ways and a choice: a loop over this then vectorises.
  if constexpr (_components<F> == 0) {
    const _reduced_scalar any = _reduce_any(x);
    return {large ? any.r : out.r, large ? any.quadrant : out.quadrant};
  }
#endif
  if (__builtin_expect(_any_of(large), false)) {
    if constexpr (_components<F> == 0) {
      const _reduced_scalar any = _reduce_any(x);
      out.r = any.r;
      out.quadrant = any.quadrant;
    } else {
      for (int i = 0; i < _components<F>; i++) {
        const _reduced_scalar any = _reduce_any(x[i]);
        out.r[i] = large[i] ? any.r : out.r[i];
        out.quadrant[i] = large[i] ? any.quadrant : out.quadrant[i];
      }
    }
  }
  return out;
}

// Sine and cosine of r, |r| <= pi/4.
template <class F> MM_FN F _sin_near(F r, F t) {
  return _fused(r * t, _poly(t, -0x1.555556p-3f, 0x1.111174p-7f, -0x1.a058e4p-13f, 0x1.7bf19cp-19f), r);
}
template <class F> MM_FN F _cos_near(F t) {
  const F q = _poly(t, 0x1.555556p-5f, -0x1.6c175ep-10f, 0x1.a0714cp-16f, -0x1.35dfep-22f);
  return _fused(t * t, q, _fused(t, -0.5f, (F)1.0f));
}
template <class F> struct _sine_pair {
  F s, c;
};
// Sine and cosine of r + quadrant pi/2.
template <class F> MM_FN _sine_pair<F> _turned(F r, _ints<F> quadrant) {
  const F t = r * r;
  const F s = _sin_near(r, t), c = _cos_near(t);
  const auto odd = (quadrant & 1) != 0;
  const _uints<F> bits = _from_bits<_uints<F>>(quadrant);
  const F sine = odd ? c : s, cosine = odd ? s : c;
  return {_from_bits<F>(_bits(sine) ^ ((bits & 2u) << 30)),
          _from_bits<F>(_bits(cosine) ^ (((bits + 1u) & 2u) << 30))};
}
template <class F> MM_FN _sine_pair<F> sincos(F x) {
  const _reduced<F> a = _reduce(x);
  _sine_pair<F> out = _turned(a.r, a.quadrant);
  out.s = x == 0.0f ? x : out.s;
  return out;
}
template <class F> MM_FN F sin(F x) { return _math::sincos(x).s; }
template <class F> MM_FN F cos(F x) { return _math::sincos(x).c; }
template <class F> MM_FN F tan(F x) {
  const _sine_pair<F> a = _math::sincos(x);
  return a.s / a.c;
}

// Of pi x. From 2^24 on all numbers are even; x - x keeps NaN and infinities.
template <class F> MM_FN _sine_pair<F> sincospi(F x) {
  x = _absolute(x) < 0x1p24f ? x : _with_sign(x - x, x);
  const F n = _rounded(x + x);
  const F half_turns = _fused(n, -0.5f, x);
  const F modulo = n - 4.0f * __builtin_elementwise_floor(n * 0.25f);
  const F r = _fused(half_turns, 0x1.921fb6p1f, half_turns * -0x1.777a5cp-24f);
  _sine_pair<F> out = _turned(r, _from_bits<_ints<F>>(_bits(modulo + 0x1.8p23f)));
  out.s = out.s == 0.0f ? _with_sign(out.s, x) : out.s;
  out.c = out.c + 0.0f;  // +0 at every pole of tanpi
  return out;
}
template <class F> MM_FN F sinpi(F x) { return _math::sincospi(x).s; }
template <class F> MM_FN F cospi(F x) { return _math::sincospi(x).c; }
template <class F> MM_FN F tanpi(F x) {
  const _sine_pair<F> a = _math::sincospi(x);
  return a.s / a.c;
}

// asin z = z + z t P(t), t = z², z <= 1/2; beyond, of sqrt((1 - |x|)/2).
template <class F> MM_FN F _asin_near(F z, F t) {
  const F q = _poly(t, 0x1.55554cp-3f, 0x1.3338a6p-4f, 0x1.6ca908p-5f, 0x1.04bf1ep-5f, 0x1.d692fap-7f,
                    0x1.343084p-5f);
  return _fused(z * t, q, z);
}
template <class F> MM_FN F asin(F x) {
  const F a = _absolute(x);
  const auto far = a > 0.5f;
  const F t = far ? _fused(a, -0.5f, (F)0.5f) : a * a;
  const F p = _asin_near(far ? __builtin_elementwise_sqrt(t) : a, t);
  return _with_sign(far ? 0x1.921fb6p0f - (p + (p + 0x1.777a5cp-25f)) : p, x);
}
template <class F> MM_FN F acos(F x) {
  const F a = _absolute(x);
  const auto far = a > 0.5f;
  const F t = far ? _fused(a, -0.5f, (F)0.5f) : a * a;
  const F p = _asin_near(far ? __builtin_elementwise_sqrt(t) : a, t);
  const F near = 0x1.921fb6p0f - (_with_sign(p, x) + 0x1.777a5cp-25f);
  const F twice = p + p;
  return far ? (x < 0.0f ? 0x1.921fb6p1f - (twice + 0x1.777a5cp-24f) : twice) : near;
}

template <class F> MM_FN F _atan_near(F z) {
  const F t = z * z;
  const F q = _poly(t, -0x1.55554p-2f, 0x1.999268p-3f, -0x1.242656p-3f, 0x1.c0cb8ep-4f, -0x1.58c74p-4f,
                    0x1.dcc3bp-5f, -0x1.01628p-5f, 0x1.69e638p-7f, -0x1.ddc9dep-10f);
  return _fused(z * t, q, z);
}
template <class F> MM_FN F atan(F x) {
  const F a = _absolute(x);
  const auto steep = a > 1.0f;
  const F p = _atan_near((steep ? (F)1.0f : a) / (steep ? a : (F)1.0f));
  return _with_sign(steep ? 0x1.921fb6p0f - (p + 0x1.777a5cp-25f) : p, x);
}
template <class F> MM_FN F atan2(F y, F x) {
  const F ax = _absolute(x), ay = _absolute(y);
  const auto steep = ay > ax;
  const F small = steep ? ax : ay, big = steep ? ay : ax;
  F z = small / big;
  z = small == big ? (big == 0.0f ? (F)0.0f : (F)1.0f) : z;
  F p = _atan_near(z);
  p = steep ? 0x1.921fb6p0f - (p + 0x1.777a5cp-25f) : p;
  const auto left = _from_bits<_ints<F>>(_bits(x)) < 0;
  p = left ? 0x1.921fb6p1f - (p + 0x1.777a5cp-24f) : p;
  return _with_sign(p, y);
}

}  // namespace _math
}  // namespace metal

MM_STRICT_END
