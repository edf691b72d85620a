"""The ``metal-marlin`` command."""

from metal_marlin.cli.commands import app, main

__all__ = ["app", "main"]
