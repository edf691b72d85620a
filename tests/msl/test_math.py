"""Mathematics: error bounds in units in the last place against float64, special values, types of arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import mpmath
import numpy as np
import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]
Reference = Callable[..., np.ndarray]

# signalling NaN among the arguments
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
inf, nan = math.inf, math.nan
STORED = {"float": np.float32, "half": np.float16, "bfloat": np.float32}
MANTISSA = {"float": (23, -126, 127), "half": (10, -14, 15), "bfloat": (7, -126, 127)}


def _turns(f: Callable[[np.ndarray], np.ndarray]) -> Reference:
    """f(pi x) by way of the exact remainder of x; half turns are exact."""

    def reference(x: np.ndarray) -> np.ndarray:
        r = np.fmod(x, 2.0)
        r = np.where(np.abs(r) > 1, r - np.copysign(2.0, r), r)
        if f is np.cos:
            return np.sin(np.pi * (0.5 - np.abs(r)))
        fold = np.where(np.abs(r) > 0.5, np.copysign(1.0, r) - r, r)
        if f is np.sin:
            return np.sin(np.pi * fold)
        sine, cosine = np.sin(np.pi * fold), np.sin(np.pi * (0.5 - np.abs(r)))
        return np.where(np.abs(fold) == 0.5, np.copysign(inf, sine), sine / cosine)

    return reference


def _round(x: np.ndarray) -> np.ndarray:
    return np.copysign(np.floor(np.abs(x) + 0.5), x)


def _fract(x: np.ndarray) -> np.ndarray:
    return np.where(np.isinf(x), 0.0, x - np.floor(x))


# name -> (float64 reference, ulp in float, smallest argument range worth drawing from)
UNARY: dict[str, tuple[Reference, float, tuple[float, float]]] = {
    "acos": (np.arccos, 4, (-1, 1)),
    "acosh": (np.arccosh, 4, (1, 3)),
    "asin": (np.arcsin, 4, (-1, 1)),
    "asinh": (np.arcsinh, 4, (-3, 3)),
    "atan": (np.arctan, 5, (-5, 5)),
    "atanh": (np.arctanh, 5, (-1, 1)),
    "ceil": (np.ceil, 0, (-9, 9)),
    "cos": (np.cos, 4, (-20, 20)),
    "cosh": (np.cosh, 4, (-90, 90)),
    "cospi": (_turns(np.cos), 4, (-5, 5)),
    "exp": (np.exp, 4, (-105, 90)),
    "exp10": (lambda x: np.power(10.0, x), 4, (-46, 39)),
    "exp2": (np.exp2, 4, (-151, 129)),
    "fabs": (np.abs, 0, (-9, 9)),
    "floor": (np.floor, 0, (-9, 9)),
    "log": (np.log, 4, (0, 3)),
    "log10": (np.log10, 4, (0, 3)),
    "log2": (np.log2, 4, (0, 3)),
    "rint": (np.rint, 0, (-9, 9)),
    "round": (_round, 0, (-9, 9)),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2, (0, 5)),
    "saturate": (lambda x: np.fmin(np.fmax(x, 0), 1), 0, (-1, 2)),
    "sign": (lambda x: np.nan_to_num(np.sign(x)), 0, (-1, 1)),
    "sin": (np.sin, 4, (-20, 20)),
    "sinh": (np.sinh, 4, (-90, 90)),
    "sinpi": (_turns(np.sin), 4, (-5, 5)),
    "sqrt": (np.sqrt, 0.5, (0, 5)),
    "tan": (np.tan, 6, (-20, 20)),
    "tanh": (np.tanh, 5, (-3, 3)),
    "tanpi": (_turns(np.tan), 6, (-5, 5)),
    "trunc": (np.trunc, 0, (-9, 9)),
}


def rounded(x: np.ndarray, kind: str) -> np.ndarray:
    """x (float64) rounded once to `kind`, as float64; beyond the largest number: infinity."""
    bits, low, high = MANTISSA[kind]
    with np.errstate(all="ignore"):
        _, e = np.frexp(np.where(np.isfinite(x), x, 1.0))
        step = np.ldexp(1.0, np.maximum(e - 1, low) - bits)
        r = np.where(np.isfinite(x), np.rint(x / step) * step, x)
    return np.where(np.abs(r) >= 2.0 ** (high + 1), np.copysign(inf, r), r)


def errors(got: np.ndarray, want: np.ndarray, kind: str) -> np.ndarray:
    """Distance in ulps of `kind` of the reference; 0 for equal infinities or two NaN; inf where only one is NaN."""
    bits, low, high = MANTISSA[kind]
    end = 2.0 ** (high + 1)
    got, want = got.astype(np.float64), want.astype(np.float64)
    with np.errstate(all="ignore"):
        g, w = np.clip(got, -end, end), np.clip(want, -end, end)
        _, e = np.frexp(np.where(np.isnan(w), 1.0, w))
        ulps = np.abs(g - w) / np.ldexp(1.0, np.clip(e - 1, low, high) - bits)
    fine = np.isnan(got) & np.isnan(want)
    if kind == "bfloat":  # processors with bfloat instructions drop its denormals
        fine |= (got == 0) & (np.abs(want) < 2.0**low)
    return np.where(fine, 0.0, np.where(np.isnan(ulps), inf, ulps))


def check(names: Sequence[str], bounds: Sequence[float], got: Sequence, want: Sequence, kind: str, x: Sequence) -> None:
    """Assert every function's bound, naming the worst argument of each that misses it. All arrays have one shape."""
    wrong = []
    for name, bound, a, b in zip(names, bounds, got, want, strict=True):
        error = errors(a, b, kind)
        i = int(np.argmax(error))
        if error[i] > bound:
            where = ", ".join(repr(float(v[i])) for v in x)
            wrong.append(
                f"{name}({where}) = {a[i]!r}, not {b[i]!r}: {error[i]:.3g} ulp > {bound} ({np.sum(error > bound)} points)"
            )
    assert not wrong, "\n".join(wrong)


def anywhere(rng: np.random.Generator, n: int) -> np.ndarray:
    """n floats of any bit pattern: every exponent, denormals, infinities and NaN."""
    return rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32).view(np.float32)


EDGES = np.array(
    [
        *(
            0.0,
            -0.0,
            inf,
            -inf,
            nan,
            1.0,
            -1.0,
            0.5,
            -0.5,
            1.5,
            2.5,
            -2.5,
            8388607.5,
            8388608.0,
            16777216.0,
            3.4028235e38,
        ),
        *(
            1e-45,
            -1e-45,
            1.1754944e-38,
            1.1754942e-38,
            88.72284,
            88.72283,
            -87.33655,
            -103.97208,
            127.99999,
            128.0,
            -149.0,
        ),
        *(
            -150.0,
            -126.0,
            38.53184,
            38.531845,
            -45.0,
            32768.0,
            32769.0,
            0.99999994,
            1.0000001,
            4096.0,
            4097.0,
            89.41599,
        ),
        *(
            0.625,
            1.57079637,
            3.14159274,
            25.13274,
            1e10,
            1e22,
            1e30,
            0.49999997,
            -0.49999997,
            1e-5,
            0.6666667,
            1.3333334,
        ),
    ],
    dtype=np.float32,
)


def draw(rng: np.random.Generator, ranges: Sequence[tuple[float, float]], n: int) -> np.ndarray:
    """n floats (rounded down to a multiple of 12): the edges, any bit pattern, and uniform draws from each range."""
    parts = [EDGES, anywhere(rng, n // 4)]
    parts += [rng.uniform(a, b, n // len(ranges)).astype(np.float32) for a, b in ranges]
    x = np.concatenate(parts)
    return x[: len(x) // 12 * 12]


def storage(kind: str, width: int) -> str:
    return kind if width == 1 else f"packed_{kind}{width}" if width == 3 else f"{kind}{width}"


def value(kind: str, width: int) -> str:
    return kind if width == 1 else f"{kind}{width}"


def tensor(x: np.ndarray, kind: str) -> torch.Tensor:
    """As a tensor; bfloat by cutting bits off, because conversions drop denormals on some processors."""
    x = np.ascontiguousarray(x.astype(STORED[kind]))
    if kind == "bfloat":
        return torch.from_numpy((x.view(np.uint32) >> 16).astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(t: torch.Tensor) -> np.ndarray:
    """As float64."""
    if t.dtype == torch.bfloat16:
        return (t.view(torch.int16).numpy().view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return t.numpy().astype(np.float64)


def call(
    msl: Run, expressions: Sequence[str], kind: str, width: int, args: Sequence[np.ndarray], *, setup: str = ""
) -> np.ndarray:
    """Each expression of x (and y, z), as float64 of shape (expressions, points), for points taken `width` at a time."""
    n = len(args[0]) // width
    stored, name = storage(kind, width), value(kind, width)
    inputs = "xyz"[: len(args)]
    params = "".join(f"device const {stored}* {v}s, " for v in inputs)
    loads = " ".join(f"{name} {v} = {v}s[i];" for v in inputs)
    lines = "\n  ".join(f"out[{k}u * n + i] = {e};" for k, e in enumerate(expressions))
    source = f"{HEAD}kernel void k({params}device {stored}* out, constant uint& n, uint i [[thread_position_in_grid]]) {{\n  {loads}{setup}\n  {lines}\n}}"
    tensors = {f"{v}s": tensor(a, kind) for v, a in zip(inputs, args, strict=True)}
    out = torch.full((len(expressions) * n * width,), nan, dtype=next(iter(tensors.values())).dtype)
    size = 1 if msl.backend == "cpu1" else 64  # type: ignore[attr-defined]
    out = msl(source, "k", {**tensors, "out": out, "n": n}, threads=n, threads_per_threadgroup=size)["out"]
    return array(out).reshape(len(expressions), -1)


def references(functions: Sequence[Reference], *args: np.ndarray) -> list[np.ndarray]:
    with np.errstate(all="ignore"):
        return [f(*(a.astype(np.float64) for a in args)) for f in functions]


def every(kind: str) -> np.ndarray:
    """All 65536 numbers of a 16-bit type, as floats; without the denormals of bfloat."""
    bits = np.arange(65536, dtype=np.uint32)
    if kind == "bfloat":
        x = (bits << 16).view(np.float32)
        return np.where(np.abs(x) < 2.0**-126, np.float32(0), x)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


@pytest.mark.lane_agnostic
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_unary_float(msl: Run, width: int) -> None:
    x = draw(np.random.default_rng(width), sorted({r for _, _, r in UNARY.values()}), 6000)
    got = call(msl, [f"{name}(x)" for name in UNARY], "float", width, [x])
    want = references([f for f, _, _ in UNARY.values()], x)
    check(list(UNARY), [b for _, b, _ in UNARY.values()], got, want, "float", [x])


@pytest.mark.parametrize(("kind", "width"), [("half", 1), ("half", 4), ("bfloat", 1), ("bfloat", 2)])
def test_unary_of_every_16_bit_number(msl: Run, kind: str, width: int) -> None:
    x = every(kind)
    got = call(msl, [f"{name}(x)" for name in UNARY], kind, width, [x])
    want = references([f for f, _, _ in UNARY.values()], x)
    # one rounding of a float result that is off by a few float ulps: barely more than half an ulp
    bounds = [0.0 if bound == 0 else 0.51 for _, bound, _ in UNARY.values()]
    check(list(UNARY), bounds, got, want, kind, [x])


def test_huge_angles(msl: Run) -> None:
    rng = np.random.default_rng(5)
    x = np.ldexp(rng.uniform(1, 2, 360) * rng.choice([-1, 1], 360), rng.integers(14, 128, 360)).astype(np.float32)
    with mpmath.workprec(400):
        want = [np.array([float(f(mpmath.mpf(float(v)))) for v in x]) for f in (mpmath.sin, mpmath.cos, mpmath.tan)]
    for width in (1, 4):
        got = call(msl, ["sin(x)", "cos(x)", "tan(x)"], "float", width, [x])
        check(["sin", "cos", "tan"], [4, 4, 6], got, want, "float", [x])


def test_angles_next_to_zeros(msl: Run) -> None:
    """Where sine, cosine or tangent nearly vanish, every bit of pi that the reduction lacks would show."""
    k = np.random.default_rng(7).permutation(np.arange(1, 60000))[:4000]
    x = (k * (np.pi / 2)).astype(np.float32)
    got = call(msl, ["sin(x)", "cos(x)", "tan(x)"], "float", 4, [x])
    check(["sin", "cos", "tan"], [4, 4, 6], got, references([np.sin, np.cos, np.tan], x), "float", [x])


def test_references_agree_with_mpmath() -> None:
    """numpy's float64 functions are good to far less than a float's ulp."""
    exact = {
        "exp10": lambda v: mpmath.power(10, v),
        "exp2": lambda v: mpmath.power(2, v),
        "rsqrt": lambda v: 1 / mpmath.sqrt(v),
    }
    exact |= {"log2": lambda v: mpmath.log(v, 2), "tanpi": lambda v: mpmath.sinpi(v) / mpmath.cospi(v)}
    names = {
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cos",
        "cosh",
        "cospi",
        "exp",
        "log",
        "log10",
        "sin",
        "sinh",
    }
    exact |= {name: getattr(mpmath, name) for name in names | {"sinpi", "sqrt", "tan", "tanh"}}
    rng = np.random.default_rng(6)
    for name, function in exact.items():
        reference, _, (low, high) = UNARY[name]
        x = rng.uniform(low, high, 40).astype(np.float32)
        x = x[x != 0]
        with mpmath.workprec(200):
            want = np.array([float(mpmath.re(function(mpmath.mpf(float(v))))) for v in x])
        assert np.max(np.abs(reference(x.astype(np.float64)) / want - 1)) < 2**-40, name


def _fdim(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x) | np.isnan(y), nan, np.where(x > y, x - y, 0.0))


def _powr(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    undefined = (x < 0) | ((x == 0) & (y == 0)) | (np.isinf(x) & (y == 0)) | ((x == 1) & np.isinf(y))
    return np.where(undefined | np.isnan(x) | np.isnan(y), nan, np.power(np.abs(x), y))


BINARY: dict[str, tuple[Reference, float]] = {
    "atan2": (np.arctan2, 6),
    "copysign": (np.copysign, 0),
    "divide": (np.divide, 0.5),
    "fdim": (_fdim, 0.5),
    "fmax": (np.fmax, 0),
    "fmin": (np.fmin, 0),
    "fmod": (np.fmod, 0),
    "max": (np.fmax, 0),
    "min": (np.fmin, 0),
    "pow": (np.power, 16),
    "powr": (_powr, 16),
    "precise::divide": (np.divide, 0.5),
    "precise::pow": (np.power, 16),
    "step": (lambda x, y: np.where(y < x, 0.0, 1.0), 0),
}


def pairs(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Arguments of two: all pairs of edges, any bits, and the neighbourhoods where pow neither over- nor underflows."""
    x = [np.repeat(EDGES, len(EDGES)), anywhere(rng, n), rng.uniform(0, 3, n), np.exp(rng.uniform(-80, 80, n))]
    y = [np.tile(EDGES, len(EDGES)), anywhere(rng, n), rng.uniform(-40, 40, n), rng.uniform(-1.2, 1.2, n)]
    x += [rng.uniform(0.999, 1.001, n), rng.integers(-9, 9, n), anywhere(rng, n)]
    y += [rng.uniform(-9e4, 9e4, n), rng.integers(-9, 9, n), rng.integers(-3, 4, n)]
    a, b = (np.concatenate([p.astype(np.float32) for p in side]) for side in (x, y))
    count = len(a) // 12 * 12
    return a[:count], b[:count]


@pytest.mark.parametrize("width", [1, 3, 4])
def test_binary_float(msl: Run, width: int) -> None:
    x, y = pairs(np.random.default_rng(width), 2000)
    got = call(msl, [f"{name}(x, y)" for name in BINARY], "float", width, [x, y])
    want = references([f for f, _ in BINARY.values()], x, y)
    check(list(BINARY), [b for _, b in BINARY.values()], got, want, "float", [x, y])


@pytest.mark.parametrize(("kind", "width"), [("half", 1), ("half", 4), ("bfloat", 3)])
def test_binary_16_bit(msl: Run, kind: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x, y = (rng.permutation(every(kind))[:36000] for _ in range(2))
    near = rng.uniform(-3, 3, (2, 12000)).astype(np.float32)
    x, y = (rounded(np.concatenate(p).astype(np.float64), kind) for p in ((x, near[0]), (y, near[1])))
    got = call(msl, [f"{name}(x, y)" for name in BINARY], kind, width, [x, y])
    want = references([f for f, _ in BINARY.values()], x, y)
    check(list(BINARY), [0.0 if b == 0 else 0.51 for _, b in BINARY.values()], got, want, kind, [x, y])


def _fma(x: np.ndarray, y: np.ndarray, z: np.ndarray, kind: str) -> list[float]:
    """x y + z rounded once to `kind`, by exact arithmetic."""
    bits, low, _ = MANTISSA[kind]
    out = []
    with mpmath.workprec(1200):
        for a, b, c in zip(x.tolist(), y.tolist(), z.tolist(), strict=True):
            if not (math.isfinite(a) and math.isfinite(b) and math.isfinite(c)):
                out.append(a * b + c)
                continue
            exact = mpmath.mpf(a) * b + c
            if exact == 0:
                out.append(0.0)
                continue
            exponent = max(int(mpmath.floor(mpmath.log(abs(exact), 2))), low) - bits
            r = float(mpmath.nint(mpmath.ldexp(exact, -exponent))) * math.ldexp(1.0, exponent)
            out.append(r)
    return out


@pytest.mark.parametrize(
    ("kind", "width"), [("float", 1), ("float", 4), ("half", 1), ("half", 4), ("bfloat", 1), ("bfloat", 2)]
)
def test_fma_rounds_once(msl: Run, kind: str, width: int) -> None:
    rng = np.random.default_rng(width)
    n = 800
    spread = 7 if kind == "half" else 60
    bits = MANTISSA[kind][0]
    significands = rng.integers(2**bits, 2 ** (bits + 1), (3, n)) * rng.choice([-1.0, 1.0], (3, n))
    x, y = (np.ldexp(significands[k], rng.integers(-spread, spread, n) - bits) for k in (0, 1))
    # z between far below the product's last place and far above it
    z = np.ldexp(significands[2], np.frexp(x * y)[1] + rng.integers(-2 * bits - 6, bits + 6, n) - bits)
    ends = np.array(
        [inf, nan, 0.0, MANTISSA[kind][2] * 1.0, 2.0 ** MANTISSA[kind][2], -(2.0 ** MANTISSA[kind][2]), 2.0, -inf]
    )
    x, y, z = (np.concatenate([v, rng.choice(ends, 200)]) for v in (x, y, z))
    # x y within a hair of half a unit of z: rounding twice would take it for a tie
    k, unit = rng.integers(1, 4, 240), 2.0**-bits
    x, y = np.append(x, 1 + k * unit), np.append(y, rng.choice([-1, 1], 240) * (1 - k * unit) * unit / 2)
    z = np.append(z, rng.choice([-1, 1], 240) * (1 + rng.integers(0, 2**bits, 240) * unit))
    x, y, z = (rounded(v, kind) for v in (x, y, z))
    with np.errstate(all="ignore"):
        got = call(msl, ["fma(x, y, z)"], kind, width, [x, y, z])
    want = rounded(np.array(_fma(x, y, z, kind)), kind)
    check(["fma"], [0], got, [want], kind, [x, y, z])


def test_nextafter(msl: Run) -> None:
    rng = np.random.default_rng(8)
    x, y = pairs(rng, 300)
    with np.errstate(all="ignore"):
        want = np.nextafter(x, y)
        check(["nextafter"], [0], call(msl, ["nextafter(x, y)"], "float", 4, [x, y]), [want], "float", [x, y])
        a, b = every("half").astype(np.float16), rng.permutation(every("half")).astype(np.float16)
        got = call(msl, ["nextafter(x, y)"], "half", 1, [a, b])
        check(["nextafter"], [0], got, [np.nextafter(a, b)], "half", [a, b])


TWO_RESULTS = {
    "frexp": ("int{n} e; {t} m = frexp(x, e);", ["m", "{t}(e)", "ldexp(m, e)", "{t}(ilogb(x))"]),
    "modf": ("{t} w; {t} r = modf(x, w);", ["r", "w"]),
    "sincos": ("{t} c, d; {t} s = sincos(x, c), p = sincospi(x, d);", ["s", "c", "p", "d"]),
}


@pytest.mark.parametrize(("kind", "width"), [("float", 1), ("float", 3), ("float", 4), ("half", 1), ("bfloat", 4)])
def test_two_results(msl: Run, kind: str, width: int) -> None:
    rng = np.random.default_rng(width)
    x = draw(rng, [(-20, 20), (-1, 1)], 1200) if kind == "float" else rng.permutation(every(kind))[:24000]
    x = x[np.isfinite(x)]
    x = x[: len(x) // 12 * 12]
    fill = {"n": "" if width == 1 else str(width), "t": value(kind, width)}
    setup = "".join(s.format(**fill) for s, _ in TWO_RESULTS.values())
    names = [e.format(**fill) for _, row in TWO_RESULTS.values() for e in row]
    got = call(msl, names, kind, width, [x], setup=setup)
    d = x.astype(np.float64)
    m, e = np.frexp(d)
    logb = np.where(d == 0, -(2.0**31), e - 1.0)
    want = [m, e.astype(np.float64), d, logb, *np.modf(d), np.sin(d), np.cos(d), _turns(np.sin)(d), _turns(np.cos)(d)]
    if kind != "float":
        want = [rounded(w, kind) for w in want]
    loose = [4.0] * 4 if kind == "float" else [1.0] * 4
    check(names, [0.0] * 6 + loose, got, want, kind, [x])


def test_results_by_reference_into_any_address_space(msl: Run) -> None:
    source = (
        HEAD
        + """
    kernel void k(device float* out, device int* e, device const float& x, threadgroup float* scratch [[threadgroup(0)]]) {
      threadgroup float shared;
      out[0] = modf(x, out[1]);
      out[2] = frexp(x, e[0]);
      out[3] = sincos(0.5f, shared); out[4] = shared;
      out[5] = modf(-x, scratch[1]); out[6] = scratch[1];
      float whole; out[7] = metal::precise::modf(x, whole) + whole;
    }"""
    )
    args = {"out": torch.zeros(8), "e": torch.zeros(1, dtype=torch.int32), "x": torch.tensor([5.75])}
    got = msl(source, "k", args, threads=1, threads_per_threadgroup=1, threadgroup_memory={"scratch": 16})
    want = [0.75, 5.0, 0.71875, math.sin(0.5), math.cos(0.5), -0.75, -5.0, 5.75]
    assert got["e"].item() == 3
    torch.testing.assert_close(got["out"], torch.tensor(want), rtol=3e-7, atol=0)


def test_ldexp(msl: Run) -> None:
    rng = np.random.default_rng(9)
    m, k = anywhere(rng, 6000), rng.integers(-300, 300, 6000).astype(np.int32)
    k[:8] = [2**31 - 1, -(2**31), 0, 1, -1, 277, -278, 128]
    source = (
        HEAD
        + "kernel void k(device const float4* m, device const int4* e, device float4* y, uint i [[thread_position_in_grid]]) { y[i] = ldexp(m[i], e[i]); y[i].x = ldexp(m[i].x, e[i].x); }"
    )
    args = {"m": torch.from_numpy(m), "e": torch.from_numpy(k), "y": torch.zeros(6000)}
    got = msl(source, "k", args, threads=1500, threads_per_threadgroup=50)["y"].numpy()
    with np.errstate(all="ignore"):
        want = np.ldexp(m.astype(np.float64), np.clip(k, -700, 700)).astype(np.float32)
    check(["ldexp"], [0], [got], [want], "float", [m, k])


def test_fract_stays_below_one(msl: Run) -> None:
    for kind, x in (
        ("float", draw(np.random.default_rng(3), [(-3, 3), (-1e-6, 0)], 3000)),
        ("half", every("half")),
        ("bfloat", every("bfloat")),
    ):
        got = call(msl, ["fract(x)"], kind, 1, [x])
        below = 1 - 2.0 ** -(MANTISSA[kind][0] + 1)
        with np.errstate(all="ignore"):
            want = np.minimum(rounded(_fract(x.astype(np.float64)), kind), below)
        check(["fract"], [0], got, [want], kind, [x])


# x is a float argument, so that nothing is folded at compile time; expressions are of type float.
SPECIAL: dict[str, float] = {
    "pow(Z, -1.0f)": inf, "pow(-Z, -1.0f)": -inf, "pow(-Z, -2.0f)": inf, "pow(-Z, 3.0f)": -0.0, "pow(Z, -I)": inf,
    "pow(O, Q)": 1, "pow(Q, Z)": 1, "pow(-O, I)": 1, "pow(-O, -I)": 1, "pow(-O * 2, 0.5f)": nan, "pow(-O * 2, 3.0f)": -8,
    "pow(-I, 3.0f)": -inf, "pow(-I, 2.0f)": inf, "pow(-I, -3.0f)": -0.0, "pow(O * 0.5f, -I)": inf, "pow(O * 2, I)": inf,
    "pow(O * 2, -I)": 0, "pow(O * 0.5f, I)": 0, "pow(Q, O)": nan, "pow(O * 2, Q)": nan, "pow(-8.0f * O, 1.0f / 3.0f)": nan,
    "powr(Z, Z)": nan, "powr(-O, 2.0f)": nan, "powr(I, Z)": nan, "powr(O, I)": nan, "powr(O, Q)": nan, "powr(Z, O)": 0,
    "powr(Z, -O)": inf, "powr(I, -O)": 0, "powr(O * 3, Z)": 1,
    "exp(-I)": 0, "exp(I)": inf, "exp(Q)": nan, "exp2(O * 1e30f)": inf, "exp10(-I)": 0,
    "log(Z)": -inf, "log(-Z)": -inf, "log(-O)": nan, "log(I)": inf, "log2(-I)": nan, "log10(Z)": -inf, "log(O)": 0,
    "sin(I)": nan, "cos(-I)": nan, "tan(I)": nan, "sin(-Z)": -0.0, "tan(-Z)": -0.0, "sinpi(I)": nan, "tanpi(O * 0.5f)": inf,
    "cospi(O * 0.5f)": 0, "cospi(O * 1.5f)": 0, "sinpi(O * 1e20f)": 0, "cospi(O * 1e20f)": 1, "sinpi(-Z)": -0.0, "cospi(Q)": nan,
    "asin(O * 1.5f)": nan, "acos(-O * 1.5f)": nan, "acos(O)": 0, "asin(-Z)": -0.0, "atan(-Z)": -0.0, "acosh(O * 0.5f)": nan,
    "acosh(I)": inf, "asinh(-I)": -inf, "asinh(-Z)": -0.0, "atanh(O)": inf, "atanh(-O)": -inf, "atanh(O * 2)": nan, "atanh(-Z)": -0.0,
    "sinh(-I)": -inf, "cosh(-I)": inf, "tanh(I)": 1, "tanh(-I)": -1, "tanh(-Z)": -0.0, "sinh(-Z)": -0.0, "tanh(Q)": nan,
    "atan2(Z, O)": 0, "atan2(-Z, O)": -0.0, "atan2(Z, Z)": 0, "atan2(Q, O)": nan, "atan2(O, Q)": nan,
    "sqrt(-O)": nan, "sqrt(-Z)": -0.0, "sqrt(I)": inf, "rsqrt(Z)": inf, "rsqrt(I)": 0, "rsqrt(-O)": nan, "rsqrt(Q)": nan,
    "fmod(I, O)": nan, "fmod(O, Z)": nan, "fmod(O, I)": 1, "fmod(-Z, O)": -0.0, "fmod(O * 5.5f, -O * 2)": 1.5, "fmod(-O * 5.5f, O * 2)": -1.5,
    "fmin(Q, O)": 1, "fmax(O, Q)": 1, "fmin(Q, Q)": nan, "min(Q, O)": 1, "max(I, Q)": inf, "max3(Q, O, Z)": 1, "min3(O, Q, -O)": -1,
    "median3(O * 3, O, O * 2)": 2, "fmedian3(O * 3, -O, I)": 3, "fmax3(O, I, Z)": inf, "fmin3(O, -I, Z)": -inf, "median3(O, O * 2, O * 3)": 2,
    "clamp(Q, O, O * 2)": 1, "clamp(O * 5, O, O * 2)": 2, "saturate(Q)": 0, "saturate(-I)": 0, "saturate(I)": 1, "sign(Q)": 0, "sign(-Z)": -0.0,
    "sign(-I)": -1, "copysign(O, -Z)": -1, "copysign(I, -O)": -inf, "fdim(O, Q)": nan, "fdim(I, I)": 0, "fabs(-I)": inf, "abs(-Z)": 0,
    "round(-O * 0.5f)": -1, "rint(O * 2.5f)": 2, "rint(-O * 0.25f)": -0.0, "round(O * 0.49999997f)": 0, "trunc(-O * 0.5f)": -0.0, "ceil(-O * 0.5f)": -0.0,
    "fract(-O * 1e-10f)": 0.99999994, "fract(Q)": nan, "ldexp(I, -5)": inf, "ldexp(-Z, 5)": -0.0, "ldexp(O, -149)": 2.0**-149, "ldexp(O, 200)": inf,
    "nextafter(Z, O)": 2.0**-149, "nextafter(O, I) - 1.0f": 2.0**-23, "nextafter(Q, O)": nan, "nextafter(MAXFLOAT * O, I)": inf,
    "float(ilogb(Z) == FP_ILOGB0)": 1, "float(ilogb(I) == 2147483647)": 1, "float(ilogb(Q) == FP_ILOGBNAN)": 1, "float(ilogb(O * 1e-45f))": -149,
    "mix(O, O * 3, 0.25f)": 1.5, "step(O, O)": 1, "step(O * 2, O)": 0, "smoothstep(Z, O * 2, O)": 0.5, "smoothstep(Z, O, -O)": 0, "smoothstep(Z, O, I)": 1,
    "fma(O * 3, 4.0f, -I)": -inf, "divide(O, Z)": inf, "divide(-O, Z)": -inf, "divide(Z, Z)": nan, "fast::divide(O * 6, 3.0f)": 2,
}  # fmt: skip


def evaluate(msl: Run, cases: dict[str, float], *, signs: bool = False, ulps: float = 0) -> None:
    """Each expression of O = 1, Z = 0, I = infinity, Q = NaN (run-time values) has its value, sign of zero included."""
    lines = "\n".join(f"  out[{i}] = {e};" for i, e in enumerate(cases))
    source = f"{HEAD}kernel void k(device const float* x, device float* out) {{\n  float O = x[0], Z = x[1], I = x[2], Q = x[3]; half H = half(O); bfloat B = bfloat(O);\n{lines}\n}}"
    args = {"x": torch.tensor([1.0, 0.0, inf, nan]), "out": torch.zeros(len(cases))}
    got = msl(source, "k", args, threads=1, threads_per_threadgroup=1)["out"].tolist()
    wrong = []
    for (expression, want), value_ in zip(cases.items(), got, strict=True):
        same = errors(np.array(value_), np.array(float(np.float32(want))), "float") <= ulps
        if not same or (signs and want == 0 and math.copysign(1, want) != math.copysign(1, value_)):
            wrong.append(f"{expression} is {value_!r}, not {want!r}")
    assert not wrong, "\n".join(wrong)


def test_special_values(msl: Run) -> None:
    evaluate(msl, SPECIAL, signs=True)


def test_atan2_quadrants(msl: Run) -> None:
    pi = math.pi
    cases = {
        "atan2(O, Z)": pi / 2,
        "atan2(-O, Z)": -pi / 2,
        "atan2(Z, -O)": pi,
        "atan2(-Z, -O)": -pi,
        "atan2(Z, -Z)": pi,
    }
    cases |= {
        "atan2(I, I)": pi / 4,
        "atan2(I, -I)": 3 * pi / 4,
        "atan2(-I, -I)": -3 * pi / 4,
        "atan2(O, I)": 0,
        "atan2(O, -I)": pi,
    }
    evaluate(msl, cases, ulps=6)


def test_types_meet_as_in_metal(msl: Run) -> None:
    cases: dict[str, float] = {
        "max(H, 2.0h)": 2, "max(O, 0)": 1, "min(int(O), 3u)": 1, "clamp(O * 7, 0, 5)": 5, "clamp(int(O) * 7, 0, 5)": 5,
        "float(max(half4(H, 2.0h, 3.0h, -4.0h), 0.0h).w)": 0, "max(float4(O), 3.0f).y": 3, "float(max(half2(H), 0.1f).x)": 1,
        "fma(H, H, H)": 2, "pow(O * 3, 2)": 9, "pow(H * 3, 2.0h)": 9, "pow(float2(O, 3), 2).y": 9, "float(pow(half4(2.0h), 3).z)": 8,
        "float(is_same_v<decltype(exp(H)), half>)": 1, "float(is_same_v<decltype(exp(B)), bfloat>)": 1, "float(is_same_v<decltype(exp(1)), float>)": 1,
        "float(is_same_v<decltype(max(H, O)), float>)": 1, "float(is_same_v<decltype(max(H, H)), half>)": 1,
        "float(is_same_v<decltype(max(uchar(1), uchar(2))), uchar>)": 1, "float(is_same_v<decltype(abs(short(1))), short>)": 1,
        "float(is_same_v<decltype(max(half4(H), 0.0f)), half4>)": 1, "float(is_same_v<decltype(ilogb(float3(O))), int3>)": 1,
        "abs(-int(O))": 1, "abs(-O * 1.5f)": 1.5, "float(abs(-H))": 1, "float(abs(bfloat(-2.0f)))": 2, "abs(int2(-3, 4)).x": 3, "fabs(float2(-O)).y": 1,
        "exp(packed_float3(O - 1, 1, 2)).x": 1, "sqrt(float4(O * 4, 9, 16, 25)).xyzw.w": 5, "min(max(O, 2.0f), 1.5f)": 1.5, "max(packed_float2(O, 2), 1.5f).x": 1.5,
        "saturate(half2(H * 3, -H)).x": 1, "mix(float2(O), float2(3), 0.5f).y": 2, "mix(half4(H), half4(3.0h), half4(0.5h)).x": 2, "step(0.5f, float3(O)).z": 1,
        "smoothstep(0.0f, 2.0f, float2(O)).x": 0.5, "float(max3(1, 5, 3))": 5, "float(median3(7u, 2u, 5u))": 5, "clamp(int4(-5, 0, 5, 50), 0, 9).w": 9,
        "metal::precise::exp(Z)": 1, "metal::fast::max(O, 2.0f)": 2, "precise::clamp(O, 2.0f, 3.0f)": 2, "fast::normalize(float2(3, 4) * O).x": np.float32(3) / np.float32(5),
        "::metal::floor(O * 1.5f)": 1, "float(min(char(-3), char(4)))": -3, "float(max(long(1) << 40, long(3)) >> 40)": 1, "max(bool(O), false)": 1,
        "M_PI_F * O": math.pi, "float(M_PI_H * H)": 3.140625, "MAXFLOAT * O": 3.4028235e38, "float(MAXHALF * H)": 65504, "HUGE_VALF * O": inf, "INFINITY": inf, "NAN": nan,
    }  # fmt: skip
    evaluate(msl, cases)


def test_constant_expressions(msl: Run) -> None:
    source = (
        HEAD
        + """
    constant int rows = max(3, min(9, 5)), kept = clamp(12, 0, 7);
    constant float low = min(2.5f, 4.0f), size = abs(-3.0f);
    kernel void k(device float* out) { float a[rows + kept]; for (int i = 0; i < rows + kept; i++) a[i] = low; out[0] = a[11]; out[1] = size + rows; }"""
    )
    assert msl(source, "k", {"out": torch.zeros(2)}, threads=1, threads_per_threadgroup=1)["out"].tolist() == [2.5, 8.0]


# fast::name -> (reference, relative error, absolute error); for x where the result is an ordinary number
FAST: dict[str, tuple[Reference, float, float, tuple[float, float]]] = {
    "cos": (np.cos, 0, 2e-6, (-100, 100)),
    "exp": (np.exp, 1e-5, 0, (-80, 80)),
    "exp10": (lambda x: np.power(10.0, x), 1e-5, 0, (-35, 35)),
    "exp2": (np.exp2, 5e-7, 0, (-120, 120)),
    "log": (np.log, 1e-6, 1e-6, (1e-3, 1e3)),
    "log10": (np.log10, 1e-6, 1e-6, (1e-3, 1e3)),
    "log2": (np.log2, 1e-6, 1e-6, (1e-3, 1e3)),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 5e-7, 0, (1e-3, 1e3)),
    "sin": (np.sin, 0, 2e-6, (-100, 100)),
    "sqrt": (np.sqrt, 5e-7, 0, (1e-3, 1e3)),
    "tan": (np.tan, 1e-4, 1e-5, (-1.5, 1.5)),
    "tanh": (np.tanh, 0, 1e-6, (-20, 20)),
    "atan": (np.arctan, 1e-6, 0, (-9, 9)),
}


@pytest.mark.parametrize("width", [1, 4])
def test_fast(msl: Run, width: int) -> None:
    rng = np.random.default_rng(width)
    for low, high in sorted({r for _, _, _, r in FAST.values()}):
        chosen = {name: row for name, row in FAST.items() if row[3] == (low, high)}
        x = rng.uniform(low, high, 1200).astype(np.float32)
        got = call(msl, [f"fast::{name}(x)" for name in chosen], "float", width, [x])
        for (name, (f, relative, absolute, _)), a in zip(chosen.items(), got, strict=True):
            np.testing.assert_allclose(a, f(x.astype(np.float64)), rtol=relative, atol=absolute, err_msg=name)
    x, y = rng.uniform(0.01, 20, 1200).astype(np.float32), rng.uniform(-8, 8, 1200).astype(np.float32)
    got = call(msl, ["fast::pow(x, y)", "fast::powr(x, y)", "fast::divide(x, y)"], "float", width, [x, y])
    power = np.power(x.astype(np.float64), y)
    for a, b, tolerance in zip(got, (power, power, x / y.astype(np.float64)), (1e-5, 1e-5, 5e-7), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance)


def test_fast_special_values(msl: Run) -> None:
    cases = {
        "exp(-I)": 0,
        "exp(I)": inf,
        "exp(Q)": nan,
        "log(Z)": -inf,
        "log2(I)": inf,
        "log(-O)": nan,
        "sin(Q)": nan,
        "sin(Z)": 0,
        "cos(Z)": 1,
    }
    cases |= {
        "tanh(I)": 1,
        "tanh(-I)": -1,
        "tanh(Q)": nan,
        "pow(O * 2, 10.0f)": 1024,
        "pow(-O * 2, 3.0f)": -8,
        "pow(Q, Z)": 1,
        "pow(-O * 2, 0.5f)": nan,
    }
    cases |= {"rsqrt(Z)": inf, "sqrt(Z)": 0, "pow(Z, O)": 0, "pow(Z, -O)": inf, "powr(O * 2, -O)": 0.5}
    evaluate(msl, {f"fast::{e}": v for e, v in cases.items()})
