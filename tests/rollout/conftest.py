"""Fixtures of these tests."""

from tests.tiny_models import load, tiny

__all__ = ["load", "tiny"]
