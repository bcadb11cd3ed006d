"""Evaluation: `evaluate` as a function, `python -m dqjax.eval` as a command."""

from dqjax.eval.run import Graded, evaluate

__all__ = ["Graded", "evaluate"]
