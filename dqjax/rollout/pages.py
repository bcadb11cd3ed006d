"""Which pages of the cache belong to which sequence: the host's book, of numbers alone."""

import numpy as np


class Pages:
    """Pages are handed out by shard, since a device decodes from its own; several sequences may hold the same one.

    Args:
      slots: sequences, split evenly over the shards, as the pages.
      pages: numbered over all shards.
      size: positions of a page.
      width: the most pages of a sequence.

    Attributes:
      table: pages of each slot in order; numbers behind those it holds mean nothing.
    """

    def __init__(self, *, slots: int, pages: int, size: int, width: int, shards: int):
        self._size, self._slots_a_shard = size, slots // shards
        self._free = [list(range(pages * s // shards, pages * (s + 1) // shards))[::-1] for s in range(shards)]
        self._users = [0] * pages
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self.table = np.zeros((slots, width), np.int32)

    def shard(self, slot: int) -> int:
        """The shard that a slot belongs to."""
        return slot // self._slots_a_shard

    def free(self, shard: int) -> int:
        """Pages that nobody holds."""
        return len(self._free[shard])

    def needed(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self._size)

    def extend(self, slot: int, positions: int) -> bool:
        """Gives a slot all pages for so many positions (at most its width), or none and False where too few are free."""
        held, free = self._held[slot], self._free[self.shard(slot)]
        more = min(self.needed(positions), self.table.shape[1]) - len(held)
        if more > len(free):
            return False
        self._take(slot, [free.pop() for _ in range(more)])
        return True

    def share(self, slot: int, other: int, count: int) -> None:
        """Gives a slot without pages the first ones of another slot of its shard."""
        self._take(slot, self._held[other][:count])

    def release(self, slot: int) -> None:
        """Takes all pages from a slot."""
        for page in self._held[slot]:
            self._users[page] -= 1
            if not self._users[page]:
                self._free[self.shard(slot)].append(page)
        self._held[slot] = []

    def _take(self, slot: int, pages: list[int]) -> None:
        held = self._held[slot]
        self.table[slot, len(held) : len(held) + len(pages)] = pages
        held += pages
        for page in pages:
            self._users[page] += 1
