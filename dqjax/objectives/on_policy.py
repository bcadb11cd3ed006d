"""The source of on-policy distillation: a loader's batches, of which some get the student's own answers.

    loader's batch   prompt a, text a | prompt b, text b
    on policy        prompt a, sample a | prompt b, sample b      packed anew, trained on the samples

Which batches and which samples is a function of the loader's state and a seed, so a resumed run goes on the same.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dqjax.data.documents import Documents
from dqjax.data.loader import Loader
from dqjax.data.pack import Tokens, pack_items
from dqjax.rollout.engine import Engine, Prompt
from dqjax.types import Batch, Mean, Metrics, Params


@dataclasses.dataclass
class OnPolicy:
    """A `Source` that mixes.

    Attributes:
      loader: of whole documents, all rows of a global batch.
      documents: those that the loader's side value `row` numbers.
      engine: samples from the student.
      fraction: chance of a batch to be the student's own.
      pad_id: token that fills rows up.
      local: this process's rows of a global batch.
    """

    loader: Loader
    documents: Documents
    engine: Engine
    fraction: float
    seed: int
    pad_id: int
    local: Callable[[Batch], Batch]
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def next(self, state: Any, frozen: Any) -> Batch:
        """The next batch; its rows may be more than the loader's, by a whole multiple, where samples are long."""
        place = self.loader.get_state()
        rng = np.random.default_rng([self.seed, place["epoch"], place["next_row"]])
        batch, sampled = self.loader.next(), rng.random() < self.fraction
        self._metrics: Metrics = {"on_policy": Mean(float(sampled), 1.0)}
        return self.local(self._answered(batch, state.params, rng) if sampled else batch)

    def metrics(self) -> Metrics:
        """Whether the last batch was the student's own, and the length of its samples."""
        return self._metrics

    def get_state(self) -> dict:
        return self.loader.get_state()

    def set_state(self, state: Mapping[str, int]) -> None:
        self.loader.set_state(state)

    def _answered(self, batch: Batch, params: Params, rng: np.random.Generator) -> Batch:
        places = list(zip(*np.nonzero(batch.side["row"] >= 0)))
        prompts = [self.documents.prompt(int(batch.side["row"][place])) for place in places]
        seeds = rng.integers(0, 2**31, len(places)).tolist()
        asked = (Prompt(tuple(prompt.tolist()), seed) for prompt, seed in zip(prompts, seeds))
        items, lengths = [], []
        for place, prompt, sample in zip(places, prompts, self.engine.generate(params, asked), strict=True):
            ids = np.concatenate([prompt, np.array(sample.token_ids, np.int32)])[: self.loader.row_length]
            values = {name: int(column[place]) for name, column in batch.side.items()}
            items.append([Tokens(ids, np.arange(len(ids)) >= len(prompt), values)])
            lengths.append(len(sample.token_ids))
        self._metrics = {**self._metrics, "sampled_tokens": Mean(float(sum(lengths)), float(len(lengths)))}
        return pack_items(items, self.loader.row_length, row_multiple=self.loader.batch_rows, pad_id=self.pad_id)
