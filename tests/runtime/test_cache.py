"""The cache of compiled rows: concurrent use, damage, trust, and what keys depend on."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.errors import MetalMarlinError
from metal_marlin.msl import program
from metal_marlin.msl.clang import Compiler
from metal_marlin.msl.target import Target
from metal_marlin.runtime.cache import RowCache, default_directory

posix = pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners and modes are POSIX")
SOURCE = """
constant float k [[function_constant(0)]];
kernel void twice(device const float* x, device float* y, uint i [[thread_position_in_grid]]) {
  y[i] = 2 * x[i];
}
kernel void scaled(device const float* x, device float* y, uint i [[thread_position_in_grid]]) { y[i] = k * x[i]; }
"""
KEY, TAG = "a" * 64, "zig-1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "rows"


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def works(folder: Path, source: str = SOURCE) -> bool:
    library = MetalKernelLibrary(source, device="cpu", cache=RowCache(folder))
    x, y = torch.arange(8.0), torch.zeros(8)
    dispatch_kernel(library, "twice", threads=8, threads_per_threadgroup=8, args=[x, y])
    return torch.equal(y, 2 * x)


# --- entries


def test_entries_come_back_as_they_were(folder: Path) -> None:
    cache = RowCache(folder)
    meta, binary = {"name": "k", "list": [1, 2.5, None], "text": "é"}, bytes(range(256)) * 100
    assert cache.get(KEY, TAG) is None
    cache.put(KEY, TAG, meta, binary)
    assert cache.get(KEY, TAG) == (meta, binary)
    assert cache.get(KEY, "zig-2") is None
    assert cache.get("b" * 64, TAG) is None
    cache.put(KEY, TAG, {}, b"")
    assert RowCache(folder).get(KEY, TAG) == ({}, b"")
    assert files(folder) == [f"{KEY}-{TAG}.row"]


def test_without_a_compiler_the_newest_entry_counts(folder: Path) -> None:
    cache = RowCache(folder)
    for age, tag in ((30, "zig-3"), (10, "clang-1"), (20, "zig-9")):
        cache.put(KEY, tag, {"tag": tag}, b"")
        time = (folder / f"{KEY}-{tag}.row").stat().st_mtime - age
        os.utime(folder / f"{KEY}-{tag}.row", (time, time))
    found = cache.get(KEY, None)
    assert found is not None
    assert found[0] == {"tag": "clang-1"}
    (folder / f"{KEY}-clang-1.row").write_bytes(b"damaged")
    found = cache.get(KEY, None)
    assert found is not None
    assert found[0] == {"tag": "zig-9"}


def test_folders_that_are_only_read_serve_any_tag(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped, other = tmp_path / "shipped", tmp_path / "other"
    RowCache(shipped).put(KEY, "zig-7", {"from": "shipped"}, b"1")
    RowCache(other).put("c" * 64, "zig-7", {"from": "other"}, b"2")
    monkeypatch.setenv("METAL_MARLIN_ROWS", os.pathsep.join([str(tmp_path / "missing"), str(shipped), str(other)]))
    cache = RowCache(folder)
    assert cache.get(KEY, TAG) == ({"from": "shipped"}, b"1")
    assert cache.get("c" * 64, None) == ({"from": "other"}, b"2")
    cache.put(KEY, TAG, {"from": "own"}, b"3")
    assert cache.get(KEY, TAG) == ({"from": "own"}, b"3")
    assert cache.clear() == 1
    assert len(files(shipped)) == 1
    (shipped / f"{KEY}-zig-7.row").write_bytes(b"damaged")
    assert cache.get(KEY, TAG) is None
    assert len(files(shipped)) == 1  # only read


def test_stats_and_clear(folder: Path) -> None:
    cache = RowCache(folder)
    assert cache.stats() == (0, 0)
    assert cache.clear() == 0
    for n in range(3):
        cache.put(str(n) * 64, TAG, {}, os.urandom(1000))
    (folder / "note.txt").write_text("mine")
    (folder / ".new-old").write_text("left by a process that died")
    os.utime(folder / ".new-old", (0, 0))
    (folder / ".new-now").write_text("being written")
    count, size = cache.stats()
    assert count == 3
    assert 3000 < size < 4000
    assert cache.clear() == 3
    assert cache.stats() == (0, 0)
    assert files(folder) == [".new-now", "note.txt"]


@pytest.mark.parametrize(
    ("variables", "platform", "want"),
    [
        ({"METAL_MARLIN_CACHE": "/x/y"}, "linux", "/x/y"),
        ({"XDG_CACHE_HOME": "/xdg"}, "linux", "/xdg/metal-marlin"),
        ({"HOME": "/home/me"}, "linux", "/home/me/.cache/metal-marlin"),
        ({"HOME": "/Users/me"}, "darwin", "/Users/me/Library/Caches/metal-marlin"),
        ({"LOCALAPPDATA": "/local"}, "win32", "/local/metal-marlin/cache"),
    ],
)
def test_the_default_folder(
    variables: dict[str, str], platform: str, want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("METAL_MARLIN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert default_directory() == Path(want)


# --- damage


def damaged(data: bytes, how: str) -> bytes:
    if how.startswith("bit"):
        at = int(how[3:]) * (len(data) - 1) // 100
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    return data[: int(how) * len(data) // 100]


@pytest.mark.parametrize("how", ["0", "1", "30", "99", "bit0", "bit1", "bit3", "bit50", "bit100"])
def test_damaged_entries_are_rebuilt(folder: Path, how: str, compiler: Compiler) -> None:
    assert works(folder)
    rows = {p: p.read_bytes() for p in folder.iterdir()}
    assert len(rows) == 2  # what the text declares, and the row
    for path, data in rows.items():
        path.write_bytes(damaged(data, how))
        assert path.read_bytes() != data
    assert works(folder)
    assert {p: p.read_bytes() for p in folder.iterdir()} == rows


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, compiler: Compiler) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept"):
        assert works(tmp_path / "file" / "rows")


# --- trust


@posix
def test_the_folder_is_private(folder: Path) -> None:
    before = os.umask(0)
    try:
        RowCache(folder / "deep").put(KEY, TAG, {}, b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "deep").stat().st_mode) == 0o700
    (entry,) = (folder / "deep").iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600


@posix
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_folders_that_others_may_write_to_are_refused(folder: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    RowCache(folder).put(KEY, TAG, {}, b"")
    folder.chmod(mode)
    with pytest.raises(MetalMarlinError, match=rf"may be written by others \(mode {mode:o}\).*chmod go-w"):
        RowCache(folder).get(KEY, TAG)
    with pytest.raises(MetalMarlinError, match="may be written by others"):
        RowCache(folder).put(KEY, TAG, {}, b"")
    monkeypatch.setenv("METAL_MARLIN_ROWS", str(folder))
    with pytest.raises(MetalMarlinError, match="may be written by others"):
        RowCache(folder.parent / "own").get(KEY, TAG)
    folder.chmod(0o755)
    assert RowCache(folder).get(KEY, TAG) is not None


@posix
def test_entries_that_others_may_write_to_are_refused(folder: Path) -> None:
    RowCache(folder).put(KEY, TAG, {}, b"")
    (folder / f"{KEY}-{TAG}.row").chmod(0o666)
    with pytest.raises(MetalMarlinError, match=r"\.row may be written by others \(mode 666\)"):
        RowCache(folder).get(KEY, TAG)


@posix
def test_folders_of_other_users_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RowCache(folder).put(KEY, TAG, {}, b"")
    owner = folder.stat().st_uid
    if owner == 0:
        os.chown(folder, 12345, -1)
        owner = 12345
    else:
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(MetalMarlinError, match=f"belongs to user {owner}, not to you; set METAL_MARLIN_CACHE"):
        RowCache(folder).get(KEY, TAG)
    with pytest.raises(MetalMarlinError, match="not to you"):
        RowCache(folder).put(KEY, TAG, {}, b"")


# --- keys


def keys(cache: RowCache) -> set[str]:
    return {p.name.split("-")[0] for p in cache.directory.glob("*.row")}


def rows_of(tmp_path: Path, name: str, source: str | Path, **options: object) -> set[str]:
    cache = RowCache(tmp_path / name)
    library = MetalKernelLibrary(source, cache=cache, **{"target": Target.parse("cpu:x86-64-v3"), **options})  # type: ignore[arg-type]
    library.compile("twice")
    return keys(cache)


def test_keys_depend_on_content_alone(tmp_path: Path, compiler: Compiler) -> None:
    texts = {"h.h": "#pragma once\ninline float two() { return 2; }\n"}
    texts["k.metal"] = '#include "h.h"\n' + SOURCE.replace("2 *", "two() *")
    for place in ("here", "there/deeper"):
        (tmp_path / place).mkdir(parents=True)
        for name, text in texts.items():
            (tmp_path / place / name).write_text(text)
    first = rows_of(tmp_path, "c1", tmp_path / "here" / "k.metal")
    assert first == rows_of(tmp_path, "c2", tmp_path / "there" / "deeper" / "k.metal")
    (tmp_path / "here" / "h.h").write_text(texts["h.h"].replace("return 2", "return 3"))
    assert not first & rows_of(tmp_path, "c3", tmp_path / "here" / "k.metal")


def test_keys_depend_on_everything_that_matters(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants: list[dict[str, object]] = [
        {},
        {"constants": {"k": 1.0}},
        {"constants": {"k": 2.0}},
        {"lanes": 1},
        {"defines": {"A": 1}},
        {"defines": {"A": 2}},
        {"target": Target.parse("cpu:x86-64-v4")},
        {"target": Target.parse("cpu:x86-64-v3+avxvnni")},
        {"target": Target.parse("cuda:sm_80")},
    ]
    rows: list[str] = []
    for n, options in enumerate(variants):
        cache = RowCache(tmp_path / str(n))
        library = MetalKernelLibrary(SOURCE, cache=cache, **{"target": Target.parse("cpu:x86-64-v3"), **options})  # type: ignore[arg-type]
        library.kernels  # noqa: B018 - stores what the text declares
        before = keys(cache)
        library.compile("twice")
        rows += keys(cache) - before
    assert len(set(rows)) == len(variants)
    monkeypatch.setattr(program, "frontend_hash", lambda: "another front end")
    assert not set(rows) & rows_of(tmp_path, "front end", SOURCE)


# --- several at once

CHILD = """
import sys, torch
from metal_marlin import MetalKernelLibrary, dispatch_kernel
from metal_marlin.runtime.cache import RowCache
sys.stdin.readline()
library = MetalKernelLibrary(sys.argv[2], device="cpu", cache=RowCache(sys.argv[1]))
x, y = torch.arange(8.0), torch.zeros(8)
dispatch_kernel(library, "twice", threads=8, threads_per_threadgroup=8, args=[x, y])
assert torch.equal(y, 2 * x), y
print("right")
"""


def test_processes_compile_the_same_row_at_once(folder: Path, compiler: Compiler) -> None:
    command = [sys.executable, "-c", CHILD, str(folder), SOURCE]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(command, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    for child in children:
        out, err = child.communicate(timeout=120)
        assert out == "right\n", err
    assert len(files(folder)) == 2
    assert all(name.endswith(".row") for name in files(folder))
    assert works(folder)


def test_threads_compile_the_same_row_at_once(folder: Path, compiler: Compiler) -> None:
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(works(folder))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert results == [True] * 6
    assert len(files(folder)) == 2
    assert all(name.endswith(".row") for name in files(folder))


def test_writers_readers_and_clearing_do_not_disturb_each_other(folder: Path) -> None:
    cache, stop, wrong = RowCache(folder), threading.Event(), []
    bodies = [bytes([n]) * 5000 for n in range(4)]

    def write(n: int) -> None:
        while not stop.is_set():
            cache.put(KEY, TAG, {"n": n}, bodies[n])

    def read(tag: str | None) -> None:
        while not stop.is_set():
            found = cache.get(KEY, tag)
            if found is not None and found[1] != bodies[found[0]["n"]]:
                wrong.append(found[0])

    def guarded(job: object, *args: object) -> None:
        try:
            job(*args)  # type: ignore[operator]
        except BaseException as error:
            wrong.append(error)

    jobs = [(write, n) for n in range(4)] + [(read, TAG), (read, None)]
    threads = [threading.Thread(target=guarded, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for _ in range(50):
        cache.clear()
        cache.stats()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
