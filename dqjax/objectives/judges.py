"""Trained classifiers as judges of a policy's samples: a reward model's score, RV and CD of a chain."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dqjax.config import ConfigError
from dqjax.convert.classifier import LABELS
from dqjax.data.records import BadRow, Message, Record
from dqjax.objectives.shares import Shared
from dqjax.rewards.mix import MixConfig, Sources
from dqjax.rewards.model import Score
from dqjax.rewards.types import Completion
from dqjax.rewards.verbosity import Labels, StyleScorer
from dqjax.scoring import Scorer
from dqjax.sharding import Rules
from dqjax.steps.scorer import expected_levels


def make_sources(config: MixConfig, rules: Rules, *, row_length: int, rows: int, dtype: str) -> Sources:
    """What the terms of a mix need: the classifiers that it names, frozen, on the policy's mesh.

    Args:
      row_length, rows, dtype: of the batches that are scored, see `Scorer`.

    Raises:
      ConfigError: a checkpoint that is not named, cannot be read, or holds something else.
    """
    shape = {"row_length": row_length, "rows": rows, "dtype": dtype}
    style = score = None
    if needy := next((name for name in ("verbosity", "difficulty") if name in config.terms), None):
        style = levels_of(_load(config.style.scorer, "style.scorer", needy, "scorer", rules, shape))
    if "model" in config.terms:
        score = scores_of(_load(config.reward_model.checkpoint, "reward_model.checkpoint", "model", "reward", rules, shape))
    return Sources(style=style, score=score, share=Shared)


def levels_of(scorer: Scorer) -> StyleScorer:
    """RV and CD of completions, by a scorer of both."""

    def levels(completions: Sequence[Completion]) -> list[Labels]:
        logits = _logits(scorer, completions)
        found = {name: np.asarray(level)[0] for name, level in expected_levels(jnp.asarray(logits)[None]).items()}
        pairs = zip(found["verbosity"].tolist(), found["difficulty"].tolist(), strict=True)
        return [Labels(None, None) if np.isnan(rv) else Labels(rv, cd) for rv, cd in pairs]

    return levels


def scores_of(scorer: Scorer) -> Score:
    """Scores of completions by a reward model; NaN where there is none."""
    return lambda completions: _logits(scorer, completions)[:, 0].tolist()


def _logits(scorer: Scorer, completions: Sequence[Completion]) -> np.ndarray:
    """Logits `[N, C]`; NaN for what is no whole conversation: a block that never closes, or one longer than a row."""
    out = np.full((len(completions), len(scorer.labels)), np.nan, np.float32)
    whole = [i for i, c in enumerate(completions) if c.response.closed and not c.truncated]
    tokens = scorer.tokens([_conversation(completions[i]) for i in whole])
    scored = [(i, ids) for i, ids in zip(whole, tokens, strict=True) if not isinstance(ids, BadRow)]
    if scored:
        out[[i for i, _ in scored]] = scorer.logits([ids for _, ids in scored])
    return out


def _conversation(completion: Completion) -> Record:
    """The problem's turns and the sample's."""
    said = Message("assistant", completion.response.answer, completion.response.thinking)
    problem = completion.problem
    return dataclasses.replace(problem, messages=(*problem.messages, said))


def _load(name: str | None, key: str, term: str, kind: str, rules: Rules, shape: dict) -> Scorer:
    """The classifier under a key of the config, which has to be of the kind that the term reads."""
    if name is None:
        raise ConfigError(f"objective.reward.{key}: {term} needs a run folder of objective: {kind}, or one exported from it")
    scorer = Scorer(name, rules, **shape)
    if (tuple(scorer.labels) == LABELS["scorer"]) != (kind == "scorer") or (kind == "reward" and len(scorer.labels) != 1):
        raise ConfigError(f"objective.reward.{key}: {name} has the labels {', '.join(scorer.labels)}, not those of a {kind}")
    return scorer
