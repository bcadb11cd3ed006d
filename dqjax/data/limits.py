"""Rates and budgets: how fast an endpoint may be called, and how many tokens a run may cost."""

import asyncio
import time
from collections.abc import Callable


class BudgetSpent(Exception):
    """The next call could cost more tokens than the run may still spend."""


class Bucket:
    """A rate of `per_minute` units, evenly spread, with bursts of `burst` seconds' worth.

    The generic cell rate algorithm (ITU-T I.371): one number, the time at which the next unit is due.

    Args:
      per_minute: units (requests, tokens) a minute.
    """

    def __init__(self, per_minute: float, burst: float = 1.0, now: Callable[[], float] = time.monotonic):
        self._interval, self._burst, self._now = 60.0 / per_minute, burst, now
        self._due = now()

    def delay(self, units: float) -> float:
        """Takes `units` and returns how long their taker has to wait, in seconds."""
        now = self._now()
        wait = max(0.0, self._due - now - self._burst)
        self._due = max(self._due, now) + units * self._interval
        return wait

    def settle(self, units: float) -> None:
        """Takes `units` more, or gives back -`units`: what was taken was an estimate."""
        self._due += units * self._interval


class Budget:
    """Tokens that a run may spend. A call reserves the most it could cost; what it did cost is settled after it.

    So the limit is hard: what was spent and what calls in flight could still cost never exceed it together. Where a
    reservation does not fit, the call waits until those in flight are settled, and fails if none is.

    A call that was cut or stalled may have been billed: it counts with all it could have cost.

    Args:
      limit: tokens; None is no limit. spent: by earlier runs of the same job.
      record_lost: called with the tokens of each call that may have been billed without an answer.
    """

    def __init__(
        self, limit: int | None = None, spent: int = 0, record_lost: Callable[[int], None] = lambda tokens: None
    ):
        self.limit, self.spent = limit, spent
        self._record_lost = record_lost
        self._reserved = 0
        self._settled = asyncio.Event()

    async def reserve(self, tokens: int) -> None:
        """Raises `BudgetSpent` if `tokens` are not left."""
        while self.limit is not None and self.spent + self._reserved + tokens > self.limit:
            if self._reserved == 0:
                raise BudgetSpent(
                    f"{self.spent:,} of {self.limit:,} tokens are spent, and the next call may cost {tokens:,}; "
                    "raise max_total_tokens to go on: what is answered stays answered"
                )
            self._settled.clear()
            await self._settled.wait()
        self._reserved += tokens

    def settle(self, reserved: int, spent: int, *, lost: bool = False) -> None:
        """Ends a reservation with what the call has cost; `lost`: it gave no answer, and all may have been billed."""
        self._reserved -= reserved
        self.spent += reserved if lost else spent
        if lost:
            self._record_lost(reserved)
        self._settled.set()
