#pragma once
// What fast:: computes differently: the hardware's approximations on NVIDIA GPUs; on the CPU only angles,
// without the long way for huge ones, and what is made of exponentials. NaN and infinities behave as in
// precise::. Accuracy: exp2 and log2 some 4 ulp, exp 4 + |x| ulp, sin and cos 2^-20 absolute for |x| < 2^15,
// tanh 2^-22 absolute.
#include "mm_math_exp.h"
#include "mm_math_ieee.h"
#include "mm_math_trig.h"

namespace metal {
namespace _quick {

MM_STRICT_BEGIN

#ifdef __METAL_MARLIN_CUDA__
using _hardware::exp2;
using _hardware::log2;
using _hardware::rsqrt;
using _hardware::sqrt;
// Within half a turn, where the instructions are accurate.
template <class F> MM_FN F _within_turn(F x) {
  const F n = _rounded(x * 0x1.45f306p-3f);
  return _fused(n, 0x1.777a5cp-23f, _fused(n, -0x1.921fb6p2f, x));
}
template <class F> MM_FN F _inverse(F x) { return _hardware::inverse(x); }
template <class F> MM_FN F exp(F x) { return _quick::exp2(x * 0x1.715476p0f); }
template <class F> MM_FN F exp10(F x) { return _quick::exp2(x * 0x1.a934fp1f); }
template <class F> MM_FN F log(F x) { return _quick::log2(x) * 0x1.62e43p-1f; }
template <class F> MM_FN F log10(F x) { return _quick::log2(x) * 0x1.344136p-2f; }
template <class F> MM_FN F sin(F x) { return _hardware::sin(_within_turn(x)); }
template <class F> MM_FN F cos(F x) { return _hardware::cos(_within_turn(x)); }
template <class F> MM_FN _math::_sine_pair<F> sincos(F x) {
  const F r = _within_turn(x);
  return {_hardware::sin(r), _hardware::cos(r)};
}
template <class F> MM_FN F tan(F x) {
  const _math::_sine_pair<F> a = _quick::sincos(x);
  return a.s * _hardware::inverse(a.c);
}
template <class F> MM_FN F divide(F x, F y) {
  F r = x;
  if constexpr (_components<F> == 0) {
    __asm__("div.full.f32 %0, %1, %2;" : "=f"(r) : "f"(x), "f"(y));
  } else {
    for (int i = 0; i < _components<F>; i++) r[i] = _quick::divide(x[i], y[i]);
  }
  return r;
}
#else
using _math::divide;
using _math::exp;
using _math::exp10;
using _math::exp2;
using _math::log;
using _math::log10;
using _math::log2;
using _math::sqrt;
template <class F> MM_FN F rsqrt(F x) { return 1.0f / __builtin_elementwise_sqrt(x); }
template <class F> MM_FN F _inverse(F x) { return 1.0f / x; }
template <class F> MM_FN _math::_sine_pair<F> sincos(F x) {
  const _math::_reduced<F> a = _math::_reduce_small(x);
  // so that angles beyond the reduction give a number in [-1, 1], as the polynomials would not
  const F limit = 0.8f;
  const F r = a.r > limit ? limit : (a.r < -limit ? -limit : a.r);
  return _math::_turned(r, a.quadrant);
}
template <class F> MM_FN F sin(F x) { return _quick::sincos(x).s; }
template <class F> MM_FN F cos(F x) { return _quick::sincos(x).c; }
template <class F> MM_FN F tan(F x) {
  const _math::_sine_pair<F> a = _quick::sincos(x);
  return a.s / a.c;
}
#endif

template <class F> MM_FN F pow(F x, F y) {
  const F r = _quick::exp2(y * _quick::log2(_absolute(x)));
  return _math::_pow_edges(x, y, r);
}
template <class F> MM_FN F powr(F x, F y) { return _quick::exp2(y * _quick::log2(x)); }
template <class F> MM_FN F tanh(F x) {
  const F e = _quick::exp(2.0f * _absolute(x));
  return _with_sign(1.0f - 2.0f * _inverse(e + 1.0f), x);
}

MM_STRICT_END

}  // namespace _quick
}  // namespace metal
