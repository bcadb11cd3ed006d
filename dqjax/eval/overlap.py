"""Which test problems occur in training data: equal questions, and long passages in common.

Both tests compare words without regard to case, spacing and LaTeX's spacing commands.
"""

import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from dqjax.config import ConfigError
from dqjax.data.config import SourceConfig
from dqjax.data.records import Record, normalise_question, question_key
from dqjax.data.sources import Rejected, read_records

WORDS = 10  # OmniThought decontaminates by 10-grams
FEW = 10  # so few problems do not show which words are common

_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Test problems found in training data.

    Attributes:
      problems: test problems. rows: training rows.
      equal: ids whose normalised question is one of training. similar: other ids that share a passage of 10 words.
    """

    problems: int
    rows: int
    equal: tuple[str, ...]
    similar: tuple[str, ...]

    def __str__(self) -> str:
        share = f"{(len(self.equal) + len(self.similar)) / self.problems:.1%}"
        return (
            f"{len(self.equal)} of {self.problems} questions occur in {self.rows} training rows, "
            f"{len(self.similar)} more share {WORDS} words in a row ({share} in all)"
        )


def find_overlap(problems: Sequence[Record], training: Iterable[Record]) -> Overlap:
    """Looks every training question up among the test problems; training data are streamed.

    Words that more than half of the test problems use (a common instruction, "the") are taken out before passages are
    compared, on both sides: a task whose questions differ in their numbers alone would overlap with itself otherwise.
    """
    words = [_WORD.findall(normalise_question(problem.question)) for problem in problems]
    uses = collections.Counter(word for mine in words for word in set(mine))
    common = {word for word, n in uses.items() if n > len(problems) / 2} if len(problems) >= FEW else set()
    keys: dict[int, list[str]] = {}
    grams: dict[int, list[str]] = {}
    for problem, mine in zip(problems, words):
        keys.setdefault(question_key(problem), []).append(problem.id)
        for gram in set(_grams(mine, common)):
            grams.setdefault(gram, []).append(problem.id)
    equal: set[str] = set()
    similar: set[str] = set()
    rows = 0
    for record in training:
        rows += 1
        equal.update(keys.get(question_key(record), ()))
        if grams:
            for gram in _grams(_WORD.findall(normalise_question(record.question)), common):
                similar.update(grams.get(gram, ()))
    order = [problem.id for problem in problems]
    return Overlap(
        len(problems),
        rows,
        tuple(i for i in order if i in equal),
        tuple(i for i in order if i in similar and i not in equal),
    )


def training_records(paths: Sequence[str]) -> Iterator[Record]:
    """The rows of training files; rows that training could not use are passed over.

    Raises:
      ConfigError: no such file.
    """
    if not paths:
        raise ConfigError("no training data to compare with")
    for path in paths:
        for record in read_records(SourceConfig(path=path)):
            if not isinstance(record, Rejected):
                yield record


def _grams(words: Sequence[str], common: set[str]) -> Iterator[int]:
    words = [word for word in words if word not in common]
    for i in range(len(words) - WORDS + 1):
        digest = hashlib.blake2b(" ".join(words[i : i + WORDS]).encode(), digest_size=8).digest()
        yield int.from_bytes(digest, "little")
