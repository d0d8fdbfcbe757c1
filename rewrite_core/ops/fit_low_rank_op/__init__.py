"""The coefficients of a rank-R change: one nonlinear fit per output channel (paper, eq. 10 to 15)."""
