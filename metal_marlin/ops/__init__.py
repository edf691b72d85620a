"""Torch ops over the kernels, one module per family."""
