"""Near-duplicate problems by MinHash (Broder 1997) and banding ("Mining of Massive Datasets", chapter 3).

Two texts' share of equal signature entries estimates the Jaccard similarity J of their sets of word shingles, with
standard error sqrt(J (1 − J) / k) for k entries. Signatures are cut into b bands of r entries; pairs that agree in a
whole band are compared, which finds a pair with probability 1 − (1 − J^r)^b: over 0.9999 at J = 0.8 for the 32 bands of
4 used here.

Signatures lie in a file (512 bytes a text); in memory are 16 bytes a text, and 40 more while a band is sorted.
"""

import mmap
import tempfile
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
import pydantic
from jaxtyping import Bool, Int, UInt32, UInt64

from dqjax.config import Section
from dqjax.data.canonical import number_bag, tokens

ENTRIES, BANDS = 128, 32
_AT_A_TIME = 1 << 15  # signatures looked at together: 16 MB
_PAIRS = 512  # pairs compared at a time: each brings up to 64 KB around its two signatures into memory


class NearConfig(Section):
    """near_duplicates.

    threshold: estimated Jaccard similarity of word shingles from which two problems are one.
    shingle: words of a shingle.
    same_numbers: only problems with the same numbers are near-duplicates: a word problem with other numbers is another
      one.
    """

    threshold: float = pydantic.Field(0.8, gt=0, le=1)
    shingle: int = pydantic.Field(4, ge=1)
    same_numbers: bool = True


class Signer:
    """Signatures and number hashes of texts; the same in every process."""

    def __init__(self, config: NearConfig):
        self._shingle, self._same_numbers = config.shingle, config.same_numbers
        rng = np.random.default_rng(20510)
        self._multiply = rng.integers(0, 2**63, ENTRIES, np.uint64) << np.uint64(1) | np.uint64(1)
        self._add = rng.integers(0, 2**63, ENTRIES, np.uint64)

    def __call__(self, texts: Sequence[str]) -> tuple[UInt32[np.ndarray, "N 128"], UInt64[np.ndarray, " N"]]:
        signatures, numbers = np.zeros((len(texts), ENTRIES), np.uint32), np.zeros(len(texts), np.uint64)
        for i, text in enumerate(texts):
            parts = tokens(text)
            hashes = np.array(
                [zlib.crc32(s.encode("utf-8", "surrogatepass")) for s in self._shingles(parts)], np.uint64
            )
            # Multiply-shift hashing (Dietzfelbinger et al. 1997): the upper 32 bits of a·h + b.
            mixed = (hashes[:, None] * self._multiply + self._add) >> np.uint64(32)
            signatures[i] = mixed.min(axis=0)
            if self._same_numbers:
                bag = " ".join(number_bag(parts)).encode()
                numbers[i] = zlib.crc32(bag) | zlib.crc32(b"#" + bag) << 32
        return signatures, numbers

    def _shingles(self, parts: list[str]) -> set[str]:
        n = self._shingle
        return {" ".join(parts[i : i + n]) for i in range(max(len(parts) - n + 1, 1))}


def find_near_duplicates(
    signed: Iterable[tuple[UInt32[np.ndarray, "n 128"], UInt64[np.ndarray, " n"]]], threshold: float
) -> Int[np.ndarray, " N"]:
    """For each text the number of the earlier text that it repeats, or its own.

    Args:
      signed: what `Signer` returns for consecutive chunks of the texts.
    """
    with tempfile.TemporaryFile() as file:
        parts = []
        for signatures, numbers in signed:
            file.write(signatures.tobytes())
            parts.append(numbers)
        numbers = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        original = np.arange(len(numbers))
        if len(numbers) < 2:
            return original
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            for band in range(BANDS):
                first, other = _candidates(_band_keys(pages, numbers, band))
                keep = _alike(pages, first, other, threshold)
                np.minimum.at(original, other[keep], first[keep])
    for _ in range(64):  # a copy of a copy is a copy of the first
        if np.array_equal(original, original[original]):
            break
        original = original[original]
    return original


def _signatures(pages: mmap.mmap) -> UInt32[np.ndarray, "N 128"]:
    return np.frombuffer(pages, np.uint32).reshape(-1, ENTRIES)


def _band_keys(pages: mmap.mmap, numbers: np.ndarray, band: int) -> UInt64[np.ndarray, " N"]:
    width = ENTRIES // BANDS
    keys = numbers.copy()
    for i in range(0, len(keys), _AT_A_TIME):
        signatures, part = _signatures(pages)[i : i + _AT_A_TIME], keys[i : i + _AT_A_TIME]
        for column in range(band * width, (band + 1) * width):
            part ^= signatures[:, column]
            part *= np.uint64(0x9E3779B97F4A7C15)
            part ^= part >> np.uint64(29)
        del signatures
        pages.madvise(mmap.MADV_DONTNEED)  # they stay in the page cache, and out of this process's memory
    return keys


def _candidates(keys: UInt64[np.ndarray, " N"]) -> tuple[Int[np.ndarray, " C"], Int[np.ndarray, " C"]]:
    """Pairs (the first of its key, another of the same key)."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    first = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
    return first[~begins], order[~begins]


def _alike(pages: mmap.mmap, first: np.ndarray, other: np.ndarray, threshold: float) -> Bool[np.ndarray, " C"]:
    keep = np.zeros(len(first), bool)
    for i in range(0, len(first), _PAIRS):
        part = slice(i, i + _PAIRS)
        signatures = _signatures(pages)
        keep[part] = (signatures[first[part]] == signatures[other[part]]).mean(axis=1) >= threshold
        del signatures
        pages.madvise(mmap.MADV_DONTNEED)
    return keep
