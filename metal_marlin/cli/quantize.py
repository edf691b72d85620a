"""``metal-marlin quantize`` and ``import``: checkpoints of ours, from plain ones and from those of other libraries."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.progress import Progress

from metal_marlin.cli.console import console, print_table, size
from metal_marlin.cli.models import load
from metal_marlin.errors import ArgumentError
from metal_marlin.formats import codec
from metal_marlin.integrations.replace import Report, replace_linear_layers

_WORST = 12  # layers shown


def run(
    source: str,
    target: Path,
    *,
    preset: str | None,
    format: str | None,
    group_size: int | None,
    scale: str,
    per_layer: list[str],
    force: bool,
    every: bool,
) -> None:
    """Quantise a model folder into another. Raises ArgumentError; the target appears when it is complete."""
    if preset is not None and (format is not None or group_size is not None):
        raise ArgumentError("give --preset, or --format and --group-size, not both")
    if format is not None:
        codec(format)
    if target.exists() and not force:
        raise ArgumentError(f"{target} exists; --force replaces it")
    rules = dict(_rule(text) for text in per_layer)
    model, tokenizer = load(source)
    chosen: dict[str, Any] = {"preset": preset or "default"}
    if format is not None or group_size is not None:
        chosen = {"format": format or "fp4", "group_size": group_size}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("quantising")
        report = replace_linear_layers(
            model,
            per_layer=rules,
            scale=scale,
            progress=lambda done, of, name: progress.update(task, completed=done, total=of, description=name),
            **chosen,
        )
    _save(model, tokenizer, target)
    _show(report, every)
    console.print(f"{target}: linear layers {size(report.bytes_before)} -> {size(report.bytes_after)}", markup=False)


def run_import(source: Path, target: Path) -> None:
    """Rewrite a checkpoint of another library. Raises ArgumentError."""
    from metal_marlin.integrations.transformers.importers import import_checkpoint

    found = import_checkpoint(source, target)
    formats = sorted(set(found.layers.values()))
    console.print(
        f"{target}: {len(found.layers)} layers of layout {found.layout} as {', '.join(formats)}; "
        f"{found.copied} tensors copied",
        markup=False,
    )


def _rule(text: str) -> tuple[str, str]:
    pattern, equals, spec = text.partition("=")
    if not (pattern and equals and spec):
        raise ArgumentError(f"--per-layer {text!r}: it is PATTERN=FORMAT[:GROUP]")
    return pattern, spec


def _save(model: Any, tokenizer: Any, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as made:
        folder = Path(made) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if target.exists():  # goes with the temporary folder, once the new one is in its place
            target.rename(Path(made) / "old")
        try:
            folder.rename(target)
        except OSError:
            if (Path(made) / "old").exists():
                (Path(made) / "old").rename(target)
            raise


def _show(report: Report, every: bool) -> None:
    """Layers by error, the worst first."""
    layers = sorted(report.layers, key=lambda layer: -layer.error)
    shown = layers if every else layers[:_WORST]
    rows = [
        [
            r.name,
            f"{r.format} g{r.group_size}",
            f"{r.bits_per_weight:.2f}",
            size(r.bytes_before),
            size(r.bytes_after),
            f"{r.error:.4f}",
        ]
        for r in shown
    ]
    print_table(["layer", "format", "bits", "before", "after", "error"], rows)
    if len(shown) < len(layers):
        console.print(f"{len(layers) - len(shown)} layers with smaller errors; --all shows them", markup=False)
    for name, why in report.skipped.items():
        console.print(f"skipped {name}: {why}", markup=False)
