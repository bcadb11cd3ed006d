"""Which chains a student trains on: filters, an adaptive draw by RV and CD, a mixture by CD, a cap a problem.

They apply in this order; each can be left out.

1. Filters (the toolkit's [E]): correct, RV and CD within bounds, a length range, suitable for the student.
2. The draw [D]: of each problem's chains, `per_problem` without replacement, with weight

       w ∝ exp(−((RV − RV*(CD))² + λ (CD − CD*)²) / 2τ²)

   RV*(CD) rises with difficulty, so that easy problems get short chains and hard ones long ones; CD* is what the
   student can follow. Drawn by adding Gumbel noise to log w and taking the largest (Efraimidis and Spirakis 2006, in
   Gumbel form), the noise of a row being a function of (seed, id): a shard or another order draws the same.
3. The cap: the first `per_problem_cap` chains of a problem.
4. The mixture [E]: in each CD bin, the rows whose RV is nearest to the target. It looks at all rows, so it does not
shard.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pydantic

from dqjax.config import Section
from dqjax.data.chain_rows import DIFFICULTY, VERBOSITY, Row, has_chain, label_of, thought_of
from dqjax.data.stage import Job, Out, rejection
from dqjax.rewards.verbosity import StyleConfig

HELP = "filter chains, draw them by RV and CD, mix difficulties, cap a problem's share"


class DrawConfig(Section):
    """The adaptive draw.

    per_problem: chains drawn of each problem. target: RV*(CD) and CD*, as in the RV and CD rewards.
    difficulty_weight: λ. temperature: τ; small draws nearly always the best. seed: of the draw.
    """

    per_problem: int = pydantic.Field(1, ge=1)
    target: StyleConfig = StyleConfig()
    difficulty_weight: float = pydantic.Field(1.0, ge=0)
    temperature: float = pydantic.Field(1.0, gt=0)
    seed: int = 0


class MixtureConfig(Section):
    """The CD-binned mixture.

    edges: of the bins, the last one open above; [0, 3, 6, 10] is the toolkit's. rows: kept in each bin, one number or
      one a bin.
    target: RV*(CD), to which the kept rows are nearest.
    """

    edges: tuple[float, ...] = pydantic.Field((0, 3, 6, 10), min_length=2)
    rows: tuple[int, ...] = pydantic.Field(min_length=1)
    target: StyleConfig = StyleConfig()

    @pydantic.field_validator("rows", mode="before")
    @classmethod
    def _one_number(cls, value):
        return [value] if isinstance(value, int) else value

    @pydantic.model_validator(mode="after")
    def _consistent(self):
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges: expected rising numbers, got {list(self.edges)}")
        if len(self.rows) not in (1, len(self.edges) - 1):
            raise ValueError(f"rows: expected one number or {len(self.edges) - 1}, got {len(self.rows)}")
        return self


class Config(Section):
    """select.

    correct: only chains verified as correct (rows without `correct` are left out too).
    suitable: leave out chains that refine found unsuitable.
    verbosity, difficulty: [lowest, highest] of RV and CD; rows without the label are left out.
    length: [lowest, highest] characters of the chain. tokens: the same in tokens, as the teacher counted them.
    draw, mixture: see there. per_problem_cap: chains of a problem at most.
    missing: what the draw and the mixture do with rows without labels: `drop` them, or `keep` them beside what is
      drawn.
    """

    correct: bool = True
    suitable: bool = True
    verbosity: tuple[float, float] | None = None
    difficulty: tuple[float, float] | None = None
    length: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    draw: DrawConfig | None = None
    mixture: MixtureConfig | None = None
    per_problem_cap: int | None = pydantic.Field(None, ge=1)
    missing: Literal["drop", "keep"] = "drop"


def run(config: Config, job: Job) -> None:
    """Writes the rows that are left, in the order of the input."""
    if config.mixture is None:
        job.map(lambda group: choose(group, config))
        return
    job.refuse_shard("select with a mixture")
    job.map(choose_mixture(config, job))


def choose(group: Sequence[Row], config: Config) -> list[Out]:
    """Filters, draw and cap over the chains of one problem."""
    reasons = {row["id"]: reason for row in group if (reason := _filtered(row, config)) is not None}
    left = [row for row in group if row["id"] not in reasons]
    if config.draw is not None:
        scored = {row["id"]: log_weight(row, config.draw) for row in left}
        known = [row for row in left if scored[row["id"]] is not None]
        for row in left:
            if scored[row["id"]] is None and config.missing == "drop":
                reasons[row["id"]] = "RV or CD missing"
        noisy = {row["id"]: scored[row["id"]] + _gumbel(config.draw.seed, row["id"]) for row in known}
        for id in sorted(noisy, key=noisy.__getitem__, reverse=True)[config.draw.per_problem :]:
            reasons[id] = "not drawn"
        left = [row for row in left if row["id"] not in reasons]
    for row in left[config.per_problem_cap :] if config.per_problem_cap else ():
        reasons[row["id"]] = "over the cap of its problem"
    return [rejection(row, reasons[row["id"]]) if row["id"] in reasons else row for row in group]


def log_weight(row: Row, draw: DrawConfig) -> float | None:
    """log w of the module's formula, up to a constant; None where a label is missing."""
    verbosity, difficulty = label_of(row, VERBOSITY), label_of(row, DIFFICULTY)
    if verbosity is None or difficulty is None:
        return None
    off = verbosity - draw.target.verbosity_for(difficulty)
    far = difficulty - draw.target.difficulty
    return -(off**2 + draw.difficulty_weight * far**2) / (2 * draw.temperature**2)


def choose_mixture(config: Config, job: Job) -> Callable[[Sequence[Row]], list[Out]]:
    """`choose`, then the mixture; reads the input to find the kept rows (24 bytes a row), and again to write them."""
    mixture, places, bins, distances = config.mixture, [], [], []
    at = 0
    for group in job.groups(whole=True):
        for out in choose(group, config):
            if isinstance(out, dict):
                place = _place(out, mixture)
                if place is not None:
                    places.append(at), bins.append(place[0]), distances.append(place[1])
            at += 1
    job.counts.clear()
    places, bins, distances = np.array(places, np.int64), np.array(bins, np.int64), np.array(distances)
    kept: list[np.ndarray] = []
    for b in range(len(mixture.edges) - 1):
        mine = np.flatnonzero(bins == b)
        n = mixture.rows[b if len(mixture.rows) > 1 else 0]
        kept.append(places[mine[np.argsort(distances[mine], kind="stable")[:n]]])
        job.counts[f"CD bin [{mixture.edges[b]:g}, {mixture.edges[b + 1]:g})"] = min(n, len(mine))
    chosen = np.sort(np.concatenate(kept))
    position = -1

    def transform(group: Sequence[Row]) -> list[Out]:
        nonlocal position
        outs = choose(group, config)
        for i, out in enumerate(outs):
            position += 1
            j = np.searchsorted(chosen, position)
            inside = j < len(chosen) and chosen[j] == position
            if isinstance(out, dict) and not inside:
                if _place(out, mixture) is not None:
                    outs[i] = rejection(out, "its CD bin is full")
                elif config.missing == "drop":
                    outs[i] = rejection(out, "RV or CD missing")
        return outs

    return transform


def _place(row: Row, mixture: MixtureConfig) -> tuple[int, float] | None:
    """(bin, |RV − RV*|) of a row; None without labels, or outside the bins."""
    verbosity, difficulty = label_of(row, VERBOSITY), label_of(row, DIFFICULTY)
    if verbosity is None or difficulty is None or not mixture.edges[0] <= difficulty < mixture.edges[-1]:
        return None
    b = int(np.searchsorted(mixture.edges, difficulty, side="right")) - 1
    return b, abs(verbosity - mixture.target.verbosity_for(difficulty))


def _filtered(row: Row, config: Config) -> str | None:
    """The reason why a row is filtered out; None where it stays."""
    if not has_chain(row):
        return "no chain"
    if config.correct and row.get("correct") is not True:
        return "incorrect" if row.get("correct") is False else "correctness missing"
    if config.suitable and row.get("suitable") is False:
        return "unsuitable for the student"
    for name, bounds in ((VERBOSITY, config.verbosity), (DIFFICULTY, config.difficulty)):
        if bounds is not None:
            label = label_of(row, name)
            if label is None:
                return f"{name} missing"
            if not bounds[0] <= label <= bounds[1]:
                return f"{name} out of range"
    if config.length is not None and not config.length[0] <= len(thought_of(row) or "") <= config.length[1]:
        return "length out of range"
    if config.tokens is not None:
        if row.get("tokens") is None:
            return "no token count"
        if not config.tokens[0] <= row["tokens"] <= config.tokens[1]:
            return "tokens out of range"
    return None


def _gumbel(seed: int, id: str) -> float:
    digest = hashlib.blake2b(f"{seed}\0{id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    u = ((int.from_bytes(digest, "little") >> 12) + 0.5) / 2**52
    return -math.log(-math.log(u))
