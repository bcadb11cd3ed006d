"""Graders: from a completion to a score. See `types` for the one signature, `correct` and `mix` for the tables."""
