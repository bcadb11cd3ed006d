"""A teacher in this process: requests that wait at the same time are decoded together, and answered one by one.

It knows no model: whoever makes it passes a function from prompts to token ids (`python -m dqjax.data` wires the
rollout engine to it).
"""

import asyncio
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from dqjax.data.chat import ChatFormat
from dqjax.data.teacher import CallFailed, Reply, Request, SamplingConfig

QUEUE = 4  # requests a row that may wait, so that a row whose sample has ended gets the next one

Generate = Callable[[SamplingConfig, Iterable[tuple[Sequence[int], int]]], Iterable[tuple[Sequence[int], str]]]


class LocalTeacher:
    """Answers requests with a model of our own.

    Each request is seeded by its own key, so its answer does not depend on what is decoded beside it.

    Args:
      chat: renders the prompts and splits the answers, as in training.
      generate: (sampling, (token ids, seed) pairs) → (new token ids, "stop" or "length"), in order, each when it is ready.
      rows: prompts decoded together; four times as many may wait.
    """

    def __init__(
        self, name: str, model: str, chat: ChatFormat, generate: Generate, *, rows: int, thinking: bool = True
    ):
        self.name, self.model, self.parallel = name, model, QUEUE * rows
        self._chat, self._generate, self._thinking = chat, generate, thinking
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
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(0)  # lets those that are about to ask do so
            sampling = self._waiting[0][0].sampling
            batch = [(r, f) for r, f in self._waiting if r.sampling == sampling]
            self._waiting = [(r, f) for r, f in self._waiting if r.sampling != sampling]

            def answer() -> None:
                replies = self._answer(sampling, [r for r, _ in batch])  # noqa: B023 - awaited before they change
                for (_, future), reply in zip(batch, replies, strict=True):  # noqa: B023
                    loop.call_soon_threadsafe(_settle, future, reply)

            try:
                await asyncio.to_thread(answer)
            except Exception as e:
                for _, future in batch:
                    _settle(future, e)

    def _answer(self, sampling: SamplingConfig, requests: Sequence[Request]) -> Iterator[Reply | CallFailed]:
        started = time.monotonic()
        prompts = [self._chat.prompt_ids(r.messages, thinking=self._thinking) for r in requests]
        seeds = [int(r.key(self.model)[:8], 16) for r in requests]
        for prompt, (ids, finish) in zip(prompts, self._generate(sampling, zip(prompts, seeds)), strict=True):
            ids = list(ids)
            if ids and ids[-1] in self._chat.stop_ids:
                ids.pop()
            said = self._chat.parse(self._chat.tokenizer.decode(ids), thinking=self._thinking)
            if not said.answer.strip() and finish == "stop":
                yield CallFailed("an empty answer")
                continue
            seconds = time.monotonic() - started
            counts = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
            reply = Reply(said.answer, said.thinking, finish, model=self.model, time=time.time(), **counts)
            yield dataclasses.replace(reply, seconds=seconds)


def _settle(future: "asyncio.Future[Reply]", reply: Reply | Exception) -> None:
    if future.done():
        return
    future.set_exception(reply) if isinstance(reply, Exception) else future.set_result(reply)
