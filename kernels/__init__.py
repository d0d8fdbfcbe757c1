"""Triton kernels, one file per op, imported when a backend uses them (installed as rewrite_core.kernels)."""
