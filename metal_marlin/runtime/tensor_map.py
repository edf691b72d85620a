"""Descriptors with which the tensor copy unit of NVIDIA GPUs (compute capability 9.0) copies boxes of a matrix."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_uint32, c_uint64, c_void_p

from metal_marlin.runtime import _driver

BYTES = 128
NONE = bytes(BYTES)  # for kernels on other devices, which never read it
_UINT16, _SWIZZLE_128, _PROMOTE_256 = 1, 3, 3
_WIDTH = 64  # columns of a box: 128 bytes, as wide as swizzling allows


@functools.lru_cache(maxsize=4096)
def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> bytes:
    """The descriptor (CUtensorMap) of a matrix of 16-bit numbers [rows, columns] at a device address, contiguous,
    copied in boxes of [box_rows, 64] whose 16-byte chunk c of row r lands at c ^ r % 8; zeros outside.

    address: multiple of 16 bytes; columns: multiple of 8; box_rows: at most 256. It holds no reference to the memory.
    Raises DriverError for what the driver refuses. Source: CUDA driver API, cuTensorMapEncodeTiled.
    """
    room = ctypes.create_string_buffer(2 * BYTES)
    at = -(-ctypes.addressof(room) // 64) * 64
    _driver.driver().call(
        "cuTensorMapEncodeTiled",
        c_void_p(at),
        _UINT16,
        2,
        c_void_p(address),
        (c_uint64 * 2)(columns, rows),
        (c_uint64 * 1)(2 * columns),
        (c_uint32 * 2)(_WIDTH, box_rows),
        (c_uint32 * 2)(1, 1),
        0,
        _SWIZZLE_128,
        _PROMOTE_256,
        0,
        doing=f"describing a matrix of {rows} x {columns} for copies of {box_rows} rows",
    )
    return ctypes.string_at(at, BYTES)
