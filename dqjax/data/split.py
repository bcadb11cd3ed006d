"""Which documents are trained on, how often and when: held-out questions, source weights, curriculum stages."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dqjax.config import ConfigError
from dqjax.data.config import DataConfig, SourceConfig, StageConfig
from dqjax.data.documents import Documents

log = logging.getLogger(__name__)


def split(
    config: DataConfig, found: Any, load: Callable[[DataConfig, Sequence[SourceConfig]], Any]
) -> tuple[Int[np.ndarray, " taken"], Any, dict[str, int]]:
    """What `data.validation` and the sources' weights make of a set.

    Args:
      found: all that was read: documents, pairs, labelled conversations, which have `question`, `source` and `take`.
      load: reads a set of the same kind.

    Returns:
      Numbers to train on (one may occur twice), the held-out set or None, and counts for the log.

    Raises:
      ConfigError: a side is empty.
    """
    held, train, counts = None, np.arange(len(found)), {}
    if isinstance(config.validation, str):
        held = load(config.model_copy(update={"quarantine": None}), [SourceConfig(path=config.validation)])
        train = without_questions(found, held)
        counts["overlap_removed"] = len(found) - len(train)
    elif config.validation is not None:
        out, train = hold_out(found, config.validation, config.seed)
        held = found.take(out)
    if not len(train):
        raise ConfigError("data: every training row asks a held-out question")
    if held is not None:
        counts["held_out"] = len(held)
    return weigh(config.sources, found.source, train, config.seed), held, counts


def hold_out(
    documents: Documents, share: float, seed: int
) -> tuple[Int[np.ndarray, " held"], Int[np.ndarray, " train"]]:
    """(held out, to train on): numbers of documents, drawn by question, so that no question is on both sides.

    Raises:
      ConfigError: a side is empty.
    """
    out = _question_draw(documents.question, seed) < share
    if not out.any() or out.all():
        raise ConfigError(f"data.validation: a share of {share:g} leaves one side of {len(out)} documents empty")
    return np.flatnonzero(out), np.flatnonzero(~out)


def without_questions(documents: Documents, held: Documents) -> Int[np.ndarray, " train"]:
    """Numbers of the documents whose question `held` does not ask; says how many ask one."""
    overlap = np.isin(documents.question, held.question)
    if overlap.any():
        log.warning("%d training documents ask a held-out question and were removed", overlap.sum())
    return np.flatnonzero(~overlap)


def weigh(
    sources: Sequence[SourceConfig], source: Int[np.ndarray, " D"], chosen: Int[np.ndarray, " chosen"], seed: int
) -> Int[np.ndarray, " taken"]:
    """`chosen` with each source taken `weight` times, or as often as its `share` of as many documents says.

    What is left of a weight after whole copies is a fixed draw: an epoch is the same set every time.
    """
    rng = np.random.default_rng([seed, 1])
    taken = []
    for i, config in enumerate(sources):
        mine = chosen[source[chosen] == i]
        weight = config.weight if config.share is None else config.share * len(chosen) / max(len(mine), 1)
        whole, rest = divmod(weight, 1)
        taken += [mine] * int(whole) + [np.sort(rng.permutation(mine)[: round(rest * len(mine))])]
    return np.concatenate(taken)


def in_stage(stage: StageConfig, difficulty: Float[np.ndarray, " D"]) -> Bool[np.ndarray, " D"]:
    """Mask of the difficulties (NaN: unknown) that a stage trains on."""
    inside = np.ones(len(difficulty), bool)
    if stage.at_least is not None:
        inside &= difficulty >= stage.at_least
    if stage.below is not None:
        inside &= difficulty < stage.below
    return inside


def _question_draw(question: Int[np.ndarray, " D"], seed: int) -> Float[np.ndarray, " D"]:
    """A number in [0, 1) for each question hash, mixed with the seed (the finaliser of splitmix64)."""
    x = question.astype(np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 & (2**64 - 1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
