"""python -m dqjax.teacher_logits: a teacher's top-k log-probabilities of a config's texts, for `objective: distill`.

The teacher reads what the student will: the texts of `data:` (the held-out ones too), rendered by the student's
template and cut into sequences as in training. Rows are kept by sample id for trained tokens alone;
`dqjax.data.teacher_rows` has the format and its bytes a token. Every host writes its own shards; the cache counts only
once the last is done. Killed and started again, the command goes on behind the shards that are whole, and leaves the
files of a run that was not killed.
"""

import argparse
import functools
import hashlib
import itertools
import json
import logging
import pathlib
import sys
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from dqjax.commands import run_command
from dqjax.config import ConfigError, load
from dqjax.data.cache_writer import CacheWriter
from dqjax.data.loader import open_training_data
from dqjax.data.pack import Tokens, pack_rows
from dqjax.data.rows import PackedRows
from dqjax.data.teacher_rows import teacher_fields, teacher_meta, write_teacher_rows
from dqjax.load import build_model, read_parameters, start_jax
from dqjax.losses.top_k import top_k_logprobs
from dqjax.objectives.distill import open_teacher
from dqjax.sharding import Rules, local_part, make_mesh
from dqjax.train_config import Config
from dqjax.trainer import local_rows, placer
from dqjax.types import Params

log = logging.getLogger("dqjax.teacher_logits")


def write_cache(
    config: Config, teacher: str, folder: pathlib.Path, *, k: int, dtype: str = "bfloat16", shard_rows: int = 1 << 20
) -> int:
    """Runs the teacher once over every sequence of the config's data; returns how many samples this process wrote.

    Args:
      k: tokens kept at each place.
      dtype: of the log-probabilities on disk.
      shard_rows: trained tokens of a shard.

    Raises:
      ConfigError: another objective, a teacher of another tokenizer, data that cannot be used, or a `folder` in use.
    """
    if config.objective.kind != "distill":
        raise ConfigError(f"objective: teacher caches are for distill, got {config.objective.kind}")
    rules = Rules(make_mesh(**config.mesh.model_dump()))
    student = build_model(config.model, rules)
    model = open_teacher(teacher, config, student, rules)
    if not 1 <= k <= student.vocab:
        raise ConfigError(f"--k: expected 1 to {student.vocab}, the student's tokens, got {k}")
    rows, here = config.train.batch_rows, local_rows(rules, config.train.batch_rows)
    data = open_training_data(config.data, student.tokenizer, batch_rows=rows)
    sets, temperature, place = data.row_sets, config.objective.temperature, placer(rules, rows)

    @functools.partial(jax.jit, out_shardings=rules.sharding(("batch",), (rows,)))
    def best(params, batch):
        hidden, _ = model.decoder.apply(params, batch.tokens, batch.positions, batch.segment_ids)
        table = model.decoder.output_table(params)
        return top_k_logprobs(hidden, table, rules, k=k, temperature=temperature, vocab=student.vocab)

    params = read_parameters(model, dtype=model.decoder.dtype)
    fields = teacher_fields(k, student.vocab, dtype)
    meta = teacher_meta(student.tokenizer, temperature) | {"teacher": teacher, "k": k}
    meta["made_by"] = _digest(config, params)
    part = jax.process_index(), jax.process_count()
    with CacheWriter(folder, fields, meta, part=part, shard_rows=shard_rows) as writer:
        batches = [(found, first) for found in sets for first in range(0, len(found), rows)]
        done = _leading(writer, (_rows(found, first, here) for found, first in batches))
        bar = tqdm(batches[done:], initial=done, total=len(batches), desc="teacher", unit="batch", disable=None)
        for found, first in bar:
            packed = _rows(found, first, here)
            batch = pack_rows(
                [[sequence for _, sequence in row] for row in packed],
                config.data.row_length,
                columns=max(s.plan.columns for s in sets),
                pad_id=student.tokenizer.pad_token_id,
                like=sets[0].row(0),
            )
            arrays = [local_part(x) for x in best(params, place(batch))]
            for r, row in enumerate(packed):
                begin = 0
                for id, sequence in row:
                    end = begin + len(sequence.ids)
                    write_teacher_rows(writer, id, sequence.ids, sequence.trained, *(a[r, begin:end] for a in arrays))
                    begin = end
        size = sum(field.bytes for field in fields.values())
        log.info("%s: %d samples, %d bytes a trained token", folder, writer.samples, size)
    return writer.samples


def _rows(found: PackedRows, first: int, here: Sequence[int]) -> list[list[tuple[str, Tokens]]]:
    """This host's part of the batch that starts at row `first`: ids and sequences, none in rows behind the last."""
    rows = [found.row(first + i) if first + i < len(found) else [] for i in here]
    return [[(found.documents.ids[sequence.values["row"]], sequence) for sequence in row] for row in rows]


def _leading(writer: CacheWriter, batches: Iterable[list[list[tuple[str, Tokens]]]]) -> int:
    """How many of the first batches every host has written already: all of them compute a batch, or none."""
    held = itertools.takewhile(lambda rows: all(writer.holds(id, s.ids) for row in rows for id, s in row), batches)
    done = int(multihost_utils.process_allgather(np.int32(sum(1 for _ in held))).min())
    if done:
        log.info("%s: going on behind batch %d", writer.folder, done)
    return done


def _digest(config: Config, params: Params) -> str:
    """A hash of what the rows are computed from: data, shape of the batches, and the teacher's weights by their sum."""
    total = jax.jit(lambda tree: sum(jnp.abs(x).sum(dtype=jnp.float32) for x in jax.tree.leaves(tree)))(params)
    settings = [config.data.model_dump_json(), config.model.model_dump_json(), config.train.batch_rows, float(total)]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.teacher_logits",
        description="Write a teacher's top-k log-probabilities of the texts of a training config, by sample id.",
        epilog="A trained token takes k × 6 + 2 bytes, k × 4 + 2 where the vocabulary has at most 65,536 tokens. "
        "Started again after a kill, the same command goes on behind the last whole shard (1,048,576 trained tokens). "
        "On several hosts start it on all, as training, with DIR on a disk that they share: each writes its own shards, "
        "and training may read them on any number of hosts. "
        "example: python -m dqjax.teacher_logits --config configs/miniature/distill.yaml --teacher "
        "runs/chain_sum/columns --output runs/chain_sum/teacher_cache; then "
        "objective.teachers='[{cache: runs/chain_sum/teacher_cache}]'",
    )
    parser.add_argument("--config", required=True, help="a training config with objective: distill")
    parser.add_argument("--teacher", required=True, metavar="DIR", help="a model, as model.init_from takes it")
    parser.add_argument(
        "--output", required=True, metavar="DIR", type=pathlib.Path, help="the cache: new, or unfinished"
    )
    parser.add_argument("--k", type=int, default=64, help="tokens kept at each place; default %(default)s")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of the log-probabilities; default %(default)s",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values that replace those of the file"
    )
    arguments = parser.parse_args(argv)
    config = load(Config, arguments.config, arguments.overrides)
    start_jax()
    write_cache(config, arguments.teacher, arguments.output, k=arguments.k, dtype=arguments.dtype)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
