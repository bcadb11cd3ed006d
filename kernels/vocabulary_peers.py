"""The other implementations of the vocabulary's losses that the benchmark runs beside ours.

Full logits in XLA are what one writes without a kernel; in float64, on a few rows, they are what all candidates are
held against. Liger and Cut Cross-Entropy run where they are installed. All losses weigh each of the M rows by 1 / M.
"""

import importlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

log = logging.getLogger(__name__)

Loss = Callable[..., tuple[Float[Array, ""], Float[Array, "M"]]]

APPROXIMATE = ("cce-filtered", "liger-chunked")
"""Timed whatever their error: they leave out small gradients, or round the logits to bfloat16."""


def full_logits(labels: Int[Array, "M"], weight: float) -> dict[str, Loss]:
    """The losses by name, as functions of x, w and, for "jsd", of the teacher's x, each giving the weighed sum and a
    number a row."""

    def softmax(x, w):
        logits = jnp.einsum("MD,VD->MV", x, w, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        return logits - lse, lse[:, 0]

    def at_label(logp):
        return jnp.take_along_axis(logp, labels[:, None], axis=-1)[:, 0]

    def cross_entropy(x, w):
        logprob = at_label(softmax(x, w)[0])
        return -weight * jnp.sum(logprob), logprob

    def logprob(x, w):
        logp, lse = softmax(x, w)
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return weight * jnp.sum(at_label(logp) + lse + entropy), at_label(logp)

    def jsd(x, w, x_teacher):
        logp, logq = softmax(x, w)[0], jax.lax.stop_gradient(softmax(x_teacher, w)[0])
        logm = jnp.logaddexp(logp, logq) - jnp.log(2)
        terms = jnp.exp(logp) * (logp - logm) + jnp.exp(logq) * (logq - logm)
        divergence = 0.5 * jnp.sum(terms, axis=-1)
        return weight * jnp.sum(divergence), divergence

    return {"cross_entropy": cross_entropy, "logprob": logprob, "jsd": jsd}


def torch_losses(
    loss: str, x: Float[Array, "M D"], w: Float[Array, "V D"], labels: Int[Array, "M"], x_teacher: Float[Array, "M D"]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Gradients in x and w of "cross_entropy" (Liger; Cut Cross-Entropy without and with its default filter of small
    gradients) or "jsd" with β = ½ (Liger's fused loss, and its chunked one, which torch compiles).

    Raises:
      ImportError: none of them is installed.
    """
    import torch

    inputs = [torch.from_dlpack(a).requires_grad_() for a in (x, w)]
    marks, teacher = torch.from_dlpack(labels).long(), torch.from_dlpack(x_teacher)

    def graded(f):
        return lambda: dict(zip(("dx", "dw"), torch.autograd.grad(f(*inputs), inputs), strict=True))

    found = {}
    if loss == "cross_entropy":
        if cce := _module("cut_cross_entropy"):
            found["cce_exact"] = lambda x, w: cce.linear_cross_entropy(x, w, marks, filter_eps=None)
            found["cce-filtered"] = lambda x, w: cce.linear_cross_entropy(x, w, marks)
        if liger := _module("liger_kernel.transformers"):
            fused = liger.LigerFusedLinearCrossEntropyLoss()
            found["liger_cross_entropy"] = lambda x, w: fused(w, x, marks)
    if loss == "jsd":
        if liger := _module("liger_kernel.transformers"):
            divergence = liger.LigerFusedLinearJSD(jsd_beta=0.5)
            found["liger_jsd"] = lambda x, w: divergence(x, w, teacher, w.detach(), None)
        if liger := _module("liger_kernel.chunked_loss"):
            chunked = liger.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
            found["liger-chunked"] = lambda x, w: chunked(x, w, teacher, w.detach(), marks)
    if not found:
        raise ImportError(f"no peer of {loss} in torch is installed")
    return {name: graded(f) for name, f in found.items()}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        log.info("peer left out: %s", error)
        return None
