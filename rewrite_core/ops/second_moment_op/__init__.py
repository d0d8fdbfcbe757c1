"""Second moment of keys: sum of k k^T over positions, in float64 (paper, section 3.2)."""
