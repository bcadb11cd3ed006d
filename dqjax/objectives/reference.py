"""A reference's log-probabilities of preference pairs: computed once, kept in the run folder."""

import hashlib
import logging
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float

from dqjax.config import ConfigError
from dqjax.data.cache_writer import CacheWriter
from dqjax.data.pair_loader import PairEvaluation, PairRows, PairSet
from dqjax.data.sample_cache import Field, SampleCache, sample_key
from dqjax.load import Model, read_parameters
from dqjax.sharding import Rules, local_part
from dqjax.steps.preference import make_sequence_logprobs
from dqjax.trainer import local_rows, placer

log = logging.getLogger(__name__)


def cached_reference(
    model: Model, rules: Rules, folder: pathlib.Path, *, rows: int, row_length: int
) -> Callable[[PairSet], dict[str, Float[np.ndarray, "P 2"]]]:
    """A function from pairs to `reference_logprob` of each one's (chosen, rejected), computed only once.

    Args:
      model: the reference, as its source holds it.
      folder: gets a `sample_cache` for each set of pairs; a damaged or unfinished one is written anew.
      rows: packed rows computed together.
    """

    def values(pairs: PairSet) -> dict[str, np.ndarray]:
        keys = [[sample_key(id, ids) for ids in both] for id, both in zip(pairs.ids, pairs.sequences)]
        here = folder / hashlib.blake2b(np.array(keys, np.uint64).tobytes(), digest_size=8).hexdigest()
        try:
            cache = SampleCache(here)
        except ConfigError as e:
            if here.exists():
                log.warning("%s; computing the reference again", e)
            _write(pairs, model, rules, here, rows=rows, row_length=row_length)
            cache = SampleCache(here)
        found = [[cache.rows(id, ids)["logprob"][0] for ids in both] for id, both in zip(pairs.ids, pairs.sequences)]
        return {"reference_logprob": np.array(found, np.float32)}

    return values


def _write(pairs: PairSet, model: Model, rules: Rules, folder: pathlib.Path, *, rows: int, row_length: int) -> None:
    _together("reading")  # all processes have seen that there is no cache before one of them changes it
    if jax.process_index() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    _together("removed")
    params = read_parameters(model, dtype=model.decoder.dtype)
    logprobs = jax.jit(
        make_sequence_logprobs(model.decoder, rules, vocab=model.vocab),
        out_shardings=rules.sharding(("batch",), (rows,)),
    )
    batches = PairEvaluation(
        PairRows.of(pairs, np.arange(len(pairs)), row_length),
        batch_rows=rows,
        local_rows=local_rows(rules, rows),
        pad_id=model.tokenizer.pad_token_id,
    )
    place = placer(rules, rows)
    part = jax.process_index(), jax.process_count()
    with CacheWriter(folder, {"logprob": Field("float32")}, {"kind": "reference"}, part=part) as writer:
        for batch in batches:
            found = local_part(logprobs(params, place(batch)))
            for at in zip(*np.nonzero(batch.side["row"] >= 0)):
                pair, side = int(batch.side["row"][at]), 1 - int(batch.side["chosen"][at])
                writer.add(pairs.ids[pair], pairs.sequences[pair][side], {"logprob": found[at][None]})
    _together("written")
    log.info("reference: log-probabilities of %d sequences in %s", writer.samples, folder)


def _together(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"reference {name}")
