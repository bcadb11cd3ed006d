"""The other implementations that the benchmark runs beside ours, where they are installed.

Each function returns {name: function}, or raises ImportError where its library is missing. JAX peers take the arrays of
the case; torch peers close over tensors with the same values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def jax_attention(lengths: list[list[int]] | None, segment_ids: jax.Array) -> dict[str, Callable[..., Any]]:
    """cuDNN through JAX: plain causal for dense rows; for packed ones offsets and, the public way, a bool mask."""
    attend = jax.nn.dot_product_attention
    if lengths is None:
        return {"cudnn_jax": lambda q, k, v: attend(q, k, v, is_causal=True, implementation="cudnn")}
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    most = max(map(len, lengths))
    offsets = -np.ones((len(lengths), most + 1), np.int32)
    sizes = -np.ones((len(lengths), most), np.int32)
    for b, row in enumerate(lengths):
        offsets[b, : len(row) + 1], sizes[b, : len(row)] = np.r_[0, np.cumsum(row)], row

    def with_offsets(q, k, v):
        return dot_product_attention(
            q,
            k,
            v,
            q_seqlen=jnp.asarray(sizes),
            kv_seqlen=jnp.asarray(sizes),
            q_offsets=jnp.asarray(offsets),
            kv_offsets=jnp.asarray(offsets),
            scale=q.shape[-1] ** -0.5,
            mask_type=MaskType.PADDING_CAUSAL,
        )

    def with_mask(q, k, v):
        mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & jnp.tril(
            jnp.ones((q.shape[1],) * 2, bool)
        )
        return attend(q, k, v, mask=mask, implementation="cudnn")

    return {"cudnn_jax_offsets": with_offsets, "cudnn_jax_bool_mask": with_mask}


def flash_attention_3(lengths: list[list[int]] | None) -> dict[str, Callable[..., Any]]:
    """FlashAttention-3 for JAX (PyPI dew-flash-attn-cu13)."""
    import dew_flash_attn

    if lengths is None:
        return {"fa3_jax": lambda q, k, v: dew_flash_attn.flash_mha(q, k, v, is_causal=True)}
    flat = [length for row in lengths for length in row]
    starts = jnp.asarray(np.r_[0, np.cumsum(flat)], jnp.int32)

    def varlen(q, k, v):
        joined = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        return dew_flash_attn.flash_mha_varlen(*joined, starts, max(flat), is_causal=True).reshape(q.shape)

    return {"fa3_jax_varlen": varlen}


def torch_attention(
    arrays: dict[str, np.ndarray], lengths: list[list[int]] | None, segment_ids: np.ndarray, backward: bool
) -> dict[str, Callable[[], Any]]:
    """flex_attention with a block mask for packed rows, cuDNN through torch for dense ones; both compiled by torch."""
    import torch
    from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

    tensors = (torch.tensor(arrays[name], device="cuda", dtype=torch.bfloat16) for name in ("q", "k", "v", "d_out"))
    q, k, v, d_out = (x.transpose(1, 2) for x in tensors)
    inputs = [x.contiguous().requires_grad_(backward) for x in (q, k, v)]

    def graded(f):
        def run():
            out = f(*inputs)
            return torch.autograd.grad(out, inputs, d_out) if backward else out

        return run

    if lengths is None:

        def cudnn(q, k, v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return {"cudnn_torch": graded(cudnn)}
    ids = torch.tensor(segment_ids, device="cuda")

    def see(b, h, t, s):
        return (ids[b, t] == ids[b, s]) & (t >= s)

    B, T = ids.shape
    compiled = torch.compile(flex_attention.flex_attention)
    make_mask = torch.compile(flex_attention.create_block_mask)
    return {
        "flex_attention": graded(
            lambda q, k, v: compiled(q, k, v, block_mask=make_mask(see, B, None, T, T), enable_gqa=True)
        )
    }


def torch_cross_entropy(x: np.ndarray, w: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Liger's fused linear cross-entropy and Cut Cross-Entropy, exact and with its default gradient filter."""
    import torch

    inputs = [torch.tensor(a, device="cuda", dtype=torch.bfloat16).requires_grad_() for a in (x, w)]
    marks = torch.tensor(labels, device="cuda", dtype=torch.int64)

    def graded(loss):
        return lambda: torch.autograd.grad(loss(*inputs), inputs)

    found = {}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = graded(lambda x, w: liger(w, x, marks))
    except ImportError:
        pass
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        found["cce_exact"] = graded(lambda x, w: cce(x, w, marks, impl="cce_exact"))
        found["cce_filtered"] = graded(lambda x, w: cce(x, w, marks))
    except ImportError:
        pass
    if not found:
        raise ImportError("neither liger_kernel nor cut_cross_entropy is installed")
    return found
