"""Which key a query sees: segment ids, positions, causality and the sliding window.

A packed row of three documents and its padding, causal (`#` visible)::

    segment id   1 1 1 2 2 3 0
               1 # . . . . . .
               1 # # . . . . .
               1 # # # . . . .
               2 . . . # . . .
               2 . . . # # . .
               3 . . . . . # .
               0 . . . . . . .     padding sees nothing and nothing sees it
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

MASKED = -1e30
"""Logit of an invisible key, and lse of a query that sees nothing: far below any real logit, and finite, so that
merging two such results (ring attention) gives neither inf - inf nor NaN."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """The static part of an attention call.

    Attributes:
      causal: a query sees keys at its own position and before.
      window: number of positions a query sees, its own included; None is unlimited. Without `causal` the window reaches
        as far to the right.
      softcap: logits become `softcap * tanh(logits / softcap)`.
      scale: factor on `q · k`.
    """

    causal: bool
    window: int | None
    softcap: float | None
    scale: float


class Tokens(NamedTuple):
    """What the mask knows of each token: its document and its position."""

    q_segment_ids: Int[Array, "B T"]
    kv_segment_ids: Int[Array, "B S"]
    q_positions: Int[Array, "B T"]
    kv_positions: Int[Array, "B S"]


def visible(tokens: Tokens, causal: bool, window: int | None) -> Bool[Array, "B T S"]:
    """True where query t sees key s: same nonzero segment, and by position where causal or windowed."""
    q_segment, q_position = tokens.q_segment_ids[:, :, None], tokens.q_positions[:, :, None]
    kv_segment, kv_position = tokens.kv_segment_ids[:, None, :], tokens.kv_positions[:, None, :]
    see = (q_segment == kv_segment) & (q_segment != 0)
    if causal:
        see &= q_position >= kv_position
    if window is not None:
        see &= q_position - kv_position < window
        if not causal:
            see &= kv_position - q_position < window
    return see


def pad_tokens(tokens: Tokens, t: int, s: int) -> Tokens:
    """Lengthens the rows to `t` queries and `s` keys with padding tokens (segment 0)."""

    def pad(x, length):
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1])))

    return Tokens(*(pad(x, length) for x, length in zip(tokens, (t, s, t, s))))
