"""Layers: drop-in modules over the ops."""
