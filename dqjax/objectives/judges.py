"""Trained classifiers as judges of a policy's samples: a reward model's score, RV and CD of a chain."""

from dqjax.config import ConfigError
from dqjax.objectives.shares import Shared
from dqjax.rewards.mix import MixConfig, Sources
from dqjax.scoring import Scorer, levels_of, load_scorer, scores_of
from dqjax.sharding import Rules


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


def _load(name: str | None, key: str, term: str, kind: str, rules: Rules, shape: dict) -> Scorer:
    """The classifier under a key of the config, which has to be of the kind that the term reads."""
    where = f"objective.reward.{key}"
    if name is None:
        raise ConfigError(f"{where}: {term} needs a run folder of objective: {kind}, or one exported from it")
    return load_scorer(name, kind, rules, where=where, **shape)
