"""White-box distillation: the student learns the teacher's distribution, not only the token it chose."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from pydantic import Field, model_validator

from dqjax.config import Section
from dqjax.losses.cross_entropy import cross_entropy
from dqjax.losses.distillation import head_divergence, top_k_divergence
from dqjax.sharding import Rules
from dqjax.types import Batch, LanguageModel, Loss, Mean, Metrics, Params

Tail = Literal["bucket", "renormalise"]


class TeacherConfig(Section):
    """One teacher; a bare text is its `model`.

    Exactly one of:
      model: a folder as `model.init_from` takes it: its weights lie on the mesh beside the student's.
      cache: a folder of `python -m dqjax.teacher_logits`: its top-k log-probabilities by sample.

    weight: its share of the loss; those of all teachers sum to 1.
    """

    model: str | None = None
    cache: str | None = None
    weight: float = Field(1.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, values: Any) -> Any:
        return {"model": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _one_kind(self):
        if (self.model is None) == (self.cache is None):
            raise ValueError(f"a teacher has one of model, cache; got {'both' if self.model else 'neither'}")
        return self


class OnPolicyConfig(Section):
    """on_policy: learn from the student's own answers too, as GKD does (https://arxiv.org/abs/2306.13649, algorithm 1).

    fraction: chance of a batch to have its answers sampled anew (GKD's λ). max_new_tokens: the limit of a sample; what
    does not fit into a row behind its prompt is cut. temperature: of sampling. decode_rows: sequences decoded together [D].
    """

    fraction: float = Field(0.5, gt=0, le=1)
    max_new_tokens: int = Field(1024, ge=1)
    temperature: float = Field(1.0, gt=0)
    decode_rows: int = Field(64, ge=1)


class DistillConfig(Section):
    """objective: white-box distillation. The forms are GKD's and Hinton's; which of them is the default is ours [D].

    teachers: whose distributions are learnt; with several, the loss is the mean of theirs by `weight`.
    loss: `forward_kl` KL(T‖S); `reverse_kl` KL(S‖T); `jsd`, TRL's generalised Jensen-Shannon divergence by `beta`;
      `hinton` alpha · T² · KL(T‖S) + (1 − alpha) · cross-entropy, T the temperature.
    beta: of `jsd`: towards 0 it behaves as forward KL, towards 1 as reverse KL; 0.5 is TRL's.
    alpha: of `hinton`.
    temperature: softens teacher and student alike.
    tail: what a cached teacher's other tokens are: one `bucket` with the mass left, or nothing (`renormalise`).
    on_policy: the student's own answers beside the texts; needs teachers that are models.
    """

    kind: Literal["distill"] = "distill"
    teachers: tuple[TeacherConfig, ...] = Field(min_length=1)
    loss: Literal["forward_kl", "reverse_kl", "jsd", "hinton"] = "forward_kl"
    beta: float = Field(0.5, gt=0, lt=1)
    alpha: float = Field(0.5, ge=0, le=1)
    temperature: float = Field(1.0, gt=0)
    tail: Tail = "bucket"
    on_policy: OnPolicyConfig | None = None

    @model_validator(mode="after")
    def _fits(self):
        if abs(sum(weights := [teacher.weight for teacher in self.teachers]) - 1) > 1e-6:
            raise ValueError(f"teachers: expected weights that sum to 1, got {weights}")
        if self.tail == "renormalise" and self.loss == "reverse_kl" and any(teacher.cache for teacher in self.teachers):
            raise ValueError("tail: reverse KL to a renormalised top-k teacher is infinite; use bucket")
        if self.on_policy and any(teacher.cache for teacher in self.teachers):
            raise ValueError("on_policy: a cache holds nothing of what the student will say; give teachers as models")
        if self.on_policy and self.loss == "hinton":
            raise ValueError("on_policy: hinton's cross-entropy would teach the student its own samples; use another loss")
        return self

    def divergence(self) -> float:
        """β of the divergence: 0 forward, 1 reverse."""
        return {"forward_kl": 0.0, "hinton": 0.0, "reverse_kl": 1.0, "jsd": self.beta}[self.loss]


@dataclasses.dataclass(frozen=True)
class CachedTeacher:
    """A teacher whose top-k rows travel with the batch, by place of the target.

    Attributes:
      ids: side array `[B, T, K]` of token ids, negative in empty slots.
      logprobs: side array `[B, T, K]`, at the temperature of the loss.
      tail: see `losses.distillation.top_k_divergence`.
    """

    ids: str = "teacher_ids"
    logprobs: str = "teacher_logprobs"
    tail: Tail = "bucket"


def make_distill_loss(
    model: LanguageModel,
    rules: Rules,
    teachers: Sequence[LanguageModel | CachedTeacher],
    *,
    weights: Sequence[float] = (1.0,),
    beta: float = 0.0,
    temperature: float = 1.0,
    hinton: float | None = None,
    vocab: int | None = None,
) -> Loss:
    """Σ token_weight · Σ_i w_i D_β(teacher i, student), D as in `losses.distillation`.

    With `hinton` = α it is α · T² · that + (1 − α) · cross-entropy (https://arxiv.org/abs/1503.02531, section 2),
    another objective: T² keeps the first term's gradient of one size whatever T is.

    `frozen["teachers"]` holds the parameters of the teachers that are models, in order. Metrics: `loss`, the mixed
    divergence a token; `divergence_<i>` where there are several teachers; `cross_entropy` with `hinton`.

    Args:
      weights: w, one a teacher.
      beta: 0 forward KL, 1 reverse KL, else the generalised Jensen-Shannon divergence.
      vocab: tokens that student and teachers share.

    Raises:
      ValueError: not one weight a teacher; when called, not one set of parameters for each teacher that is a model.
    """
    online = sum(not isinstance(teacher, CachedTeacher) for teacher in teachers)
    if not teachers or len(weights) != len(teachers):
        raise ValueError(f"distill: expected one weight for each of {len(teachers)} teachers, got {len(weights)}")
    scale = 1.0 if hinton is None else hinton * temperature**2

    def loss(params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray) -> tuple[Float[Array, ""], Metrics]:
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        student = hidden, model.output_table(params)
        options = {"beta": beta, "temperature": temperature, "vocab": vocab}
        trained = jnp.sum((batch.token_weight != 0).astype(jnp.float32))
        parameters = iter(_parameters_of_teachers(frozen, online))
        total, mixed, metrics = jnp.zeros(()), jnp.zeros(()), {}
        for i, (teacher, share) in enumerate(zip(teachers, weights)):
            if isinstance(teacher, CachedTeacher):
                rows = batch.side[teacher.ids], batch.side[teacher.logprobs]
                part, values = top_k_divergence(
                    *student, *rows, batch.token_weight, rules, tail=teacher.tail, **options
                )
            else:
                theirs = next(parameters)
                states, _ = teacher.apply(theirs, batch.tokens, batch.positions, batch.segment_ids)
                part, values = head_divergence(
                    *student, states, teacher.output_table(theirs), batch.token_weight, rules, **options
                )
            total += share * scale * part
            mixed += share * jnp.sum(values)
            if len(teachers) > 1:
                metrics[f"divergence_{i}"] = Mean(jnp.sum(values), trained)
        metrics["loss"] = Mean(mixed, trained)
        if hinton is not None:
            part, logprob = cross_entropy(*student, batch, rules, vocab=vocab)
            total += (1 - hinton) * part
            metrics["cross_entropy"] = Mean(-jnp.sum(logprob), trained)
        return total, metrics

    return loss


def _parameters_of_teachers(frozen: Any, count: int) -> Sequence[Params]:
    given = frozen["teachers"] if count and frozen else ()
    if len(given) != count:
        raise ValueError(f"distill: {count} teachers are models, frozen['teachers'] holds parameters for {len(given)}")
    return given
