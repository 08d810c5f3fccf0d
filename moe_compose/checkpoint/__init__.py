"""How a checkpoint lies on disk, and nothing about what is in it."""
