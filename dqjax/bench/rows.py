"""Packed rows of random tokens, as training meets them."""

import numpy as np

from dqjax.kernels.measure import document_lengths
from dqjax.types import Batch


def packed_rows(vocab: int, rows: int, tokens: int, mean_document: int, *, seed: int = 0) -> Batch:
    """Full rows of documents with log-normal lengths; every token but the last of a document predicts the next one.

    Args:
      rows, tokens: B and T.
      mean_document: tokens of a document, on average; 0 for one document a row.

    Returns:
      A batch of numpy arrays; `token_weight` takes the mean over the trained tokens.
    """
    rng = np.random.default_rng(seed)
    lengths = [document_lengths(rng, tokens, mean_document) if mean_document else [tokens] for _ in range(rows)]
    ids = rng.integers(0, vocab, (rows, tokens)).astype(np.int32)
    segment_ids = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]).astype(np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths]).astype(np.int32)
    trained = np.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1)))
    targets = np.where(trained, np.roll(ids, -1, axis=1), 0)
    weight = (trained / trained.sum()).astype(np.float32)
    return Batch(ids, targets, segment_ids, positions, weight, segment_ids - 1)
