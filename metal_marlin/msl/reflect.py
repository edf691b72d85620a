"""Kernels, structs and function constants of an expanded MSL text: names, buffer order, const-ness, attributes.

Only what the text says is read here; element types and sizes come from the compiler (see entry.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from metal_marlin.errors import MetalCompileError
from metal_marlin.msl.lexer import Source
from metal_marlin.msl.structs import Field, describe, flatten, inherit, outer

# every compute-kernel position attribute of the Metal Shading Language specification (section 5.2.3.6)
POSITIONS = frozenset(
    """dispatch_quadgroups_per_threadgroup dispatch_simdgroups_per_threadgroup dispatch_threads_per_threadgroup
    grid_origin grid_size quadgroup_index_in_threadgroup quadgroups_per_threadgroup simdgroup_index_in_threadgroup
    simdgroups_per_threadgroup thread_execution_width thread_index_in_quadgroup thread_index_in_simdgroup
    thread_index_in_threadgroup thread_position_in_grid thread_position_in_threadgroup threadgroup_position_in_grid
    threadgroups_per_grid threads_per_grid threads_per_simdgroup threads_per_threadgroup""".split()
)


BUFFERS = 31


@dataclass(frozen=True)
class Param:
    """One kernel parameter. `role`: buffer, value (`constant T&`), threadgroup or position."""

    name: str
    role: str
    type: str  # as written, attributes removed
    const: bool = False
    index: int = -1  # buffer or threadgroup index; -1 for a position
    position: str = ""
    condition: str = ""  # function constant that enables the parameter
    struct: str = ""  # name of the struct it points to, when that struct is in the text


@dataclass(frozen=True)
class Kernel:
    """One entry point: `name` is what the host asks for, `callee` the C++ expression that is called."""

    name: str
    callee: str
    params: tuple[Param, ...]
    file: str
    line: int
    max_threads: int | None = None

    @property
    def bound(self) -> tuple[Param, ...]:
        """Buffers and values in declaration order: what the caller passes."""
        return tuple(p for p in self.params if p.role in ("buffer", "value"))

    @property
    def dynamic(self) -> tuple[Param, ...]:
        """`[[threadgroup(n)]]` arguments, in declaration order."""
        return tuple(p for p in self.params if p.role == "threadgroup")


@dataclass(frozen=True)
class FunctionConstant:
    name: str
    index: int
    type: str


@dataclass(frozen=True)
class Program:
    """What the host may know about a text without compiling it."""

    kernels: dict[str, Kernel]
    structs: dict[str, tuple[str, ...]]  # name -> field paths
    constants: tuple[FunctionConstant, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "kernels": [{**vars(k), "params": [vars(p) for p in k.params]} for k in self.kernels.values()],
            "structs": self.structs,
            "constants": [vars(c) for c in self.constants],
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Program:
        kernels = [Kernel(**{**k, "params": tuple(Param(**p) for p in k["params"])}) for k in data["kernels"]]
        return Program(
            {k.name: k for k in kernels},
            {name: tuple(fields) for name, fields in data["structs"].items()},
            tuple(FunctionConstant(**c) for c in data["constants"]),
        )


@dataclass
class Definition:
    """Where a kernel function stands in the token list; used by the rewriter too."""

    first: int  # first token of the declaration
    name: int  # token of the function's name
    lparen: int
    body: int  # token of `{`
    template: bool


class Reflection:
    """Walks a source once and keeps what rewriting and entry generation need."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.definitions: dict[str, Definition] = {}
        self.erased: list[tuple[int, int]] = []  # token ranges, to be removed
        self._structs: dict[str, list[Field] | None] = {}
        self._constants: list[FunctionConstant] = []
        self._kernels: dict[str, Kernel] = {}
        self._rows: list[tuple[str, str, str, int]] = []  # host name, function, arguments, token
        self._entries: dict[str, tuple[tuple[Param, ...], int | None]] = {}  # parameters and most threads of a function
        self._walk(0, len(source), "")
        self._instantiate()
        self.program = Program(self._kernels, flatten(self._structs), tuple(self._constants))

    def _walk(self, i: int, end: int, scope: str) -> None:
        src = self.source
        while i < end:
            start = i
            if src.at(i) in (";", "}"):
                i += 1
                continue
            if src.at(i) == "namespace" or (src.at(i) == "inline" and src.at(i + 1) == "namespace"):
                i = self._namespace(i, scope)
                continue
            if src.at(i) == "extern" and src.at(i + 2) == "{":
                self._walk(i + 3, src.match[i + 2], scope)
                i = src.match[i + 2] + 1
                continue
            i, body = self._declaration_end(i, end)
            self._declaration(start, i, body, scope)

    def _namespace(self, i: int, scope: str) -> int:
        src, name = self.source, ""
        while src.at(i) not in ("{", ";", "="):
            if src.is_name(i) and src.at(i) not in ("namespace", "inline"):
                name += src.at(i) + "::"
            i += 1
        if src.at(i) != "{":
            while src.at(i) != ";":
                i += 1
            return i + 1
        self._walk(i + 1, src.match[i], scope + name)
        return src.match[i] + 1

    def _declaration_end(self, i: int, end: int) -> tuple[int, int | None]:
        """Index past the declaration at i, and of the `{` of a function body if that ends it."""
        src, assigned = self.source, False
        while i < end:
            text = src.at(i)
            if text == ";":
                return i + 1, None
            if text == "<" and src.at(i - 1) == "template":  # whose parameters may have defaults
                i = src.close_angle(i) or i
            elif text == "=":
                assigned = src.at(i - 1) != "operator"
            elif text == "{":
                closed = src.match[i]
                before = src.at(i - 1)
                if not assigned and (before in (")", "const", "noexcept") or self._ends_attribute(i - 1)):
                    return closed + 1, i
                i = closed
            elif text in "([":
                i = src.match[i]
            i += 1
        return end, None

    def _ends_attribute(self, i: int) -> bool:
        return self.source.at(i) == "]" and self.source.is_attribute(self.source.match[i])

    def _declaration(self, first: int, last: int, body: int | None, scope: str) -> None:
        src = self.source
        words = {src.at(j) for j in range(first, body or last)}
        head = next((src.at(j) for j in range(first, last) if src.at(j) in "({"), "")
        if body is None and head == "{" and words & {"struct", "class", "union"}:
            self._struct(first, last)
        elif body is None and src.at(first) in ("using", "typedef"):
            self._alias(first, last)
        elif "kernel" in words or "host_name" in words:
            if body is not None:
                self._definition(first, body, scope)
            elif src.at(first) == "template" and src.at(first + 1) != "<":
                self._instantiation(first, last, scope)
            else:  # a declaration ahead of the definition, which gets another signature
                self.erased.append((first, last))
        elif "function_constant" in words and body is None:
            self._function_constant(first, last)
        elif words & {"vertex", "fragment"} and body is not None:
            raise MetalCompileError(f"{src.where(first)}: only compute kernels are supported, not graphics functions")

    def _attributes(self, first: int, last: int) -> dict[str, str]:
        """Attributes in [first, last): name -> argument text."""
        src, found, i = self.source, {}, first
        while i < last:
            if src.is_attribute(i):
                for a, b in src.split(i + 2, src.match[i + 1]):
                    name_end = next((j for j in range(a, b) if src.at(j) == "("), b)
                    argument = src.slice(name_end + 1, b - 1) if name_end < b else ""
                    found[src.slice(a, name_end)] = argument
                i = src.match[i]
            i += 1
        return found

    def _definition(self, first: int, body: int, scope: str) -> None:
        src, i = self.source, first
        template = src.at(first) == "template"
        if template:
            closed = src.close_angle(first + 1)
            if closed is None:
                raise MetalCompileError(f"{src.where(first)}: cannot read the template parameters of this kernel")
            i = closed + 1
        while i < body and not (src.is_name(i) and src.at(i + 1) == "("):
            i = src.match[i] + 1 if src.at(i) in "([" else i + 1
        if i >= body:
            raise MetalCompileError(f"{src.where(first)}: cannot find the name of this kernel")
        name = scope + src.at(i)
        self.definitions[name] = Definition(first, i, i + 1, body, template)
        if not template:
            attributes = self._attributes(first, i)
            self._add(_unquoted(attributes.get("host_name", "")) or src.at(i), name, "", i)

    def _instantiation(self, first: int, last: int, scope: str) -> None:
        src = self.source
        self.erased.append((first, last))
        i, found = first, None
        while i < last:
            if src.is_attribute(i) or src.at(i) == "decltype":
                i = src.match[i if src.at(i) == "[" else i + 1] + 1
                continue
            closed = src.close_angle(i + 1) if src.is_name(i) and src.at(i + 1) == "<" else None
            if closed is not None and src.at(closed + 1) in ("(", ";"):
                found = (i, closed)
                break
            i += 1
        if found is None:
            raise MetalCompileError(f"{src.where(first)}: cannot read this kernel instantiation")
        start = found[0]
        while src.at(start - 1) == "::" and src.is_name(start - 2) and src.at(start - 2) != "void":
            start -= 2
        qualified = src.at(start - 1) == "::"
        function = ("" if qualified else scope) + src.slice(start, found[0] + 1).replace(" ", "")
        arguments = src.slice(found[0] + 1, found[1] + 1)
        host = _unquoted(self._attributes(first, last).get("host_name", "")) or function + arguments.replace(" ", "")
        self._rows.append((host, function, arguments, found[0]))

    def _instantiate(self) -> None:
        for host, function, arguments, token in self._rows:
            if function not in self.definitions:
                raise MetalCompileError(f"{self.source.where(token)}: no kernel template named '{function}'")
            self._add(host, function, arguments, token)

    def _add(self, host: str, function: str, arguments: str, token: int) -> None:
        src, definition = self.source, self.definitions[function]
        file, line = src.location(token)
        if host in self._kernels:
            other = self._kernels[host]
            raise MetalCompileError(f"{file}:{line}: kernel '{host}' was already defined at {other.file}:{other.line}")
        if function not in self._entries:  # rows of a template have what it says in common
            said = self._attributes(src.match[definition.lparen], definition.body)
            said |= self._attributes(definition.first, definition.name)
            most = _integer(said.get("max_total_threads_per_threadgroup"))
            self._entries[function] = self._params(definition), most
        params, most = self._entries[function]
        self._kernels[host] = Kernel(host, function + arguments, params, file, line, most)

    def _params(self, definition: Definition) -> tuple[Param, ...]:
        src = self.source
        first, last = definition.lparen + 1, src.match[definition.lparen]
        parts = src.split(first, last)
        if src.slice(first, last) in ("", "void"):
            return ()
        params = [self._param(a, b) for a, b in parts]
        return tuple(_number(params, src.where(definition.name)))

    def _param(self, a: int, b: int) -> tuple[Param, int | None]:
        src = self.source
        attributes = self._attributes(a, b)
        spans = [(j, src.match[j]) for j in range(a, b) if src.is_attribute(j)]
        plain = [j for j in range(a, b) if not any(s <= j <= e for s, e in spans)]
        stop = next((k for k, j in enumerate(plain) if src.at(j) == "="), len(plain))
        plain = plain[:stop]
        texts = [src.at(j) for j in plain]
        bounds = ""
        if "(" in texts and texts[texts.index("(") + 1] == "&" and texts[-1] == "]":  # T (&name)[N]
            k = texts.index("(")
            bounds = " ".join(texts[k + 4 :]) + " & "
            plain = [*plain[:k], plain[k + 2]]
        if len(plain) < 2 or not src.is_name(plain[-1]):
            raise MetalCompileError(f"{src.where(a)}: cannot read kernel parameter '{src.slice(a, b)}'")
        name, type_text = src.at(plain[-1]), (" ".join(src.at(j) for j in plain[:-1]) + " " + bounds).strip()
        words = type_text.split()
        _check_attributes(attributes, src.where(a))
        position = next((k for k in attributes if k in POSITIONS), "")
        if position:
            return Param(name, "position", type_text, position=position), None
        condition = attributes.get("function_constant", "")
        slot = _integer(attributes.get("buffer"))
        if "threadgroup" in words and ("*" in words or "&" in words):
            return Param(name, "threadgroup", type_text, condition=condition), _integer(attributes.get("threadgroup"))
        if not ("*" in words or "&" in words) or not {"device", "constant"} & set(words):
            raise MetalCompileError(
                f"{src.where(a)}: kernel parameter '{name}' of type '{type_text}' is neither a device, constant or "
                f"threadgroup pointer or reference nor a thread position; textures and samplers are not supported"
            )
        pointee = words[: len(words) - 1 - words[::-1].index("*" if "*" in words else "&")]
        const = "constant" in words or "const" in pointee
        role = "value" if "constant" in words and "*" not in words else "buffer"
        struct = next((w for w in pointee[: outer(pointee)] if w in self._structs), "")
        return Param(name, role, type_text, const, -1, "", condition, struct), slot

    def _function_constant(self, first: int, last: int) -> None:
        src = self.source
        argument = self._attributes(first, last).get("function_constant", "")
        spot = next(j for j in range(first, last) if src.is_attribute(j))
        words = [src.at(j) for j in range(first, spot - 1) if src.at(j) not in ("constant", "constexpr", "static")]
        index = _integer(argument)
        if index is None:
            raise MetalCompileError(f"{src.where(first)}: function_constant needs an integer index, not '{argument}'")
        self._constants.append(FunctionConstant(src.at(spot - 1), index, " ".join(words)))

    def _struct(self, first: int, last: int) -> None:
        src = self.source
        i = next((j for j in range(first, last) if src.at(j) == "{"), None)
        if i is None:
            return
        if src.at(first) == "template":  # whose parameters may say `class`
            first = src.close_angle(first + 1) or first
        key = next(j for j in range(first, i) if src.at(j) in ("struct", "class", "union"))
        name = next((src.at(j) for j in range(key + 1, i) if src.is_name(j) and src.at(j) not in ("alignas",)), "")
        if src.at(first) == "typedef" and src.is_name(last - 2):
            name = src.at(last - 2)
        found = describe(src, i + 1, src.match[i], self._structs) if src.at(key) != "union" else None
        colon = next((j for j in range(key, i) if src.at(j) == ":"), i)
        if colon < i:
            found = inherit([src.at(b - 1) for _, b in src.split(colon + 1, i)], found, self._structs)
        if any(src.at(j) == "<" for j in range(key, colon)):  # a specialization: offsets depend on the arguments
            found = None
        if name:
            self._structs[name] = found

    def _alias(self, first: int, last: int) -> None:
        src, using = self.source, self.source.at(first) == "using"
        if using and src.at(first + 2) != "=":
            return
        a, b = (first + 3, last - 1) if using else (first + 1, last - 2)
        words = [src.at(j) for j in range(a, b)]
        target = next((w for w in words[: words.index("<") if "<" in words else None] if w in self._structs), "")
        if target and not {"*", "&", "[", "("} & set(words) and src.is_name(last - 2 if not using else first + 1):
            self._structs[src.at(first + 1 if using else last - 2)] = self._structs[target]


def _unquoted(text: str) -> str:
    """Adjacent string literals as one string."""
    return "".join(re.findall(r'"((?:\\.|[^"\\])*)"', text))


def _integer(text: str | None) -> int | None:
    text = (text or "").strip().rstrip("uUlL")
    return int(text, 0) if re.fullmatch(r"0[xX][0-9a-fA-F]+|\d+", text) else None


def _check_attributes(attributes: dict[str, str], where: str) -> None:
    known = POSITIONS | {"buffer", "threadgroup", "function_constant"}
    for name in attributes.keys() - known:
        near = get_close_matches(name, known, 1, 0.75)
        if near:
            raise MetalCompileError(f"{where}: unknown attribute '[[{name}]]'; did you mean '[[{near[0]}]]'?")


def _number(params: list[tuple[Param, int | None]], where: str) -> list[Param]:
    """Give explicit indices first and the lowest free ones to the rest, as Metal does."""
    out: list[Param] = []
    taken: dict[tuple[bool, int], str] = {}
    for param, slot in params:
        if param.role == "position" or slot is None:
            continue
        key = (param.role == "threadgroup", slot)
        if slot >= BUFFERS and not key[0]:
            raise MetalCompileError(
                f"{where}: '{param.name}' has buffer index {slot}; Metal has {BUFFERS} buffers, 0 to {BUFFERS - 1}"
            )
        if key in taken:
            raise MetalCompileError(f"{where}: parameters '{taken[key]}' and '{param.name}' share index {slot}")
        taken[key] = param.name
    for param, slot in params:
        if param.role != "position" and slot is None:
            shared = param.role == "threadgroup"
            slot = next(k for k in range(len(params) + len(taken) + 1) if (shared, k) not in taken)
            taken[(shared, slot)] = param.name
        out.append(replace(param, index=-1 if slot is None else slot))
    return out
