"""Statistics of a layer's keys, collected over many images."""
