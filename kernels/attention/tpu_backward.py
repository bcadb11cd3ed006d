"""Attention on TPU, backward: one kernel for dq, one for dk and dv, each over its own order of the plan's blocks.

Nothing is added up across grid cells, so results do not depend on any order of execution. Tiles stand as in `tpu.py`,
keys down and queries across: lse and delta broadcast as rows, and dv = Pᵀ dO, dk = dLᵀ Q are plain products.
"""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from dqjax.kernels.attention.mask import Tokens, Variant
from dqjax.kernels.attention.plan import Plan
from dqjax.kernels.attention.tpu import LOG2E, PARAMS, Call, current_step, forward, logits_of, on_needed_tile, product
from dqjax.kernels.attention.vjp import Kernel, delta_of


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    tokens: Tokens,
    plan: Plan,
    variant: Variant,
    lse: Float[Array, "B T N"],
    out: Float[Array, "B T N H"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """dq, dk, dv by the formulas of `vjp.py`."""
    call = Call(q, k, tokens, plan, variant)
    operands = (
        *call.blocks_first([q, d_out], [k, v]),
        *map(call.scalars_first, (lse, delta_of(out, d_out, d_lse))),
        *call.token_rows,
    )
    inputs = [
        call.queries,
        call.queries,
        call.keys,
        call.keys,
        call.query_scalars,
        call.query_scalars,
        call.query_tokens,
        call.key_tokens,
    ]
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, call.group, variant),
        grid_spec=call.grid(
            plan.steps[:, 0],
            inputs=inputs,
            outputs=call.queries,
            scratch=[pltpu.VMEM((call.group, call.H, plan.block_q), jnp.float32)],
        ),
        out_shape=call.shape((call.B, call.N, call.T, call.H), q.dtype),
        compiler_params=PARAMS,
        cost_estimate=call.cost(products=3),
        name="attention_dq",
    )(plan.q_major.reshape(-1), *operands)
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, call.group, variant),
        grid_spec=call.grid(
            plan.steps[:, 1],
            inputs=inputs,
            outputs=[call.keys, call.keys],
            scratch=[pltpu.VMEM((plan.block_kv, call.H), jnp.float32)] * 2,
        ),
        out_shape=[call.shape((call.B, call.K, call.S, call.H), x.dtype) for x in (k, v)],
        compiler_params=PARAMS,
        cost_estimate=call.cost(products=4),
        name="attention_dkv",
    )(plan.kv_major.reshape(-1), *operands)
    return call.heads_last(dq, call.length_q), *(call.heads_last(x, call.length_kv) for x in (dk, dv))


TPU = Kernel(forward, backward)


def _dq_kernel(group, variant, steps, q, d_out, k, v, lse, delta, q_tokens, kv_tokens, dq, acc):
    step = current_step(steps)

    @pl.when(step.first == 1)
    def _():
        acc[...] = jnp.zeros_like(acc)

    def tile(see):
        for g in range(group):
            _, d_logits = _grade(g, k, v, q, d_out, lse, delta, see, variant)
            acc[g] += product(k[0, 0], d_logits.astype(k.dtype), "SH,ST->HT")

    on_needed_tile(step, variant, q_tokens, kv_tokens, tile)

    @pl.when(step.last == 1)
    def _():
        for g in range(group):
            dq[0, g] = (acc[g] * variant.scale).T.astype(dq.dtype)


def _dkv_kernel(group, variant, steps, q, d_out, k, v, lse, delta, q_tokens, kv_tokens, dk, dv, dk_acc, dv_acc):
    step = current_step(steps)

    @pl.when(step.first == 1)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    def tile(see):
        for g in range(group):
            weights, d_logits = _grade(g, k, v, q, d_out, lse, delta, see, variant)
            dv_acc[...] += product(weights.astype(d_out.dtype), d_out[0, g], "ST,TH->SH")
            dk_acc[...] += product(d_logits.astype(q.dtype), q[0, g], "ST,TH->SH")

    on_needed_tile(step, variant, q_tokens, kv_tokens, tile)

    @pl.when(step.last == 1)
    def _():
        dk[0, 0] = (dk_acc[...] * variant.scale).astype(dk.dtype)
        dv[0, 0] = dv_acc[...].astype(dv.dtype)


def _grade(g, k, v, q, d_out, lse, delta, see, variant):
    """Weights and gradient of the logits [s, t] of query head g, before the factor `scale`."""
    row = slice(g, g + 1)
    logits, slope = logits_of(k[0, 0], q[0, g], variant)
    weights = jnp.exp2(logits - lse[0, 0, row, :] * LOG2E)
    if see is not None:
        weights = jnp.where(see, weights, 0)
    d_weights = product(v[0, 0], d_out[0, g], "SH,TH->ST")
    return weights, weights * (d_weights - delta[0, 0, row, :]) * slope
