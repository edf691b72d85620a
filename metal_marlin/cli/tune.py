"""``metal-marlin tune``: time the kernels of products with quantised weights, and write the table that is then used."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import torch

from metal_marlin.cli.console import console, print_json, print_table
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import CANONICAL, MMA16, codec, operands
from metal_marlin.ops import packed, packed_sparse
from metal_marlin.ops.marlin_gemm import is_hopper
from metal_marlin.ops.tuned import Problem
from metal_marlin.ops.tuning import TOKENS, Measured, Session, tune_shape
from metal_marlin.ops.weights import KEYS
from metal_marlin.runtime.device import resolve_device

_SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # as integrations/transformers/fusion.py fuses


def run(
    model: str,
    shapes: list[str] | None,
    device: str,
    formats: list[str] | None,
    dtypes: list[str] | None,
    group: int,
    tokens: list[int] | None,
    layouts: list[str] | None,
    sparse: bool,
    out: Path | None,
    as_json: bool,
) -> int:
    """Exit status: 0. What was measured is kept when a later size fails or the user interrupts."""
    formats, dtypes, tokens = formats or ["fp4"], dtypes or ["half"], tokens or list(TOKENS)
    sizes = [*map(_size, shapes or []), *(model_shapes(model) if model else [])]
    if not sizes:
        raise ArgumentError("name a model, or sizes with --shape NxK")
    names = {word: dtype for dtype, word in KEYS.items()}
    if wrong := [d for d in dtypes if d not in names]:
        raise ArgumentError(f"--dtype {wrong[0]}: it is one of {', '.join(names)}")
    if wrong_tokens := [t for t in tokens if t not in TOKENS]:
        raise ArgumentError(f"--tokens {wrong_tokens[0]}: measured are {', '.join(map(str, TOKENS))}")
    if wrong_layouts := [name for name in layouts or [] if name not in (CANONICAL, MMA16)]:
        raise ArgumentError(f"--layout {wrong_layouts[0]}: it is {CANONICAL} or {MMA16}")
    if sparse and CANONICAL in (layouts or []):
        raise ArgumentError(f"--layout {CANONICAL}: of sparse weights {MMA16} alone has kernels to choose from")
    where = torch.device(str(resolve_device(device or None)))
    session = Session(out)
    written: list[Path] = []
    try:
        for format in formats:
            for dtype in dtypes:
                for N, K in dict.fromkeys(sizes):
                    _shape(session, format, names[dtype], N, K, group, tokens, layouts, sparse, where, as_json)
    finally:
        written = session.save()
    if as_json:
        print_json([_row(m) for m in session.measured])
    for path in written if not as_json else ():
        console.print(f"written to {path}", soft_wrap=True)
    return 0


def _shape(
    session: Session,
    format: str,
    dtype: torch.dtype,
    N: int,
    K: int,
    group: int,
    tokens: list[int],
    layouts: list[str] | None,
    sparse: bool,
    device: torch.device,
    quiet: bool,
) -> None:
    name, _, zeros = format.partition(":")
    form = codec(name)
    zeros = zeros or form.zero_kinds[0]
    groups = [g for g in (group, *form.groups) if g in form.groups and not (sparse and g < operands.SPARSE_GROUP)]
    if not groups or K % form.per_word:
        console.print(f"{N}x{K}: left out, {name} has no such K or groups")
        return
    scales = dtype if form.scale_kind == "float" else form.scale_dtypes[0]
    problem = Problem(name, zeros, dtype, scales, N, K)
    rows = packed_sparse.ROWS if sparse else packed.ROWS
    for layout in [MMA16] if sparse else layouts or _held(problem, device):
        if layout == MMA16 and not rows.take(problem):
            console.print(f"{problem}: left out, it has no rows in layout {MMA16}")
            continue
        op = rows.op if layout == MMA16 else "linear"
        lines = []
        for M in tokens:
            found = tune_shape(session, op, problem, M, groups[0], device)
            if found is not None:
                best, rest = found.times[found.chosen], sorted(found.times.items(), key=lambda item: item[1])
                others = ", ".join(f"{k} {t:.1f}" for k, t in rest if k != found.chosen)
                lines.append([str(M), found.chosen, f"{best:.1f}", others])
        if lines and not quiet:
            said = "" if layout == CANONICAL else f", {'2:4 sparse, ' if sparse else ''}layout {layout}"
            console.print(f"{problem} on {device}{said}")
            print_table(["tokens", "kernel", "µs", "others"], lines, right=("tokens", "µs"), whole="kernel")


def _held(p: Problem, device: torch.device) -> list[str]:
    """The layouts that layers may hold the weight in."""
    hopper = device.type == "cuda" and is_hopper(device.index or 0)
    return [CANONICAL, *([MMA16] if hopper and packed.ROWS.take(p) else [])]


def _row(found: Measured) -> dict[str, object]:
    return {**asdict(found), "problem": str(found.problem)}


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise ArgumentError(f"--shape {text}: give NxK, rows and columns of a weight, such as 4096x14336")
    return int(match[1]), int(match[2])


def model_shapes(model: str) -> list[tuple[int, int]]:
    """(N, K) of the linear layers of a transformers model, those that are fused together as one. Reads its config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    found: dict[tuple[int, int], None] = {}
    for module in net.modules():
        linears = {n: c for n, c in module.named_children() if isinstance(c, torch.nn.Linear)}
        for shared in _SHARED:
            if all(name in linears for name in shared):
                layers = [linears.pop(name) for name in shared]
                found[(sum(layer.out_features for layer in layers), layers[0].in_features)] = None
        found |= {(layer.out_features, layer.in_features): None for layer in linears.values()}
    return list(found)
