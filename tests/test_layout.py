"""The layout that every change keeps: import direction, sizes, no device conditionals, import without devices."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "metal_marlin"
MODULES = sorted(PACKAGE.rglob("*.py"))
SHADERS = sorted([*(PACKAGE / "src").rglob("*.metal"), *(ROOT / "examples").glob("*.metal")])
STDLIB = [p for p in sorted((PACKAGE / "msl" / "stdlib").rglob("*")) if p.is_file()]
HEADERS = [*sorted((PACKAGE / "src").rglob("*.h")), *STDLIB]

# A part may import itself and what stands after it. `formats` and the plain modules below import nothing of ours
# but each other.
ORDER = ["cli", "serving", "engine", "integrations", "nn", "quant", "ops", "runtime", "msl"]
LEAVES = {"formats", "src", "errors", "files", "_version"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def part(module: str) -> str:
    """``runtime`` of ``metal_marlin.runtime.cache``; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports anywhere, in functions too; ``TYPE_CHECKING`` blocks count."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "metal_marlin" else {module}
    return {name for name in found if name.split(".")[0] == "metal_marlin"}


def may_import(user: str, used: str) -> bool:
    if used in LEAVES or used == user:
        return True
    if user in LEAVES or used not in ORDER:
        return False
    return ORDER.index(used) > ORDER.index(user)


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_go_downwards(path: Path) -> None:
    if path in (PACKAGE / "__init__.py", PACKAGE / "__main__.py"):
        return
    user = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert user in ORDER or user in LEAVES, f"{relative(path)}: say in ORDER where '{user}' stands"
    wrong = sorted(name for name in imports(path) if not may_import(user, part(name)))
    assert not wrong, f"{relative(path)} imports {', '.join(wrong)}; arrows go downwards only: {' → '.join(ORDER)}"


@pytest.mark.parametrize(
    ("user", "used", "allowed"),
    [
        ("cli", "ops", True),
        ("ops", "runtime", True),
        ("runtime", "msl", True),
        ("msl", "errors", True),
        ("msl", "runtime", False),
        ("runtime", "ops", False),
        ("runtime", "cli", False),
        ("formats", "ops", False),
        ("ops", "formats", True),
        ("msl", "", False),
    ],
)
def test_the_rule_itself(user: str, used: str, allowed: bool) -> None:
    assert may_import(user, used) is allowed


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    ("files", "limit"),
    [(SHADERS, 150), (HEADERS, 600), (MODULES, 400)],
    ids=["metal", "headers", "python"],
)
def test_files_are_small(files: list[Path], limit: int) -> None:
    large = {relative(path): line_count(path) for path in files if line_count(path) > limit}
    assert not large, f"more than {limit} lines: {large}"


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring."""
    assert node.end_lineno is not None
    first = node.body[0]
    docstring = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    skipped = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
    return node.end_lineno - node.lineno + 1 - skipped


def test_functions_are_short() -> None:
    large = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and function_lines(node) > 50:
                large[f"{relative(path)}:{node.lineno} {node.name}"] = function_lines(node)
    assert not large, f"more than 50 lines: {large}"


DEVICE_CONDITION = re.compile(
    r"^[ \t]*#[ \t]*(?:el)?if.*(?:__NVPTX__|__CUDA|__METAL_MARLIN_(?:CPU|CUDA)__|__METAL_VERSION__|__x86_64__|__aarch64__"
    r"|METAL_MARLIN_LANES)",
    re.M,
)


def test_device_conditions_stay_in_the_device_folders() -> None:
    device_folders = {PACKAGE / "src" / "core" / name for name in ("apple", "nvidia", "cpu")}
    files = [p for pattern in ("*.metal", "*.h") for p in (PACKAGE / "src").rglob(pattern)]
    wrong = [
        relative(path)
        for path in files
        if not device_folders & set(path.parents) and DEVICE_CONDITION.search(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, f"#if on a device outside core/{{apple,nvidia,cpu}}: {wrong}"


def test_shaders_are_ascii() -> None:
    """Metal's run-time compiler does not take anything else."""
    wrong = [relative(path) for path in [*SHADERS, *(PACKAGE / "src").rglob("*.h")] if not path.read_bytes().isascii()]
    assert not wrong


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    assert [p for p in PACKAGE.rglob("*/") if list(p.glob("*.py")) and not (p / "__init__.py").exists()] == []


# What a machine without compiler, GPU, C library by that name or POSIX modules looks like to an import. torch comes
# first: its own imports are not the subject.
BARE_MACHINE = """
import ctypes, importlib, os, pkgutil, sys
import torch
for name in ("ziglang", "fcntl", "pwd", "grp", "resource", "numpy", "cuda", "objc", "Metal", "elftools"):
    sys.modules[name] = None
def refuse(*args, **kwargs):
    raise OSError("no such library here")
ctypes.CDLL.__init__ = refuse
for name in ("getuid", "geteuid", "sched_getaffinity", "register_at_fork", "uname"):
    if hasattr(os, name):
        delattr(os, name)
import metal_marlin
# the plug-in's modules are imported by those who have transformers
plugin = "metal_marlin.integrations.transformers."
names = [m.name for m in pkgutil.walk_packages(metal_marlin.__path__, "metal_marlin.")]
names = [name for name in names if not name.startswith(plugin)]
for name in names:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
print(len(names))
"""


def test_imports_on_a_bare_machine() -> None:
    """Every module imports with no compiler and no device, and without the modules that Windows lacks."""
    environment = {"PATH": "", "METAL_MARLIN_CLANG": "/nonexistent/clang", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", BARE_MACHINE],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 10


def contract() -> dict[str, list[str]]:
    """Names of kernels by section of the contract ("1 GEMM")."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (ROOT / "tests" / "contract_names.txt").read_text().splitlines():
        if line.startswith("#"):
            section = line.removeprefix("# ")
        elif line:
            found.setdefault(section, []).append(line)
    return found


def test_contract_names_are_unique() -> None:
    names = [name for of in contract().values() for name in of]
    assert len(names) == len(set(names)) >= 228
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name in names)


def test_every_gemm_of_the_contract_is_a_row_that_an_op_launches() -> None:
    from metal_marlin.ops.inventory import inventory

    rows = {row.name: row for row in inventory()}
    names = contract()["1 GEMM"]
    assert len(names) > 80
    assert [name for name in names if name not in rows] == []
    for name in names:
        row = rows[name]
        assert row.op, name
        assert row.cases, name
        assert row.bench, name
        assert {"cpu", "cuda", "mps"} <= set(row.devices), name
