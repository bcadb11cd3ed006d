"""What is decided by a sample's text, whichever tokens spell it: stop strings, and whether thinking has ended."""

import dataclasses
from collections.abc import Callable, Sequence

PARTIAL = 4  # tokens that may spell the rest of a character at the edge of a window


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Strings that end a sample, and the function from token ids to text in which they are looked for."""

    strings: tuple[str, ...]
    decode: Callable[[list[int]], str]

    def __post_init__(self):
        if not self.strings or "" in self.strings:
            raise ValueError(f"stop strings: expected at least one, none of them empty, got {list(self.strings)}")

    def find(self, ids: Sequence[int], new: int) -> tuple[int, str] | None:
        """Where the first stop string is complete, given that none was before the last `new` tokens.

        Returns:
          The number of tokens up to and with the one that completes it (transformers' `stop_strings` keeps the same),
          and the string; None where there is none.
        """
        reach = max(len(s.encode()) for s in self.strings) + PARTIAL  # a token is one byte at least
        window = list(ids[max(len(ids) - new - reach, 0) :])
        if self._first(window) is None:
            return None
        for length in range(len(window) - new + 1, len(window) + 1):
            if found := self._first(window[:length]):
                return len(ids) - len(window) + length, found
        return None

    def _first(self, ids: list[int]) -> str | None:
        text = self.decode(ids)
        found = [s for s in self.strings if s in text]
        return min(found, key=text.index, default=None)


@dataclasses.dataclass(frozen=True)
class ThinkingEnd:
    """How thinking is ended by force.

    Attributes:
      token_ids: what is put behind the last token within the budget, such as those of "\\n</think>\\n\\n".
      ended: whether thinking has ended in these new tokens; then nothing is put there.
    """

    token_ids: tuple[int, ...]
    ended: Callable[[Sequence[int]], bool]


def cut(text: str, stop: str | None) -> str:
    """The text before the stop string that ended it."""
    return text if stop is None else text[: text.index(stop)]
