"""Solves with symmetric positive definite matrices: C^-1 K for second moments C (paper, eq. 14)."""
