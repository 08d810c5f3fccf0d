"""Fixtures of the tests about checkpoints."""

from fake_hub import hub

__all__ = ["hub"]
