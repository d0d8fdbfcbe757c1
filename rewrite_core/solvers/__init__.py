"""Solvers: find the coefficients Lambda of a rank-R change W1 = W0 + Lambda D (paper, eq. 10 to 15)."""
