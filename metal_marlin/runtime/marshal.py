"""Python values as kernel arguments: scalars, vectors and structs to bytes, tensors checked against parameters."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from metal_marlin.errors import ArgumentError
from metal_marlin.msl.row import FieldMeta, ParamMeta, TypeMeta

_INTEGERS = {8: "b", 16: "h", 32: "i", 64: "q"}
_FLOATS = {16: "e", 32: "f", 64: "d"}
_BYTES = (torch.uint8, torch.int8)
_FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
# signedness is not checked: torch lacks most operations on unsigned integers, so codes usually live in signed tensors
_DTYPES: dict[tuple[str, int], tuple[torch.dtype, ...]] = {
    ("i", 8): (*_BYTES, torch.bool, *_FLOAT8),
    ("i", 16): (torch.int16, torch.uint16),
    ("i", 32): (torch.int32, torch.uint32),
    ("i", 64): (torch.int64, torch.uint64),
    ("f", 16): (torch.float16,),
    ("f", 32): (torch.float32,),
    ("bf", 16): (torch.bfloat16,),
    ("b", 8): (torch.bool, torch.uint8),
}


def accepted_dtypes(kind: TypeMeta) -> frozenset[torch.dtype] | None:
    """Tensor dtypes that may be bound where a kernel has this element type; None for any (structs)."""
    if kind.kind in ("struct", "void"):
        return None
    return frozenset(_DTYPES.get(("i" if kind.kind == "u" else kind.kind, kind.bits), ()))


def _scalar(kind: TypeMeta, value: Any, what: str) -> bytes:
    try:
        if kind.kind in ("u", "i"):
            code = _INTEGERS[kind.bits]
            return struct.pack("<" + (code.upper() if kind.kind == "u" else code), _whole(value))
        if kind.kind == "b":
            return struct.pack("<?", bool(value))
        if kind.kind == "f":
            return struct.pack("<" + _FLOATS[kind.bits], float(value))
        if kind.kind == "bf":
            return torch.tensor(float(value), dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    except (struct.error, OverflowError, TypeError, ValueError):
        raise ArgumentError(f"{what}: {value!r} does not fit {kind}") from None
    raise ArgumentError(f"{what}: needs a dict of fields or a tensor, not {type(value).__name__}")


def scalar_packer(kind: TypeMeta) -> Callable[[Any], bytes] | None:
    """The fast way for numbers of this type, None where there is none; raises struct.error or OverflowError for a
    number that it cannot take, and then `pack_value` knows more."""
    code = _INTEGERS.get(kind.bits) if kind.kind in ("u", "i") else _FLOATS.get(kind.bits) if kind.kind == "f" else None
    if code is None or kind.lanes or kind.size * 8 != kind.bits:
        return None
    return struct.Struct("<" + (code.upper() if kind.kind == "u" else code)).pack


def _whole(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("a fraction")
    return int(value)


def pack_type(kind: TypeMeta, value: Any, what: str) -> bytes:
    """Bytes of a scalar, or of a vector or array from a sequence of as many numbers; padded to the type's size."""
    count = kind.lanes or (kind.size * 8 // kind.bits if kind.bits else 1)
    if kind.kind == "struct" and isinstance(value, (bytes, bytearray)) and len(value) == kind.size:
        return bytes(value)
    if kind.kind == "struct" or (count == 1 and not isinstance(value, Sequence)):
        return _scalar(kind, value, what)
    numbers = _numbers(value) if isinstance(value, Sequence) else []
    if len(numbers) != count:
        raise ArgumentError(f"{what}: needs {count} numbers, got {value!r}")
    return b"".join(_scalar(kind, v, what) for v in numbers).ljust(kind.size, b"\0")


def _numbers(value: Sequence[Any]) -> list[Any]:
    """The leaves of nested sequences."""
    if isinstance(value, str):
        return [value]
    nested = (_numbers(v) if isinstance(v, Sequence) and not isinstance(v, str) else [v] for v in value)
    return [n for part in nested for n in part]


def pack_value(param: ParamMeta, value: Any) -> bytes:
    """Bytes of a `constant T&` argument: a number, a sequence for a vector, a dict for a struct (nested as in MSL).

    Raises ArgumentError naming the argument for values that do not fit, unknown or missing fields.
    """
    if not isinstance(value, Mapping):
        return pack_type(param.type, value, param.name)
    if not param.fields:
        raise ArgumentError(f"{param.name}: is {param.type}, not a struct whose fields are known")
    flat = dict(_flatten(value, ""))
    names = [f.name for f in param.fields]
    wrong = [n for n in flat if n not in names] or [n for n in names if n not in flat]
    if wrong:
        state = "unknown" if wrong[0] in flat else "missing"
        raise ArgumentError(
            f"{param.name}: {state} field{'s' * (len(wrong) > 1)} {', '.join(wrong)}; the struct has {', '.join(names)}"
        )
    out = bytearray(param.type.size)
    for field in param.fields:
        data = pack_type(field.type, flat[field.name], f"{param.name}.{field.name}")
        out[field.offset : field.offset + len(data)] = data
    return bytes(out)


def _flatten(value: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, item in value.items():
        if isinstance(item, Mapping):
            out += _flatten(item, f"{prefix}{name}.")
        elif isinstance(item, Sequence) and item and all(isinstance(v, Mapping) for v in item):
            out += [pair for k, v in enumerate(item) for pair in _flatten(v, f"{prefix}{name}[{k}].")]
        else:
            out.append((prefix + name, item))
    return out


def check_tensor(
    param: ParamMeta, tensor: torch.Tensor, device: torch.device, allowed: frozenset[torch.dtype] | None
) -> None:
    """Raise ArgumentError saying which rule of a buffer argument the tensor breaks."""
    name = param.name
    if tensor.device != device:
        raise ArgumentError(f"{name}: tensor is on {tensor.device}, the library runs on {device}")
    if not tensor.is_contiguous():
        raise ArgumentError(
            f"{name}: tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()} is not contiguous; "
            f"call .contiguous() (kernels ignore strides)"
        )
    if allowed is not None and tensor.dtype not in allowed:
        wanted = ", ".join(sorted(str(d) for d in allowed)) or "no torch dtype"
        raise ArgumentError(f"{name}: tensor is {tensor.dtype}, the kernel's element is {param.type} (takes {wanted})")
    if tensor.data_ptr() % param.type.align:
        raise ArgumentError(
            f"{name}: tensor starts at an address that is not a multiple of {param.type.align} bytes, which "
            f"{param.type} needs (storage offset {tensor.storage_offset()})"
        )
    if tensor.requires_grad and not param.const and torch.is_grad_enabled():
        raise ArgumentError(f"{name}: the kernel may write this tensor, which requires grad; pass tensor.detach()")


__all__ = ["FieldMeta", "accepted_dtypes", "check_tensor", "pack_type", "pack_value", "scalar_packer"]
