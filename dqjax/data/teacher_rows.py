"""A teacher's top-k log-probabilities on disk: a `sample_cache` with one row a trained token.

    field      a row             bytes
    ids        [k] uint16/32     2 k where the vocabulary has at most 65,536 tokens, else 4 k
    logprobs   [k] bfloat16      2 k     (float32: 4 k)
    tail       [] bfloat16       2       log-probability of all other tokens

So k = 64 of a Qwen vocabulary takes 386 bytes a trained token. bfloat16 moves a probability by up to 0.3%, which may be
more than the whole tail holds; hence the tail is stored too, and the k are scaled on reading to what it leaves.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from dqjax.config import ConfigError
from dqjax.data.cache_writer import CacheWriter
from dqjax.data.rows import PackedRows
from dqjax.data.sample_cache import Field, SampleCache, expect_meta
from dqjax.data.tokenizer import token_fingerprint

REASONS = {
    "kind": "something else than a teacher's top-k log-probabilities",
    "tokenizer": "another tokenizer than the student's",
    "temperature": "another temperature than objective.temperature",
}


def teacher_meta(tokenizer: Any, temperature: float) -> dict[str, Any]:
    """What cached log-probabilities depend on, besides the teacher."""
    return {"kind": "teacher", "tokenizer": token_fingerprint(tokenizer), "temperature": temperature}


def teacher_fields(k: int, vocab: int, dtype: str) -> dict[str, Field]:
    """The fields of the table above."""
    ids = Field("uint16" if vocab <= 1 << 16 else "uint32", (k,))
    return {"ids": ids, "logprobs": Field(dtype, (k,)), "tail": Field(dtype)}


def write_teacher_rows(
    writer: CacheWriter,
    id: str,
    tokens: Int[np.ndarray, " n"],
    trained: Bool[np.ndarray, " n"],
    ids: Int[np.ndarray, "n k"],
    logprobs: Float[np.ndarray, "n k"],
    tail: Float[np.ndarray, " n"],
) -> None:
    """Adds a sample. Row t of the arrays is the distribution behind token t; kept are those before a trained one."""
    kept = trained[1:]
    writer.add(id, tokens, {"ids": ids[:-1][kept], "logprobs": logprobs[:-1][kept], "tail": tail[:-1][kept]})


class TeacherRows:
    """Reads a cache into the `token_values` of packed sequences.

    Args:
      folder: of the cache.
      tokenizer, temperature: the student's, which have to be those of the cache.
      names: of the two values: ids `[n, k]` int32 (-1 where nothing is trained), log-probabilities `[n, k]` float32.

    Raises:
      ConfigError: no whole cache, or one of another tokenizer or temperature.
    """

    def __init__(self, folder: str | pathlib.Path, tokenizer: Any, temperature: float, names: tuple[str, str]):
        self._cache, self._names = SampleCache(folder), names
        expect_meta(self._cache, teacher_meta(tokenizer, temperature), REASONS)

    def check(self, rows: PackedRows) -> None:
        """Raises ConfigError unless the cache has as many rows as there are trained tokens, for every sequence."""
        plain, sequences, wrong = dataclasses.replace(rows, token_values=None), 0, []
        for r in range(len(plain)):
            for sequence in plain.row(r):
                id = plain.documents.ids[sequence.values["row"]]
                sequences += 1
                if self._cache.count(id, sequence.ids) != sequence.trained_count:
                    wrong.append(id)
        if wrong:
            raise ConfigError(
                f"{self._cache.folder} does not hold {len(wrong)} of {sequences} sequences as they are tokenised now, "
                f"the first of sample {wrong[0]!r}: its data, chat template or data settings are others; write the "
                "cache anew"
            )

    def __call__(
        self, id: str, tokens: Int[np.ndarray, " n"], trained: Bool[np.ndarray, " n"]
    ) -> Mapping[str, np.ndarray]:
        """The values of a sample; row i is the distribution that token i was a target of."""
        rows = self._cache.rows(id, tokens)
        targets = trained & (np.arange(len(tokens)) > 0)
        head, tail = (rows[name].astype(np.float64) for name in ("logprobs", "tail"))
        scale = (1 - np.minimum(np.exp(tail), 1 - 1e-6)) / np.exp(head).sum(axis=-1)
        logprobs = (head + np.log(scale)[:, None]).astype(np.float32)
        found = {self._names[0]: rows["ids"].astype(np.int32), self._names[1]: logprobs}
        out = {}
        for name, array in found.items():
            empty = -1 if name == self._names[0] else 0
            out[name] = np.full((len(tokens), array.shape[1]), empty, array.dtype)
            out[name][targets] = array
        return out
