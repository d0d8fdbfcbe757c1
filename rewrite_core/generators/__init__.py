"""Generators of our own and the loaders of published checkpoints."""
