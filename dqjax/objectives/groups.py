"""Batches of a policy's own samples: groups of completions, graded, with advantages, packed.

    P problems → G samples each → rewards [P, G] → advantages [P, G] → U parts → packed rows → token weights

A rollout feeds U = minibatches × passes updates, so its samples are taken while the policy moves away from them: the
log-probabilities of the policy that sampled are computed once and kept.

Everything is a function of the parameters and of one counter, the problems drawn so far: draw d asks problem d mod N of
the order of epoch d div N, and its sample g is seeded by d·G + g. A resumed run samples what one that was not would have.
"""

import collections
import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Float
from pydantic import Field, model_validator

from dqjax.data.chat import ChatFormat
from dqjax.data.pack import Tokens, pack_items
from dqjax.data.records import Record
from dqjax.losses.advantages import group_advantages, uninformative_groups
from dqjax.objectives.graded import completion_of, numbers_of
from dqjax.objectives.sample_table import SampleTable
from dqjax.rewards.mix import Mix, MixConfig
from dqjax.rewards.types import Completion
from dqjax.rollout.engine import Engine, Prompt, Sample
from dqjax.steps.grpo import GRPOConfig, weigh_updates
from dqjax.types import Batch, Mean, Metrics, Params, merge_metrics

Values = Callable[[Params, Any, Batch], Mapping[str, Float[np.ndarray, "B T"]]]
"""(parameters, frozen, batch) → side arrays by target: log-probabilities that are computed once a rollout."""


class PolicyConfig(GRPOConfig):
    """objective: grpo. The loss, and what it learns from: how groups are sampled, and what they are rewarded for.

    As many rows as the samples need make an update, empty ones added up to a multiple of train.batch_rows.

    prompts: P, problems of one rollout. group_size: G, samples of each [S: 8].
    minibatches: parts a rollout's samples are split into, at random, one update each. passes: times that all of them are
      gone through. Both 1: every update samples anew. train.steps counts updates.
    max_new_tokens: the limit of a sample, thinking included; with its prompt it has to fit into data.row_length.
    temperature: of sampling, and so of the policy that is trained. No top-k or top-p: they would sample from another one.
    thinking: ask in thinking mode.
    decode_rows: sequences decoded together, which bounds the cache; null takes all samples of a rollout. cache_gib: a
      device's memory for the cache; if it is short, there are pages, or fewer rows. null: what decode_rows need.
    uninformative: groups whose rewards are all equal teach nothing: `keep` them in the mean, `drop` them, or `refill` the
      batch with other problems (DAPO's dynamic sampling), up to `rounds` rounds of sampling in all.
    reward: terms and weights.
    best: the checkpoint kept besides the newest is the one with the highest held-out `accuracy` or `reward`.
    table: problems of a rollout whose samples are written to RUN/rollouts.jsonl.
    """

    prompts: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    minibatches: int = Field(1, ge=1)
    passes: int = Field(1, ge=1)
    max_new_tokens: int = Field(1024, ge=1)
    temperature: float = Field(1.0, gt=0)
    thinking: Literal["on", "off"] = "on"
    decode_rows: int | None = Field(None, ge=1)
    cache_gib: float | None = Field(None, gt=0)
    uninformative: Literal["keep", "drop", "refill"] = "keep"
    rounds: int = Field(4, ge=1)
    reward: MixConfig = MixConfig()
    best: Literal["accuracy", "reward"] = "accuracy"
    table: int = Field(4, ge=0)

    @model_validator(mode="after")
    def _a_sample_for_each_part(self):
        if self.minibatches > self.prompts * self.group_size:
            samples = self.prompts * self.group_size
            raise ValueError(f"minibatches: {self.minibatches} parts of {samples} samples (prompts × group_size)")
        return self

    @property
    def updates(self) -> int:
        """U, the updates that a rollout feeds."""
        return self.minibatches * self.passes


@dataclasses.dataclass(frozen=True)
class Question:
    """A problem, and the token ids that ask it."""

    problem: Record
    prompt: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Group:
    """The samples of one question and their rewards; NaN where correctness could not be graded."""

    question: Question
    samples: Sequence[Sample]
    completions: Sequence[Completion]
    rewards: Float[np.ndarray, "G"]


class Groups:
    """The source of GRPO's batches.

    Every process samples the same tokens and holds the whole rollout; `local` takes its rows of a batch.

    Args:
      questions: N problems; an epoch asks each once, in an order drawn from `seed` and the epoch.
      engine: samples at `config.temperature`, at most `config.max_new_tokens` tokens.
      row_length: T, at least any prompt and `max_new_tokens` together.
      row_multiple: rows are added up to a multiple of it, so that few shapes are compiled.
      table: gets a row for each sample of the first `config.table` problems of a rollout.
      values: what of a batch is computed once, under the policy that sampled it; None for nothing.
      local: a whole batch → the rows that this process feeds.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        engine: Engine,
        chat: ChatFormat,
        rewards: Mix,
        config: PolicyConfig,
        *,
        row_length: int,
        row_multiple: int,
        seed: int,
        table: pathlib.Path | None,
        values: Values | None = None,
        local: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        self._questions, self._engine, self._chat, self._mix, self._config = questions, engine, chat, rewards, config
        self._row_length, self._row_multiple, self._seed = row_length, row_multiple, seed
        shortest = min(len(q.prompt) for q in questions) + 1
        self._columns = min(config.prompts * config.group_size, row_length // shortest)  # S: no row can hold more
        self._table, self._values, self._local = SampleTable(table), values, local
        self._drawn = 0
        self._updates: collections.deque[Batch] = collections.deque()
        self._metrics: Metrics = {}
        self._handed: float | None = None  # when the last batch was
        self.bounds = {} if config.max_sampler_gap is None else {"sampler_gap": config.max_sampler_gap}

    def next(self, state: Any, frozen: Any) -> Batch:
        """The next part of the rollout; behind the last one, samples from `state.params`, grades and packs anew."""
        self._metrics = {}
        if self._handed is not None:  # what is left of an update that the device took without making the host wait
            with self._timed("update", count=0.0):
                jax.block_until_ready(state.params)
        if not self._updates:
            groups = self._groups(state.params)
            config = self._config
            rewards_PG = np.stack([g.rewards for g in groups])
            advantages_PG = group_advantages(rewards_PG, scale=config.scale, baseline=config.baseline)
            self._table.write(int(state.step) + 1, _rows(groups[: config.table], advantages_PG))
            parts = self._pack(groups, advantages_PG)
            if self._values is not None:
                with self._timed("logp"):
                    parts = [_with_side(part, self._values(state.params, frozen, part)) for part in parts]
            self._updates.extend(self._local(part) for _ in range(config.passes) for part in parts)
        self._handed = time.perf_counter()
        return self._updates.popleft()

    def metrics(self) -> Metrics:
        """Numbers on the samples behind the last batch, those that were dropped included, and seconds.

        To be called once a step, as soon as the step has been handed to the device: the seconds of an update are those
        that this took, and those that `next` waits for its parameters.
        """
        self._count({"seconds/update": Mean(time.perf_counter() - self._handed, 1.0)})
        return self._metrics

    def get_state(self) -> dict | None:
        """None within a rollout, which the policy that has moved on cannot sample again."""
        return None if self._updates else {"drawn": self._drawn}

    def set_state(self, state: dict) -> None:
        self._drawn = state["drawn"]
        self._updates.clear()

    def _groups(self, params: Params) -> list[Group]:
        """The groups of a rollout: at least as many as its parts need."""
        config, groups, spare = self._config, [], []
        for _ in range(config.rounds if config.uninformative == "refill" else 1):
            sampled = self._sample(params, config.prompts - len(groups))
            equal = uninformative_groups(np.stack([g.rewards for g in sampled]))
            self._count({"equal_rewards": Mean(float(equal.sum()), float(len(equal)))})
            spare = [g for g, same in zip(sampled, equal) if same]
            groups += [g for g, same in zip(sampled, equal) if not same]
            if len(groups) == config.prompts:
                break
        wanted = config.prompts if config.uninformative == "keep" else -(-config.minibatches // config.group_size)
        return groups + spare[: max(0, wanted - len(groups))]

    def _sample(self, params: Params, count: int) -> list[Group]:
        """Groups of the next `count` problems, graded together."""
        size, thinking = self._config.group_size, self._config.thinking == "on"
        draws = range(self._drawn, self._drawn + count)
        questions = [self._question(draw) for draw in draws]
        self._drawn += count
        with self._timed("generate") as seconds:
            prompts = (Prompt(q.prompt, d * size + g) for q, d in zip(questions, draws) for g in range(size))
            samples = list(self._engine.generate(params, prompts))
        asked = [q.problem for q in questions for _ in range(size)]
        completions = [completion_of(self._chat, p, s, thinking=thinking) for p, s in zip(asked, samples, strict=True)]
        with self._timed("reward"):
            rewards = self._mix(completions)
        self._count(numbers_of(completions, rewards))
        self._count({"sampled_tokens_per_second": Mean(float(sum(c.tokens for c in completions)), seconds())})
        ungraded = rewards.failed.get("correct", np.zeros(len(completions), bool))
        totals = np.where(ungraded, np.nan, rewards.total)
        parts = [slice(i * size, (i + 1) * size) for i in range(count)]
        return [Group(q, samples[part], completions[part], totals[part]) for q, part in zip(questions, parts)]

    def _question(self, draw: int) -> Question:
        epoch, place = divmod(draw, len(self._questions))
        return self._questions[_order(self._seed, epoch, len(self._questions))[place]]

    def _pack(self, groups: Sequence[Group], advantages_PG: Float[np.ndarray, "P G"]) -> list[Batch]:
        """The parts of a rollout, each as the batch of an update."""
        config = self._config
        items = [
            [_tokens(group.question.prompt, sample, float(advantage))]
            for group, advantages in zip(groups, advantages_PG)
            for sample, advantage in zip(group.samples, advantages)
        ]
        if config.minibatches > 1:
            order = np.random.default_rng([self._seed, self._drawn]).permutation(len(items))
            parts = [[items[i] for i in part] for part in np.array_split(order, config.minibatches)]
        else:
            parts = [items]
        shape = {"row_multiple": self._row_multiple, "columns": self._columns}
        batches = [pack_items(part, self._row_length, **shape) for part in parts]
        return weigh_updates(
            batches, config.loss, max_length=config.max_new_tokens, mask_truncated=config.mask_truncated
        )

    def _count(self, metrics: Metrics) -> None:
        self._metrics = merge_metrics(self._metrics, metrics)

    @contextlib.contextmanager
    def _timed(self, what: str, count: float = 1.0) -> Iterator[Callable[[], float]]:
        """Adds the seconds of what is done inside to a mean over `count` more; yields what reads them."""
        began, ended = time.perf_counter(), None
        yield lambda: ended - began
        ended = time.perf_counter()
        self._count({f"seconds/{what}": Mean(ended - began, count)})


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _tokens(prompt: Sequence[int], sample: Sample, advantage: float) -> Tokens:
    """Prompt and completion as one sequence, of which the completion is trained."""
    ids = np.array([*prompt, *sample.token_ids], np.int32)
    logprobs = np.zeros(len(ids), np.float32)
    logprobs[len(prompt) :] = sample.logprobs
    return Tokens(
        ids,
        np.arange(len(ids)) >= len(prompt),
        {"advantage": advantage, "truncated": int(sample.finish_reason == "length")},
        {"sample_logprobs": logprobs},
    )


def _with_side(batch: Batch, values: Mapping[str, Array]) -> Batch:
    return dataclasses.replace(batch, side={**batch.side, **values})


def _rows(groups: Sequence[Group], advantages_PG: Float[np.ndarray, "P G"]) -> Iterator[dict[str, Any]]:
    """The rows of the sample table."""
    for group, advantages in zip(groups, advantages_PG):
        for i, completion in enumerate(group.completions):
            yield {
                "id": group.question.problem.id,
                "sample": i,
                "question": group.question.problem.question,
                "text": completion.text,
                "reference": group.question.problem.answer,
                "reward": None if np.isnan(group.rewards[i]) else float(group.rewards[i]),
                "advantage": float(advantages[i]),
                "tokens": completion.tokens,
                "truncated": completion.truncated,
            }
