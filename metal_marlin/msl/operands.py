"""Scalar operands of vector operators, as Metal has them: `half4 * float` is a half4.

OpenCL refuses a scalar that ranks above the vector's elements, and only the compiler knows the types. So its
message says where: the scalar operand E of a vector V becomes `metal::_operand<decltype(V)>(E)`, and the text
is compiled again.
"""

from __future__ import annotations

import re

# The first puts the operands' {line:column-line:column} before the message; they count in the text itself,
# whatever its line markers say.
FLAGS = ("-fdiagnostics-print-source-range-info", "-ferror-limit=0")
ROUNDS = 12  # an operand inside another mended operand shows only after that one is mended
_RANGE = r"\{(\d+):(\d+)-(\d+):(\d+)\}"
_RANK = r"scalar operand type has greater rank than the type of the vector element\."
_REFUSED = re.compile(rf"^(?P<file>[^\n]*?):\d+:\d+:{_RANGE}{_RANGE}: error: {_RANK} \('(?P<first>[^\n]*)$", re.M)
_RANGES = re.compile(r"(:\d+:\d+:)(?:\{[^{}]*\})+:")


def readable(stderr: str) -> str:
    """The compiler's messages without the ranges."""
    return _RANGES.sub(r"\1", stderr)


def mend(text: str, stderr: str, stdlib: str) -> str | None:
    """`text` with the refused scalar operands converted, or None if `stderr` names none outside `stdlib`."""
    data = text.encode()
    starts = [0]
    for line in data.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    found: dict[tuple[int, int], bytes] = {}
    for message in _REFUSED.finditer(stderr):
        if message["file"].startswith(stdlib):
            continue
        at = [int(n) for n in message.groups()[1:9]]
        first, second = ((starts[a - 1] + b - 1, starts[c - 1] + d - 1) for a, b, c, d in (at[:4], at[4:]))
        vector, scalar = (first, second) if "(vector of" in message["first"].split(" and ")[0] else (second, first)
        found[scalar] = data[slice(*vector)]
    out, end = b"", 0
    for (a, b), vector_text in sorted(found.items()):
        if a >= end:
            out += data[end:a] + b"::metal::_operand<decltype(" + vector_text + b")>(" + data[a:b] + b")"
            end = b
    return (out + data[end:]).decode() if found else None
