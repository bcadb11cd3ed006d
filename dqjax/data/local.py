"""A teacher in this process: requests that wait at the same time are decoded together.

It knows no model: whoever makes it passes a function from prompts to token ids (`python -m dqjax.data` wires the
rollout engine to it).
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from dqjax.data.chat import ChatFormat
from dqjax.data.teacher import CallFailed, Reply, Request, SamplingConfig

Generate = Callable[[SamplingConfig, Iterable[tuple[Sequence[int], int]]], Iterable[tuple[Sequence[int], str]]]


class LocalTeacher:
    """Answers requests with a model of our own.

    Each request is seeded by its own key, so its answer does not depend on what is decoded beside it (nor on the order
    of the rows; only the padding of a batch may differ, in the last bits of its arithmetic).

    Args:
      chat: renders the prompts and splits the answers, as in training.
      generate: (sampling, (token ids, seed) pairs) → (new token ids, "stop" or "length"), in order.
      rows: prompts decoded together.
    """

    def __init__(
        self, name: str, model: str, chat: ChatFormat, generate: Generate, *, rows: int, thinking: bool = True
    ):
        self.name, self.model, self.parallel = name, model, rows
        self._chat, self._generate, self._rows, self._thinking = chat, generate, rows, thinking
        self._waiting: list[tuple[Request, asyncio.Future[Reply]]] = []
        self._worker: asyncio.Task | None = None

    async def ask(self, request: Request) -> Reply:
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def close(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
            self._worker = None

    async def _work(self) -> None:
        while self._waiting:
            await asyncio.sleep(0)  # lets those that are about to ask do so
            sampling = self._waiting[0][0].sampling
            batch = [(r, f) for r, f in self._waiting if r.sampling == sampling][: self._rows]
            taken = {id(future) for _, future in batch}
            self._waiting = [(r, f) for r, f in self._waiting if id(f) not in taken]
            try:
                replies = await asyncio.to_thread(self._answer, sampling, [r for r, _ in batch])
            except Exception as e:
                replies = [e] * len(batch)
            for (_, future), reply in zip(batch, replies, strict=True):
                if future.done():
                    continue
                future.set_exception(reply) if isinstance(reply, Exception) else future.set_result(reply)

    def _answer(self, sampling: SamplingConfig, requests: Sequence[Request]) -> list[Reply | CallFailed]:
        started = time.monotonic()
        prompts = [self._chat.prompt_ids(r.messages, thinking=self._thinking) for r in requests]
        seeds = [int(r.key(self.model)[:8], 16) for r in requests]
        replies: list[Reply | CallFailed] = []
        for prompt, (ids, finish) in zip(prompts, self._generate(sampling, zip(prompts, seeds)), strict=True):
            ids = list(ids)
            if ids and ids[-1] in self._chat.stop_ids:
                ids.pop()
            said = self._chat.parse(self._chat.tokenizer.decode(ids), thinking=self._thinking)
            if not said.answer.strip() and finish == "stop":
                replies.append(CallFailed("an empty answer"))
                continue
            seconds = time.monotonic() - started
            counts = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
            reply = Reply(said.answer, said.thinking, finish, model=self.model, time=time.time(), **counts)
            replies.append(dataclasses.replace(reply, seconds=seconds))
        return replies
