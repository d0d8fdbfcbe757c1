"""Evaluation: what a change did, without ground truth, and which layer and rank hold a rule."""
