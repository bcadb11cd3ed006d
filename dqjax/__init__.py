"""dqjax: distil, reward and reinforce small reasoning models in JAX."""

__version__ = "0.1.0"
