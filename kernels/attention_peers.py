"""The other implementations of attention that the benchmark runs beside ours, where they are installed.

Each function returns {name: function}, or raises ImportError where its library is missing. A name is LIBRARY_how. JAX
peers take q [B, T, N, H], k and v [B, T, K, H] and the segment ids; torch peers hold tensors that share the same memory.
What a library needs besides (views in another order, keys copied to all heads, a mask) is made inside, so it counts;
offsets of the documents, which a data loader knows, are given.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Functions = dict[str, Callable[..., jax.Array]]

DETERMINISTIC = {"xla_gpu_exclude_nondeterministic_ops": True}
"""XLA's option that asks cuDNN for its deterministic backward pass."""

MOST_MASKED = 8192
"""The longest row for which the T × T mask, here for information, is run."""


def jax_attention(lengths: list[list[int]] | None, T: int) -> Functions:
    """cuDNN through JAX: plain causal for dense rows; for packed ones offsets and, the public way, a bool mask."""
    attend = jax.nn.dot_product_attention
    if lengths is None:
        return {"cudnn_jax": lambda q, k, v, _: attend(q, k, v, is_causal=True, implementation="cudnn")}
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    most = max(map(len, lengths))
    offsets = -np.ones((len(lengths), most + 1), np.int32)
    sizes = -np.ones((len(lengths), most), np.int32)
    for b, row in enumerate(lengths):
        offsets[b, : len(row) + 1], sizes[b, : len(row)] = np.r_[0, np.cumsum(row)], row

    def with_offsets(q, k, v, _):
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

    def with_mask(q, k, v, segment_ids):
        t = jnp.arange(T)
        mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & (t[:, None] >= t)
        return attend(q, k, v, mask=mask, implementation="cudnn")

    found = {"cudnn_jax_offsets": with_offsets}
    return found | ({"cudnn-mask_jax": with_mask} if T <= MOST_MASKED else {})


def flash_attention_3(lengths: list[list[int]] | None) -> Functions:
    """FlashAttention-3 for JAX (PyPI dew-flash-attn-cu13)."""
    import dew_flash_attn

    if lengths is None:
        return {"fa3_jax": lambda q, k, v, _: dew_flash_attn.flash_mha(q, k, v, is_causal=True)}
    flat = [length for row in lengths for length in row]
    starts = jnp.asarray(np.r_[0, np.cumsum(flat)], jnp.int32)

    def varlen(q, k, v, _):
        joined = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        return dew_flash_attn.flash_mha_varlen(*joined, starts, max(flat), is_causal=True).reshape(q.shape)

    return {"fa3_jax_varlen": varlen}


def tokamax_attention(lengths: list[list[int]] | None) -> Functions:
    """tokamax's Pallas kernels for Hopper. Packed rows need a mask that its public function does not take: the first
    key that each query sees, beside causality."""
    from tokamax._src.ops.attention.base import Mask
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every shape that it was not tuned for
    attend = PallasMosaicGpuFlashAttention()
    if lengths is None:
        return {"tokamax_mosaic_gpu": lambda q, k, v, _: attend(q, k, v, mask=Mask(is_causal=True))}
    starts = [np.repeat(np.r_[0, np.cumsum(row)[:-1]], row) for row in lengths]
    first = jnp.asarray(np.stack(starts)[:, None], jnp.int32)
    return {"tokamax_mosaic_gpu": lambda q, k, v, _: attend(q, k, v, mask=Mask(k_start=first, is_causal=True))}


def torch_attention(
    arrays: Mapping[str, jax.Array], lengths: list[list[int]] | None, segment_ids: jax.Array, backward: bool
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Attention in torch, forward alone or with its backward pass.

    Dense rows: cuDNN behind `scaled_dot_product_attention`; in its deterministic mode torch refuses cuDNN. Packed rows:
    flex_attention with a block mask, both compiled; and `varlen_attn` (FlashAttention-2), which documents grouped heads
    in torch 2.13, not in 2.11: with the keys as they are, and with a copy of them for every query head.

    Args:
      arrays: q, k, v and d_out.
    """
    import torch

    tensors = {name: torch.from_dlpack(x) for name, x in arrays.items()}
    inputs = [tensors[name].requires_grad_(backward) for name in ("q", "k", "v")]
    functions = _torch_dense() if lengths is None else _torch_packed(lengths, torch.from_dlpack(segment_ids))

    def graded(f):
        def run():
            out = f(*inputs)
            if not backward:
                return {"out": out}
            return dict(zip(("dq", "dk", "dv"), torch.autograd.grad(out, inputs, tensors["d_out"]), strict=True))

        return run

    return {name: graded(f) for name, f in functions.items()}


def _torch_dense():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def cudnn(q, k, v):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)

    return {"cudnn_torch": cudnn}


def _torch_packed(lengths, ids):
    import torch
    from torch.nn.attention import flex_attention
    from torch.nn.attention.varlen import varlen_attn

    B, T = ids.shape
    flat = [length for row in lengths for length in row]
    starts = torch.tensor(np.r_[0, np.cumsum(flat)], dtype=torch.int32, device=ids.device)
    attend = torch.compile(flex_attention.flex_attention, dynamic=False)
    make_mask = torch.compile(flex_attention.create_block_mask, dynamic=False)

    def see(b, h, t, s):
        return (ids[b, t] == ids[b, s]) & (t >= s)

    def flex(q, k, v):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        mask = make_mask(see, B, None, T, T, device=ids.device)
        return attend(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2)

    options = {"window_size": (-1, 0)}  # causal
    options |= {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

    def varlen(q, k, v):
        joined = (x.flatten(0, 1) for x in (q, k, v))
        return varlen_attn(*joined, starts, starts, max(flat), max(flat), **options).reshape(q.shape)

    def expanded(q, k, v):
        return varlen(q, *(x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v)))

    return {"flex_attention": flex, "torch-varlen": varlen, "torch-varlen_expanded": expanded}
