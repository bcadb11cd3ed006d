"""What an objective brings to the trainer, and what the objectives share."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from dqjax.load import Model
from dqjax.metrics import scalars
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.sampling import Sampling
from dqjax.types import Batch, Loss, Mean, Metrics, Params, Source, merge_metrics

Evaluate = Callable[[Params, Any], tuple[dict[str, float], dict[str, str]]]
Place = Callable[[Batch], Batch]


class Trainable(Protocol):
    """What has parameters to train: a decoder, or a classifier on one."""

    def shapes(self) -> Any: ...

    def shardings(self) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Setup:
    """An objective, ready for the trainer.

    Attributes:
      trainable: whose parameters are trained.
      initial: makes them, for a run that has no checkpoint yet.
      loss: the objective.
      source: its batches.
      steps: updates in all.
      labels: names of the entries of vector metrics, see `metrics.scalars`.
      evaluate: (parameters, frozen) → held-out numbers and texts; None where nothing is held out.
      score: of held-out numbers; the checkpoint with the lowest is the best.
      frozen: a teacher, a reference, a LoRA base: handed to the step, never trained.
      close: stops the source's threads.
    """

    trainable: Trainable
    initial: Callable[[], Params]
    loss: Loss
    source: Source
    steps: int
    labels: Mapping[str, Sequence[str]]
    evaluate: Evaluate | None = None
    score: Callable[[Mapping[str, float]], float | None] = lambda numbers: numbers.get("loss")
    frozen: Any = None
    close: Callable[[], None] = lambda: None


def measure(
    loss: Loss,
    batches: Iterable[Batch],
    place: Place,
    labels: Mapping[str, Sequence[str]],
    summarise: Callable[[Metrics], dict[str, float]] = lambda metrics: {},
    describe: Callable[[Metrics], dict[str, str]] = lambda metrics: {},
) -> Evaluate:
    """An evaluation: the loss's own metrics over held-out batches, and numbers and texts made of their sums."""
    metrics_of = jax.jit(lambda params, frozen, batch, key: loss(params, frozen, batch, key)[1])

    def evaluate(params: Params, frozen: Any) -> tuple[dict[str, float], dict[str, str]]:
        total: Metrics = {}
        for batch in batches:
            total = merge_metrics(total, metrics_of(params, frozen, place(batch), jax.random.key(0)))
        total = jax.device_get(total)
        return scalars(without_matrices(total), labels) | summarise(total), describe(total)

    return evaluate


def without_matrices(metrics: Metrics) -> Metrics:
    """The metrics that can be written as numbers: a confusion matrix is for `describe`."""
    return {name: m for name, m in metrics.items() if not (isinstance(m, Mean) and np.ndim(m.total) > 1)}


def with_sample(evaluate: Evaluate, model: Model, prompt: Sequence[int], tokens: int, file: pathlib.Path) -> Evaluate:
    """`evaluate`, and a greedy sample of at most `tokens` tokens behind a held-out prompt, appended to `file`."""
    engine = Engine(
        model.decoder,
        stop_ids=model.chat.stop_ids,
        vocab=model.vocab,
        sampling=Sampling(temperature=0.0),
        rows=model.decoder.rules.batch_shards,
        max_new_tokens=tokens,
    )

    def both(params: Params, frozen: Any) -> tuple[dict[str, float], dict[str, str]]:
        numbers, texts = evaluate(params, frozen)
        sample = next(engine.generate(params, [Prompt(tuple(prompt), 0)]))
        text = model.tokenizer.decode(list(sample.token_ids))
        if jax.process_index() == 0:
            row = {"prompt": model.tokenizer.decode(list(prompt)), "text": text, "finish_reason": sample.finish_reason}
            with file.open("a", encoding="utf-8") as f:
                f.write(json.dumps({**numbers, **row}, ensure_ascii=False) + "\n")
        return numbers, {**texts, "sample": text}

    return both
