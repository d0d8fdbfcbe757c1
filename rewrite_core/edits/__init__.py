"""Edits: what a user marks, and what follows from it."""
