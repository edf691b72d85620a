"""What Apple's compiler would refuse, or torch.mps.compile_shader cannot do, found in the text without a Mac.

Rules read tokens after macros are expanded as Metal sees them; they know names, not types, so a rule that would need
types says nothing where it is unsure. Sizes of threadgroup memory are the compiler's (see cli/lint.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from metal_marlin.msl.lexer import Source
from metal_marlin.msl.reflect import Program

_MSL = "Metal Shading Language Specification"
_TORCH = "torch.mps.compile_shader (PyTorch, torch/csrc/mps/Module.cpp)"
MOST_THREADGROUP_BYTES = 32768


@dataclass(frozen=True)
class Rule:
    """`source` says who forbids it; `torch` rules hold only for what torch.mps.compile_shader shall run."""

    summary: str
    source: str
    torch: bool = False


RULES: dict[str, Rule] = {
    "ascii": Rule("text is ASCII", "Metal's run-time compiler takes a C string; sources are kept to ASCII"),
    "double": Rule("no double, long double or long long", f"{_MSL}, scalar data types"),
    "recursion": Rule(
        "functions do not call themselves",
        f"{_MSL}, restrictions: recursive calls need a stack that pipelines have not by default",
    ),
    "lambda": Rule("no lambda expressions", f"{_MSL}, restrictions (before Metal 3.2's C++17)"),
    "virtual": Rule("no virtual functions", f"{_MSL}, restrictions: virtual"),
    "exceptions": Rule("no try, catch or throw", f"{_MSL}, restrictions: exception handling"),
    "allocation": Rule("no new or delete", f"{_MSL}, restrictions: new and delete"),
    "rtti": Rule("no dynamic_cast or typeid", f"{_MSL}, restrictions: run-time type information"),
    "goto": Rule("no goto", f"{_MSL}, restrictions: goto"),
    "storage": Rule("no thread_local or register", f"{_MSL}, restrictions: storage classes"),
    "static-local": Rule("no static variables in functions", f"{_MSL}, restrictions: static storage in functions"),
    "program-scope": Rule("data at program scope is constant", f"{_MSL}, constant address space"),
    "address-space": Rule(
        "pointers and references say device, constant, threadgroup or thread", f"{_MSL}, address spaces"
    ),
    "threadgroup-memory": Rule("at most 32 KB of threadgroup memory", "Metal feature set tables: threadgroup memory"),
    "function-constant": Rule("no function constants", f"{_TORCH} sets none", torch=True),
    "dynamic-threadgroup": Rule("no [[threadgroup(n)]] arguments", f"{_TORCH} sizes none", torch=True),
    "struct-argument": Rule(
        "a constant struct holds only long or only float", f"{_TORCH} binds int64[] and float[]", torch=True
    ),
}

_WORDS = {
    "double": "double",
    "virtual": "virtual",
    "try": "exceptions",
    "catch": "exceptions",
    "throw": "exceptions",
    "new": "allocation",
    "delete": "allocation",
    "dynamic_cast": "rtti",
    "typeid": "rtti",
    "goto": "goto",
    "thread_local": "storage",
    "register": "storage",
}
_SPACES = frozenset(
    ("device", "constant", "threadgroup", "thread", "threadgroup_imageblock", "ray_data", "object_data")
)
_TYPES = re.compile(
    r"(packed_)?(bool|char|uchar|short|ushort|int|uint|long|ulong|half|bfloat|float)([234](x[234])?)?"
    r"|void|size_t|ptrdiff_t|u?int(8|16|32|64)_t"
)
_NO_FUNCTION = frozenset(("if", "for", "while", "switch", "return", "sizeof", "decltype", "alignof"))


@dataclass(frozen=True)
class LintFinding:
    """One violation. rule: a key of RULES."""

    rule: str
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.rule}: {self.message} [{RULES[self.rule].source}]"


@dataclass(frozen=True)
class _Function:
    name: str
    token: int
    lparen: int
    body: int  # its `{`, or -1 where it is only declared
    end: int


def lint(source: Source, program: Program, *, torch: bool = False) -> list[LintFinding]:
    """Findings in a text whose macros are expanded, by line. torch: also what compile_shader cannot do."""
    found = _Linter(source, program).run()
    kept = [f for f in found if torch or not RULES[f.rule].torch]
    return sorted(set(kept), key=lambda f: (f.file, f.line, f.rule))


def lint_ascii(text: str, file: str) -> list[LintFinding]:
    """Findings of the `ascii` rule, which is about the text as it is stored."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for character in line:
            if ord(character) > 127:
                found.append(LintFinding("ascii", file, number, f"U+{ord(character):04X} '{character}'"))
                break
    return found


class _Linter:
    def __init__(self, source: Source, program: Program) -> None:
        self.src, self.program = source, program
        self.functions = list(self._functions())
        self.bodies = [(f.body, f.end) for f in self.functions if f.body >= 0]
        self.types = self._type_names()

    def run(self) -> list[LintFinding]:
        checks: tuple[Callable[[], Iterator[LintFinding]], ...] = (
            self._words,
            self._lambdas,
            self._static_locals,
            self._recursion,
            self._program_scope,
            self._parameters,
            self._casts,
            self._locals,
            self._kernels,
        )
        return [finding for check in checks for finding in check()]

    def _finding(self, rule: str, token: int, message: str) -> LintFinding:
        return LintFinding(rule, *self.src.location(token), message)

    def _functions(self) -> Iterator[_Function]:
        src = self.src
        for i in range(len(src)):
            if src.is_name(i) and src.at(i + 1) == "(" and src.at(i) not in _NO_FUNCTION:
                after = src.match[i + 1] + 1
                while src.at(after) in ("const", "thread", "device", "constant", "threadgroup"):
                    after += 1
                if src.at(after) == ":":  # a constructor's initialisers
                    while after < len(src) and src.at(after) not in ("{", ";"):
                        after = src.match[after] + 1 if src.at(after) == "(" else after + 1
                if src.at(after) == "{" and src.at(i - 1) not in (".", "->", "new"):
                    yield _Function(src.at(i), i, i + 1, after, src.match[after])

    def _type_names(self) -> set[str]:
        """Names that this text makes types of: structs, aliases, template parameters."""
        src, names = self.src, set()
        for i in range(len(src)):
            if src.at(i) in ("struct", "class", "typename", "enum", "union") and src.is_name(i + 1):
                names.add(src.at(i + 1))
            if src.at(i) == "using" and src.is_name(i + 1) and src.at(i + 2) == "=":
                names.add(src.at(i + 1))
        return names

    def _is_type(self, i: int) -> bool:
        return self.src.is_name(i) and (self.src.at(i) in self.types or _TYPES.fullmatch(self.src.at(i)) is not None)

    def _inside(self, i: int) -> bool:
        return any(first < i < last for first, last in self.bodies)

    def _words(self) -> Iterator[LintFinding]:
        src = self.src
        for i in range(len(src)):
            text = src.at(i)
            if src.is_name(i) and text in _WORDS and src.at(i - 1) not in (".", "->", "::"):
                if text == "delete" and src.at(i - 1) == "=":
                    continue
                yield self._finding(_WORDS[text], i, f"'{text}'")
            if text == "long" and src.at(i + 1) in ("long", "double"):
                yield self._finding("double", i, f"'long {src.at(i + 1)}'")

    def _lambdas(self) -> Iterator[LintFinding]:
        src = self.src
        for i in range(len(src)):
            if src.at(i) != "[" or src.is_attribute(i) or src.is_attribute(i - 1):
                continue
            after = src.match[i] + 1
            before = src.at(i - 1)
            operand = (src.is_name(i - 1) and before not in ("return",)) or before in (")", "]", ">")
            if not operand and src.at(after) in ("(", "{") and before != "operator":
                yield self._finding("lambda", i, "a lambda expression")

    def _static_locals(self) -> Iterator[LintFinding]:
        for first, last in self.bodies:
            for i in range(first + 1, last):
                if self.src.at(i) == "static" and not self._declares_function(i) and self._in_function(i):
                    yield self._finding("static-local", i, "a static variable in a function")

    def _in_function(self, i: int) -> bool:
        """Whether token i stands in a function, not in a struct that lies in one."""
        src, depth, j = self.src, 0, i
        while j > 0:
            j -= 1
            if src.at(j) in ("}", ")"):
                j = src.match[j]
            elif src.at(j) == "{":
                head = j - 1
                while head > 0 and src.at(head) not in (";", "{", "}"):
                    head = src.match[head] - 1 if src.at(head) == ")" else head - 1
                words = {src.at(k) for k in range(head + 1, j)}
                return not words & {"struct", "class", "union"}
        return depth > 0

    def _declares_function(self, i: int) -> bool:
        src = self.src
        while i < len(src) and src.at(i) not in (";", "=", "{"):
            if src.at(i) == "(":
                return True
            i += 1
        return False

    def _recursion(self) -> Iterator[LintFinding]:
        """Cycles among functions by name, where a name has one definition: overloads may call each other."""
        names: dict[str, list[_Function]] = {}
        for f in self.functions:
            names.setdefault(f.name, []).append(f)
        single = {name: fs[0] for name, fs in names.items() if len(fs) == 1}
        calls = {
            name: {self.src.at(i) for i in range(f.body + 1, f.end) if self.src.at(i) in single and self._is_call(i)}
            for name, f in single.items()
        }
        for name, f in single.items():
            reached, todo = set(), list(calls[name])
            while todo:
                callee = todo.pop()
                if callee not in reached:
                    reached.add(callee)
                    todo += calls[callee]
            if name in reached:
                yield self._finding("recursion", f.token, f"'{name}' calls itself")

    def _is_call(self, i: int) -> bool:
        src, after = self.src, i + 1
        if src.at(after) == "<":
            after = (src.close_angle(after) or i) + 1
        declared = src.is_name(i - 1) and src.at(i - 1) not in ("return", "else", "do", "case")
        return src.at(after) == "(" and src.at(i - 1) not in (".", "->") and not declared

    def _program_scope(self) -> Iterator[LintFinding]:
        src, i = self.src, 0
        while i < len(src):
            end, opened = i, False
            while end < len(src) and src.at(end) != ";":
                if src.at(end) == "{" and self._is_scope(i, end):
                    opened = True
                    break
                end = src.match[end] + 1 if src.at(end) in ("(", "[", "{") else end + 1
                if src.at(end - 1) == "}" and src.at(end) not in (";", ",", "=", "[", "(") and not src.is_name(end):
                    break
                if src.at(end - 1) == "}" and self._is_body(i, end - 1):
                    break
            if not opened:
                yield from self._declaration(i, end)
            i = end + (src.at(end) in (";", "{"))

    def _is_scope(self, first: int, brace: int) -> bool:
        return "namespace" in (self.src.at(j) for j in range(first, brace))

    def _is_body(self, first: int, closing: int) -> bool:
        opened = self.src.match[closing]
        return any(f.body == opened for f in self.functions if f.token >= first)

    def _declaration(self, first: int, end: int) -> Iterator[LintFinding]:
        src = self.src
        words = [src.at(j) for j in range(first, end)]
        head = words[: words.index("=")] if "=" in words else words
        skip = {
            "constant",
            "using",
            "typedef",
            "template",
            "struct",
            "class",
            "enum",
            "union",
            "namespace",
            "static_assert",
        }
        if not head or skip & set(head) or "(" in head or "{" in head or not any(map(self._is_type, range(first, end))):
            return
        if len([w for w in head if re.match(r"\w", w)]) >= 2:
            yield self._finding("program-scope", first, f"'{' '.join(head[:6])}' is not in the constant address space")

    def _spaceless(self, first: int, last: int) -> int | None:
        """The token of a `*` or `&` in a declarator [first, last) that no address space goes before."""
        src = self.src
        depth = 0
        space = False
        for j in range(first, last):
            text = src.at(j)
            depth += {"<": 1, ">": -1}.get(text, 0)
            space = space or text in _SPACES
            if depth == 0 and text in ("*", "&") and not space:
                return None if src.at(j - 1) == "(" else j  # pointers to functions have none
            if text in ("=", "["):
                return None
        return None

    def _parameters(self) -> Iterator[LintFinding]:
        src = self.src
        for f in self.functions:
            for a, b in src.split(f.lparen + 1, src.match[f.lparen]):
                star = self._spaceless(a, b)
                named = any(self._is_type(j) for j in range(a, b)) or src.at(a) == "auto" or src.at(a + 1) == "auto"
                if star is not None and named:
                    yield self._finding("address-space", star, f"parameter '{src.slice(a, b)}' of '{f.name}'")

    def _casts(self) -> Iterator[LintFinding]:
        src = self.src
        for i in range(len(src)):
            if src.at(i) == "(" and self._is_pointer_cast(i):
                star = self._spaceless(i + 1, src.match[i])
                if star is not None and self._is_type(star - 1):
                    yield self._finding("address-space", i, f"cast to '{src.slice(i + 1, src.match[i])}'")
            if src.at(i) in ("reinterpret_cast", "static_cast", "const_cast") and src.at(i + 1) == "<":
                closed = src.close_angle(i + 1)
                star = None if closed is None else self._spaceless(i + 2, closed)
                if star is not None and closed is not None:
                    yield self._finding("address-space", i, f"{src.at(i)} to '{src.slice(i + 2, closed)}'")

    def _is_pointer_cast(self, i: int) -> bool:
        src, closed = self.src, self.src.match[i]
        plain = not any(src.at(j) in ("(", ",") for j in range(i + 1, closed))
        return plain and src.at(closed - 1) == "*" and self._inside(i)

    def _locals(self) -> Iterator[LintFinding]:
        """Declarations `T* p`, `T& r` that start a statement."""
        src = self.src
        for first, last in self.bodies:
            for i in range(first + 1, last):
                start = i + (src.at(i) == "const")
                if src.at(i - 1) not in ("{", "}", ";", "(") or not self._is_type(start):
                    continue
                if src.at(start + 1) in ("*", "&") and src.is_name(start + 2) and src.at(start + 3) in ("=", ";", "["):
                    yield self._finding("address-space", start + 1, f"'{src.slice(i, start + 3)}'")

    def _kernels(self) -> Iterator[LintFinding]:
        for kernel in self.program.kernels.values():
            place = (kernel.file, kernel.line)
            for p in kernel.dynamic:
                yield LintFinding("dynamic-threadgroup", *place, f"'{kernel.name}': argument '{p.name}'")
            for p in kernel.params:
                if p.role == "value" and p.struct and not self._uniform(p.struct):
                    yield LintFinding("struct-argument", *place, f"'{kernel.name}': '{p.name}' is a {p.struct}")
        for constant in self.program.constants:
            yield LintFinding("function-constant", self.src.name, 1, f"'{constant.name}'")

    def _uniform(self, struct: str) -> bool:
        """Whether the struct's members are all `long` or all `float`."""
        kinds = self._kinds(struct)
        return kinds <= {"long"} or kinds <= {"float"}

    def _kinds(self, struct: str) -> set[str]:
        """Types of a struct's members, and of those that are structs theirs; none for a struct not written here."""
        src = self.src
        for i in range(len(src)):
            if src.at(i) == "struct" and src.at(i + 1) == struct and src.at(i + 2) == "{":
                members = {src.at(a) for a, b in src.split(i + 3, src.match[i + 2], ";") if b > a}
                return set().union(*(self._kinds(kind) or {kind} for kind in members))
        return set()
