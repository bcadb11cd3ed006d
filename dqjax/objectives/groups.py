"""Batches of a policy's own samples: groups of completions, graded, with advantages, packed.

    P problems → G samples each → rewards [P, G] → advantages [P, G] → packed rows → token weights

Everything is a function of the parameters and of one counter, the problems drawn so far: draw d asks problem d mod N of
the order of epoch d div N, and its sample g is seeded by d·G + g. A resumed run samples what one that was not would have.
"""

import dataclasses
import functools
import json
import pathlib
import time
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from dqjax.data.chat import ChatFormat
from dqjax.data.pack import Tokens, pack_items
from dqjax.data.records import Record
from dqjax.losses.advantages import group_advantages, uninformative_groups
from dqjax.rewards.mix import Mix, MixConfig, Rewards
from dqjax.rewards.types import Completion
from dqjax.rollout.engine import Engine, Prompt, Sample
from dqjax.steps.grpo import GRPOConfig, weigh_samples
from dqjax.types import Batch, Mean, Metrics, Params, merge_metrics


class PolicyConfig(GRPOConfig):
    """objective: grpo. The loss, and what it learns from: how groups are sampled, and what they are rewarded for.

    As many rows as the samples need make an update, empty ones added up to a multiple of train.batch_rows.

    prompts: P, problems of one update. group_size: G, samples of each [S: 8].
    max_new_tokens: the limit of a sample, thinking included; with its prompt it has to fit into data.row_length.
    temperature: of sampling, and so of the policy that is trained. No top-k or top-p: they would sample from another one.
    thinking: ask in thinking mode.
    decode_rows: sequences decoded together, which bounds the cache; null takes all samples of an update.
    uninformative: groups whose rewards are all equal teach nothing: `keep` them in the mean, `drop` them, or `refill` the
      batch with other problems (DAPO's dynamic sampling), up to `rounds` rounds of sampling in all.
    reward: terms and weights.
    table: problems of an update whose samples are written to RUN/rollouts.jsonl.
    """

    prompts: int = Field(16, ge=1)
    group_size: int = Field(8, ge=2)
    max_new_tokens: int = Field(1024, ge=1)
    temperature: float = Field(1.0, gt=0)
    thinking: Literal["on", "off"] = "on"
    decode_rows: int | None = Field(None, ge=1)
    uninformative: Literal["keep", "drop", "refill"] = "keep"
    rounds: int = Field(4, ge=1)
    reward: MixConfig = MixConfig()
    table: int = Field(4, ge=0)


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

    Args:
      questions: N problems; an epoch asks each once, in an order drawn from `seed` and the epoch.
      engine: samples at `config.temperature`, at most `config.max_new_tokens` tokens.
      row_length: T, at least any prompt and `max_new_tokens` together.
      row_multiple: rows are added up to a multiple of it, so that few shapes are compiled.
      table: file that gets one JSON line for each sample of the first `config.table` problems of an update.
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
        table: pathlib.Path,
    ):
        self._questions, self._engine, self._chat, self._mix, self._config = questions, engine, chat, rewards, config
        self._row_length, self._row_multiple, self._seed = row_length, row_multiple, seed
        shortest = min(len(q.prompt) for q in questions) + 1
        self._columns = min(config.prompts * config.group_size, row_length // shortest)  # S: no row can hold more
        self._table = Table(table)
        self._drawn = 0
        self._metrics: Metrics = {}
        self.bounds = {} if config.max_sampler_gap is None else {"sampler_gap": config.max_sampler_gap}

    def next(self, state: Any, frozen: Any) -> Batch:
        """Samples from `state.params`, grades, and packs."""
        config, self._metrics = self._config, {}
        groups: list[Group] = []
        for _ in range(config.rounds if config.uninformative == "refill" else 1):
            sampled = self._sample(state.params, config.prompts - len(groups))
            equal = uninformative_groups(np.stack([g.rewards for g in sampled]))
            self._count({"equal_rewards": Mean(float(equal.sum()), float(len(equal)))})
            groups += [g for g, same in zip(sampled, equal) if config.uninformative == "keep" or not same]
            if len(groups) == config.prompts:
                break
        groups = groups or sampled[:1]  # nothing to learn here: a batch with advantages of 0
        rewards_PG = np.stack([g.rewards for g in groups])
        advantages_PG = group_advantages(rewards_PG, scale=config.scale, baseline=config.baseline)
        self._table.write(int(state.step) + 1, groups[: config.table], advantages_PG)
        return self._pack(groups, advantages_PG)

    def metrics(self) -> Metrics:
        """Numbers on the samples behind the last batch, those that were dropped included."""
        return self._metrics

    def get_state(self) -> dict:
        return {"drawn": self._drawn}

    def set_state(self, state: dict) -> None:
        self._drawn = state["drawn"]

    def _sample(self, params: Params, count: int) -> list[Group]:
        """Groups of the next `count` problems, graded together."""
        size, thinking = self._config.group_size, self._config.thinking == "on"
        draws = range(self._drawn, self._drawn + count)
        questions = [self._question(draw) for draw in draws]
        self._drawn += count
        began = time.perf_counter()
        prompts = (Prompt(q.prompt, d * size + g) for q, d in zip(questions, draws) for g in range(size))
        samples = list(self._engine.generate(params, prompts))
        generated = time.perf_counter()
        asked = [q.problem for q in questions for _ in range(size)]
        completions = [self._completion(p, s, thinking) for p, s in zip(asked, samples, strict=True)]
        rewards = self._mix(completions)
        graded = time.perf_counter()
        self._count(_numbers(completions, rewards, generate=generated - began, reward=graded - generated))
        ungraded = rewards.failed.get("correct", np.zeros(len(completions), bool))
        totals = np.where(ungraded, np.nan, rewards.total)
        parts = [slice(i * size, (i + 1) * size) for i in range(count)]
        return [Group(q, samples[part], completions[part], totals[part]) for q, part in zip(questions, parts)]

    def _question(self, draw: int) -> Question:
        epoch, place = divmod(draw, len(self._questions))
        return self._questions[_order(self._seed, epoch, len(self._questions))[place]]

    def _completion(self, problem: Record, sample: Sample, thinking: bool) -> Completion:
        cut = sample.finish_reason == "length"
        text = self._chat.tokenizer.decode(list(sample.token_ids if cut else sample.token_ids[:-1]))
        return Completion(
            problem=problem,
            text=text,
            response=self._chat.parse(text, thinking=thinking),
            tokens=len(sample.token_ids),
            truncated=cut,
            thinking=thinking,
            opened=self._chat.opens_block and thinking,
        )

    def _pack(self, groups: Sequence[Group], advantages_PG: Float[np.ndarray, "P G"]) -> Batch:
        items = [
            [_tokens(group.question.prompt, sample, float(advantage))]
            for group, advantages in zip(groups, advantages_PG)
            for sample, advantage in zip(group.samples, advantages)
        ]
        batch = pack_items(items, self._row_length, row_multiple=self._row_multiple, columns=self._columns)
        config = self._config
        return weigh_samples(
            batch, config.loss, max_length=config.max_new_tokens, mask_truncated=config.mask_truncated
        )

    def _count(self, metrics: Metrics) -> None:
        self._metrics = merge_metrics(self._metrics, metrics)


class Table:
    """The samples of a run, one JSON line each, to be browsed.

    A resumed run first drops the lines of the steps that it is about to take again.
    """

    def __init__(self, path: pathlib.Path):
        self._path, self._rewound = path, False

    def write(self, step: int, groups: Sequence[Group], advantages_PG: Float[np.ndarray, "P G"]) -> None:
        """Appends the samples of one update."""
        if not self._rewound:
            self._rewind(step)
        rows = (
            {
                "step": step,
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
            for group, advantages in zip(groups, advantages_PG)
            for i, completion in enumerate(group.completions)
        )
        with self._path.open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _rewind(self, step: int) -> None:
        self._rewound = True
        if not self._path.exists():
            return
        temporary = self._path.with_suffix(".tmp")
        with self._path.open(encoding="utf-8") as before, temporary.open("w", encoding="utf-8") as after:
            for line in before:
                if not line.endswith("\n") or json.loads(line)["step"] >= step:  # a line cut short by a kill is the last
                    break
                after.write(line)
        temporary.rename(self._path)


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


def _numbers(completions: Iterable[Completion], rewards: Rewards, *, generate: float, reward: float) -> Metrics:
    """What the log says of graded samples: reward terms, accuracy, lengths, and seconds."""
    n = float(len(rewards.total))
    tokens, cut = float(sum(c.tokens for c in completions)), float(sum(c.truncated for c in completions))
    numbers = {name: Mean(*pair) for name, pair in rewards.sums().items()}
    if "correct" in rewards.terms:
        numbers["accuracy"] = Mean(float(rewards.correct.sum()), n)
    return numbers | {
        "response_tokens": Mean(tokens, n),
        "truncated": Mean(cut, n),
        "seconds/generate": Mean(generate, 1.0),
        "seconds/reward": Mean(reward, 1.0),
        "sampled_tokens_per_second": Mean(tokens, generate),
    }
