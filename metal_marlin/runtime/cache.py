"""Compiled rows on disk: one file an entry, private to the user, safe for concurrent processes and threads.

A shared object from here runs as native code in this process, so a directory that others could write to is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metal_marlin.errors import MetalMarlinError
from metal_marlin.files import whole_file

_MAGIC = b"MMROW1\n"
_SUFFIX, _UNFINISHED, _ABANDONED_S = ".row", ".new-", 3600
_ENV, _ENV_ROWS = "METAL_MARLIN_CACHE", "METAL_MARLIN_ROWS"
_SHIPPED = Path(__file__).parent.parent / "rows"


def default_directory() -> Path:
    """METAL_MARLIN_CACHE, else the user's cache folder of this platform."""
    chosen = os.environ.get(_ENV)
    if chosen:
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "metal-marlin"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "metal-marlin" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metal-marlin"


class RowCache:
    """Entries by key (a digest of everything a row depends on but the compiler) and tag (the compiler).

    `directory` is written to; the folders of METAL_MARLIN_ROWS and the package's own are only read.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory) if directory is not None else default_directory()
        extra = [Path(p) for p in os.environ.get(_ENV_ROWS, "").split(os.pathsep) if p]
        self._read_only = [*extra, _SHIPPED]
        self._trusted: set[Path] = set()

    def get(self, key: str, tag: str | None) -> tuple[dict[str, Any], bytes] | None:
        """(meta, binary), or None. A `tag` of None takes the newest entry of the key, whatever compiled it; folders
        that are only read serve any tag. Damaged entries count as missing; in the user's own folder they are removed.
        Raises MetalMarlinError for a folder or file that somebody else owns or may write to."""
        for folder in (self.directory, *self._read_only):
            own = folder == self.directory
            for path in _candidates(folder, key, tag if own else None):
                self._check(folder)
                entry = _read(path, repair=own)
                if entry is not None:
                    return entry
        return None

    def put(self, key: str, tag: str, meta: dict[str, Any], binary: bytes) -> None:
        """Store an entry; readers see the old one or the new one, never a part.

        A folder that cannot be written (read-only, full) costs a warning and a compilation the next time, no more.
        Raises MetalMarlinError for a folder that somebody else owns or may write to.
        """
        head = json.dumps(meta).encode()
        body = zlib.compress(struct.pack("<I", len(head)) + head + binary, 6)
        try:
            self._create()
            with whole_file(self.directory / f"{key}-{tag}{_SUFFIX}", prefix=_UNFINISHED, private=True) as file:
                file.write_bytes(_MAGIC + hashlib.sha256(body).digest() + body)
        except OSError as error:
            warnings.warn(f"compiled kernels cannot be kept: {error}", RuntimeWarning, stacklevel=2)

    def clear(self) -> int:
        """Remove all entries of the writable directory; returns how many."""
        count = 0
        for path in self._entries():
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
                count += 1
        for path in self.directory.glob(f"{_UNFINISHED}*") if count else ():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_S:  # a younger one is being written
                    path.unlink()
        return count

    def stats(self) -> tuple[int, int]:
        """Number of entries and their bytes on disk."""
        sizes = []
        for path in self._entries():
            with contextlib.suppress(FileNotFoundError):
                sizes.append(path.stat().st_size)
        return len(sizes), sum(sizes)

    def _entries(self) -> Iterator[Path]:
        return self.directory.glob(f"*{_SUFFIX}") if self.directory.is_dir() else iter(())

    def _create(self) -> None:
        if self.directory not in self._trusted:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check(self.directory)

    def _check(self, folder: Path) -> None:
        """Refuse a folder that somebody else owns or may write to."""
        if folder not in self._trusted:
            _refuse_foreign(folder, folder.stat())
            self._trusted.add(folder)


def _candidates(folder: Path, key: str, tag: str | None) -> list[Path]:
    """Files that may hold the entry, newest first."""
    if tag is not None:
        path = folder / f"{key}-{tag}{_SUFFIX}"
        return [path] if path.is_file() else []
    found = []
    for path in folder.glob(f"{key}-*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):  # another process may have cleared it
            found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _refuse_foreign(path: Path, state: os.stat_result) -> None:
    if not hasattr(os, "getuid"):
        return
    if state.st_uid not in (os.getuid(), 0):
        raise MetalMarlinError(
            f"cache {path} belongs to user {state.st_uid}, not to you; set {_ENV} to a folder of yours"
        )
    if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(state.st_mode)
        raise MetalMarlinError(
            f"cache {path} may be written by others (mode {mode:o}); compiled kernels from it are native code: "
            f"chmod go-w it"
        )


def _read(path: Path, *, repair: bool) -> tuple[dict[str, Any], bytes] | None:
    try:
        with path.open("rb") as file:
            _refuse_foreign(path, os.fstat(file.fileno()))
            data = file.read()
    except OSError:
        return None
    start = len(_MAGIC) + 32
    body = data[start:]
    if data[: len(_MAGIC)] == _MAGIC and hashlib.sha256(body).digest() == data[len(_MAGIC) : start]:
        plain = zlib.decompress(body)
        (size,) = struct.unpack_from("<I", plain)
        return json.loads(plain[4 : 4 + size]), plain[4 + size :]
    if repair:
        with contextlib.suppress(OSError):
            path.unlink()
    return None
