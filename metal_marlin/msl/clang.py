"""clang as a subprocess: finding it, its flags, preprocessing, compiling a row to a shared object or to PTX."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metal_marlin.errors import CompilerNotFound, MetalCompileError
from metal_marlin.msl import operands
from metal_marlin.msl.target import Target

_ENV = "METAL_MARLIN_CLANG"
_OLDEST = 22  # the standard library uses builtins that older ones lack
_INSTALL = f"install one with: pip install 'metal-marlin[compiler]' (or set METAL_MARLIN_CLANG to a clang >= {_OLDEST})"
_TIMEOUT = 120
_LANGUAGE = ("-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-Xclang", "-cl-ext=+all", "-fdeclspec")
_COMMON = (
    *_LANGUAGE,
    "-cl-single-precision-constant",
    "-Wall",
    "-Wno-unused-const-variable",
    "-Wno-unused-variable",
    "-Wno-unused-function",
    "-Wno-duplicate-decl-specifier",
    "-Wno-unknown-pragmas",
    "-fno-caret-diagnostics",
    *operands.FLAGS,
    "-fno-ident",
    # NVPTX numbers thread and generic pointers alike: overloads for the two would share a symbol, and one of them win
    "-Xclang",
    "-faddress-space-map-mangling=no",
    "-mllvm",
    "-inline-threshold=100000",
)
# vectorise without deleting NaN checks (-ffast-math would)
_CPU_MATHS = (
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",
    "-Xclang",
    "-ffloat16-excess-precision=none",
)


def _cc1(*words: str) -> tuple[str, ...]:
    """Words for the compiler behind clang's driver."""
    return tuple(w for word in words for w in ("-Xclang", word))


# Every access becomes a call with its exact size (kernel-address), before anything is merged or vectorised; indices of
# arrays and alignments are told with their lines. What each flag closes: tests/msl/test_checker.py.
_CHECKED = (
    "-O1",
    *("-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops", "-ffp-contract=off", "-fno-associative-math"),
    *("-gline-tables-only", "-fsanitize=kernel-address,array-bounds,alignment"),
    *("-fsanitize-recover=all", "-fno-sanitize-trap=all"),
    *(
        word
        for option in (
            "asan-instrumentation-with-call-threshold=0",
            "asan-kernel-mem-intrinsic-prefix=1",
            "asan-instrument-atomics=0",
            "asan-use-stack-safety=0",
            "asan-globals=0",
            "asan-stack=0",
            "asan-opt=0",
        )
        for word in ("-mllvm", f"-{option}")
    ),
)


def flags(target: Target, *, checked: bool = False) -> tuple[str, ...]:
    """Compiler flags of a target; part of every cache key."""
    if checked:
        return (*flags(target), *_CHECKED)
    if target.kind == "metal":  # only to expand macros
        return _LANGUAGE
    if target.kind == "cuda":
        arch = _cc1("-target-cpu", target.arch, "-target-feature", "+ptx80")
        short = (*_cc1("-fcuda-short-ptr"), "-mllvm", "-nvptx-short-ptr")  # threadgroup addresses in 32 bits
        return (*_COMMON, "-target", "nvptx64-nvidia-cuda", *arch, *short, "-O3")
    machine = "aarch64" if target.arch == "aarch64" else "x86_64"
    level = () if target.arch == "aarch64" else _cc1("-target-cpu", target.arch)
    features = tuple(w for f in target.features for w in _cc1("-target-feature", f))
    vectors = ("-mprefer-vector-width=512",) if target.arch == "x86-64-v4" else ()
    return (
        *(*_COMMON, "-target", f"{machine}-linux-gnu", *level, *features, *vectors),
        *("-O2", "-fPIC", "-fno-stack-protector", "-fno-asynchronous-unwind-tables", *_CPU_MATHS),
    )


@dataclass(frozen=True)
class Compiler:
    """A clang. `command` runs it, `linker` runs its ld.lld; `tag` names kind and version in cache entries."""

    command: tuple[str, ...]
    linker: tuple[str, ...]
    tag: str

    def preprocess(self, text: str, target: Target, defines: Mapping[str, str]) -> str:
        """The text with macros expanded as `target` sees them, line markers kept."""
        return self._run((*self.command, "-E", *flags(target), *_macros(defines), "-"), text, "").stdout

    def compile(
        self,
        text: str,
        target: Target,
        *,
        defines: Mapping[str, str],
        stdlib_dir: Path,
        name: str,
        checked: bool = False,
    ) -> bytes:
        """A shared object (cpu; with line numbers where `checked`) or PTX text (cuda).

        Raises MetalCompileError with the .metal file and line.
        """
        with tempfile.TemporaryDirectory(prefix="metal-marlin-") as folder:
            out = Path(folder) / ("row.ptx" if target.kind == "cuda" else "row.o")
            mode = "-S" if target.kind == "cuda" else "-c"
            words = [
                *flags(target, checked=checked),
                *_macros(defines),
                "-I",
                str(stdlib_dir),
                mode,
                "-",
                "-o",
                str(out),
            ]
            self._mended((*self.command, *words), text, name, str(stdlib_dir))
            if target.kind == "cpu":
                shared = out.with_suffix(".so")
                strip = () if checked else ("-s",)
                self._run((*self.linker, "-shared", "--hash-style=gnu", *strip, str(out), "-o", str(shared)), "", name)
                out = shared
            return out.read_bytes()

    def _mended(self, words: Sequence[str], text: str, name: str, stdlib: str) -> None:
        """Compile, converting the scalar operands that only the compiler can tell need it."""
        for _ in range(operands.ROUNDS):
            done = self._call(words, text)
            if done.returncode == 0:
                return
            mended = operands.mend(text, done.stderr, stdlib)
            if mended is None:
                break
            text = mended
        raise MetalCompileError(_readable(done.stderr, name))

    def _run(self, words: Sequence[str], text: str, name: str) -> subprocess.CompletedProcess[str]:
        done = self._call(words, text)
        if done.returncode:
            raise MetalCompileError(_readable(done.stderr, name))
        return done

    def _call(self, words: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "LC_ALL": "C"}
        try:
            return subprocess.run(words, input=text, capture_output=True, text=True, timeout=_TIMEOUT, env=env)
        except subprocess.TimeoutExpired:
            raise MetalCompileError(f"the compiler took more than {_TIMEOUT} s") from None
        except OSError as error:
            raise CompilerNotFound(f"cannot run {words[0]}: {error}; {_INSTALL}") from None


def _macros(defines: Mapping[str, str]) -> list[str]:
    return [f"-D{name}={value}" for name, value in defines.items()]


def _readable(stderr: str, name: str) -> str:
    """The compiler's words without our own macros and the temporary file."""
    lines = [
        line
        for line in operands.readable(stderr).splitlines()
        if not re.match(r"\d+ (error|warning)s? generated", line)
    ]
    errors = [line for line in lines if "error:" in line] or lines
    first = errors[0] if errors else "unknown error"
    head = f"kernel '{name}' does not compile" if name else "the source does not preprocess"
    at = lines.index(first) if errors else 0
    return "\n  ".join([f"{head}: {first}", *lines[:at], *lines[at + 1 :]])


@functools.lru_cache(maxsize=8)
def _probe(path: str) -> Compiler | None:
    """A system clang, if it is new enough, has NVPTX, and finds a linker."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_TIMEOUT).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"clang version (\d+)\.(\d+)\.(\d+)", text)
    linker = shutil.which(
        "ld.lld", path=os.pathsep.join([str(Path(path).resolve().parent), os.environ.get("PATH", "")])
    )
    if found is None or int(found[1]) < _OLDEST or linker is None:
        return None
    return Compiler((path,), (linker,), f"clang-{found[1]}.{found[2]}.{found[3]}")


def _ziglang() -> Compiler | None:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    zig = Path(spec.submodule_search_locations[0]) / ("zig.exe" if os.name == "nt" else "zig")
    if not zig.is_file():
        return None
    version = importlib.metadata.version("ziglang")
    return Compiler((str(zig), "clang"), (str(zig), "ld.lld"), f"zig-{version}")


def find_compiler() -> Compiler:
    """METAL_MARLIN_CLANG, else the ziglang wheel, else a system clang >= 22 with lld.

    Raises CompilerNotFound saying what to install; a METAL_MARLIN_CLANG that does not work is an error, not skipped.
    """
    chosen = os.environ.get(_ENV)
    if chosen:
        compiler = _probe(shutil.which(chosen) or chosen)
        if compiler is None:
            raise CompilerNotFound(
                f"{_ENV}={chosen} is not a working clang >= {_OLDEST} with ld.lld beside it or on PATH"
            )
        return compiler
    compiler = _ziglang()
    if compiler is None:
        for name in ("clang", *(f"clang-{v}" for v in range(30, _OLDEST - 1, -1))):
            path = shutil.which(name)
            compiler = _probe(path) if path else None
            if compiler is not None:
                break
    if compiler is None:
        raise CompilerNotFound(f"no compiler for Metal kernels; {_INSTALL}")
    return compiler
