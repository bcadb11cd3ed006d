"""The one training loop, whatever the objective, and the hooks it is made useful with."""

import logging
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from dqjax.checkpoint import Checkpoints
from dqjax.metrics import Recorder, Writer
from dqjax.sharding import Rules
from dqjax.steps.state import State
from dqjax.steps.update import Step
from dqjax.types import Batch, Metrics, Source

log = logging.getLogger(__name__)


class Hook(Protocol):
    """Called after every step; a true result ends the loop after the other hooks have run."""

    def __call__(self, step: int, state: State, metrics: Metrics, batch: Batch) -> bool | None: ...


def fit(
    state: State,
    frozen: Any,
    step: Step,
    source: Source,
    *,
    steps: int,
    place: Callable[[Batch], Batch],
    hooks: Sequence[Hook] = (),
) -> State:
    """Takes steps until `steps` are taken, the source ends, or a hook says stop.

    Args:
      state: donated to `step`; do not use it afterwards.
      frozen: handed to `step` and to the source (a teacher, a reference, a LoRA base).
      place: puts the rows this host has made onto the mesh, see `placer`.

    Returns:
      The last state.
    """
    for n in range(int(state.step) + 1, steps + 1):
        try:
            batch = source.next(state, frozen)
        except StopIteration:
            log.warning("the data ended after %d of %d steps", n - 1, steps)
            break
        state, metrics = step(state, frozen, place(batch))
        if any([hook(n, state, metrics, batch) for hook in hooks]):
            break
    return state


def placer(rules: Rules, rows: int) -> Callable[[Batch], Batch]:
    """Turns a host's rows (numpy) into the global batch (jax.Array, split as the rules say).

    A batch has `rows` rows, or a whole multiple of them where a source cannot know how many it needs.
    """
    here = len(local_rows(rules, rows))

    def place(batch: Batch) -> Batch:
        def put(x: np.ndarray) -> jax.Array:
            shape = (rows * len(x) // here, *x.shape[1:])
            return jax.make_array_from_process_local_data(rules.sharding(("batch",), shape), x, shape)

        return jax.tree.map(put, batch)

    return place


def own_rows(rules: Rules, batch: Batch) -> Batch:
    """The rows of a whole batch (numpy, the same on every process) that this process's devices hold."""
    mine = local_rows(rules, len(batch.tokens))
    return batch if len(mine) == len(batch.tokens) else jax.tree.map(lambda x: x[mine], batch)


def local_rows(rules: Rules, rows: int) -> list[int]:
    """Which rows of a global batch this process's devices hold, ascending: what its source must make."""
    indices = rules.sharding(("batch",), (rows,)).addressable_devices_indices_map((rows,)).values()
    return sorted({r for (part,) in indices for r in range(*part.indices(rows))})


class Saving:
    """The hook that saves: every so many steps, after a signal to stop, and at the end.

    Where the source has no state yet from which it could go on, it saves behind the first step at which it has one.

    SIGTERM and SIGINT ask for a stop: the step in flight is finished, saved, and the loop ends. With several hosts, jax's
    preemption service catches SIGTERM (hence no handler of ours, which would displace its own) and makes all of them stop
    at the same step.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        source: Source,
        recorder: Recorder,
        *,
        every: int,
        steps: int,
        meta: Mapping[str, Any],
        score: Callable[[int], float | None] = lambda step: None,
    ):
        self._checkpoints, self._source, self._recorder = checkpoints, source, recorder
        self._every, self._steps, self._meta, self._score = every, steps, dict(meta), score
        self.stopped_by: int | None = None
        self._asked: int | None = None
        self._due = False
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: Any) -> None:
        if self._asked is not None:  # asked twice: the user means it
            raise KeyboardInterrupt
        self._asked = number
        log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)

    def __call__(self, step: int, state: State, metrics: Metrics, batch: Batch) -> bool:
        if jax.process_count() > 1:
            sync = multihost_utils.reached_preemption_sync_point(step)
            self._asked = self._asked or (signal.SIGTERM if sync else None)
        stop = self._asked is not None
        self._due = self._due or stop or step % self._every == 0 or step == self._steps
        data = self._source.get_state() if self._due else None
        if data is None:
            return False
        self._due = False
        self._recorder.drain()
        meta = {**self._meta, "data": data, "counters": self._recorder.counters}
        self._checkpoints.save(step, items_of(state), meta, score=self._score(step))
        if stop:
            self.stopped_by = self._asked
        return stop


def items_of(state: State) -> dict[str, Any]:
    """A state as the items of a checkpoint; parameters apart, so that export and generation read nothing else."""
    return {"params": state.params, "optimizer": {"opt_state": state.opt_state, "key": state.key, "step": state.step}}


def state_from(items: Mapping[str, Any]) -> State:
    """The inverse of `items_of`."""
    rest = items["optimizer"]
    return State(rest["step"], items["params"], rest["opt_state"], rest["key"])


class Evaluating:
    """The hook that evaluates: every so many steps and at the end, with the clock stopped.

    Args:
      evaluate: parameters → (numbers, texts); numbers are written under `eval/`, texts (a sample) beside them.
      score: numbers → which checkpoint is best (lower is better); None where they do not say.
    """

    def __init__(
        self,
        evaluate: Callable[[Any], tuple[dict[str, float], dict[str, str]]],
        writer: Writer,
        recorder: Recorder,
        *,
        every: int,
        steps: int,
        score: Callable[[Mapping[str, float]], float | None],
    ):
        self._evaluate, self._writer, self._recorder = evaluate, writer, recorder
        self._every, self._steps, self._score = every, steps, score
        self._scores: dict[int, float | None] = {}

    def __call__(self, step: int, state: State, metrics: Metrics, batch: Batch) -> None:
        if step % self._every and step != self._steps:
            return
        with self._recorder.paused():
            numbers, texts = self._evaluate(state.params)
        self._scores = {step: self._score(numbers)}
        self._writer.write(step, {f"eval/{k}": v for k, v in numbers.items()}, texts={f"eval/{k}": v for k, v in texts.items()})
        log.info("step %d  %s", step, "  ".join(f"eval/{k} {v:.4f}" for k, v in numbers.items()))

    def score(self, step: int) -> float | None:
        return self._scores.get(step)


class announce_compilation:
    """A hook that says so if the first step takes longer than `after` seconds to compile: a silent wait looks like a hang."""

    def __init__(self, after: float = 30.0):
        self._timer = threading.Timer(after, self._say, [after])
        self._timer.daemon = True

    def _say(self, after: float) -> None:
        log.info("still compiling the first training step after %.0f s; large models take minutes", after)

    def __enter__(self) -> "announce_compilation":
        self._timer.start()
        return self

    def __call__(self, step: int, state: State, metrics: Metrics, batch: Batch) -> None:
        self._timer.cancel()

    def __exit__(self, *_: Any) -> None:
        self._timer.cancel()
