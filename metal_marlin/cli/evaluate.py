"""``metal-marlin eval``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from metal_marlin.cli.console import print_json, print_table
from metal_marlin.cli.models import load
from metal_marlin.errors import ArgumentError
from metal_marlin.quant.evaluate import evaluate


def run(
    model: str, text: Path, against: str | None, tokens: int, window: int, stride: int, device: str, as_json: bool
) -> None:
    """Print perplexity of ``model`` on ``text``, and how far it is from the model ``against``."""
    try:
        words = text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"--text {text}: not UTF-8 at byte {error.start}") from None
    ours, tokenizer = load(model, device)
    original = load(against, device)[0] if against else None
    ids = torch.tensor(tokenizer(words)["input_ids"])
    if tokens:
        ids = ids[:tokens]
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as progress:
        bar = progress.add_task("tokens", total=len(ids) - 1)
        found = evaluate(
            ours,
            ids,
            original=original,
            window=window,
            stride=stride,
            progress=lambda done, _: progress.update(bar, completed=done),
        )
    if as_json:
        print_json({"model": model, "text": str(text), "against": against, **asdict(found)})
        return
    headings, row = ["perplexity", "tokens"], [f"{found.perplexity:.3f}", str(found.tokens)]
    if found.kl is not None and found.agreement is not None:
        headings += ["KL from the original, nats", "same top token"]
        row += [f"{found.kl:.4f}", f"{found.agreement:.1%}"]
    print_table(headings, [row], right=tuple(headings))
    print(f"windows of {window} tokens, {stride} apart; each token predicted once")
