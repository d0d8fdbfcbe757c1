"""Rewrites: an edit becomes a change of one layer's weight."""
