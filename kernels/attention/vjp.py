"""The derivative of attention, wired once for every backend that brings its own forward and backward.

With P = softmax(L), O = P V and cotangents dO and dlse:

    dV = Pᵀ dO
    dP = dO Vᵀ
    dL = P ∘ (dP - δ),  δ_t = Σ_h dO_th O_th - dlse_t
    dQ = scale · dL K,  dK = scale · dLᵀ Q

(Dao, FlashAttention-2, 2023, algorithm 2; δ takes dlse in because ∂lse/∂L = P.) P is recomputed from lse.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dqjax.kernels.attention.intervals import IntervalPlan
from dqjax.kernels.attention.mask import Tokens, Variant
from dqjax.kernels.attention.plan import Plan


class Kernel(NamedTuple):
    """A backend.

    Attributes:
      forward: (q, k, v, tokens, plan, variant) -> (out, lse).
      backward: (q, k, v, tokens, plan, variant, lse, out, d_out, d_lse) -> (dq, dk, dv).
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend(
    kernel: Kernel,
    variant: Variant,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    plan: Plan | IntervalPlan,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Output and lse by `kernel.forward`, differentiated by `kernel.backward`.

    Both results are named for rematerialisation: a policy that saves "attention_out" and "attention_lse"
    (`jax.checkpoint_policies.save_only_these_names`) keeps the backward pass from running the forward kernel again.
    """
    return kernel.forward(q, k, v, tokens, plan, variant)


def _attend_forward(kernel, variant, q, k, v, tokens, plan):
    out, lse = kernel.forward(q, k, v, tokens, plan, variant)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, tokens, plan, out, lse)


def _attend_backward(kernel, variant, saved, cotangents):
    q, k, v, tokens, plan, out, lse = saved
    d_out, d_lse = cotangents
    dq, dk, dv = kernel.backward(q, k, v, tokens, plan, variant, lse, out, d_out, d_lse)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


attend.defvjp(_attend_forward, _attend_backward)


def delta_of(
    out: Float[Array, "B T N H"], d_out: Float[Array, "B T N H"], d_lse: Float[Array, "B T N"]
) -> Float[Array, "B T N"]:
    """δ as above, for a backend whose kernels take it ready."""
    return jnp.einsum("BTNH,BTNH->BTN", d_out, out, preferred_element_type=d_lse.dtype) - d_lse
