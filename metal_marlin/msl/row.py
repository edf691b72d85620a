"""A compiled row and what the host knows about it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TypeMeta:
    """An element type as the compiler sees it. `kind`: u, i, f, bf, b or struct; `bits` of one component;
    `lanes` components (0: scalar); `size` and `align` in bytes."""

    kind: str
    bits: int
    lanes: int
    size: int
    align: int

    def __str__(self) -> str:
        names = {"u": "uint", "i": "int", "f": "float", "bf": "bfloat", "b": "bool"}
        base = f"struct of {self.size} bytes" if self.kind == "struct" else f"{names[self.kind]}{self.bits}"
        return f"{base}x{self.lanes}" if self.lanes else base


@dataclass(frozen=True)
class FieldMeta:
    """A struct field: path such as "a.b", byte offset, type (arrays keep their total size)."""

    name: str
    offset: int
    type: TypeMeta


@dataclass(frozen=True)
class ParamMeta:
    """A bound parameter. `kind`: buffer or value (`constant T&`); `enabled` is False where a function constant
    switched it off."""

    name: str
    index: int
    kind: str
    const: bool
    enabled: bool
    type: TypeMeta
    fields: tuple[FieldMeta, ...] = ()


@dataclass(frozen=True)
class RowMeta:
    """What dispatch needs: parameters in declaration order, threadgroup memory in bytes, limits."""

    name: str
    target: str
    lanes: int
    params: tuple[ParamMeta, ...]
    dynamic: tuple[tuple[str, int], ...]  # (name, index) of [[threadgroup(n)]] arguments
    threadgroup_bytes: int
    max_threads: int | None = None
    tails: bool = False
    by_pointer: tuple[str, ...] = ()
    checked: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> RowMeta:
        params = []
        for p in data["params"]:
            fields = tuple(FieldMeta(f["name"], f["offset"], TypeMeta(**f["type"])) for f in p["fields"])
            params.append(ParamMeta(**{**p, "type": TypeMeta(**p["type"]), "fields": fields}))
        return RowMeta(
            **{
                **data,
                "params": tuple(params),
                "dynamic": tuple((name, index) for name, index in data["dynamic"]),
                "by_pointer": tuple(data["by_pointer"]),
            }
        )


@dataclass(frozen=True)
class CompiledRow:
    """`binary`: a shared object (cpu) or PTX text (cuda)."""

    meta: RowMeta
    binary: bytes

    @property
    def name(self) -> str:
        return self.meta.name
