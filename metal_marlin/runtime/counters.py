"""How often each kernel was launched in this process: what shows that a model ran in our kernels."""

from __future__ import annotations

import itertools
import threading
from collections import Counter

_lock = threading.Lock()


class Launches:
    """Counts calls of ``tick``, which is atomic, so that threads need no lock on the hot path."""

    __slots__ = ("_before", "_reads", "tick")

    def __init__(self) -> None:
        self.tick = itertools.count().__next__
        self._reads = self._before = 0

    def read(self, reset: bool) -> int:
        """Launches since the last reset. The caller holds the lock."""
        total = self.tick() - self._reads  # reading is a tick too
        self._reads += 1
        count = total - self._before
        if reset:
            self._before = total
        return count


_launches: dict[str, Launches] = {}


def of(kernel: str) -> Launches:
    """The counter of all kernels of this name, whatever their library and device."""
    return _launches.setdefault(kernel, Launches())


def counters(*, reset: bool = False) -> Counter[str]:
    """Launches by kernel name since the start or the last reset; kernels that were not launched are left out.

    A launch captured in a CUDA graph counts once, its replays not at all. ``reset`` starts again from 0.
    """
    with _lock:
        counts = {name: launches.read(reset) for name, launches in list(_launches.items())}
    return Counter({name: count for name, count in counts.items() if count})


def reset_counters() -> None:
    """Start counting again from 0."""
    counters(reset=True)
