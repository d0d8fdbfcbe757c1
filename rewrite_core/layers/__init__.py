"""Layers: a generator is bound at one of them, and keys and values are read there."""
