#pragma once
// What generated entries need: the parameter types of a kernel, conversions of thread positions, and the table that
// tells the host each parameter's element type. See msl/entry.py.
#include "mm_config.h"
#include "metal_types"
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable  // for decltype(kernel)

constexpr unsigned mm_align(unsigned at, unsigned alignment) { return (at + alignment - 1) / alignment * alignment; }

template <int I, class F> struct mm_signature;
template <int I, class R, class... A> struct mm_signature<I, R(A...)> { typedef __type_pack_element<I, A...> type; };
template <int I, class F> using mm_param = typename mm_signature<I, F>::type;

struct mm_untyped { uchar byte; };  // what a void pointer leads to
template <class T> struct mm_nowhere { typedef T type; };
template <> struct mm_nowhere<void> { typedef mm_untyped type; };
template <class T> struct mm_nowhere<__global T> : mm_nowhere<T> {};
template <class T> struct mm_nowhere<__generic T> : mm_nowhere<T> {};
template <class T> struct mm_nowhere<__local T> : mm_nowhere<T> {};
template <class T> struct mm_bare;
template <class T> struct mm_bare<T*> : mm_nowhere<__remove_cv(T)> {};
template <class T> struct mm_bare<T&> : mm_nowhere<__remove_cv(T)> {};
// the type a pointer or reference parameter leads to, without qualifiers and address space
template <int I, class F> using mm_target = typename mm_bare<mm_param<I, F>>::type;

template <class T> struct mm_reference;
template <class T> struct mm_reference<T&> { typedef T* pointer; };
// a reference parameter bound to an address
template <class P> MM_FN P mm_refer(__generic void* at) { return *(typename mm_reference<P>::pointer)at; }

// a thread position in the type the kernel declares: scalar (x), 2 or 3 components
template <class T> MM_FN T mm_position(uint3 p) {
  typedef metal::_elem<T> E;
  if constexpr (metal::_components<T> == 0) return (T)p.x;
  else if constexpr (metal::_components<T> == 2) return metal::_make<T>((E)p.x, (E)p.y);
  else return metal::_make<T>((E)p.x, (E)p.y, (E)p.z);
}
template <class T> MM_FN T mm_position(uint i) { return (T)i; }

// --- the table for the host: per type {kind, bits, components, size, alignment}
enum { mm_struct, mm_unsigned, mm_signed, mm_float, mm_bfloat, mm_bool };
template <class T> struct mm_kind { enum { value = mm_struct }; };
#define MM_KIND(T, K) template <> struct mm_kind<T> { enum { value = K }; };
MM_KIND(uchar, mm_unsigned) MM_KIND(ushort, mm_unsigned) MM_KIND(uint, mm_unsigned) MM_KIND(ulong, mm_unsigned)
MM_KIND(unsigned long long, mm_unsigned) MM_KIND(char, mm_signed) MM_KIND(signed char, mm_signed)
MM_KIND(short, mm_signed) MM_KIND(int, mm_signed) MM_KIND(long, mm_signed) MM_KIND(long long, mm_signed)
MM_KIND(half, mm_float) MM_KIND(float, mm_float) MM_KIND(bfloat, mm_bfloat) MM_KIND(bool, mm_bool)
#undef MM_KIND
template <class T, bool = __is_enum(T)> struct mm_scalar { typedef metal::_elem<T> type; };
template <class T> struct mm_scalar<T, true> { typedef __underlying_type(T) type; };
template <class T> struct mm_element : mm_scalar<T> {};
template <class T, int N> struct mm_element<T[N]> : mm_element<T> {};
#define MM_TYPE_ROW(T) \
  mm_kind<typename mm_element<T>::type>::value, (int)sizeof(typename mm_element<T>::type) * 8, metal::_components<T>, \
      (int)sizeof(T), (int)alignof(T)

// Between threadgroup variables, so that what runs over one does not end in the next.
#ifdef METAL_MARLIN_CHECKED
#define MM_RED_ZONE 64
#define MM_VARIABLE(offset, bytes, name) mm_check_variable(offset, bytes, (ulong)name)
#else
#define MM_RED_ZONE 0
#define MM_VARIABLE(offset, bytes, name)
#endif

// The bytes of threadgroup memory a kernel declares, left in the object (CPU) or as a comment in the text (PTX).
#ifdef __METAL_MARLIN_CUDA__
#define MM_ARENA(bytes) asm volatile("// mm_arena_bytes %0" ::"n"(bytes))
#else
#define MM_ARENA(bytes) \
  asm volatile(".pushsection .rodata.mm_arena,\"a\"\n.ascii \"MM_ARENA\"\n.long %c0\n.popsection" ::"i"(bytes))
#endif
