"""Triton kernels, a file or a folder per op, imported when a backend uses them (installed as rewrite_core.kernels)."""
