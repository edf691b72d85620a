"""Flat MSL: `#include "…"` inlined, because neither Metal's run-time compiler nor a cache key can follow a path."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from metal_marlin.errors import MetalCompileError

_INCLUDE = re.compile(r'[ \t]*#[ \t]*include[ \t]*(?:"([^"]+)"|<([^>]+)>)')
_ONCE = re.compile(r"[ \t]*#[ \t]*pragma[ \t]+once\b")
_DIRECTIVE = re.compile(r"^[ \t]*#[ \t]*(define|undef|if|ifdef|ifndef|elif|else|endif|error)\b|\b_Pragma\b", re.M)
_CONDITIONAL = re.compile(r"[ \t]*#[ \t]*(if|endif)")
_MAX_DEPTH = 64
_STDLIB = Path(__file__).with_name("stdlib")


def is_standard(header: str) -> bool:
    """Whether `<header>` is part of Metal's standard library, supplied here by msl/stdlib."""
    return header.startswith("metal_") or header in ("simd/simd.h", "metal")


def needs_preprocessor(text: str) -> bool:
    """Whether the text has macros or conditionals."""
    return _DIRECTIVE.search(text) is not None


class Flattener:
    """Inlines includes. `markers` adds `# line "file"` lines (for clang's messages), left out of Metal's text."""

    def __init__(self, include_dirs: Sequence[Path] = (), markers: bool = True) -> None:
        self.include_dirs = [Path(d) for d in include_dirs]
        self.markers = markers
        self.standard: list[str] = []  # <headers> seen, in order
        self.missing: list[str] = []  # what to say of standard headers that are not in msl/stdlib; Metal has them
        self.files: list[Path] = []
        self._once: set[Path] = set()
        self._conditionals = 0  # open #if

    def file(self, path: Path) -> str:
        path = path.resolve()
        return self._text(self._read(path), str(path), path.parent, 0)

    def text(self, text: str, name: str = "<source>") -> str:
        return self._text(text, name, None, 0)

    def _read(self, path: Path) -> str:
        self.files.append(path)
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise MetalCompileError(f"{path}: not UTF-8 text ({error})") from None

    def _find(self, header: str, here: Path | None) -> Path | None:
        for folder in ([here] if here else []) + self.include_dirs:
            candidate = (folder / header).resolve()
            if candidate.is_file():
                return candidate
        return None

    def _text(self, text: str, name: str, here: Path | None, depth: int) -> str:
        if depth > _MAX_DEPTH:
            raise MetalCompileError(f"{name}: includes nest deeper than {_MAX_DEPTH}; does a file include itself?")
        out = [f'# 1 "{name}"'] if self.markers else []
        for number, line in enumerate(text.split("\n"), 1):
            found = _INCLUDE.match(line)
            if found:
                out.append(self._include(found[1] or found[2], bool(found[1]), f"{name}:{number}", here, depth))
                if self.markers:
                    out.append(f'# {number + 1} "{name}"')
            elif _ONCE.match(line):
                out += [""] if self.markers else []
            else:
                conditional = _CONDITIONAL.match(line)
                if conditional:
                    self._conditionals += 1 if conditional[1] == "if" else -1
                out.append(line)
        return "\n".join(out)

    def _include(self, header: str, quoted: bool, where: str, here: Path | None, depth: int) -> str:
        path = self._find(header, here)
        if path is None:
            known = is_standard(header)
            if known and not (_STDLIB / header).is_file() and not self._conditionals:
                self.missing.append(f"{where}: standard header <{header}> is not supported here")
                return "" if self.markers else f"#include <{header}>"
            if known and (_STDLIB / header).is_file():
                if header not in self.standard:
                    self.standard.append(header)
                return "" if self.markers else f"#include <{header}>"
            if self._conditionals:  # perhaps not for this compiler: the preprocessor will tell
                return f'#include "{header}"' if quoted else f"#include <{header}>"
            searched = ", ".join(str(d) for d in ([here] if here else []) + self.include_dirs) or "no directory"
            raise MetalCompileError(f'{where}: cannot find "{header}" (searched {searched})')
        if path in self._once:
            return ""
        text = self._read(path)
        if any(_ONCE.match(line) for line in text.split("\n")):
            self._once.add(path)
        return self._text(text, str(path), path.parent, depth + 1)
