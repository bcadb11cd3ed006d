"""Attention of one new query a sequence against a cache of keys and values."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.mask import Variant
from dqjax.kernels.decode_attention.mosaic_gpu import mosaic_gpu_decode_attention, why_not_mosaic_gpu
from dqjax.kernels.decode_attention.reference import reference_decode_attention
from dqjax.kernels.decode_attention.tpu import tpu_decode_attention
from dqjax.kernels.decode_attention.xla import xla_decode_attention
from dqjax.kernels.hopper import is_hopper

log = logging.getLogger(__name__)

BACKENDS = {
    "reference": reference_decode_attention,
    "tpu": tpu_decode_attention,
    "mosaic_gpu": mosaic_gpu_decode_attention,
    "xla": xla_decode_attention,
}


def decode_attention(
    q: Float[Array, "B N H"],
    k_cache: Float[Array, "P S K H"],
    v_cache: Float[Array, "P S K H"],
    lengths: Int[Array, "B"],
    *,
    pages: Int[Array, "B n"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> Float[Array, "B N H"]:
    """softmax(scale · q kᵀ) v of one query a sequence over its cached keys.

    Sequence b has `lengths[b]` keys at positions 0 … lengths[b] - 1, the query's own among them: write it before the
    call::

        position  0 1 2 3 4 5 6 7
        lengths 5 # # # # # . . .
        window 3  . . # # # . . .

    Args:
      q: query head n reads key-value head n // (N / K).
      k_cache, v_cache: a row of S positions a sequence (P = B), or pages of S; slots past the length may hold old keys,
        but nothing that is not finite.
      lengths: 0 … S, or n · S with pages; a sequence of length 0 gets output 0.
      pages: position s of sequence b lies in slot s % S of page `pages[b, s // S]`, which sequences may share; numbers
        behind those that the length needs mean nothing.
      scale: None is 1/√H.
      softcap: logits become softcap · tanh(logits / softcap).
      window: number of latest keys that are seen; None is all.
      backend: "tpu" (Pallas; S a multiple of 16), "mosaic_gpu" (Pallas, Hopper; S a multiple of 8, or for pages of
        8192 / H), "xla" and "reference", which copy pages into rows; None is `default_backend`.

    Returns:
      The output in q's dtype. Not meant to be differentiated.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: `backend` cannot do what is asked.
    """
    (B, N, H), (P, _, K, _) = q.shape, k_cache.shape
    if k_cache.shape != v_cache.shape or (pages is None and P != B) or k_cache.shape[3] != H or N % K:
        raise ValueError(
            "decode_attention: expected q [B,N,H] and caches [B,S,K,H], or [P,S,K,H] with pages, with K dividing N, got "
            f"{q.shape}, {k_cache.shape} and {v_cache.shape}"
        )
    if pages is not None and (pages.ndim != 2 or pages.shape[0] != B):
        raise ValueError(f"decode_attention: pages must be [{B},n], a row for each sequence, got {pages.shape}")
    if lengths.shape != (B,):
        raise ValueError(f"decode_attention: lengths must be [{B}], got {lengths.shape}")
    if window is not None and window < 1:
        raise ValueError(f"decode_attention: window counts the query's own key, so it is at least 1; got {window}")
    if backend is None:
        backend = default_backend(jax.devices()[0], q.dtype, H, k_cache.shape[1])
    if backend not in BACKENDS:
        raise ValueError(f"decode_attention: unknown backend {backend!r}; there are {tuple(BACKENDS)}")
    variant = Variant(True, window, softcap, H**-0.5 if scale is None else scale)
    if pages is not None:
        pages = jnp.clip(pages.astype(jnp.int32), 0, P - 1)
        if backend in ("xla", "reference"):
            k_cache, v_cache = (x[pages].reshape(B, -1, K, H) for x in (k_cache, v_cache))
        else:
            return BACKENDS[backend](q, k_cache, v_cache, lengths, variant, pages)
    return BACKENDS[backend](q, k_cache, v_cache, lengths, variant)


def default_backend(device: Any, dtype: jax.typing.DTypeLike, head_size: int, slots: int) -> str:
    """The backend that None stands for on a device: the kernel for it, or "xla" where that cannot do the call.

    `slots` are those of a row, or of a page.
    """
    if device.platform == "tpu":
        return _choose("tpu", "tpu")
    fits = is_hopper(device) and why_not_mosaic_gpu(dtype, head_size, slots) is None
    return _choose("mosaic_gpu" if fits else "xla", device.device_kind)


@functools.cache
def _choose(backend: str, place: str) -> str:
    log.info("decode_attention: backend %r on %s", backend, place)
    return backend
