"""What the benchmark holds its candidates against: part of each problem from the definition, in float64."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Part = dict[str, np.ndarray]
"""Results by name, cut down to the part that was computed."""

TOLERANCE = 2.0**-6
"""Relative error of a bfloat16 candidate that counts as right."""


def relative_error(got: dict[str, Any], want: Part) -> float:
    """The largest ‖got - want‖ / ‖want‖ of the tensors that are in both, JAX's or torch's; NaN where one is."""
    errors = [
        np.linalg.norm(_host(x) - want[name]) / np.linalg.norm(want[name]) for name, x in got.items() if name in want
    ]
    return float(np.max(errors, initial=0.0))


def _host(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64) if isinstance(x, jax.Array) else x.detach().double().cpu().numpy()


def attention_head(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    d_out: Float[Array, "B T N H"],
    segment_ids: Int[Array, "B T"],
) -> Part:
    """Causal attention of the first row's first key-value head, and its gradients.

    With p = softmax(scale · q kᵀ) over the keys of the query's own document up to itself, and out = p v:

        dv = pᵀ d_out     dz = scale · p ⊙ (d_out vᵀ - Σ d_out ⊙ out)     dq = dz k     dk = dzᵀ q

    Returns:
      out and dq [T, G, H], dk and dv [T, H].
    """
    G = q.shape[2] // k.shape[2]
    with jax.enable_x64(True):
        wide = (x[0].astype(jnp.float64) for x in (q[:, :, :G], k[:, :, 0], v[:, :, 0], d_out[:, :, :G]))
        results = _attention_head(*wide, segment_ids[0])
        return {name: np.asarray(x) for name, x in zip(("out", "dq", "dk", "dv"), results, strict=True)}


@jax.jit
def _attention_head(q, k, v, d_out, segments):
    T, _, H = q.shape
    block = math.gcd(T, 256)

    def step(sums, t):
        q_block, d_block = q[t], d_out[t]
        see = (segments[t][:, None] == segments) & (t[:, None] >= jnp.arange(T))
        logits = jnp.where(see[:, None], H**-0.5 * jnp.einsum("TGH,SH->TGS", q_block, k), -jnp.inf)
        p = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("TGS,SH->TGH", p, v)
        dp = jnp.einsum("TGH,SH->TGS", d_block, v)
        dz = H**-0.5 * p * (dp - jnp.sum(d_block * out, axis=-1, keepdims=True))
        dk, dv = (jnp.einsum("TGS,TGH->SH", of, by) for of, by in ((dz, q_block), (p, d_block)))
        return (sums[0] + dk, sums[1] + dv), (out, jnp.einsum("TGS,SH->TGH", dz, k))

    (dk, dv), (out, dq) = jax.lax.scan(step, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(T).reshape(-1, block))
    return out.reshape(q.shape), dq.reshape(q.shape), dk, dv


def decode_sequence(q: Float[Array, "B N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]) -> Part:
    """Attention of the first sequence's query over its whole cache: out [N, H]."""
    with jax.enable_x64(True):
        q, k, v = (x[0].astype(jnp.float64) for x in (q, k, v))
        grouped = q.reshape(k.shape[1], -1, q.shape[-1])
        p = jax.nn.softmax(q.shape[-1] ** -0.5 * jnp.einsum("KGH,SKH->KGS", grouped, k), axis=-1)
        return {"out": np.asarray(jnp.einsum("KGS,SKH->KGH", p, v).reshape(q.shape))}


def vocabulary_rows(loss: Callable[..., Any], x: Float[Array, "P D"], w: Float[Array, "V D"], *more: jax.Array) -> Part:
    """A loss of a few rows from their full logits, `loss(x, w, *more)` giving the sum and a number a row.

    Returns:
      per_row [P] and dx [P, D], the gradient in x.
    """
    with jax.enable_x64(True):
        wide = [a.astype(jnp.float64) for a in (x, w, *more)]
        dx, per_row = jax.jit(jax.grad(loss, has_aux=True))(*wide)
        return {"per_row": np.asarray(per_row), "dx": np.asarray(dx)}
