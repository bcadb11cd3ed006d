"""Attention over packed rows: `attention`, and `make_plan` for the block ranges that all layers share."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.attention.cudnn import cudnn_attention, why_not_cudnn
from dqjax.kernels.attention.intervals import IntervalPlan, build_intervals, check_order
from dqjax.kernels.attention.mask import MASKED, Tokens, Variant
from dqjax.kernels.attention.mosaic_gpu import why_not_mosaic_gpu
from dqjax.kernels.attention.mosaic_gpu_backward import MOSAIC_GPU
from dqjax.kernels.attention.plan import Plan, build_plan
from dqjax.kernels.attention.reference import reference_attention
from dqjax.kernels.attention.shapes import check_shapes, check_variant, complete_tokens
from dqjax.kernels.attention.tpu_backward import TPU
from dqjax.kernels.attention.vjp import Kernel, attend
from dqjax.kernels.attention.xla import XLA
from dqjax.kernels.hopper import is_hopper
from dqjax.kernels.tuning.lookup import Problem, chosen
from dqjax.kernels.varying import vary, varying_axes

log = logging.getLogger(__name__)

KERNELS: dict[str, Kernel] = {"tpu": TPU, "mosaic_gpu": MOSAIC_GPU, "xla": XLA}
BACKENDS = ("reference", "cudnn", *KERNELS)

__all__ = ["BACKENDS", "MASKED", "Plan", "attention", "make_plan", "packed_backend"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    backend: str | None = None,
    plan: Plan | IntervalPlan | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """softmax(scale · q kᵀ) v over the keys that each query sees.

    Query t sees key s iff their segment ids are equal and not 0 and, where `causal`, q_positions[t] >= kv_positions[s]
    and, with a window, q_positions[t] - kv_positions[s] < window (|difference| < window if not causal).

    Args:
      q, k, v: one floating dtype; query head n reads key-value head n // (N / K). Products accumulate and the softmax
        runs in float32 at least.
      q_segment_ids: the document of each token, 0 for padding; None is one document a row without padding. Ids that
        come in order along the row let whole blocks be skipped; "mosaic_gpu" needs them so, and padding at the row's
        ends only: it raises where it can look at the ids and gives NaN where they are traced.
      kv_segment_ids: likewise for the keys; None repeats the queries' (T == S).
      q_positions, kv_positions: None counts along the row. For packed rows leave them out: inside a document the order
        is that of the row, and blocks are skipped more tightly than with positions that restart.
      causal, window, softcap: see `mask.Variant`.
      scale: None is 1/√H.
      backend: "tpu" (Pallas), "mosaic_gpu" (Pallas, Hopper), "xla" (blockwise), "cudnn" (rows that are one document
        each), "reference" (naive). None takes the first of "tpu", "mosaic_gpu", "cudnn" and "xla" that the default
        device and the call allow. A program compiled for another device must name its backend.
      plan: `make_plan` of the same tokens and mask; None makes one here.
      return_lse: also return lse, which is differentiable.

    Returns:
      The output in q's dtype, exactly 0 where a query sees nothing; and lse [B, T, N] in float32, log Σ exp(logits),
      finite (`MASKED`) where a query sees nothing. Padding gets no gradient and gives none, whatever it holds (with
      "mosaic_gpu": whatever finite values it and its cotangents hold).

    Raises:
      ValueError: shapes, an option or a plan that do not fit.
      NotImplementedError: `backend` cannot do what is asked.
    """
    check_shapes(q, k, v)
    check_variant(window, softcap)
    (B, T, _, H), S = q.shape, k.shape[1]
    tokens = complete_tokens(B, T, S, q_segment_ids, kv_segment_ids, q_positions, kv_positions)
    variant = Variant(causal, window, softcap, H**-0.5 if scale is None else scale)
    in_order = q_positions is None and kv_positions is None
    refusals = {
        "mosaic_gpu": why_not_mosaic_gpu(q.dtype, H, variant.scale, kv_positions=kv_positions is not None),
        "cudnn": why_not_cudnn(
            q, k, variant, segments=q_segment_ids is not None, positions=not in_order, return_lse=return_lse
        ),
    }
    if backend is None:
        backend = default_backend(jax.devices()[0], *(name for name, refusal in refusals.items() if refusal is None))
    elif refusals.get(backend):
        raise NotImplementedError(f"attention: backend {backend!r} cannot do {refusals[backend]}; use 'xla'")
    if backend == "cudnn":
        return cudnn_attention(q, k, v, variant)
    scrub = q_segment_ids is not None and backend != "mosaic_gpu"
    if scrub:
        # Padding may hold anything; a NaN there would pass through 0 · NaN in the products and their gradients.
        q = _zero_padding(q, tokens.q_segment_ids)
        k, v = (_zero_padding(x, tokens.kv_segment_ids) for x in (k, v))
    if backend == "reference":
        out, lse = reference_attention(q, k, v, tokens, variant)
    elif backend in KERNELS:
        if plan is None:
            plan = _plan(backend, tokens, causal, window, None, in_order, kv_segment_ids is None and T == S)
        else:
            _check_plan(plan, backend, T, S, causal, window)
        arrays = q, k, v, tokens, plan
        out, lse = attend(KERNELS[backend], variant, *vary(arrays, varying_axes(arrays)))
    else:
        raise ValueError(f"attention: unknown backend {backend!r}; there are {BACKENDS}")
    if scrub:
        out = _zero_padding(out, tokens.q_segment_ids)
        lse = jnp.where(tokens.q_segment_ids[..., None] != 0, lse, MASKED)
    return (out, lse) if return_lse else out


def make_plan(
    q_segment_ids: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"] | None = None,
    *,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    causal: bool = True,
    window: int | None = None,
    blocks: tuple[int, int] | None = None,
    backend: str | None = None,
) -> Plan | IntervalPlan:
    """The block ranges of a batch: make it once a step and pass it to `attention` in every layer.

    Args:
      q_segment_ids, kv_segment_ids, q_positions, kv_positions, causal, window: as `attention` will get them.
      blocks: tokens in a block of queries and in one of keys; None leaves the choice to backend and lengths.
        "mosaic_gpu" has its own.
      backend: the one that will get the plan; None is that of `attention` for bfloat16 heads of 128.

    Returns:
      A pytree whose arrays lead with B, for forward and backward alike; shard it like the batch.

    Raises:
      ValueError: shapes or options that do not fit.
    """
    check_variant(window, None)
    B, T = q_segment_ids.shape
    S = T if kv_segment_ids is None else kv_segment_ids.shape[1]
    tokens = complete_tokens(B, T, S, q_segment_ids, kv_segment_ids, q_positions, kv_positions)
    backend = packed_backend(jax.devices()[0], jnp.bfloat16, 128) if backend is None else backend
    in_order = q_positions is None and kv_positions is None
    return _plan(backend, tokens, causal, window, blocks, in_order, kv_segment_ids is None)


def default_blocks(backend: str, length_q: int, length_kv: int) -> tuple[int, int]:
    """Tokens in a block of queries and in one of keys: by the table of this kind of device, or by rule.

    TPU tiles are multiples of 128 lanes. In plain XLA small blocks skip more and large ones loop less: a row of 1024
    tokens in documents of 64, forward and backward on two CPU cores, took 7 ms with blocks of 64, 12 with 128, 17 with
    256 and 58 with one block of 1024.
    """
    if backend == "tpu":
        whole, sizes, rule = [-(-length // 128) * 128 for length in (length_q, length_kv)], (256, 512, 1024), 512
    else:
        whole, sizes = [length_q, length_kv], (64, 128, 256, 512)
        rule = 128 if jax.default_backend() == "cpu" else 512
    legal = dict.fromkeys((min(q, whole[0]), min(kv, whole[1])) for q in sizes for kv in sizes)
    # A plan is made before dtype and heads are known: one serves all layers.
    problem = Problem("attention", backend, None, None, None, length_q, length_kv)
    return chosen(problem, list(legal), (min(rule, whole[0]), min(rule, whole[1])))


def _plan(
    backend: str,
    tokens: Tokens,
    causal: bool,
    window: int | None,
    blocks: tuple[int, int] | None,
    in_order: bool,
    shared: bool,
) -> Plan | IntervalPlan:
    if backend == "mosaic_gpu":
        plan = build_intervals(tokens, causal=causal, window=window, shared=shared and in_order)
        check_order(plan)
        return plan
    block_q, block_kv = blocks or default_blocks(backend, tokens.q_segment_ids.shape[1], tokens.kv_segment_ids.shape[1])
    return build_plan(
        tokens, causal=causal, window=window, block_q=block_q, block_kv=block_kv, in_order=causal and in_order
    )


def _check_plan(
    plan: Plan | IntervalPlan, backend: str, length_q: int, length_kv: int, causal: bool, window: int | None
) -> None:
    """Raises ValueError where the plan was made for another mask, skipping blocks visible here, or another backend."""
    made_for = plan.length_q, plan.length_kv, plan.causal, plan.window
    if made_for != (length_q, length_kv, causal, window):
        raise ValueError(
            "attention: the plan was made for (T, S, causal, window) = "
            f"{made_for}, the call has {(length_q, length_kv, causal, window)}; make one for this mask"
        )
    if isinstance(plan, IntervalPlan) != (backend == "mosaic_gpu"):
        raise ValueError(f"attention: the plan is not one for backend {backend!r}; name the backend in make_plan too")


def _zero_padding(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return jnp.where(segment_ids[..., None, None] != 0, x, 0)


def packed_backend(device: Any, dtype: jax.typing.DTypeLike, head_size: int) -> str:
    """The backend that None stands for on a device for packed rows, which have no positions."""
    refusal = why_not_mosaic_gpu(dtype, head_size, head_size**-0.5, kv_positions=False)
    return default_backend(device, *([] if refusal else ["mosaic_gpu"]))


def default_backend(device: Any, *able: str) -> str:
    """The backend that None stands for on a device; logged once.

    Args:
      able: of "mosaic_gpu" and "cudnn", those that can do the call.
    """
    if device.platform == "tpu":
        return _choose("tpu", "tpu")
    if device.platform != "gpu":
        return _choose("xla", device.platform)
    usable = [name for name in able if name != "mosaic_gpu" or is_hopper(device)]
    return _choose(usable[0] if usable else "xla", device.device_kind or device.platform)


@functools.cache
def _choose(backend: str, place: str) -> str:
    log.info("attention: backend %r on %s", backend, place)
    return backend
