"""What an attention call must look like, and the defaults of the arguments left out."""

import jax
import jax.numpy as jnp

from dqjax.kernels.attention.mask import Tokens


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError unless q is [B,T,N,H], k and v are [B,S,K,H] and K divides N."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: expected q [B,T,N,H] and k, v [B,S,K,H], got {q.shape}, {k.shape} and {v.shape}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {k.shape[2]} key-value heads must divide {q.shape[2]} query heads")
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"attention: q, k and v need one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}")


def check_variant(window: int | None, softcap: float | None) -> None:
    """Raises ValueError for a window or cap that means nothing."""
    if window is not None and window < 1:
        raise ValueError(f"attention: window counts the query's own position, so it is at least 1; got {window}")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"attention: softcap must be positive, got {softcap}; None leaves the logits as they are")


def complete_tokens(
    batch: int,
    length_q: int,
    length_kv: int,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
) -> Tokens:
    """Fills in what was left out: one document a row, the query's ids for the keys, positions counted along the row.

    Raises:
      ValueError: ids or positions of the wrong shape; query ids alone where T != S; positions for one side alone where
        queries and keys are the same tokens.
    """
    if kv_segment_ids is None and length_q == length_kv and (q_positions is None) != (kv_positions is None):
        raise ValueError(
            "attention: queries and keys share their segment ids, so they are the same tokens; pass q_positions and "
            "kv_positions both, or neither to count along the row"
        )
    if kv_segment_ids is None:
        if q_segment_ids is not None and length_q != length_kv:
            raise ValueError(
                f"attention: {length_q} queries and {length_kv} keys cannot share segment ids; pass kv_segment_ids"
            )
        kv_segment_ids = q_segment_ids
    if q_segment_ids is None and kv_segment_ids is not None:
        raise ValueError("attention: kv_segment_ids without q_segment_ids; pass both or neither")

    def complete(name, given, length, default):
        if given is None:
            return jnp.broadcast_to(default, (batch, length)).astype(jnp.int32)
        if given.shape != (batch, length):
            raise ValueError(f"attention: {name} must be [{batch}, {length}], got {given.shape}")
        return given.astype(jnp.int32)

    return Tokens(
        complete("q_segment_ids", q_segment_ids, length_q, jnp.int32(1)),
        complete("kv_segment_ids", kv_segment_ids, length_kv, jnp.int32(1)),
        complete("q_positions", q_positions, length_q, jnp.arange(length_q)),
        complete("kv_positions", kv_positions, length_kv, jnp.arange(length_kv)),
    )
