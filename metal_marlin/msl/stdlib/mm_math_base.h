#pragma once
// What the mathematics headers share: which types a call's arguments stand for, conversions to the type
// computed in, bit patterns. Every function is written once for F = float or a vector of float; half and
// bfloat arguments are widened, computed, and rounded once.
#include "metal_types"

namespace metal {

template <class T> inline constexpr bool _scalar_number = __is_arithmetic(T) || __is_enum(T);

// An argument's type as arithmetic sees it: packed vectors as vectors, bool and enumerations as integers.
template <class A, bool Enum = __is_enum(A)> struct _arith { typedef A type; };
template <class A> struct _arith<A, true> { typedef decltype(+A()) type; };
template <> struct _arith<bool, false> { typedef int type; };
template <> struct _arith<double, false> { typedef float type; };
template <class T, int N> struct _arith<packed_vec<T, N>, false> { typedef _native<T, N> type; };
template <class A> using _arith_t = typename _arith<A>::type;

// The type in which two arguments meet: a vector beats a scalar (max(half4, 0.0f) is half4); scalars follow
// the usual conversions, except that equal types stay as they are. No type where MSL has no such call.
template <class A, class B, bool Numbers = _scalar_number<A> && _scalar_number<B>> struct _join_of {};
template <class A, class B> struct _join_of<A, B, true> { typedef decltype(A() + B()) type; };
template <class A> struct _join_of<A, A, true> { typedef A type; };
template <class T, class B, int N> struct _join_of<_native<T, N>, B, false> {
  typedef _when<_scalar_number<B>> _number;
  typedef _native<T, N> type;
};
template <class A, class T, int N> struct _join_of<A, _native<T, N>, false> {
  typedef _when<_scalar_number<A>> _number;
  typedef _native<T, N> type;
};
template <class T, int N> struct _join_of<_native<T, N>, _native<T, N>, false> {
  typedef _native<T, N> type;
};
template <class A, class B> using _join = typename _join_of<_arith_t<A>, _arith_t<B>>::type;
template <class A, class B, class C> using _join3 = _join<_join<A, B>, C>;

// The floating-point type of an argument; integers count as float. No type for anything else.
template <class A, bool Integer> struct _fp_scalar {};
template <class A> struct _fp_scalar<A, true> { typedef float type; };
template <> struct _fp_scalar<half, false> { typedef half type; };
template <> struct _fp_scalar<float, false> { typedef float type; };
template <> struct _fp_scalar<bfloat, false> { typedef bfloat type; };
template <class A> struct _fp_of : _fp_scalar<A, __is_integral(A)> {};
template <int N> struct _fp_of<_native<half, N>> { typedef _native<half, N> type; };
template <int N> struct _fp_of<_native<float, N>> { typedef _native<float, N> type; };
template <int N> struct _fp_of<_native<bfloat, N>> { typedef _native<bfloat, N> type; };
template <class A> using _fp = typename _fp_of<_arith_t<A>>::type;
template <class A, class B> using _fp2 = typename _fp_of<_join<A, B>>::type;
template <class A, class B, class C> using _fp3 = typename _fp_of<_join3<A, B, C>>::type;

template <class T> inline constexpr bool _is_fp = false;
template <> inline constexpr bool _is_fp<half> = true;
template <> inline constexpr bool _is_fp<float> = true;
template <> inline constexpr bool _is_fp<bfloat> = true;
template <class T> inline constexpr bool _is_fp_like = _is_fp<_elem<T>>;

// T with elements of type E.
template <class T, class E> struct _like_of { typedef E type; };
template <class T, int N, class E> struct _like_of<_native<T, N>, E> { typedef _native<E, N> type; };
template <class T, class E> using _like = typename _like_of<T, E>::type;
template <class T> using _floats = _like<T, float>;
template <class T> using _ints = _like<T, int>;
template <class T> using _uints = _like<T, uint>;

template <class T, class U> inline constexpr bool _alike = false;
template <class T> inline constexpr bool _alike<T, T> = true;

template <int Bytes> struct _integer_of;
template <> struct _integer_of<1> { typedef char s; typedef uchar u; };
template <> struct _integer_of<2> { typedef short s; typedef ushort u; };
template <> struct _integer_of<4> { typedef int s; typedef uint u; };
template <> struct _integer_of<8> { typedef long s; typedef ulong u; };
// Integers as wide as T's elements.
template <class T> using _same_int = _like<T, typename _integer_of<sizeof(_elem<T>)>::s>;
template <class T> using _same_uint = _like<T, typename _integer_of<sizeof(_elem<T>)>::u>;

template <class T> MM_FN constexpr _same_uint<T> _bits(T x) { return __builtin_bit_cast(_same_uint<T>, x); }
template <class T, class U> MM_FN constexpr T _from_bits(U u) { return __builtin_bit_cast(T, u); }

// Whether any component of a comparison's result is set.
template <class M> MM_FN constexpr bool _any_of(M m) {
  if constexpr (_shape<M>::native) {
    return __builtin_reduce_or(m) != 0;
  } else {
    return m;
  }
}

// x with elements of an integer type E.
template <class E, class U> MM_FN constexpr _like<U, E> _resized(U x) {
  if constexpr (_components<U> != 0) {
    return __builtin_convertvector(x, _like<U, E>);
  } else {
    return (E)x;
  }
}
// bfloat from and to float by integers: x86 converts element by element, and where it has the instruction
// drops denormals. Rounds to nearest, ties to even.
template <class T> MM_FN constexpr _floats<T> _from_bfloat(T x) {
  return _from_bits<_floats<T>>(_resized<uint>(_bits(x)) << 16);
}
template <class T> MM_FN constexpr T _to_bfloat(_floats<T> x) {
  typedef _uints<T> U;
  const U u = _bits(x);
  const U rounded = u + 0x7fffu + ((u >> 16) & 1u), quiet = u | 0x400000u;
  const U r = (u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  return _from_bits<T>(_resized<ushort>(r >> 16));
}
// a as T; scalars are repeated where T is a vector.
template <class T, class A> MM_FN constexpr T _to(A a) {
  if constexpr (_alike<T, A>) {
    return a;
  } else if constexpr (_packed<A>) {
    return _to<T>(a._vector());
#ifdef __METAL_MARLIN_CPU__
  } else if constexpr (_alike<T, _floats<A>> && _alike<A, _like<A, bfloat>>) {
    return _from_bfloat(a);
  } else if constexpr (_alike<A, _floats<T>> && _alike<T, _like<T, bfloat>>) {
    return _to_bfloat<T>(a);
#endif
  } else if constexpr (_components<T> == 0) {
    return _scalar<T>(a);
  } else if constexpr (_shape<A>::native) {
    return _converted<_elem<T>>(a);
  } else {
    return _splat<T>(a);
  }
}

// All bits of T's elements but the sign.
template <class T> inline constexpr _elem<_same_uint<T>> _magnitude_bits = (_elem<_same_uint<T>>)~0ul >> 1;
// (U): scalars of 16 bits become int in between.
template <class T> MM_FN constexpr T _absolute(T x) {
  typedef _same_uint<T> U;
  return _from_bits<T>((U)(_bits(x) & (U)_magnitude_bits<T>));
}
template <class T> MM_FN constexpr T _with_sign(T x, T y) {
  typedef _same_uint<T> U;
  const U magnitude = (U)_magnitude_bits<T>;
  return _from_bits<T>((U)((_bits(x) & magnitude) | (_bits(y) & ~magnitude)));
}

// Between these, neither reassociation nor contraction: compensated steps would be undone. NVPTX has no
// float_control; after its end products and sums contract as the CPU's flags let them.
#ifdef __METAL_MARLIN_CPU__
#define MM_STRICT_BEGIN _Pragma("float_control(precise, on, push)") _Pragma("clang fp contract(off)")
#define MM_STRICT_END _Pragma("float_control(pop)")
#else
#define MM_STRICT_BEGIN _Pragma("clang fp contract(off)")
#define MM_STRICT_END _Pragma("clang fp contract(fast)")
#endif

MM_STRICT_BEGIN
// a b + c; F is deduced from a alone, so that b and c may be scalars.
template <class F> MM_FN F _fused(F a, _like<F, _elem<F>> b, _like<F, _elem<F>> c) {
  return __builtin_elementwise_fma(a, b, c);
}
template <class F> MM_FN F _rounded(F x) { return __builtin_elementwise_rint(x); }

// c0 + c1 x + c2 x² + …
template <class F> MM_FN F _poly(F, float c) { return (F)c; }
template <class F, class... C> MM_FN F _poly(F x, float c, C... rest) {
  return __builtin_elementwise_fma(x, _poly(x, rest...), (F)c);
}

// 2^n for n in [-126, 127].
template <class F> MM_FN F _two_to(_ints<F> n) { return _from_bits<F>((n + 127) << 23); }
// p 2^n, rounded once, for n in [-250, 250] and p near 1.
template <class F> MM_FN F _scaled(F p, _ints<F> n) {
  const _ints<F> half_n = n >> 1;
  return p * _two_to<F>(half_n) * _two_to<F>(n - half_n);
}

MM_STRICT_END

#ifdef __METAL_MARLIN_CUDA__
// The approximations of NVIDIA's GPUs, denormals included. Relative error of exp2 and rsqrt below 2^-22.5.
namespace _hardware {
#define MM_APPROXIMATION(name, instruction)                                                                  \
  MM_FN float name(float x) {                                                                                \
    float r;                                                                                                 \
    __asm__(instruction ".f32 %0, %1;" : "=f"(r) : "f"(x));                                                  \
    return r;                                                                                                \
  }                                                                                                          \
  template <int N> MM_FN _native<float, N> name(_native<float, N> x) {                                       \
    for (int i = 0; i < N; i++) x[i] = _hardware::name(x[i]);                                                \
    return x;                                                                                                \
  }
MM_APPROXIMATION(exp2, "ex2.approx")
MM_APPROXIMATION(log2, "lg2.approx")
MM_APPROXIMATION(rsqrt, "rsqrt.approx")
MM_APPROXIMATION(sqrt, "sqrt.approx")
MM_APPROXIMATION(inverse, "rcp.approx")
MM_APPROXIMATION(sin, "sin.approx")
MM_APPROXIMATION(cos, "cos.approx")
#undef MM_APPROXIMATION
}  // namespace _hardware
#endif

#define MM_INF (__builtin_inff())
#define MM_NAN (__builtin_nanf(""))

}  // namespace metal
