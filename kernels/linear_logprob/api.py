"""Log-probabilities, cross-entropy and divergences straight from hidden states: M × V logits never exist.

On a mesh, call these inside `shard_map`, each device on its own rows:

    hidden states, labels, weights   split over the batch axes (data, fsdp), along M
    w                                whole on every device, or split by rows (vocabulary) over one axis: pass its name
    logprob, lse, entropy            split like the rows; equal on all shards of the vocabulary
    loss                             the sum over this device's rows: psum it over the batch axes

e.g. `shard_map(f, in_specs=(P(("data", "fsdp")), P("tensor"), P(("data", "fsdp"))), …)` with `axis_name="tensor"`.
Under the default `check_vma=True` gradients may be taken inside or outside; with `check_vma=False` outside only. Under
plain `jit` with a split batch results are the same, and no chunk gathers the batch; but the table's gradient is summed
over the devices once a chunk instead of once, and a table split by vocabulary is gathered. "mosaic_gpu" there gathers
whatever is split.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dqjax.kernels.hopper import is_hopper
from dqjax.kernels.linear_logprob import (
    mosaic_gpu_divergence,
    mosaic_gpu_logprob,
    mosaic_gpu_loss,
    over_rows,
    over_vocabulary,
)
from dqjax.kernels.linear_logprob.head import Head
from dqjax.kernels.linear_logprob.mosaic_gpu import why_not_mosaic_gpu
from dqjax.kernels.linear_logprob.objectives import CrossEntropy, Divergence
from dqjax.kernels.linear_logprob.over_rows import weighted_rows
from dqjax.kernels.linear_logprob.over_vocabulary import vocabulary_logprob
from dqjax.kernels.linear_logprob.reference import (
    reference_cross_entropy,
    reference_divergence,
    reference_logprob,
)
from dqjax.kernels.linear_logprob.teacher import TeacherHead, TopK
from dqjax.kernels.varying import varying_axes

log = logging.getLogger(__name__)

LOGPROB = {"mosaic_gpu": mosaic_gpu_logprob.MOSAIC_GPU, "xla": over_vocabulary.XLA}
CROSS_ENTROPY = {"mosaic_gpu": mosaic_gpu_loss.MOSAIC_GPU, "xla": over_rows.XLA}
DIVERGENCE = {"mosaic_gpu": mosaic_gpu_divergence.MOSAIC_GPU, "xla": over_rows.XLA}
BACKENDS = ("reference", "mosaic_gpu", "xla")

__all__ = ["BACKENDS", "TeacherHead", "TopK", "linear_cross_entropy", "linear_kl", "linear_logprob"]


def linear_logprob(
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    labels: Int[Array, "M"],
    *,
    vocab: int | None = None,
    temperature: float = 1.0,
    axis_name: str | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, "M"], Float[Array, "M"], Float[Array, "M"]]:
    """Log-probability of the label, lse and entropy of softmax(z), z = x wᵀ / temperature.

        logprob = z[label] - lse,   lse = log Σ exp(z),   entropy = -Σ softmax(z) log softmax(z)

    Differentiable in x and w with any cotangents of the three: what policy gradients need. Where the weights of the
    rows are known beforehand, `linear_cross_entropy` saves a quarter of the work.

    Args:
      x, w: bfloat16 or float32; products accumulate in float32. The gradient of w is in its dtype.
      labels: token ids; a row with a negative one is ignored: all three results 0, no gradient, whatever x holds.
      vocab: number of real tokens; the table's rows from there on are masked out. None: all are real.
      temperature: a positive Python number.
      axis_name: mesh axis over which the rows of w are split, inside `shard_map`; labels are global ids.
      backend: "reference" (full logits), "xla" (chunks), "mosaic_gpu" (Pallas, Hopper: the logits never leave the
        registers, and what is multiplied with their gradient stays with cuBLAS). None takes "mosaic_gpu" where the
        default device and the call allow, else "xla". A program compiled for another device must name its backend.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: `backend` cannot do what is asked.
    """
    _check(x, w, labels, "labels", vocab, temperature, axis_name)
    head = Head(vocab, temperature, axis_name)
    backend = _choose(backend, axis_name, why_not_mosaic_gpu(w, bool(varying_axes((x, w, labels)))))
    if backend == "reference":
        return reference_logprob(x, w, labels, head)
    return vocabulary_logprob(x, w, labels, head, LOGPROB[backend])


def linear_cross_entropy(
    x: Float[Array, "M D"],
    w: Float[Array, "V D"],
    labels: Int[Array, "M"],
    weight: Float[Array, "M"],
    *,
    vocab: int | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    axis_name: str | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    """loss = Σ weight · (-logprob + z_loss · lse²), and logprob [M] for the metrics.

    Gradients in x and w are formed in the forward pass and kept in the inputs' dtypes. `weight` is a constant to the
    derivative, and logprob carries none.

    Args:
      x, w, labels, vocab, temperature, axis_name, backend: see `linear_logprob`.
      weight: a row of weight 0, or with a negative label, has logprob 0 and exactly no gradient, whatever x holds.
      z_loss: weight of lse², which keeps the logits from drifting (PaLM, 2022, section 5).

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: `backend` cannot do what is asked.
    """
    _check(x, w, labels, "labels", vocab, temperature, axis_name)
    _check(x, w, weight, "weight", vocab, temperature, axis_name)
    head = Head(vocab, temperature, axis_name)
    weight = jnp.where(labels >= 0, jax.lax.stop_gradient(weight), 0)
    backend = _choose(backend, axis_name, why_not_mosaic_gpu(w, bool(varying_axes((x, w, labels)))))
    if backend == "reference":
        return reference_cross_entropy(x, w, labels, weight, z_loss, head)
    return weighted_rows(CrossEntropy(z_loss), head, x, w, weight, labels, None, CROSS_ENTROPY[backend])


def linear_kl(
    x_student: Float[Array, "M D"],
    w_student: Float[Array, "V D"],
    teacher: TeacherHead | TopK,
    weight: Float[Array, "M"],
    *,
    beta: float = 0.0,
    tail: str = "bucket",
    vocab: int | None = None,
    temperature: float = 1.0,
    axis_name: str | None = None,
    backend: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, "M"]]:
    """loss = Σ weight · divergence of student S and teacher T, and the divergence [M] for the metrics.

    With M = (1 - β) S + β T (generalised Jensen-Shannon, in TRL's convention; no temperature² factor):

        β = 0: KL(T‖S)     β = 1: KL(S‖T)     else: β KL(T‖M) + (1 - β) KL(S‖M)

    Against `TopK` the outcomes are the teacher's k tokens and one bucket of all others, whose mass under the teacher is
    what the k leave ("bucket") or nothing, with the k scaled to 1 ("renormalise"; β = 1 is then infinite).

    Gradients in x_student and w_student are formed in the forward pass; teacher and weight are constants.

    Args:
      x_student, w_student, temperature, axis_name, backend: see `linear_logprob`; the temperature is for both sides,
        and "mosaic_gpu" wants a `TeacherHead`.
      teacher: `TeacherHead` or `TopK`. A teacher's table is split over `axis_name` like the student's.
      weight: a row of weight 0 has divergence 0 and exactly no gradient, whatever it holds.
      beta: 0 … 1.
      tail: "bucket" or "renormalise", for `TopK`.
      vocab: number of tokens that both tables share, which come first in both; needed where their widths differ.

    Raises:
      ValueError: shapes or options that do not fit.
      NotImplementedError: `backend` cannot do what is asked.
    """
    _check(x_student, w_student, weight, "weight", vocab, temperature, axis_name)
    if not 0 <= beta <= 1:
        raise ValueError(f"linear_kl: beta goes from 0 (forward KL) to 1 (reverse KL), got {beta}")
    if tail not in ("bucket", "renormalise"):
        raise ValueError(f"linear_kl: tail is 'bucket' or 'renormalise', got {tail!r}")
    if isinstance(teacher, TopK):
        if tail == "renormalise" and beta == 1:
            raise ValueError("linear_kl: reverse KL to a renormalised top-k teacher is infinite; use tail='bucket'")
        if teacher.ids.shape != teacher.logprobs.shape or len(teacher.ids) != len(weight):
            raise ValueError(
                f"linear_kl: expected ids and logprobs [M, k], got {teacher.ids.shape} and {teacher.logprobs.shape}"
            )
    else:
        _check(teacher.x, teacher.w, weight, "weight", vocab, temperature, axis_name)
        if len(teacher.w) != len(w_student) and (vocab is None or axis_name is not None):
            raise ValueError(
                f"linear_kl: tables of {len(w_student)} and {len(teacher.w)} rows: pass vocab, the number of shared "
                "tokens, and where the tables are split, pad them to one width"
            )
    head = Head(vocab, temperature, axis_name)
    rows, table = (teacher, None) if isinstance(teacher, TopK) else teacher
    refusal = "a teacher's top k alone"
    if table is not None:
        varying = bool(varying_axes((x_student, w_student, weight, rows, table)))
        refusal = why_not_mosaic_gpu(w_student, varying) or why_not_mosaic_gpu(table, varying)
    backend = _choose(backend, axis_name, refusal)
    if backend == "reference":
        teacher, weight = jax.lax.stop_gradient((teacher, weight))
        return reference_divergence(x_student, w_student, teacher, weight, beta, tail, head)
    objective = Divergence(beta, tail)
    return weighted_rows(objective, head, x_student, w_student, weight, rows, table, DIVERGENCE[backend])


def _check(x, w, per_row, name, vocab, temperature, axis_name):
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or x.dtype != w.dtype or per_row.shape != x.shape[:1]:
        raise ValueError(
            f"linear_logprob: expected x [M,D] and w [V,D] of one dtype and {name} [M], got {x.dtype}{x.shape}, "
            f"{w.dtype}{w.shape} and {per_row.shape}"
        )
    if vocab is not None and (vocab < 1 or (axis_name is None and vocab > len(w))):
        raise ValueError(f"linear_logprob: vocab is the number of real tokens of {len(w)} table rows, got {vocab}")
    if not temperature > 0:
        raise ValueError(f"linear_logprob: temperature must be positive, got {temperature}")


def _choose(backend: str | None, axis_name: str | None, refusal: str | None) -> str:
    """The backend of a call; `refusal` is why "mosaic_gpu" cannot do it, or None."""
    backend = default_backend(jax.devices()[0], refusal) if backend is None else backend
    if backend not in BACKENDS:
        raise ValueError(f"linear_logprob: unknown backend {backend!r}; there are {BACKENDS}")
    if backend == "reference" and axis_name is not None:
        raise NotImplementedError("linear_logprob: the reference needs the whole vocabulary on one device; use 'xla'")
    if backend == "mosaic_gpu" and refusal is not None:
        raise NotImplementedError(f"linear_logprob: backend 'mosaic_gpu' cannot do {refusal}; use 'xla'")
    return backend


def default_backend(device: Any, refusal: str | None) -> str:
    """The backend that None stands for on a device; logged once."""
    return _log("mosaic_gpu" if is_hopper(device) and refusal is None else "xla", device.device_kind)


@functools.cache
def _log(backend: str, place: str) -> str:
    log.info("linear_logprob: backend %r on %s", backend, place)
    return backend
