"""Descriptors with which the tensor copy unit of NVIDIA GPUs (compute capability 9.0) copies boxes of a matrix."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_uint32, c_uint64, c_void_p

from metal_marlin.runtime import _driver

BYTES = 128
NONE = bytes(BYTES)  # for kernels on other devices, which never read it
_UINT8, _UINT16, _UINT64 = 0, 1, 4
_SWIZZLE_128, _PROMOTE_256 = 3, 3
_WIDTH = 64  # columns of a box: 128 bytes, as wide as swizzling allows


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> bytes:
    """The descriptor (CUtensorMap) of a matrix of 16-bit numbers [rows, columns] at a device address, contiguous,
    copied in boxes of [box_rows, 64] whose 16-byte chunk c of row r lands at c ^ r % 8; zeros outside.

    address: multiple of 16 bytes; columns: multiple of 8; box_rows: at most 256. It holds no reference to the memory.
    Raises DriverError for what the driver refuses. Source: CUDA driver API, cuTensorMapEncodeTiled.
    """
    doing = f"describing a matrix of {rows} x {columns} for copies of {box_rows} rows"
    sizes, strides, box = (columns, rows), (2 * columns,), (_WIDTH, box_rows)
    return _encode(_UINT16, address, sizes, strides, box, _SWIZZLE_128, doing)


@functools.lru_cache(maxsize=4096)
def blocked_map(address: int, rows: int, columns: int, box_rows: int, blocks: int) -> bytes:
    """The same matrix, ``columns`` a multiple of 64, in boxes of ``blocks`` times 64 columns, one after the other."""
    doing = f"describing a matrix of {rows} x {columns} for copies of {blocks} blocks of {box_rows} rows"
    sizes, strides, box = (_WIDTH, rows, columns // _WIDTH), (2 * columns, 2 * _WIDTH), (_WIDTH, box_rows, blocks)
    return _encode(_UINT16, address, sizes, strides, box, _SWIZZLE_128, doing)


@functools.lru_cache(maxsize=4096)
def strip_map(address: int, strips: int, blocks: int, width: int, box_strips: int, box_blocks: int) -> bytes:
    """The descriptor of [strips, blocks, width] bytes, contiguous, copied in boxes of [box_strips, box_blocks, width];
    zeros outside. width: a multiple of 16, at most 2048."""
    doing = f"describing {strips} strips of {blocks} x {width} bytes for copies of {box_strips} x {box_blocks}"
    sizes, strides, box = (width // 8, blocks, strips), (width, blocks * width), (width // 8, box_blocks, box_strips)
    return _encode(_UINT64, address, sizes, strides, box, 0, doing)


@functools.lru_cache(maxsize=4096)
def group_map(address: int, groups: int, width: int, box_width: int, box_groups: int) -> bytes:
    """The descriptor of [groups, width] bytes, contiguous, copied in boxes of [box_groups, box_width]; zeros outside.
    Both widths: multiples of 16; box_width: at most 256."""
    doing = f"describing {groups} groups of {width} bytes for copies of {box_groups} x {box_width}"
    return _encode(_UINT8, address, (width, groups, 1), (width, groups * width), (box_width, box_groups, 1), 0, doing)


def _encode(
    kind: int,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    doing: str,
) -> bytes:
    room = ctypes.create_string_buffer(2 * BYTES)
    at = -(-ctypes.addressof(room) // 64) * 64
    count = len(sizes)
    _driver.driver().call(
        "cuTensorMapEncodeTiled",
        c_void_p(at),
        kind,
        count,
        c_void_p(address),
        (c_uint64 * count)(*sizes),
        (c_uint64 * (count - 1))(*strides),
        (c_uint32 * count)(*box),
        (c_uint32 * count)(*(1,) * count),
        0,
        swizzle,
        _PROMOTE_256,
        0,
        doing=doing,
    )
    return ctypes.string_at(at, BYTES)
