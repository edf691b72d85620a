#pragma once
// packed_float3 and friends: N elements with the element's alignment. Included by metal_types.

namespace metal {

template <class T> inline constexpr bool _packed = false;
template <class T, int N> inline constexpr bool _packed<packed_vec<T, N>> = true;
template <class A> MM_FN constexpr auto _unpacked(A a) {
    if constexpr (_packed<A>) {
        return a._vector();
    } else {
        return a;
    }
}

// Readable and writable; not all that native vectors have, because each costs every compilation.
#define MM_SWIZZLE2(a, b)                                                                                    \
    __declspec(property(get = _##a##b, put = _put_##a##b)) _v2 a##b;                                         \
    MM_METHOD constexpr _v2 _##a##b() const { return _v2{a, b}; }                                            \
    MM_METHOD constexpr void _put_##a##b(_v2 _v) { a = _v.x, b = _v.y; }
#define MM_SWIZZLE3(a, b, c)                                                                                 \
    __declspec(property(get = _##a##b##c, put = _put_##a##b##c)) _v3 a##b##c;                                \
    MM_METHOD constexpr _v3 _##a##b##c() const { return _v3{a, b, c}; }                                      \
    MM_METHOD constexpr void _put_##a##b##c(_v3 _v) { a = _v.x, b = _v.y, c = _v.z; }
#define MM_SWIZZLE4(a, b, c, d)                                                                              \
    __declspec(property(get = _##a##b##c##d, put = _put_##a##b##c##d)) _v4 a##b##c##d;                       \
    MM_METHOD constexpr _v4 _##a##b##c##d() const { return _v4{a, b, c, d}; }                                \
    MM_METHOD constexpr void _put_##a##b##c##d(_v4 _v) { a = _v.x, b = _v.y, c = _v.z, d = _v.w; }

#define MM_COMPOUND(op)                                                                                      \
    template <class B> MM_METHOD constexpr packed_vec& operator op## = (B b) {                               \
        return *this = packed_vec(_vector() op _operand<_native<T, 2>>(_unpacked(b)));                       \
    }
#define MM_PACKED(N, ...)                                                                                    \
    typedef _native<T, 2> _v2;                                                                               \
    typedef _native<T, 3> _v3;                                                                               \
    typedef _native<T, 4> _v4;                                                                               \
    packed_vec() = default;                                                                                  \
    MM_METHOD constexpr packed_vec(T a) : packed_vec((_native<T, N>)a) {}                                    \
    template <class... A>                                                                                    \
    explicit MM_METHOD constexpr packed_vec(A... a) : packed_vec(_make_vector<_native<T, N>>(a...)) {}       \
    MM_METHOD constexpr _native<T, N> _vector() const { return _native<T, N>{__VA_ARGS__}; }                 \
    MM_METHOD constexpr operator _native<T, N>() const { return _vector(); }                                 \
    template <class E> MM_METHOD constexpr _native<E, N> _as() const { return _converted<E>(_vector()); }    \
    MM_METHOD constexpr T& operator[](int i) { return v[i]; }                                                \
    MM_COMPOUND(+)                                                                                           \
    MM_COMPOUND(-) MM_COMPOUND(*) MM_COMPOUND(/) MM_COMPOUND(%) MM_COMPOUND(&) MM_COMPOUND(|) MM_COMPOUND(^) \
        MM_COMPOUND(<<) MM_COMPOUND(>>)

template <class T> struct packed_vec<T, 2> {
    union {
        struct {
            T x, y;
        };
        struct {
            T r, g;
        };
        T v[2];
    };
    MM_PACKED(2, x, y)
    MM_METHOD constexpr packed_vec(_native<T, 2> a) : x(a.x), y(a.y) {}
    MM_METHOD constexpr T operator[](int i) const { return i == 0 ? x : y; }
    MM_SWIZZLE2(x, y) MM_SWIZZLE2(y, x) MM_SWIZZLE2(r, g)
};

template <class T> struct packed_vec<T, 3> {
    union {
        struct {
            T x, y, z;
        };
        struct {
            T r, g, b;
        };
        T v[3];
    };
    MM_PACKED(3, x, y, z)
    MM_METHOD constexpr packed_vec(_native<T, 3> a) : x(a.x), y(a.y), z(a.z) {}
    MM_METHOD constexpr T operator[](int i) const { return i == 0 ? x : i == 1 ? y : z; }
    MM_SWIZZLE2(x, y)
    MM_SWIZZLE2(x, z) MM_SWIZZLE2(y, z) MM_SWIZZLE2(y, x) MM_SWIZZLE2(z, x) MM_SWIZZLE2(z, y)
        MM_SWIZZLE3(x, y, z) MM_SWIZZLE3(z, y, x) MM_SWIZZLE3(r, g, b)
};

template <class T> struct packed_vec<T, 4> {
    union {
        struct {
            T x, y, z, w;
        };
        struct {
            T r, g, b, a;
        };
        T v[4];
    };
    MM_PACKED(4, x, y, z, w)
    MM_METHOD constexpr packed_vec(_native<T, 4> f) : x(f.x), y(f.y), z(f.z), w(f.w) {}
    MM_METHOD constexpr T operator[](int i) const { return i == 0 ? x : i == 1 ? y : i == 2 ? z : w; }
    MM_SWIZZLE2(x, y)
    MM_SWIZZLE2(x, z) MM_SWIZZLE2(x, w) MM_SWIZZLE2(y, z) MM_SWIZZLE2(y, w) MM_SWIZZLE2(z, w)
        MM_SWIZZLE3(x, y, z) MM_SWIZZLE3(y, z, w) MM_SWIZZLE3(r, g, b) MM_SWIZZLE4(x, y, z, w)
            MM_SWIZZLE4(w, z, y, x) MM_SWIZZLE4(r, g, b, a)
};
#undef MM_PACKED
#undef MM_COMPOUND
#undef MM_SWIZZLE2
#undef MM_SWIZZLE3
#undef MM_SWIZZLE4

#define MM_BINARY(op)                                                                                        \
    template <class A, class B, class = _when<(_packed<A> || _packed<B>)>>                                   \
    MM_FN constexpr auto operator op(A a, B b) {                                                             \
        const auto u = _unpacked(a);                                                                         \
        const auto v = _unpacked(b);                                                                         \
        return _operand<decltype(v + v)>(u) op _operand<decltype(u + u)>(v);                                 \
    }
MM_BINARY(+)
MM_BINARY(-) MM_BINARY(*) MM_BINARY(/) MM_BINARY(%) MM_BINARY(&) MM_BINARY(|) MM_BINARY(^) MM_BINARY(<<)
    MM_BINARY(>>) MM_BINARY(<) MM_BINARY(>) MM_BINARY(<=) MM_BINARY(>=) MM_BINARY(==) MM_BINARY(!=)
#undef MM_BINARY

#define MM_COMPOUND(op)                                                                                      \
    template <class V, class T, int N, class = _when<_shape<_value<V>>::native>>                             \
    MM_FN constexpr V& operator op## = (V & a, packed_vec<T, N> b) {                                         \
        return a op## = b._vector();                                                                         \
    }
        MM_COMPOUND(+) MM_COMPOUND(-) MM_COMPOUND(*) MM_COMPOUND(/) MM_COMPOUND(&) MM_COMPOUND(|)
            MM_COMPOUND(^)
#undef MM_COMPOUND
                template <class T, int N>
                MM_FN constexpr auto operator-(packed_vec<T, N> a) {
    return -a._vector();
}
template <class T, int N> MM_FN constexpr auto operator+(packed_vec<T, N> a) { return a._vector(); }
template <class T, int N> MM_FN constexpr auto operator~(packed_vec<T, N> a) { return ~a._vector(); }

} // namespace metal

#define MM_PACKED_NAMES(T)                                                                                   \
    typedef metal::packed_vec<T, 2> packed_##T##2;                                                           \
    typedef metal::packed_vec<T, 3> packed_##T##3;                                                           \
    typedef metal::packed_vec<T, 4> packed_##T##4;                                                           \
    namespace metal {                                                                                        \
    using ::packed_##T##2;                                                                                   \
    using ::packed_##T##3;                                                                                   \
    using ::packed_##T##4;                                                                                   \
    }
MM_EACH_NUMBER(MM_PACKED_NAMES)
#undef MM_PACKED_NAMES
