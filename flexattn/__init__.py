"""Fused attention from a few lines of Python."""
