"""Adam on a layer's whole weight with projection onto directions, fused."""
