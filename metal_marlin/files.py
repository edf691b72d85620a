"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, prefix: str = "", private: bool = False) -> Iterator[Path]:
    """An empty file to write to, in the same folder; it becomes ``path`` when the block ends, and is removed if that
    raises.

    Readers see the old file or the new one. ``prefix``: of the unfinished file's name. ``private``: for its owner only,
    else as new files are. Raises OSError as writing does.
    """
    target = Path(path)
    unfinished = target.parent / f"{prefix or f'.{target.name}.'}{secrets.token_hex(8)}"
    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600 if private else 0o666))
    try:
        yield unfinished
        unfinished.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise
