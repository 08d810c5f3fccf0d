"""Recovery of what surgery cost, without training."""
