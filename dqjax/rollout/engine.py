"""Continuous batching with the trainer's own model code and weights.

A fixed number of slots decode together, some steps a call; between calls the host reads the tokens, and a slot whose
sample has ended gets the next one. Prompts are prefilled ahead, in lanes of their own (`programs.py` has the picture),
so that a free slot does not wait. All programs have fixed shapes: they are compiled once for an engine, and again only
when a prompt comes that is longer than any before and outgrows the cache, or once for each capacity that a large cache
grows through (`layout.py`).

Where the cache has pages, a sample starts once there are some for its prompt and one more for every sample in its
shard. When they run out all the same, the youngest sample gives its own back and begins anew later: its seed makes it
the same again.
"""

import collections
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np

from dqjax.models.cache import Cache, make_cache
from dqjax.models.decoder import Decoder
from dqjax.rollout.layout import Layout, plan_layout
from dqjax.rollout.pages import Pages
from dqjax.rollout.programs import (
    NEVER,
    NOTHING,
    Admission,
    Decoding,
    Made,
    Slots,
    admit,
    decode,
    make_slots,
    prefill,
    resize,
)
from dqjax.rollout.sampling import Sampling
from dqjax.rollout.stops import StopStrings, ThinkingEnd
from dqjax.types import Params

log = logging.getLogger(__name__)

STEPS = 16  # of one decoding call: a slot idles for half of them on average, the host has work once

ONE_GPU = {"xla_gpu_enable_triton_gemm": False}
"""Compiler options of decoding: cuBLAS has better products for few rows, and adds the residual to them. On several GPUs
weights of one input are not joined beforehand, and without Triton XLA would join them anew at every step."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What to continue.

    Attributes:
      token_ids: the prompt; prompts that follow each other and are equal are prefilled once.
      seed: of the sample (distinct prompts and samples want distinct ones).
      thinking_budget: new tokens after which thinking that has not ended is ended by force; None: never.
    """

    token_ids: tuple[int, ...]
    seed: int
    thinking_budget: int | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """What was generated for one prompt.

    Attributes:
      token_ids: the new tokens; the stop token, or the one that completes a stop string, included.
      logprobs: the sampler's own log-probability of each, see `sampling.sample`.
      finish_reason: "stop" at a stop token or string, "length" at the limit.
      stop_string: the string that ended it, if one did.
      forced: places in `token_ids` of what the thinking budget put there; the policy did not choose them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    stop_string: str | None = None
    forced: range = range(0)


class Engine:
    """Generates for any number of prompts, at most `rows` at a time.

    Args:
      decoder: the model; the cache is kept in its dtype.
      stop_ids: tokens that end a sample (Qwen: end of text and end of turn).
      vocab: real entries of the output table; padded ones are never sampled.
      rows: sequences decoded together, a multiple of the mesh's batch shards.
      max_new_tokens: the limit of every sample.
      prompt_tokens: of the longest prompt to expect, for which there is room at once. A longer one makes the cache
        larger when it comes, and other shapes round other bits: a run that is to be resumed bit for bit names it.
      seed: of all samples; each has its own besides.
      thinking_end: ends thinking, for prompts with a budget.
      stop_strings: end a sample besides `stop_ids`; looked for between calls.
      cache_bytes: memory of a device for the key-value cache. Where the longest samples would not fit in `rows`, the
        cache has pages, or fewer rows are decoded together (`layout.py`).

    Raises:
      ValueError: no stop ids, or rows that do not divide over the mesh.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        stop_ids: Sequence[int],
        vocab: int,
        sampling: Sampling,
        rows: int,
        max_new_tokens: int,
        prompt_tokens: int = 1,
        seed: int = 0,
        thinking_end: ThinkingEnd | None = None,
        stop_strings: StopStrings | None = None,
        cache_bytes: int | None = None,
    ):
        if not stop_ids:
            raise ValueError(
                "no stop ids: samples would never end by themselves; give the tokenizer's end-of-turn id"
            )
        rules = decoder.rules
        if rows % rules.batch_shards:
            raise ValueError(f"rows: {rows} sequences do not divide over {rules.batch_shards} batch shards of the mesh")
        steps = min(STEPS, max_new_tokens)
        self.decoder, self.limit = decoder, max_new_tokens
        self.stop_strings, self.thinking_end = stop_strings, thinking_end
        closing = thinking_end.token_ids if thinking_end else ()
        self.fixed = Decoding(sampling, tuple(stop_ids), closing, vocab, steps, seed)
        self.rows, self._cache_bytes, self._longest = rows, cache_bytes, prompt_tokens
        heads = (decoder.config.num_kv_heads, decoder.config.head_dim)
        layer = rules.sharding(("batch", None, "kv_heads", None), (rules.batch_shards, 1, *heads))
        row, whole = rules.sharding(("batch",)), rules.sharding(())
        layers = (layer,) * decoder.config.num_layers
        cache = Cache(layers, layers, row)
        slots = Slots(cache, row, row, row)
        # Equal decoders are one static argument, so engines of one model share what they compile.
        self.unstack = jax.jit(Decoder.unstack, static_argnums=0, out_shardings=decoder.unstacked_shardings())
        self.prefill = jax.jit(prefill, static_argnums=0, donate_argnums=2, out_shardings=cache)
        self.admit = jax.jit(admit, donate_argnums=0, out_shardings=slots)
        self.resize = jax.jit(resize, static_argnums=1, out_shardings=layer)
        self.decode = jax.jit(
            decode,
            static_argnums=(0, 1),
            donate_argnums=3,
            out_shardings=(slots, Made(whole, whole)),  # whole on every host, to be read there
            compiler_options=ONE_GPU if rules.mesh.size == 1 and rules.mesh.devices.flat[0].platform == "gpu" else None,
        )

    def generate(self, params: Params, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Samples in the order of the prompts, each as soon as those before it are done.

        Prompts are read ahead, up to as many as are decoded together. All hosts give the same ones.

        Raises:
          ValueError: an empty prompt, a thinking budget without `thinking_end`, or a prompt too long for `cache_bytes`.
        """
        return _Run(self, self.unstack(self.decoder, params), map(self._checked, prompts)).samples()

    def layout(self, prompt_tokens: int) -> Layout:
        """The shapes for prompts up to `prompt_tokens`, never smaller than before: shorter prompts compile nothing."""
        self._longest = max(self._longest, prompt_tokens)
        lengths = {"prompt_tokens": self._longest, "max_new_tokens": self.limit}
        config, rules = self.decoder.config, self.decoder.rules
        layout = plan_layout(
            config, rules, self.decoder.dtype, rows=self.rows, cache_bytes=self._cache_bytes, **lengths
        )
        log.debug("%s", layout)
        return layout

    def _checked(self, prompt: Prompt) -> Prompt:
        if not prompt.token_ids:
            raise ValueError("an empty prompt: there is no token to continue")
        if prompt.thinking_budget is not None and self.thinking_end is None:
            raise ValueError("thinking_budget: this engine does not know how thinking ends; give it a thinking_end")
        return prompt


@dataclasses.dataclass
class _Lane:
    """A prompt being prefilled, and the samples that wait for it."""

    token_ids: tuple[int, ...]
    waiting: collections.deque[tuple[int, Prompt]]
    cached: int = 0

    @property
    def left(self) -> int:
        """Tokens to prefill: all but the last, which decoding starts from."""
        return len(self.token_ids) - 1 - self.cached


@dataclasses.dataclass
class _Answer:
    """A sample in a slot; `force_at` is decided once it has as many tokens as its thinking may."""

    number: int
    prompt: Prompt
    lane: _Lane
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    force_at: int | None = None

    def bounds(self, limit: int, end: ThinkingEnd | None) -> tuple[int, int]:
        """(stop_at, force_at) of the next call: at its budget a sample pauses, so that its text can be looked at."""
        budget = self.prompt.thinking_budget
        if budget is None:
            return limit, NEVER
        if len(self.token_ids) < budget:
            return min(budget, limit), NEVER
        if self.force_at is None:
            self.force_at = NEVER if end.ended(self.token_ids) else budget
        return limit, self.force_at

    @property
    def length(self) -> int:
        """Tokens of prompt and sample."""
        return len(self.prompt.token_ids) + len(self.token_ids)

    def sample(self, length: int, finish_reason: Literal["stop", "length"], stop: str | None, closing: int) -> Sample:
        start = length if self.force_at is None else min(self.force_at, length)
        ids, logprobs = tuple(self.token_ids[:length]), tuple(self.logprobs[:length])
        return Sample(ids, logprobs, finish_reason, stop, range(start, min(start + closing, length)))


class _Run:
    """One call of `generate`: which prompt is in which lane, which sample in which slot."""

    def __init__(self, engine: Engine, params: Params, prompts: Iterable[Prompt]):
        self._engine, self._params = engine, params
        self._groups = itertools.groupby(enumerate(prompts), key=lambda numbered: numbered[1].token_ids)
        self._queue: collections.deque[_Lane] = collections.deque()
        self._lanes: dict[int, _Lane] = {}
        self._answers: dict[int, _Answer] = {}
        self._finished: dict[int, Sample] = {}
        self._layout: Layout | None = None
        self._pages: Pages | None = None

    def samples(self) -> Iterator[Sample]:
        number = 0
        while True:
            self._fill()
            if not self._answers:
                return
            self._decode()
            while number in self._finished:
                yield self._finished.pop(number)
                number += 1

    @property
    def _free(self) -> list[int]:
        return [slot for slot in range(self._layout.slots) if slot not in self._answers]

    def _fill(self) -> None:
        """Gives every free slot a sample, as long as there are any.

        Lanes are prefilled together, a chunk of each a call, and only when a slot is free and no lane ready: so calls
        are as few and as full as can be, and so are those of decoding.
        """
        self._load()
        while self._lanes and (free := self._free):
            if any(lane.left == 0 for lane in self._lanes.values()):
                if not self._admit(free):
                    return
            else:
                self._prefill()
            self._load()

    def _load(self) -> None:
        """Puts prompts into free lanes; one that is too long waits until all is done, and then gets a larger cache."""
        while True:
            self._look_ahead()
            if not self._queue:
                return
            longest = len(self._queue[0].token_ids)
            if self._layout is None or longest - 1 > self._layout.room:
                if self._answers or self._lanes:
                    return
                self._allocate(max(len(lane.token_ids) for lane in self._queue))
            free = next((i for i in range(self._layout.lanes) if i not in self._lanes), None)
            if free is None:
                return
            self._lanes[free] = self._queue.popleft()

    def _look_ahead(self) -> None:
        while len(self._queue) < self._engine.rows:
            group = next(self._groups, None)
            if group is None:
                return
            self._queue.append(_Lane(group[0], collections.deque(group[1])))

    def _allocate(self, prompt_tokens: int) -> None:
        decoder = self._engine.decoder
        self._slots = self._prefilled = None  # before there are two
        layout = self._layout = self._engine.layout(prompt_tokens)
        capacity, page, pages, slots = layout.capacities[0], layout.page, layout.pages, layout.slots
        self._slots = make_slots(decoder, slots=slots, capacity=page or capacity, pages=pages)
        if page:
            shards = decoder.rules.batch_shards
            self._pages = Pages(slots=slots, pages=pages, size=page, width=capacity // page, shards=shards)
        self._prefilled = make_cache(
            decoder.config, decoder.rules, rows=layout.lanes, capacity=layout.room, dtype=decoder.dtype
        )

    def _prefill(self) -> None:
        lanes, chunk = self._layout.lanes, self._layout.chunk
        tokens = np.zeros((lanes, chunk), np.int32)
        starts, counts = np.zeros(lanes, np.int32), np.zeros(lanes, np.int32)
        for i, lane in self._lanes.items():
            starts[i], counts[i] = lane.cached, min(lane.left, chunk)
            tokens[i, : counts[i]] = lane.token_ids[lane.cached : lane.cached + counts[i]]
            lane.cached += int(counts[i])
        engine = self._engine
        self._prefilled = engine.prefill(engine.decoder, self._params, self._prefilled, tokens, starts, counts)

    def _admit(self, free: list[int]) -> bool:
        """Starts as many samples of prefilled lanes as there are free slots, entries of an admission, and pages.

        Returns:
          Whether it was one at least.
        """
        size = self._layout.lanes
        slot = np.arange(self._layout.slots, self._layout.slots + size, dtype=np.int32)
        entry = Admission(slot, *(np.zeros(size, np.int32) for _ in range(4)))._replace(seed=np.zeros(size, np.uint32))
        if self._pages is not None:
            nowhere = self._layout.pages + np.arange(size * self._layout.room // self._layout.page, dtype=np.int32)
            entry = entry._replace(pages=nowhere.reshape(size, -1))
        ready = [i for i, lane in self._lanes.items() if lane.left == 0]
        waiting = [(i, self._lanes[i]) for i in ready for _ in range(len(self._lanes[i].waiting))]
        started = 0
        for k, (i, lane) in enumerate(waiting[: min(size, len(free))]):
            slot = self._place(lane, free, None if entry.pages is None else entry.pages[k])
            if slot is None:
                break
            free.remove(slot)
            number, prompt = lane.waiting.popleft()
            values = (slot, i, len(lane.token_ids) - 1, lane.token_ids[-1], prompt.seed & 0xFFFFFFFF)
            for array, value in zip(entry, values):
                array[k] = value
            self._answers[slot] = _Answer(number, prompt, lane)
            started += 1
            if not lane.waiting:
                del self._lanes[i]
        if started:
            self._slots = self._engine.admit(self._slots, self._prefilled, entry)
        return started > 0

    def _place(self, lane: _Lane, free: Sequence[int], copied: np.ndarray | None) -> int | None:
        """A free slot for a sample of a lane, with pages if the cache has some; `copied` gets those to fill.

        A group shares the whole pages of its prompt as long as one of it is there.
        """
        if copied is None:
            return free[0]
        book, cached = self._pages, len(lane.token_ids) - 1
        whole = cached // self._layout.page
        kin = {book.shard(slot): slot for slot, answer in self._answers.items() if answer.lane is lane}
        first = {book.shard(slot): slot for slot in reversed(free)}
        for shard in sorted(first, key=lambda shard: (shard not in kin, -book.free(shard))):
            slot, shared = first[shard], whole if shard in kin else 0
            others = sum(book.shard(slot) == shard for slot in self._answers)
            positions = cached + self._engine.fixed.steps
            if others and book.free(shard) < book.needed(positions) - shared + others:
                continue
            if shared:
                book.share(slot, kin[shard], shared)
            book.extend(slot, positions)
            filled = slice(shared, book.needed(cached))
            copied[filled] = book.table[slot, filled]
            return slot
        return None

    def _resize(self) -> None:
        """Fits the slots' cache to the longest sample, one layer after another: only one is there twice."""
        if self._pages is not None:
            return
        cache = self._slots.cache
        needed = max(answer.length for answer in self._answers.values()) + self._engine.fixed.steps
        capacity = self._layout.capacity_for(needed, cache.capacity)
        if capacity == cache.capacity:
            return
        keys, values, lengths = list(cache.keys), list(cache.values), cache.lengths
        rest = self._slots._replace(cache=None)
        del self._slots, cache
        for layers in keys, values:
            for i in range(len(layers)):
                layers[i] = self._engine.resize(layers[i], capacity)
        self._slots = rest._replace(cache=Cache(tuple(keys), tuple(values), lengths))

    def _secure_pages(self) -> None:
        """Gives every sample the pages of the next call, the oldest first; the youngest yield where there are too few."""
        in_order = sorted(self._answers, key=lambda slot: self._answers[slot].number)
        for slot in in_order:
            while slot in self._answers:
                if self._pages.extend(slot, self._answers[slot].length - 1 + self._engine.fixed.steps):
                    break
                shard = self._pages.shard(slot)
                youngest = next(s for s in reversed(in_order) if s in self._answers and self._pages.shard(s) == shard)
                answer = self._answers.pop(youngest)
                self._pages.release(youngest)
                lane = _Lane(answer.prompt.token_ids, collections.deque([(answer.number, answer.prompt)]))
                self._queue.appendleft(lane)

    def _decode(self) -> None:
        engine, book = self._engine, self._pages
        self._resize()
        if book is not None:
            self._secure_pages()
        stop_at, force_at = np.zeros(self._layout.slots, np.int32), np.full(self._layout.slots, NEVER, np.int32)
        for slot, answer in self._answers.items():
            stop_at[slot], force_at[slot] = answer.bounds(engine.limit, engine.thinking_end)
        table = None if book is None else book.table
        self._slots, made = engine.decode(
            engine.decoder, engine.fixed, self._params, self._slots, stop_at, force_at, table
        )
        made = jax.device_get(made)
        counts = (made.tokens != NOTHING).sum(axis=0).tolist()
        for slot, answer in list(self._answers.items()):
            new = counts[slot]
            answer.token_ids += made.tokens[:new, slot].tolist()
            answer.logprobs += made.logprobs[:new, slot].tolist()
            if sample := self._ended(answer, new):
                self._finished[answer.number] = sample
                del self._answers[slot]
                if book is not None:
                    book.release(slot)

    def _ended(self, answer: _Answer, new: int) -> Sample | None:
        """The sample, if its last `new` tokens end it."""
        engine, length, ids = self._engine, len(answer.token_ids), answer.token_ids
        closing = len(engine.fixed.closing)
        if engine.stop_strings and (found := engine.stop_strings.find(ids, new)):
            return answer.sample(found[0], "stop", found[1], closing)
        if ids[-1] in engine.fixed.stop_ids:
            return answer.sample(length, "stop", None, closing)
        return answer.sample(length, "length", None, closing) if length == engine.limit else None
