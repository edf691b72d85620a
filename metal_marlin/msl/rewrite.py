"""Rewrites expanded MSL into what clang's C++ for OpenCL takes, token by token; lines stay where they are.

- `T(…)`, `(T)x` and `static_cast<T>(x)` for vector types and type aliases become `metal::_make` / `metal::_cast`,
  because clang reads them as comma expressions or bit casts (see metal_types for the two helpers).
- `constant` becomes `const __generic` in pointer and reference types and `constexpr` in variables.
- threadgroup variables of a kernel become references into the arena that the entry passes as a hidden first argument.
- kernels become plain functions; their declarations, explicit instantiations and attributes go.
- function constants get their values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from metal_marlin.errors import MetalCompileError
from metal_marlin.msl import arena, methods, rejoin
from metal_marlin.msl.aliases import Aliases
from metal_marlin.msl.lexer import Edits, Source
from metal_marlin.msl.reflect import Definition, Reflection

_ELEMENTS = "bool char uchar short ushort int uint long ulong half float bfloat".split()
VECTORS = frozenset(f"{e}{n}" for e in _ELEMENTS for n in (2, 3, 4))
_KEPT_ATTRIBUTES = (
    "maybe_unused",
    "nodiscard",
    "fallthrough",
    "clang",
    "gnu",
    "likely",
    "unlikely",
    "no_unique_address",
)
# words that OpenCL reserves and Metal does not
_RENAMED = frozenset("global local generic pipe read_only write_only read_write vec_step queue_t event_t".split())
_NOT_A_CAST = frozenset("sizeof alignof alignas decltype typeid noexcept requires operator if while for switch".split())
_LOGICAL = ("==", "!=", "<", ">", "<=", ">=", "!", "&&", "||")
_CAST_AFTER = frozenset("return else case do co_return".split())
_SCALARS = frozenset(
    "bool char uchar short ushort int uint long ulong half float bfloat unsigned signed size_t".split()
)


def renamed(text: str) -> str:
    """Generated text that uses names of the source, under the names that `rewrite` gives them."""
    return re.sub(rf"\b({'|'.join(sorted(_RENAMED))})\b", r"\1_", text)


def rewrite(source: Source, reflection: Reflection, constants: Mapping[str, str]) -> str:
    """The text as C++ for OpenCL. `constants` maps function-constant names to literals (absent: not set)."""
    return _Rewriter(source, reflection, constants).run()


class _Rewriter:
    def __init__(self, source: Source, reflection: Reflection, constants: Mapping[str, str]) -> None:
        self.src = source
        self.reflection = reflection
        self.constants = constants
        self.edits = Edits(source.text)
        # half and bfloat too: clang converts neither into the other
        self.types = VECTORS | {"half", "bfloat"}
        self.aliases = Aliases(source, VECTORS)
        self.casts: set[int] = set()  # the closing parentheses of rewritten casts

    def run(self) -> str:
        for first, last in self.reflection.erased:
            self._span(first, last, "")
        for definition in self.reflection.definitions.values():
            self._kernel(definition)
        for i in range(len(self.src)):
            self._token(i)
        methods.qualify(self.src, self.edits)
        rejoin.mark(self.src, self.edits)
        return self.edits.apply()

    def _span(self, first: int, last: int, text: str) -> None:
        """Replace tokens first … last-1."""
        tokens = self.src.tokens
        self.edits.replace(tokens[first].start, tokens[last - 1].end, text)

    def _token(self, i: int) -> None:
        src, text = self.src, self.src.at(i)
        token = src.tokens[i]
        if token.kind == "name":
            if text == "kernel":
                self._span(i, i + 1, "")
            elif text == "constant":
                self._constant(i)
            elif text in _RENAMED:
                self._span(i, i + 1, f"{text}_")
            elif text == "is_function_constant_defined" and src.at(i + 1) == "(":
                self._span(i, src.match[i + 1] + 1, "true" if src.at(i + 2) in self.constants else "false")
            elif text in ("static_cast", "decltype"):
                self._named_cast(i)
            elif text == "template" and src.at(i + 1) == "<":
                self._function_parameters(i + 1)
            elif self._is_type(i) or text in self.aliases.templates:
                self._type(i)
        elif token.kind == "number" and text[-2:].lower() == "bf" and not text.lower().startswith("0x"):
            self._span(i, i + 1, f"((bfloat){text[:-2]}{'' if '.' in text or 'e' in text else '.'}f)")
        elif src.is_attribute(i) and src.at(i + 2) not in _KEPT_ATTRIBUTES:
            if src.at(i + 2) == "function_constant" and src.at(src.match[i] + 1) in (";", "="):
                self._function_constant(i)
            else:
                self._span(i, src.match[i] + 1, "")

    # --- address spaces

    def _constant(self, i: int) -> None:
        src, j = self.src, i + 1
        if src.at(j) in ("{", ";"):  # a method for objects in constant memory
            self._span(i, j, "__generic")
            return
        while j < len(src):
            text = src.at(j)
            if text == "<":
                closed = src.close_angle(j)
                if closed is None:
                    break
                j = closed
            elif text in ("*", "&", ">", ",", ")") or (text == "(" and src.at(j + 1) in ("*", "&")):
                self._span(i, i + 1, "const __generic")
                return
            elif text in ("=", "[", "{", ";", "("):
                break
            j += 1
        if src.at(j) == "[":
            self._constant_array(i, j - 1)
        near = {src.at(k) for k in range(max(i - 3, 0), i + 3)}
        self._span(i, i + 1, "" if "constexpr" in near else "constexpr")

    def _constant_array(self, i: int, name: int) -> None:
        """clang puts arrays at program scope into device memory: the name becomes a reference to a generic address."""
        src, end = self.src, name
        while src.at(end) not in (";", ",", ""):
            end = src.match[end] + 1 if src.at(end) in "([{" else end + 1
        if src.at(end) != ";" or not src.is_name(name):
            return
        array = f"mm_in_{src.at(name)}"
        self._span(name, name + 1, array)
        reference = f" static constexpr const __generic ::metal::_value<decltype({array})>& {src.at(name)} = {array};"
        self.edits.insert(src.tokens[end].end, reference)

    def _function_constant(self, i: int) -> None:
        """`constant T name [[function_constant(k)]];` gets its value; the attribute becomes the initialiser."""
        end = self.src.match[i] + 1
        value = self.constants.get(self.src.at(i - 1))
        if value is None:  # unset: only is_function_constant_defined() may look at it, or its own default applies
            self._span(i, end, "" if self.src.at(end) == "=" else "= {}")
        elif self.src.at(end) == "=":
            stop = next(j for j in range(end, len(self.src)) if self.src.at(j) == ";")
            self._span(i, stop, f"= {value}")
        else:
            self._span(i, end, f"= {value}")

    # --- types: constructors and casts

    def _is_type(self, i: int) -> bool:
        return self.src.at(i) in self.types or self.aliases.is_type(i)

    def _type_start(self, i: int) -> int:
        """First token of the possibly qualified type name that ends at token i."""
        src = self.src
        while src.at(i - 1) == "::":
            i -= 1
            if src.at(i - 1) == ">":
                opened = src.open_angle(i - 1)
                if opened is None:
                    break
                i = opened - 1
            elif src.is_name(i - 1):
                i -= 1
            if src.at(i - 1) == "template":
                i -= 1
        return i - 1 if src.at(i - 1) == "typename" else i

    def _type(self, i: int) -> None:
        src, start, end = self.src, self._type_start(i), i
        if src.at(i) in self.aliases.templates and src.at(i + 1) == "<":
            closed = src.close_angle(i + 1)
            if closed is None:
                return
            end = closed
        elif src.at(i) == "vec":
            return
        after, before = src.at(end + 1), src.at(start - 1)
        if src.is_name(end + 1) and src.at(end + 2) == "(":
            self._initialised(start, end, src.at(i) == "vec" or self.aliases.is_vector(i))
        elif after == "(" and before not in ("operator", "~", "class", "struct", "."):
            self._constructor(start, end)
        elif after == ")" and before == "(" and self._is_cast(start - 1, end + 1):
            if src.at(end + 2) == "(":
                self._check_comma(end + 2)
                self._truth(end + 2, inside=False)
            self._cast(start - 1, end + 1)

    def _initialised(self, start: int, end: int, vector: bool) -> None:
        """`float4 v(a, b);` in a function: `float4 v = float4(a, b);`."""
        src, opened = self.src, end + 2
        first = src.at(start - 1) in (";", "{", "}", ")", ":", "else", "const", "constexpr", "thread")
        if vector and first and self.aliases.in_function(start) and src.at(src.match[opened] + 1) in (";", ","):
            made = f" = ::metal::_make<{src.slice(start, end + 1)}>"
            self.edits.insert(src.tokens[end + 1].end, made)

    def _cast(self, opened: int, closed: int) -> None:
        """Rewrite `(T)`, and a cast to a scalar that its value goes to: a cast expression binds tighter than ->*."""
        src, tokens = self.src, self.src.tokens
        self.casts.add(closed)
        self.edits.replace(tokens[opened].start, tokens[opened].end, " ::metal::_cast<")
        self.edits.replace(tokens[closed].start, tokens[closed].end, ">{} ->* ")
        before = opened - 1
        while src.at(before) in ("-", "+", "~", "!"):
            before -= 1
        if src.at(before) == ")" and before not in self.casts and self._closes_cast(before):
            outer = src.match[before]
            if src.at(outer - 1) not in _NOT_A_CAST and self._is_cast(outer, before):
                self._cast(outer, before)

    def _function_parameters(self, opened: int) -> None:
        """`R (*f)(A)` among template parameters becomes a reference: clang gives the pointer an address space that no
        function's address has."""
        src, closed = self.src, self.src.close_angle(opened) or opened
        for i in range(opened, closed):
            if src.at(i) == "(" and src.at(i + 1) == "*" and src.at(i + 3) == ")" and src.at(i + 4) == "(":
                self._span(i + 1, i + 2, "&")

    def _constructor(self, start: int, end: int) -> None:
        src, opened = self.src, end + 1
        closed = src.match[opened]
        if src.at(opened + 1) in ("&", "*") and src.at(closed + 1) in ("[", "("):
            return  # declarator: T (&name)[N]
        if src.at(closed + 1) == "{" and src.at(start - 1) not in ("return", "=", "(", ","):
            return
        self.edits.insert(src.tokens[start].start, " ::metal::_make<")
        self.edits.insert(src.tokens[end].end, ">")
        self._truth(opened, inside=True)

    def _truth(self, opened: int, inside: bool) -> None:
        """A lone operand that may be a comparison: clang's vector comparisons are 0/-1, Metal's are bool vectors."""
        src, closed = self.src, self.src.match[opened]
        found, i = False, opened + 1
        while i < closed:
            text = src.at(i)
            angle = src.close_angle(i) if text == "<" else None
            if angle is not None and src.at(angle + 1) in ("(", "::", "{"):
                i = angle + 1  # template arguments
                continue
            if text in (",", "?"):
                return
            found = found or text in _LOGICAL
            i = src.match[i] + 1 if text in "([{" else i + 1
        if not found:
            return
        if inside:
            self.edits.insert(src.tokens[opened].end, "::metal::_truth(")
            self.edits.insert(src.tokens[closed].start, ")")
        else:
            self.edits.insert(src.tokens[opened].start, "::metal::_truth")

    def _is_cast(self, opened: int, closed: int) -> bool:
        src = self.src
        before, after = src.at(opened - 1), src.at(closed + 1)
        if before in _NOT_A_CAST or before == "]":
            return False
        if before == ")" and not self._closes_cast(opened - 1):
            return False
        if src.is_name(opened - 1) and before not in _CAST_AFTER:
            return False
        if before == ">" and src.tokens[opened - 1].end == src.tokens[opened].start:
            return False
        operand = closed + 1 < len(src) and src.tokens[closed + 1].kind in ("name", "number")
        return (operand and after not in ("const", "override")) or after in (
            "(",
            "-",
            "+",
            "~",
            "!",
            "*",
            "&",
            "::",
            "++",
            "--",
        )

    def _closes_cast(self, closed: int) -> bool:
        words = {self.src.at(j) for j in range(self.src.match[closed] + 1, closed)}
        return closed in self.casts or (bool(words) and words <= _SCALARS)

    def _check_comma(self, i: int) -> None:
        src = self.src
        if len(src.split(i + 1, src.match[i])) > 1 and src.at(src.match[i] + 1) != "(":
            raise MetalCompileError(
                f"{src.where(i)}: a comma expression is cast to a vector, which keeps only its last value; "
                f"write a constructor such as float4(a, b, c, d)"
            )

    def _named_cast(self, i: int) -> None:
        """`static_cast<T>(x)` and `decltype(e)(x)` for types that may be vectors."""
        src = self.src
        if src.at(i) == "decltype":
            closed = src.match.get(i + 1, i)
            if src.at(closed + 1) == "(" and src.at(i - 1) != "operator":
                self.edits.insert(src.tokens[i].start, " ::metal::_make<")
                self.edits.insert(src.tokens[closed].end, ">")
            return
        closed_angle = src.close_angle(i + 1)
        if closed_angle is None:
            return
        words = {src.at(j) for j in range(i + 2, closed_angle)}
        typed = words & self.aliases.templates or any(self._is_type(j) for j in range(i + 2, closed_angle))
        if typed and not words & {"*", "&"}:
            self._span(i, i + 1, " ::metal::_make")

    # --- kernels

    def _kernel(self, definition: Definition) -> None:
        src, opened = self.src, definition.lparen
        start = definition.first
        if definition.template:
            start = (src.close_angle(start + 1) or start) + 1
        if src.at(start) not in ("static", "extern"):  # or a copy of the inlined body stays in the object
            self.edits.insert(src.tokens[start].start, "static ")
        empty = src.slice(opened + 1, src.match[opened]) in ("", "void")
        if empty:
            self._erase_inside(opened)
        self.edits.insert(src.tokens[opened].end, "__local char* mm_arena" + ("" if empty else ", "))
        arena.lay_out(src, self.edits, definition)

    def _erase_inside(self, opened: int) -> None:
        closed = self.src.match[opened]
        if closed > opened + 1:
            self._span(opened + 1, closed, "")
