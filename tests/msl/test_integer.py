"""Integer functions against Python's integers: every pair of 8-bit numbers, random and extreme wider ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

Run = Callable[..., dict[str, torch.Tensor]]

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
TYPES = {"char": (8, True), "uchar": (8, False), "short": (16, True), "ushort": (16, False)}
TYPES |= {"int": (32, True), "uint": (32, False), "long": (64, True), "ulong": (64, False)}


class Kind:
    """The numbers of one type; functions of Python integers within it."""

    def __init__(self, name: str) -> None:
        self.bits, self.signed = TYPES[name]
        self.low = -(1 << (self.bits - 1)) if self.signed else 0
        self.high = self.low + (1 << self.bits) - 1
        self.mask = (1 << self.bits) - 1
        self.dtype = np.dtype(f"{'i' if self.signed else 'u'}{self.bits // 8}")

    def wrap(self, v: int) -> int:
        v &= self.mask
        return v - (1 << self.bits) if v > self.high else v

    def saturate(self, v: int) -> int:
        return min(max(v, self.low), self.high)

    def clz(self, x: int) -> int:
        return self.bits - (x & self.mask).bit_length()

    def ctz(self, x: int) -> int:
        return self.bits if x == 0 else (x & -x).bit_length() - 1

    def reversed_bits(self, x: int) -> int:
        return self.wrap(int(f"{x & self.mask:0{self.bits}b}"[::-1], 2))

    def rotated(self, x: int, y: int) -> int:
        k, u = y % self.bits, x & self.mask
        return self.wrap(u << k | u >> (self.bits - k))

    def extracted(self, x: int, offset: int, count: int) -> int:
        field = (x & self.mask) >> offset & ((1 << count) - 1)
        negative = self.signed and count > 0 and field >> (count - 1)
        return field - (1 << count) if negative else field

    def inserted(self, x: int, y: int, offset: int, count: int) -> int:
        mask = ((1 << count) - 1) << offset
        return self.wrap((x & ~mask) | (y << offset & mask))


def operations(k: Kind) -> dict[str, Callable[[int, int, int], int]]:
    """Expression -> its value for x, y, z. Counts and offsets of fields stay constants of the kernel's text."""
    w = k.bits
    table: dict[str, Callable[[int, int, int], int]] = {
        "abs(x)": lambda x, y, z: k.wrap(abs(x)),
        "absdiff(x, y)": lambda x, y, z: k.wrap(abs(x - y)),
        "addsat(x, y)": lambda x, y, z: k.saturate(x + y),
        "subsat(x, y)": lambda x, y, z: k.saturate(x - y),
        "clz(x)": lambda x, y, z: k.clz(x),
        "ctz(x)": lambda x, y, z: k.ctz(x),
        "popcount(x)": lambda x, y, z: (x & k.mask).bit_count(),
        "reverse_bits(x)": lambda x, y, z: k.reversed_bits(x),
        "hadd(x, y)": lambda x, y, z: (x + y) >> 1,
        "rhadd(x, y)": lambda x, y, z: (x + y + 1) >> 1,
        "mulhi(x, y)": lambda x, y, z: x * y >> w,
        "madhi(x, y, z)": lambda x, y, z: k.wrap((x * y >> w) + z),
        "madsat(x, y, z)": lambda x, y, z: k.saturate(x * y + z),
        "max(x, y)": lambda x, y, z: max(x, y),
        "min(x, y)": lambda x, y, z: min(x, y),
        "max3(x, y, z)": lambda x, y, z: max(x, y, z),
        "min3(x, y, z)": lambda x, y, z: min(x, y, z),
        "median3(x, y, z)": lambda x, y, z: sorted((x, y, z))[1],
        "clamp(x, min(y, z), max(y, z))": lambda x, y, z: sorted((x, y, z))[1],
        "rotate(x, y)": lambda x, y, z: k.rotated(x, y),
        "select(x, y, x < z)": lambda x, y, z: y if x < z else x,
    }
    for offset, count in ((0, w), (0, 0), (w, 0), (1, w - 1), (w - 1, 1), (3, 2)):
        table[f"extract_bits(x, {offset}u, {count}u)"] = lambda x, y, z, o=offset, n=count: k.extracted(x, o, n)
        table[f"insert_bits(x, y, {offset}, {count})"] = lambda x, y, z, o=offset, n=count: k.inserted(x, y, o, n)
    if w == 32:
        table["mul24((x << 8) >> 8, (y << 8) >> 8)"] = lambda x, y, z: k.wrap(_low24(k, x) * _low24(k, y))
        table["mad24((x << 8) >> 8, (y << 8) >> 8, z)"] = lambda x, y, z: k.wrap(_low24(k, x) * _low24(k, y) + z)
    return table


def _low24(k: Kind, x: int) -> int:
    u = x & 0xFFFFFF
    return u - (1 << 24) if k.signed and u >> 23 else u


def arguments(name: str, n: int) -> list[list[int]]:
    """Three lists of numbers: all pairs for 8 bits; else pairs of extremes and random numbers of every magnitude."""
    k, rng = Kind(name), np.random.default_rng(TYPES[name][0])
    if k.bits == 8:
        xs, ys = ([k.wrap(v) for v in side.ravel().tolist()] for side in np.meshgrid(range(256), range(256)))
        return [xs, ys, rng.integers(k.low, k.high, len(xs), endpoint=True).tolist()]
    ends = [0, 1, 2, k.high, k.high - 1, k.low, k.low + 1, k.wrap(-1), k.high // 2, k.wrap(1 << (k.bits - 2))]
    triples = [[a, b, c] for a in ends for b in ends for c in ends]
    for _ in range(n):
        triples.append(
            [k.wrap(int.from_bytes(rng.bytes(8), "little") >> int(rng.integers(64 - k.bits, 64))) for _ in "xyz"]
        )
    triples = triples[: len(triples) // 12 * 12]
    return [list(column) for column in zip(*triples, strict=True)]


def run(msl: Run, name: str, width: int, expressions: Sequence[str], columns: Sequence[Sequence[int]]) -> np.ndarray:
    k = Kind(name)
    stored = name if width == 1 else f"packed_{name}{width}" if width == 3 else f"{name}{width}"
    value = name if width == 1 else f"{name}{width}"
    unsigned = value if not k.signed else f"u{value}"
    lines = "\n  ".join(
        f"{{ {unsigned if e.startswith('absdiff') else value} r = {e}; out[{i}u * n + at] = {value}(r); }}"
        for i, e in enumerate(expressions)
    )
    source = f"""{HEAD}kernel void k(device const {stored}* xs, device const {stored}* ys, device const {stored}* zs, device {stored}* out,
    constant uint& n, uint at [[thread_position_in_grid]]) {{
  {value} x = xs[at], y = ys[at], z = zs[at];
  {lines}
}}"""
    arrays = [np.array(c, dtype=k.dtype) for c in columns]
    signed = np.dtype(f"i{k.bits // 8}")
    n = len(arrays[0]) // width
    out = torch.from_numpy(np.zeros(len(expressions) * n * width, dtype=signed))
    args = {f"{v}s": torch.from_numpy(a.view(signed)) for v, a in zip("xyz", arrays, strict=True)}
    got = msl(source, "k", {**args, "out": out, "n": n}, threads=n, threads_per_threadgroup=64)["out"]
    return got.numpy().view(k.dtype).reshape(len(expressions), -1)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", TYPES)
def test_against_python(msl: Run, name: str, width: int) -> None:
    columns = arguments(name, 400)
    if width == 4 and TYPES[name][0] == 8:  # every third pair will do once scalars have seen them all
        columns = [column[::3][:21840] for column in columns]
    table = operations(Kind(name))
    got = run(msl, name, width, list(table), columns)
    wrong = []
    for (expression, function), values in zip(table.items(), got.tolist(), strict=True):
        for x, y, z, value in zip(*columns, values, strict=True):
            if function(x, y, z) != value:
                wrong.append(f"{expression} is {value}, not {function(x, y, z)} for x = {x}, y = {y}, z = {z}")
                break
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("name", "width"), [("short", 3), ("uchar", 2), ("long", 3), ("uint", 2)])
def test_odd_widths(msl: Run, name: str, width: int) -> None:
    columns = [column[:1200] for column in arguments(name, 400)]
    table = operations(Kind(name))
    got = run(msl, name, width, list(table), columns)
    for (expression, function), values in zip(table.items(), got.tolist(), strict=True):
        assert values == [function(*xyz) for xyz in zip(*columns, strict=True)], expression


def test_types_and_fields_at_run_time(msl: Run) -> None:
    source = (
        HEAD
        + """
    kernel void k(device const uint* x, device long* out) {
      uint a = x[0], o = x[1], b = x[2];
      out[0] = extract_bits(a, o, b);
      out[1] = extract_bits(int(a), o, b);
      out[2] = insert_bits(0u, a, o, b);
      out[3] = popcount(uchar(a)) + clz(uchar(x[3])) + clz(ushort(x[3]));
      out[4] = sizeof(popcount(uchar(a))) + sizeof(absdiff(char(1), char(2))) + sizeof(mulhi(1l, 2l));
      out[5] = rotate(uchar(0x81), uchar(1));
      out[6] = abs(int3(-4, 5, -6)).z + max(int2(3, -3), 0).y + clamp(uint(a), 1u, 9u);
      out[7] = is_same_v<decltype(absdiff(int2(1), int2(2))), uint2> && is_same_v<decltype(addsat(short(1), short(2))), short>;
      out[8] = any(select(int4(1), int4(2), bool4(false, true, false, false)) == int4(2, 2, 2, 2));
      out[9] = max(ulong(x[3] - 1u), 7ul) + min(long(-5), 3l);
    }"""
    )
    x = torch.tensor([0xF0F0, 4, 8, 1], dtype=torch.int32)
    got = msl(source, "k", {"x": x, "out": torch.zeros(10, dtype=torch.int64)}, threads=1, threads_per_threadgroup=1)[
        "out"
    ]
    assert got.tolist() == [0x0F, 0x0F, 0xF00, 4 + 7 + 15, 1 + 1 + 8, 3, 6 + 0 + 9, 1, 1, 2]
