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

import jax.numpy as jnp
import numpy as np

from dqjax.commands import run_command
from dqjax.config import ConfigError
from dqjax.convert.classifier import LABELS
from dqjax.data.config import ColumnsConfig, SourceConfig
from dqjax.data.records import BadRow, Record
from dqjax.data.sources import Rejected, read_records
from dqjax.load import start_jax
from dqjax.scoring import Scorer
from dqjax.sharding import MeshConfig, Rules, make_mesh
from dqjax.steps.scorer import expected_levels

log = logging.getLogger("dqjax.score")

_WINDOW = 1024  # rows of the input that are packed together


def score_records(scorer: Scorer, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
    """The output row of each record.

    Raises:
      ConfigError: a conversation that cannot be scored; names it.
    """
    sides = [("_chosen", "_rejected") if record.chosen is not None else ("",) for record in records]
    asked = [
        dataclasses.replace(record, messages=(*record.messages, getattr(record, side[1:]))) if side else record
        for record, its in zip(records, sides)
        for side in its
    ]
    tokens = scorer.tokens(asked)
    for record, ids in zip(asked, tokens):
        if isinstance(ids, BadRow):
            raise ConfigError(f"{record.id}: {ids}")
    logits = iter(scorer.logits(tokens))
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
        Rules(make_mesh(**MeshConfig().model_dump())),
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
