"""What a row is compiled for: a CPU with a resolved feature list, or an NVIDIA architecture."""

from __future__ import annotations

import functools
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from metal_marlin.errors import ArgumentError, NoDeviceError

# /proc/cpuinfo flag -> clang feature, for what the levels below do not contain and our kernels can use
_EXTRAS = {
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx512_vnni": "avx512vnni",
    "avx512vbmi": "avx512vbmi",
    "avx512_vbmi2": "avx512vbmi2",
    "avx_vnni": "avxvnni",
    "amx_tile": "amx-tile",
    "amx_bf16": "amx-bf16",
    "amx_int8": "amx-int8",
    "gfni": "gfni",
}
_V3 = frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave".split())
_V4 = frozenset("avx512f avx512bw avx512cd avx512dq avx512vl".split())
# what `parse` takes besides; clang would only warn of a feature that does not exist
_X86_FEATURES = frozenset(_EXTRAS.values()) | frozenset(
    "aes amx-complex amx-fp16 avx avx2 avx512bitalg avx512bw avx512cd avx512dq avx512f avx512ifma avx512vl "
    "avx512vpopcntdq avxifma avxneconvert avxvnniint16 avxvnniint8 bmi bmi2 f16c fma lzcnt movbe pclmul popcnt sha "
    "sse4.1 sse4.2 vaes vpclmulqdq xsave".split()
)
_ARM_EXTRAS = {"asimdhp": "fullfp16", "bf16": "bf16", "i8mm": "i8mm", "asimddp": "dotprod"}


_ARM_FEATURES = frozenset(_ARM_EXTRAS.values()) | frozenset("aes crc lse rdm sha2 sve sve2".split())
_OLDEST_SM = 80


@dataclass(frozen=True)
class Target:
    """kind "cpu" with arch x86-64-v3, x86-64-v4 or aarch64 and sorted extra features; or "cuda" with arch sm_NN[a];
    or "metal" (nothing is compiled here)."""

    kind: str
    arch: str
    features: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}{''.join(self.features)}"

    def portable(self) -> tuple[Target, ...]:
        """Other targets whose rows run on this one too, best first."""
        if self.kind == "cpu" and self.arch.startswith("x86-64"):
            levels = ("x86-64-v4", "x86-64-v3") if self.arch == "x86-64-v4" else ("x86-64-v3",)
            found = [Target("cpu", level) for level in levels]
        elif self.kind == "cuda":
            own = int(re.sub(r"\D", "", self.arch))
            numbers = sorted({own, 90, 89, 86, 80}, reverse=True)
            found = [Target("cuda", f"sm_{n}") for n in numbers if n <= own]
        else:
            found = [Target(self.kind, self.arch)]
        return tuple(t for t in found if t != self)

    @staticmethod
    def parse(text: str) -> Target:
        """From "cpu" (this machine's), "cpu:x86-64-v3+f16c", "cuda:sm_90a" or "metal". Raises ArgumentError."""
        if text == "cpu":
            return Target.host_cpu()
        if text in ("metal", "metal:apple"):
            return Target("metal", "apple")
        kind, _, rest = text.partition(":")
        arch, *features = rest.split("+")
        if kind == "cuda" and re.fullmatch(r"sm_\d{2,3}[af]?", rest):
            if int(re.sub(r"\D", "", rest)) < _OLDEST_SM:
                raise ArgumentError(f"target '{text}': sm_{_OLDEST_SM} is the oldest")
            return Target("cuda", rest)
        if kind == "cpu" and arch in ("x86-64-v3", "x86-64-v4", "aarch64"):
            known = _ARM_FEATURES if arch == "aarch64" else _X86_FEATURES
            unknown = sorted(set(features) - known)
            if unknown:
                raise ArgumentError(
                    f"target '{text}': {arch} has no feature '{unknown[0]}'; known: {', '.join(sorted(known))}"
                )
            return Target("cpu", arch, tuple(f"+{f}" for f in sorted(set(features))))
        raise ArgumentError(f"target '{text}': expected cpu, cpu:<level>[+feature…], cuda:sm_<NN> or metal")

    @staticmethod
    def host_cpu() -> Target:
        """This machine's CPU. Raises NoDeviceError below x86-64-v3 (half needs F16C) and on other architectures."""
        return _host_cpu()


@functools.lru_cache(maxsize=1)
def _host_cpu() -> Target:
    machine = platform.machine().lower()
    flags = _cpu_flags()
    if machine in ("aarch64", "arm64"):
        return Target("cpu", "aarch64", tuple(sorted(f"+{v}" for k, v in _ARM_EXTRAS.items() if k in flags)))
    if machine not in ("x86_64", "amd64"):
        raise NoDeviceError(f"the cpu device knows x86-64 and aarch64, not {machine}")
    return cpu_from_flags(flags)


def cpu_from_flags(flags: frozenset[str]) -> Target:
    """x86-64 target from the flags of /proc/cpuinfo. Raises NoDeviceError naming what is missing below x86-64-v3."""
    missing = sorted(_V3 - flags - ({"abm"} if "lzcnt" in flags else set()))
    if missing:
        raise NoDeviceError(f"this CPU is below x86-64-v3, which the cpu device needs: it lacks {', '.join(missing)}")
    extras = tuple(sorted(f"+{clang}" for flag, clang in _EXTRAS.items() if flag in flags))
    if flags >= _V4:
        return Target("cpu", "x86-64-v4", extras)
    return Target("cpu", "x86-64-v3", tuple(e for e in extras if "512" not in e))


def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        raise NoDeviceError("cannot read /proc/cpuinfo to learn what this CPU can do") from None
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.M)
    return frozenset(found[1].split()) if found else frozenset()
