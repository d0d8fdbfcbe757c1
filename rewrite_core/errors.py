"""Every exception and warning the library raises on its input. Each message is one sentence that says what to do."""

from __future__ import annotations


class RewriteCoreError(ValueError):
    """Base class: bad input to rewrite_core."""


class UnknownLayerError(RewriteCoreError, LookupError):
    """The generator has no layer of that name, or none of a kind that can be bound."""


class MaskError(RewriteCoreError):
    """A mask is empty or of the wrong type or shape."""


class SelectionError(RewriteCoreError, IndexError):
    """A selection points at a latent that does not exist, or an edit lacks a selection."""


class MismatchError(RewriteCoreError):
    """A second moment or rewrite belongs to another layer, model or set of latents."""


class NonFiniteError(RewriteCoreError):
    """NaN or infinity in activations, keys or weights."""


class RankError(RewriteCoreError):
    """The rank is below one or above what the layer or the context allows."""


class FileFormatError(RewriteCoreError):
    """A file is truncated, foreign, or of a version this library does not read."""


class SolverError(RewriteCoreError):
    """The solver asked for cannot solve this layer's problem."""


class UnderdeterminedWarning(UserWarning):
    """The fit has at least as many unknowns as pixels, so it meets the goal and may ruin everything else."""
