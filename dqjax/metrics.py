"""From metrics on the device to metrics.jsonl, TensorBoard and a progress bar, without making the device wait.

A step's metrics are read only once the next step has been dispatched, so the device always has work queued.
"""

import contextlib
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from dqjax.types import Batch, Max, Metrics, merge_metrics

log = logging.getLogger(__name__)

# Dense bf16 matrix rate of one device, FLOP/s, from the makers' datasheets; matched as a substring of `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p calls itself "TPU v5"; the two lite names are matched first
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak of one device, or None where the datasheet rate is not known (a CPU)."""
    return next((rate for name, rate in PEAK_FLOPS.items() if name in device.device_kind), None)


@runtime_checkable
class Reporting(Protocol):
    """A source that has numbers of its own on the batch it made last, such as rewards and seconds.

    Attributes:
      bounds: metric (a `Max`) → the most it may be; the run stops when it is more.
    """

    bounds: Mapping[str, float]

    def metrics(self) -> Metrics: ...


class Work(NamedTuple):
    """What a step does, on all devices."""

    tokens: int  # real tokens, padding left out
    trained: int  # tokens in the loss
    flops: float  # model FLOPs, forward and backward


def work_of(batch: Batch, matmul_parameters: int, attention_width: int) -> Work:
    """The work of a training step on a batch that is whole on this host; see `model_flops`."""
    real = batch.segment_ids > 0
    tokens = int(real.sum())
    pairs = float((batch.positions.astype(np.float64) + 1)[real].sum())
    flops = model_flops(tokens, pairs, matmul_parameters, attention_width)
    return Work(tokens, int((batch.token_weight > 0).sum()), flops)


def model_flops(tokens: float, pairs: float, matmul_parameters: int, attention_width: int) -> float:
    """Of a training step: 6 × matmul parameters × tokens, plus attention at its causal, in-document count.

    A query at position p meets p + 1 keys; forward 4·N·H FLOPs a pair and layer, backward 2.5 times that.

    Args:
      pairs: (query, key) pairs, Σ p + 1 over tokens.
      attention_width: L·N·H.
    """
    return 6.0 * matmul_parameters * tokens + 3.5 * 4 * attention_width * pairs


def scalars(metrics: Metrics, names: Mapping[str, Sequence[str]] | None = None) -> dict[str, float]:
    """Metrics as plain numbers; a vector metric `m` becomes `m/<name>` for each of `names[m]` that was seen."""
    out = {}
    for name, metric in jax.device_get(dict(metrics)).items():
        if isinstance(metric, Max):
            out[name] = float(metric.value)
            continue
        total, count = np.asarray(metric.total, np.float64), np.asarray(metric.count, np.float64)
        if total.ndim == 0:
            out[name] = float(total / count) if count else math.nan
            continue
        for i, label in enumerate((names or {}).get(name, range(total.size))):
            if count[i]:
                out[f"{name}/{label}"] = float(total[i] / count[i])
    return out


class Writer:
    """metrics.jsonl and TensorBoard events of a run folder; only the first process writes.

    A resumed run first drops the lines of steps it is about to take again, so that the file is the curve of one run.
    """

    def __init__(self, folder: str | pathlib.Path, *, resume_step: int = 0, wandb: str | None = None):
        self._file = self._events = self._wandb = None
        if jax.process_index() != 0:
            return
        from tensorboardX import SummaryWriter

        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in lines))
            temporary.rename(path)
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)
        if wandb:
            import wandb as client

            self._wandb = client.init(project=wandb, name=folder.name, dir=str(folder), resume="allow", id=folder.name)

    def write(self, step: int, values: Mapping[str, float], *, texts: Mapping[str, str] | None = None) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values, **(texts or {})}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        for name, text in (texts or {}).items():
            self._events.add_text(name, text, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return math.inf


class Recorder:
    """The hook that turns each step's metrics into records.

    Args:
      steps: of the whole run, for the bar and the time left.
      every: steps averaged into one record.
      max_skipped: more skipped (non-finite) steps than this end the run.
      names: labels of vector metrics, see `scalars`.
      counters: sums that outlive a restart: tokens, skipped, device_hours.
      source: where the batches come from; one that is `Reporting` adds its numbers to each step's.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        steps: int,
        every: int,
        max_skipped: int,
        matmul_parameters: int,
        attention_width: int,
        schedule: Any,
        names: Mapping[str, Sequence[str]] | None = None,
        counters: Mapping[str, float] | None = None,
        start: int = 0,
        source: Any = None,
    ):
        self.counters = {"tokens": 0, "skipped": 0, "device_hours": 0.0, **(counters or {})}
        self.last: dict[str, float] = {}
        self._writer, self._steps, self._every, self._max_skipped = writer, steps, every, max_skipped
        self._model = (matmul_parameters, attention_width)
        self._schedule, self._names = schedule, names
        self._source = source if isinstance(source, Reporting) else None
        self._pending: tuple[int, Metrics] | None = None
        self._window: list[tuple[dict[str, Any], Work]] = []
        self._devices = jax.device_count()
        peak = peak_flops(jax.devices()[0])
        self._peak = peak * self._devices if peak else None
        self._clock = self._window_clock = time.perf_counter()
        quiet = jax.process_index() != 0 or not sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, disable=quiet, unit="step", dynamic_ncols=True)

    def __call__(self, step: int, state: Any, metrics: Metrics, batch: Batch) -> None:
        own = self._source.metrics() if self._source else {}
        previous, self._pending = self._pending, (step, {**metrics, **own})
        if previous is not None:
            self._settle(*previous)

    def drain(self) -> None:
        """Waits for the last step's metrics; before a checkpoint, an evaluation, or the end."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._settle(*previous)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Drains, then leaves what happens inside out of the throughput: an evaluation is not training."""
        self.drain()
        began = time.perf_counter()
        yield
        now = time.perf_counter()
        self._count_hours(now)
        self._window_clock += now - began

    def close(self) -> None:
        self.drain()
        self._bar.close()

    def _count_hours(self, now: float) -> None:
        self.counters["device_hours"] += (now - self._clock) / 3600 * self._devices
        self._clock = now

    def _settle(self, step: int, metrics: Metrics) -> None:
        metrics = jax.device_get(dict(metrics))
        tokens, trained, pairs = map(float, metrics.pop("work").total)
        work = Work(int(tokens), int(trained), model_flops(tokens, pairs, *self._model))
        now = time.perf_counter()
        self._count_hours(now)
        self.counters["tokens"] += work.tokens
        skipped = int(metrics["skipped"].total)
        self.counters["skipped"] += skipped
        if skipped:
            log.warning("step %d was not finite and changed nothing (%d so far)", step, self.counters["skipped"])
        self._window.append((metrics, work))
        self._bar.update()
        if step % self._every == 0 or step == self._steps:
            self._record(step, now)
        if self.counters["skipped"] > self._max_skipped:
            raise FloatingPointError(
                f"{self.counters['skipped']} steps had a loss or gradient that is not finite, more than "
                f"train.max_skipped = {self._max_skipped}; lower optimizer.learning_rate or look at the data of these steps"
            )
        for name, bound in (self._source.bounds if self._source else {}).items():
            if not metrics[name].value <= bound:  # NaN is over every bound
                raise FloatingPointError(f"step {step}: {name} is {metrics[name].value:.3g}, over its bound of {bound:g}")

    def _record(self, step: int, now: float) -> None:
        total: Metrics = {}
        for metrics, _ in self._window:
            total = merge_metrics(total, metrics)
        seconds = max(now - self._window_clock, 1e-9)
        tokens = sum(w.tokens for _, w in self._window)
        self.last = scalars(total, self._names) | {
            "learning_rate": float(self._schedule(step - 1)),
            "trained_tokens": sum(w.trained for _, w in self._window) / len(self._window),
            "tokens_per_second": tokens / seconds,
            "seconds_per_step": seconds / len(self._window),
            "tokens": self.counters["tokens"],
            "skipped": self.counters["skipped"],
            "device_hours": round(self.counters["device_hours"], 6),
        }
        if self._peak:
            self.last["mfu"] = sum(w.flops for _, w in self._window) / seconds / self._peak
        self._writer.write(step, self.last)
        left = (self._steps - step) * seconds / len(self._window)
        shown = {"loss": f"{self.last.get('loss', math.nan):.4f}", "tok/s": f"{self.last['tokens_per_second']:.0f}"}
        if self._peak:
            shown["mfu"] = f"{self.last['mfu']:.1%}"
        self._bar.set_postfix(shown)
        if self._bar.disable and jax.process_index() == 0:
            text = "  ".join(f"{k} {v}" for k, v in shown.items())
            log.info("step %d/%d  %s  %s left", step, self._steps, text, time.strftime("%H:%M:%S", time.gmtime(left)))
        self._window, self._window_clock = [], now
