"""Any objective with adapters in place of its weights: the base goes to the frozen side, the adapters are trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from dqjax.data.loader import Loader
from dqjax.models.lora import Adapters, LoRAConfig
from dqjax.objectives.setup import Setup
from dqjax.steps.state import State
from dqjax.types import Batch, Params, Source


def with_lora(setup: Setup, config: LoRAConfig, *, seed: int, dtype: Any) -> Setup:
    """The objective, training adapters of what it trains; `frozen` is {"base", "objective"}.

    Evaluations and samples see the adapters merged into the weights, as they are served.

    Args:
      seed: of the adapters' start.
      dtype: of the arithmetic, in which the base is kept.
    """
    adapters = Adapters(setup.trainable, config)
    start = setup.initial()
    base = jax.tree.map(lambda x: x.astype(dtype), start)
    whole = {part: start[part] for part in adapters.trained_whole}
    merge = jax.jit(adapters.merge, out_shardings=setup.trainable.shardings())

    def loss(params: Params, frozen: Any, batch: Batch, key: PRNGKeyArray):
        return setup.loss(adapters.join(frozen["base"], params), frozen["objective"], batch, key)

    def evaluate(params: Params, frozen: Any) -> tuple[dict[str, float], dict[str, str]]:
        return setup.evaluate(merge(frozen["base"], params), frozen["objective"])

    return dataclasses.replace(
        setup,
        trainable=adapters,
        initial=lambda: adapters.init(jax.random.key(seed), whole),
        loss=loss,
        source=setup.source if isinstance(setup.source, Loader) else _Merging(setup.source, merge),
        evaluate=setup.evaluate and evaluate,
        frozen={"base": base, "objective": setup.frozen},
    )


class _Merging:
    """A source that samples from the parameters, shown those of a model without adapters."""

    def __init__(self, source: Source, merge: Callable[[Params, Params], Params]):
        self._source, self._merge = source, merge

    def next(self, state: State, frozen: Any) -> Batch:
        whole = dataclasses.replace(state, params=self._merge(frozen["base"], state.params))
        return self._source.next(whole, frozen["objective"])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)
