"""Mending of scalar operands from the compiler's messages."""

from __future__ import annotations

from metal_marlin.msl.operands import mend, readable

MESSAGE = "error: scalar operand type has greater rank than the type of the vector element."


def line(where: str, ranges: str, operands: str, file: str = "k.metal") -> str:
    return f"{file}:{where}:{ranges}: {MESSAGE} ({operands})"


def test_both_orders_and_compound_assignment() -> None:
    text = "half4 a;\nx = a.xy * s;\ny = (s + 1) * f(a, b);\na *= s;\n"
    stderr = "\n".join(
        [
            line("9:1", "{2:5-2:9}{2:12-2:13}", "'half2' (vector of 2 'half' values) and 'float'"),
            line("10:1", "{3:5-3:12}{3:15-3:22}", "'float' and 'half4' (vector of 4 'half' values)"),
            line("11:1", "{4:1-4:2}{4:6-4:7}", "'half4' (vector of 4 'half' values) and 'float'"),
        ]
    )
    assert mend(text, stderr, "/lib") == (
        "half4 a;\nx = a.xy * ::metal::_operand<decltype(a.xy)>(s);\n"
        "y = ::metal::_operand<decltype(f(a, b))>((s + 1)) * f(a, b);\na *= ::metal::_operand<decltype(a)>(s);\n"
    )


def test_columns_count_bytes_and_ranges_may_span_lines() -> None:
    text = "/* é */ a * (s +\n 1);\n"
    stderr = line("1:1", "{1:10-1:11}{1:14-2:4}", "'half4' (vector of 4 'half' values) and 'float'")
    assert mend(text, stderr, "/lib") == "/* é */ a * ::metal::_operand<decltype(a)>((s +\n 1));\n"


def test_the_library_and_other_errors_are_left_alone() -> None:
    stderr = line("1:1", "{1:1-1:2}{1:5-1:6}", "'half4' (vector of 4 'half' values) and 'float'", "/lib/metal_math")
    assert mend("a * s", stderr, "/lib") is None
    assert mend("a * s", "k.metal:1:1: error: no such thing", "/lib") is None


def test_an_operand_inside_another_waits_for_the_next_round() -> None:
    text = "a * (b * s);"
    stderr = "\n".join(
        line("1:1", r, "'half4' (vector of 4 'half' values) and 'float'")
        for r in ("{1:1-1:2}{1:5-1:12}", "{1:6-1:7}{1:10-1:11}")
    )
    assert mend(text, stderr, "/lib") == "a * ::metal::_operand<decltype(a)>((b * s));"


def test_messages_lose_the_ranges() -> None:
    assert readable("k.metal:3:7:{1:1-1:2}{1:5-1:6}: error: no") == "k.metal:3:7: error: no"
