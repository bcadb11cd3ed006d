"""python -m dqjax.score: what a reward model or an RV/CD scorer says of conversations, one JSON line a row.

    {"id": "...", "score": 1.25}                                         a reward model, a conversation
    {"id": "...", "score_chosen": 1.25, "score_rejected": -0.5}          a reward model, a preference pair
    {"id": "...", "verbosity": 4.1, "difficulty": 3.2}                   a scorer, levels from 0 to 9

Conversations are rendered and read as in training and in serving: whole, at the last token of the chat template.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dqjax.checkpoint import Checkpoints
from dqjax.commands import run_command
from dqjax.config import ConfigError
from dqjax.convert.classifier import LABELS, classifier_config
from dqjax.convert.huggingface import load_params
from dqjax.convert.source import resolve_model
from dqjax.data.chat import ChatFormat
from dqjax.data.config import ColumnsConfig, SourceConfig
from dqjax.data.pack import Tokens, best_fit_decreasing, pack_rows
from dqjax.data.pair_loader import closing_ids
from dqjax.data.records import BadRow, Record
from dqjax.data.sources import Rejected, read_records
from dqjax.data.tokenizer import load_tokenizer
from dqjax.load import abstract_tree, start_jax
from dqjax.losses.scores import sequence_scores
from dqjax.models.decoder import Decoder
from dqjax.models.heads import Classifier
from dqjax.sharding import MeshConfig, Rules, make_mesh
from dqjax.steps.scorer import expected_levels
from dqjax.trainer import placer

log = logging.getLogger("dqjax.score")

_WINDOW = 1024  # rows of the input that are packed together


class Scorer:
    """A trained classifier as the commands use it: conversations in, logits out.

    Args:
      name: a run folder of `objective: reward` or `scorer`, a folder converted from one, or a Hugging Face folder of a
        `…ForSequenceClassification`.
      row_length: tokens of a packed row, the longest conversation that can be scored.
      rows: of a batch; rounded up to the shards of the mesh.
    """

    def __init__(
        self, name: str, *, row_length: int = 4096, rows: int = 8, dtype: str = "bfloat16", step: int | None = None
    ):
        rules = Rules(make_mesh(**MeshConfig().model_dump()))
        source = resolve_model(name)
        config = classifier_config(source)
        if config is None:
            raise ConfigError(f"{name} holds a language model; expected a reward model or a scorer")
        self.labels = config.labels
        decoder = Decoder(config, rules, jnp.dtype(dtype), "none")
        self._classifier = Classifier(decoder, labels=len(config.labels))
        self._params = _read_parameters(source, config, self._classifier, step)
        self._tokenizer = load_tokenizer(source.files, vocab_size=config.vocab_size)
        self._chat = ChatFormat.of(self._tokenizer)
        self._closing = closing_ids(self._chat)
        self._row_length, self._rows = row_length, -(-rows // rules.batch_shards) * rules.batch_shards
        self._place = placer(rules, self._rows)
        self._scores = jax.jit(self._scores_of, static_argnames="columns")

    def tokens(self, records: Sequence[Record]) -> list[np.ndarray]:
        """The token ids of whole conversations, which end with an assistant's turn.

        Raises:
          ConfigError: a conversation that cannot be rendered or is longer than a row; names it.
        """
        found = []
        for record, turns in zip(records, self._chat.turns(records, ["turn"] * len(records)), strict=True):
            if isinstance(turns, BadRow) or record.messages[-1].role != "assistant":
                raise ConfigError(f"{record.id}: {turns if isinstance(turns, BadRow) else 'it ends without an answer'}")
            ids = np.array([*turns[-1].ids, *self._closing], np.int32)
            if len(ids) > self._row_length:
                raise ConfigError(f"{record.id} has {len(ids)} tokens, over --row-length {self._row_length}; raise it")
            found.append(ids)
        return found

    def logits(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Logits `[n, C]`, float32, of token sequences, packed into rows."""
        plan = best_fit_decreasing([len(ids) for ids in sequences], self._row_length)
        columns = -(-plan.columns // 8) * 8
        out = np.zeros((len(sequences), len(self.labels)), np.float32)
        for first in range(0, len(plan), self._rows):
            items = [plan[r].tolist() if r < len(plan) else [] for r in range(first, first + self._rows)]
            rows = [[Tokens(sequences[i], np.zeros(len(sequences[i]), bool), {"row": i}) for i in row] for row in items]
            batch = pack_rows(rows, self._row_length, columns=columns, pad_id=self._tokenizer.pad_token_id)
            scores = np.asarray(self._scores(self._params, self._place(batch), columns=columns))
            present = batch.side["row"] >= 0
            out[batch.side["row"][present]] = scores[present]
        return out

    def _scores_of(self, params: Any, batch: Any, *, columns: int) -> jax.Array:
        model = self._classifier
        hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        return sequence_scores(hidden, model.output_table(params), batch, columns)


def _read_parameters(source: Any, config: Any, classifier: Classifier, step: int | None) -> Any:
    """The parameters of trunk and head, float32, laid out over the mesh."""
    shardings = classifier.shardings()
    if source.kind == "huggingface":
        return load_params(source.folder, config, shardings)
    checkpoints = Checkpoints(source.folder / "checkpoints")
    found = checkpoints.restore({"params": abstract_tree(classifier.shapes(), shardings)}, step=step)
    checkpoints.close()
    if found is None:
        raise ConfigError(f"{source.folder} has no complete checkpoint yet")
    log.info("%s: step %d", source.folder, found[0])
    return found[1]["params"]


def score_records(scorer: Scorer, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """The output row of each record."""
    sides = [("_chosen", "_rejected") if record.chosen is not None else ("",) for record in records]
    asked = [
        dataclasses.replace(record, messages=(*record.messages, getattr(record, side[1:]))) if side else record
        for record, its in zip(records, sides)
        for side in its
    ]
    logits = iter(scorer.logits(scorer.tokens(asked)))
    for record, its in zip(records, sides):
        row: dict[str, Any] = {"id": record.id}
        for side in its:
            row |= {f"{name}{side}": value for name, value in _named(scorer.labels, next(logits)).items()}
        yield row


def _named(labels: Sequence[str], logits: np.ndarray) -> dict[str, float]:
    """A scorer's levels, a reward model's score, or any other classifier's logits by label."""
    if tuple(labels) == LABELS["scorer"]:
        return {name: float(level[0, 0]) for name, level in expected_levels(jnp.asarray(logits[None, None])).items()}
    if len(labels) == 1:
        return {"score": float(logits[0])}
    return dict(zip(labels, map(float, logits), strict=True))


def run(arguments: argparse.Namespace) -> int:
    start_jax()
    scorer = Scorer(
        arguments.checkpoint,
        row_length=arguments.row_length,
        rows=arguments.rows,
        dtype=arguments.dtype,
        step=arguments.step,
    )
    target = pathlib.Path(arguments.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    making, count = target.with_name(f".{target.name}.partial"), 0
    records = read_records(SourceConfig(path=arguments.input), ColumnsConfig())
    with making.open("w", encoding="utf-8") as file:
        while window := list(itertools.islice(records, _WINDOW)):
            for bad in window:
                if isinstance(bad, Rejected):
                    raise ConfigError(f"{bad.file}:{bad.line}: {bad.reason}")
            for row in score_records(scorer, window):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += len(window)
    making.replace(target)
    log.info("%d rows scored into %s", count, target)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.score",
        description="Score conversations or preference pairs with a reward model or an RV/CD scorer.",
        epilog="example: python -m dqjax.score --checkpoint runs/reward --input pairs.jsonl --output scores.jsonl",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a run folder, or an exported classifier")
    parser.add_argument("--input", required=True, metavar="FILE", help="jsonl or parquet: conversations or pairs")
    parser.add_argument("--output", required=True, metavar="FILE", help="one JSON line a row, in the input's order")
    parser.add_argument("--row-length", type=int, default=4096, metavar="T", help="tokens of a row; default %(default)s")
    parser.add_argument("--rows", type=int, default=8, help="packed rows scored together; default %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default %(default)s")
    parser.add_argument("--step", type=int, help="of a run folder's checkpoint; default: the newest intact one")
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(run_command(main))
