"""How much of an MoE can be left out: quality against size."""
