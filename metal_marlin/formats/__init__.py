"""Quantisation formats: one codec a format, twin of the policy struct in ``src/formats``."""

CANONICAL = "canonical"  # layout tag of what files hold: row-per-output, little-endian, least significant code first
