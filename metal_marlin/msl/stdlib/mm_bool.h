#pragma once
// bool2, bool3, bool4 as MSL lays them out: one byte a component (a native vector of bool is a bit mask).
// Included by metal_types.

namespace metal {

#define MM_SWIZZLE2(a, b)                                                                                    \
    __declspec(property(get = _##a##b)) bool2 a##b;                                                          \
    template <class B = bool2> MM_METHOD constexpr B _##a##b() const { return B(a, b); }
#define MM_SWIZZLE3(a, b, c)                                                                                 \
    __declspec(property(get = _##a##b##c)) bool3 a##b##c;                                                    \
    template <class B = bool3> MM_METHOD constexpr B _##a##b##c() const { return B(a, b, c); }
#define MM_SWIZZLE4(a, b, c, d)                                                                              \
    __declspec(property(get = _##a##b##c##d)) bool4 a##b##c##d;                                              \
    template <class B = bool4> MM_METHOD constexpr B _##a##b##c##d() const { return B(a, b, c, d); }

// Every swizzle of two and of three components that starts with a, from N components. Of the 256 with four,
// each of which costs every compilation, only permutations, pairs and repetitions.
#define MM_LAST2(M, ...) M(__VA_ARGS__, x) M(__VA_ARGS__, y)
#define MM_LAST3(M, ...) MM_LAST2(M, __VA_ARGS__) M(__VA_ARGS__, z)
#define MM_LAST4(M, ...) MM_LAST3(M, __VA_ARGS__) M(__VA_ARGS__, w)
#define MM_TWO2(M, a) MM_LAST2(M, a, x) MM_LAST2(M, a, y)
#define MM_TWO3(M, a) MM_LAST3(M, a, x) MM_LAST3(M, a, y) MM_LAST3(M, a, z)
#define MM_TWO4(M, a) MM_LAST4(M, a, x) MM_LAST4(M, a, y) MM_LAST4(M, a, z) MM_LAST4(M, a, w)
#define MM_SWIZZLES(N, a) MM_LAST##N(MM_SWIZZLE2, a) MM_TWO##N(MM_SWIZZLE3, a)
#define MM_PAIRS(M, a, b) M(a, a, a, a) M(b, b, b, b) M(a, a, b, b) M(b, b, a, a) M(a, b, a, b) M(b, a, b, a)
#define MM_AFTER(M, a, b, c, d)                                                                              \
    M(a, b, c, d) M(a, b, d, c) M(a, c, b, d) M(a, c, d, b) M(a, d, b, c) M(a, d, c, b)
#define MM_PERMUTATIONS(M)                                                                                   \
    MM_AFTER(M, x, y, z, w) MM_AFTER(M, y, x, z, w) MM_AFTER(M, z, x, y, w) MM_AFTER(M, w, x, y, z)

// A constructor argument as components 0 / 1 of type char. A comparison's result (0 / -1) needs no more than
// != 0.
template <class A> MM_FN constexpr auto _flags(A a) {
    if constexpr (_shape<A>::native) {
        typedef _native<char, _components<A>> C;
        return __builtin_convertvector(a != _splat<A>(0), C) & (C)(char)1;
    } else if constexpr (_components<A> != 0) {
        return a.template _as<char>();
    } else {
        return static_cast<char>(static_cast<bool>(a));
    }
}

struct _flags_tag {};

// What the three classes share: implicit from a bool (splat) and from a native vector of as many components.
#define MM_BOOL_VECTOR(N, ...)                                                                               \
    bool##N() = default;                                                                                     \
    MM_METHOD constexpr bool##N(bool a) : bool##N((_native<char, N>)(char)a, _flags_tag{}) {}                \
    template <class E> MM_METHOD constexpr bool##N(_native<E, N> a) : bool##N(_flags(a), _flags_tag{}) {}    \
    template <class T>                                                                                       \
    explicit MM_METHOD constexpr bool##N(packed_vec<T, N> a)                                                 \
        : bool##N(_flags(a.template _as<T>()), _flags_tag{}) {}                                              \
    template <class A, class B, class... C>                                                                  \
    explicit MM_METHOD constexpr bool##N(A a, B b, C... c)                                                   \
        : bool##N(_make_vector<_native<char, N>>(_flags(a), _flags(b), _flags(c)...), _flags_tag{}) {}       \
    MM_METHOD constexpr bool& operator[](int i) { return v[i]; }                                             \
    template <class E> MM_METHOD constexpr _native<E, N> _as() const { return _native<E, N>{__VA_ARGS__}; }

struct alignas(2) bool2 {
    union {
        struct {
            bool x, y;
        };
        struct {
            bool r, g;
        };
        bool v[2];
    };
    MM_BOOL_VECTOR(2, (E)x, (E)y)
    MM_METHOD constexpr bool2(_native<char, 2> f, _flags_tag) : x(f.x), y(f.y) {}
    MM_METHOD constexpr bool operator[](int i) const { return i == 0 ? x : y; }
    MM_SWIZZLES(2, x) MM_SWIZZLES(2, y) MM_PAIRS(MM_SWIZZLE4, x, y)
};

struct alignas(4) bool3 {
    union {
        struct {
            bool x, y, z;
        };
        struct {
            bool r, g, b;
        };
        bool v[3];
    };
    MM_BOOL_VECTOR(3, (E)x, (E)y, (E)z)
    MM_METHOD constexpr bool3(_native<char, 3> f, _flags_tag) : x(f.x), y(f.y), z(f.z) {}
    MM_METHOD constexpr bool operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
    MM_SWIZZLES(3, x)
    MM_SWIZZLES(3, y) MM_SWIZZLES(3, z) MM_PAIRS(MM_SWIZZLE4, x, y) MM_SWIZZLE4(x, y, z, z)
        MM_SWIZZLE4(z, z, z, z)
};

struct alignas(4) bool4 {
    union {
        struct {
            bool x, y, z, w;
        };
        struct {
            bool r, g, b, a;
        };
        bool v[4];
    };
    MM_BOOL_VECTOR(4, (E)x, (E)y, (E)z, (E)w)
    MM_METHOD constexpr bool4(_native<char, 4> f, _flags_tag) : x(f.x), y(f.y), z(f.z), w(f.w) {}
    MM_METHOD constexpr bool operator[](int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
    MM_SWIZZLES(4, x)
    MM_SWIZZLES(4, y) MM_SWIZZLES(4, z) MM_SWIZZLES(4, w) MM_PERMUTATIONS(MM_SWIZZLE4)
        MM_PAIRS(MM_SWIZZLE4, x, y) MM_PAIRS(MM_SWIZZLE4, z, w)
};

// Not templates, so that a comparison's result on either side converts.
#define MM_BOOL_OPERATOR(N, op, bitwise)                                                                     \
    MM_FN constexpr bool##N operator op(bool##N a, bool##N b) {                                              \
        return bool##N(a._as<char>() bitwise b._as<char>(), _flags_tag{});                                   \
    }
#define MM_BOOL_OPERATORS(N)                                                                                 \
    MM_BOOL_OPERATOR(N, &&, &)                                                                               \
    MM_BOOL_OPERATOR(N, ||, |) MM_BOOL_OPERATOR(N, &, &) MM_BOOL_OPERATOR(N, |, |) MM_BOOL_OPERATOR(N, ^, ^) \
        MM_BOOL_OPERATOR(N, !=, ^) MM_FN constexpr bool##N                                                   \
        operator!(bool##N a) {                                                                               \
        return bool##N(a._as<char>() ^ (char)1, _flags_tag{});                                               \
    }                                                                                                        \
    MM_FN constexpr bool##N operator==(bool##N a, bool##N b) { return !(a != b); }                           \
    MM_FN constexpr __generic bool##N& operator&=(__generic bool##N& a, bool##N b) { return a = a & b; }     \
    MM_FN constexpr __generic bool##N& operator|=(__generic bool##N& a, bool##N b) { return a = a | b; }     \
    MM_FN constexpr __generic bool##N& operator^=(__generic bool##N& a, bool##N b) { return a = a ^ b; }
MM_BOOL_OPERATORS(2) MM_BOOL_OPERATORS(3) MM_BOOL_OPERATORS(4)
#undef MM_BOOL_OPERATORS
#undef MM_BOOL_OPERATOR
#undef MM_BOOL_VECTOR
#undef MM_SWIZZLES
#undef MM_LAST2
#undef MM_LAST3
#undef MM_LAST4
#undef MM_TWO2
#undef MM_TWO3
#undef MM_TWO4
#undef MM_PAIRS
#undef MM_PERMUTATIONS
#undef MM_AFTER
#undef MM_SWIZZLE2
#undef MM_SWIZZLE3
#undef MM_SWIZZLE4

} // namespace metal
