"""Trained classifiers put to use: reward models and RV/CD scorers, from conversations to logits."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dqjax.config import ConfigError
from dqjax.convert.classifier import LABELS, classifier_config
from dqjax.convert.source import resolve_model
from dqjax.data.chat import ChatFormat
from dqjax.data.pack import Tokens, best_fit_decreasing, pack_rows
from dqjax.data.pair_loader import closing_ids
from dqjax.data.records import BadRow, Message, Record
from dqjax.data.tokenizer import load_tokenizer
from dqjax.load import read_classifier
from dqjax.losses.scores import sequence_scores
from dqjax.models.decoder import Decoder
from dqjax.models.heads import Classifier
from dqjax.rewards.model import Score
from dqjax.rewards.types import Completion
from dqjax.rewards.verbosity import Labels, StyleScorer
from dqjax.sharding import Rules
from dqjax.steps.scorer import expected_levels
from dqjax.trainer import own_rows, placer

log = logging.getLogger(__name__)


class Scorer:
    """A trained classifier as commands and rewards use it: conversations in, logits out.

    Conversations are rendered and read as in training and in serving: whole, at the last token of the chat template. In a
    job of several processes all of them score the same conversations, at the same time.

    Args:
      name: a run folder of `objective: reward` or `scorer`, a folder converted from one, or a Hugging Face folder of a
        `…ForSequenceClassification`.
      rules: where its parameters and batches lie.
      row_length: tokens of a packed row, the longest conversation that can be scored.
      rows: of a batch; rounded up to the shards of the mesh.

    Raises:
      ConfigError: not a classifier, or none that can be read.
    """

    def __init__(
        self,
        name: str,
        rules: Rules,
        *,
        row_length: int = 4096,
        rows: int = 8,
        dtype: str = "bfloat16",
        step: int | None = None,
    ):
        source = resolve_model(name)
        config = classifier_config(source)
        if config is None:
            raise ConfigError(f"{name} holds a language model; expected a reward model or a scorer")
        self.labels, self.row_length = config.labels, row_length
        decoder = Decoder(config, rules, jnp.dtype(dtype), "none")
        self._classifier = Classifier(decoder, labels=len(config.labels))
        self._params = read_classifier(source, self._classifier, step=step)
        self._tokenizer = load_tokenizer(source.files, vocab_size=config.vocab_size)
        self._chat = ChatFormat.of(self._tokenizer)
        self._closing = closing_ids(self._chat)
        self._rules, self._rows = rules, -(-rows // rules.batch_shards) * rules.batch_shards
        self._place = placer(rules, self._rows)
        whole = rules.sharding(())  # on every host, to be read there
        self._scores = jax.jit(self._scores_of, static_argnames="columns", out_shardings=whole)

    def tokens(self, records: Sequence[Record]) -> list[np.ndarray | BadRow]:
        """The token ids of whole conversations, which end with an assistant's turn, or why there are none."""
        found: list[np.ndarray | BadRow] = []
        for record, turns in zip(records, self._chat.turns(records, ["turn"] * len(records)), strict=True):
            if isinstance(turns, BadRow):
                found.append(turns)
            elif record.messages[-1].role != "assistant":
                found.append(BadRow("it ends without an answer"))
            else:
                ids = np.array([*turns[-1].ids, *self._closing], np.int32)
                long = len(ids) > self.row_length
                found.append(BadRow(f"{len(ids)} tokens do not fit into a row of {self.row_length}") if long else ids)
        return found

    def logits(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Logits `[n, C]`, float32, of token sequences, packed into rows."""
        plan = best_fit_decreasing([len(ids) for ids in sequences], self.row_length)
        columns = -(-plan.columns // 8) * 8
        out = np.zeros((len(sequences), len(self.labels)), np.float32)
        for first in range(0, len(plan), self._rows):
            items = [plan[r].tolist() if r < len(plan) else [] for r in range(first, first + self._rows)]
            rows = [[Tokens(sequences[i], np.zeros(len(sequences[i]), bool), {"row": i}) for i in row] for row in items]
            batch = pack_rows(rows, self.row_length, columns=columns, pad_id=self._tokenizer.pad_token_id)
            scores = np.asarray(self._scores(self._params, self._place(own_rows(self._rules, batch)), columns=columns))
            present = batch.side["row"] >= 0
            out[batch.side["row"][present]] = scores[present]
        return out

    def _scores_of(self, params: Any, batch: Any, *, columns: int) -> jax.Array:
        model = self._classifier
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        return sequence_scores(hidden, model.output_table(params), batch, columns)


def load_scorer(name: str, kind: Literal["scorer", "reward"], rules: Rules, *, where: str, **shape: Any) -> Scorer:
    """A `Scorer` of one kind: RV and CD, or a reward.

    Args:
      where: the key that names it, for the message. shape: row_length, rows, dtype.

    Raises:
      ConfigError: cannot be read, or holds a classifier of another kind.
    """
    scorer = Scorer(name, rules, **shape)
    if (tuple(scorer.labels) == LABELS["scorer"]) != (kind == "scorer") or (kind == "reward" and len(scorer.labels) != 1):
        raise ConfigError(f"{where}: {name} has the labels {', '.join(scorer.labels)}, not those of a {kind}")
    return scorer


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
