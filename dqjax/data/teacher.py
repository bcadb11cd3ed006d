"""Teachers: what the stages ask, what comes back, and a client for OpenAI-compatible endpoints.

A stage sees the protocol `Teacher` alone. `EndpointTeacher` speaks to servers, `dqjax.data.local.LocalTeacher` to a
model in this process, `Journaled` wraps either so that an answer is on disk before it counts.
"""

import asyncio
import dataclasses
import functools
import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import pydantic

from dqjax.config import Section
from dqjax.data.endpoint import Endpoint, EndpointConfig, Fault, Paused
from dqjax.data.journal import Journal
from dqjax.data.limits import Budget
from dqjax.data.records import Message


class SamplingConfig(Section):
    """How a teacher samples; 0.6 and 0.95 are what the authors use for thinking models [S].

    top_k, min_p: sent only if set; hosted models refuse them, vLLM and SGLang know them.
    max_tokens: limit of an answer, chain included.
    seed: of the samples; a server may ignore it. Sample number k of a request is seeded by seed + k.
    """

    temperature: float = pydantic.Field(0.6, ge=0)
    top_p: float = pydantic.Field(0.95, gt=0, le=1)
    top_k: int = pydantic.Field(0, ge=0)
    min_p: float = pydantic.Field(0.0, ge=0, lt=1)
    max_tokens: int = pydantic.Field(16384, ge=1)
    seed: int = 0

    @functools.cached_property
    def as_text(self) -> str:
        """The settings as JSON, for keys and provenance."""
        return json.dumps(self.model_dump(), sort_keys=True)


class LocalConfig(Section):
    """A model of our own in place of an endpoint.

    checkpoint: a run folder, a converted checkpoint, or a Hugging Face folder.
    rows: sequences decoded together. thinking: the mode of the chat template. dtype: of the arithmetic.
    """

    checkpoint: str
    rows: int = pydantic.Field(64, ge=1)
    thinking: bool = True
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


class TeacherConfig(Section):
    """One teacher: a model behind one or several endpoints, or a local one.

    name: what stages and rows call it. model: what provenance and the journal call it; by default the first endpoint's
      model, or the local checkpoint. An answer in the journal stays valid as long as `model` does, whatever endpoint
      gave it.
    attempts: of a request, the first included.
    backoff, max_backoff: seconds; after attempt k a random time up to backoff · 2^(k-1) is waited. Retry-After rests
      the whole endpoint.
    """

    name: str
    model: str | None = None
    endpoints: tuple[EndpointConfig, ...] = ()
    local: LocalConfig | None = None
    attempts: int = pydantic.Field(6, ge=1)
    backoff: float = pydantic.Field(1.0, ge=0)
    max_backoff: float = pydantic.Field(60.0, ge=0)

    @pydantic.model_validator(mode="after")
    def _one_kind(self):
        if bool(self.endpoints) == (self.local is not None):
            raise ValueError(f"teacher {self.name}: expected either endpoints or local")
        return self

    @property
    def identity(self) -> str:
        """The model's name in provenance and in the journal."""
        return self.model or (self.endpoints[0].model if self.endpoints else self.local.checkpoint)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """One call: a conversation to answer.

    Attributes:
      sample: which of several answers to the same conversation.
      prompt: name and version of the prompt file that made the conversation; "" for the bare problem.
    """

    messages: tuple[Message, ...]
    sampling: SamplingConfig
    sample: int = 0
    prompt: str = ""

    def key(self, model: str) -> str:
        """32 hex digits that are equal for the same question to the same model."""
        digest = hashlib.blake2b(digest_size=16)
        parts = [model, self.sampling.as_text, str(self.sample)]
        for message in self.messages:
            parts += [message.role, message.content, "" if message.reasoning is None else f"r{message.reasoning}"]
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(b"%d:" % len(data))
            digest.update(data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
      text: the content. reasoning: the chain, where the server split it off.
      finish: "stop", or "length" where it was cut at max_tokens.
      model: as `TeacherConfig.identity`. time: Unix time of the answer. seconds: how long it took, all attempts
        included.
    """

    text: str
    reasoning: str | None
    finish: str
    prompt_tokens: int
    completion_tokens: int
    model: str
    time: float
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As the journal has it; `Reply(**...)` is the inverse."""
        return {name: getattr(self, name) for name in self.__slots__}


class CallFailed(Exception):
    """A request that got no usable answer; the message is the reason, as the failure file shows it."""


class Teacher(Protocol):
    """Answers requests.

    Attributes:
      name, model: as in `TeacherConfig`.
      parallel: how many requests it works on at once; more than so many only wait.
    """

    name: str
    model: str
    parallel: int

    async def ask(self, request: Request) -> Reply:
        """Raises `CallFailed`, `limits.BudgetSpent` or `ConfigError`."""

    async def close(self) -> None: ...


class EndpointTeacher:
    """A model behind OpenAI-compatible endpoints (https://platform.openai.com/docs/api-reference/chat).

    A request goes to the endpoint with the smallest share of its slots in use, endpoints that are pausing (Retry-After,
    or several faults in a row) last. A fault that may pass (see `endpoint`) is tried again, on another endpoint where
    there is one, after exponential backoff with full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter",
    2015).

    Args:
      endpoints: clients; they share a connection pool.
      budget: tokens are reserved there before a call and settled after it.
    """

    def __init__(self, config: TeacherConfig, endpoints: Sequence[Endpoint], budget: Budget):
        self.name, self.model = config.name, config.identity
        self.parallel = sum(e.concurrency for e in endpoints)
        self._config, self._endpoints, self._budget = config, endpoints, budget

    async def ask(self, request: Request) -> Reply:
        body, prompt_limit = body_of(request)
        tried: Endpoint | None = None
        attempt, started = 1, time.monotonic()
        while True:
            endpoint = self._pick(tried)
            if (pause := endpoint.paused_until - time.monotonic()) > 0:  # the others pause as well
                await asyncio.sleep(pause)
                continue
            try:
                answer = await endpoint.call(body, prompt_limit, request.sampling.max_tokens, self._budget)
            except Paused:
                continue
            except Fault as fault:
                if not fault.passing:
                    raise CallFailed(fault.reason) from None
                if attempt == self._config.attempts:
                    raise CallFailed(f"{fault.reason} (attempt {attempt}, the last)") from None
                tried = endpoint
                await asyncio.sleep(
                    random.random() * min(self._config.backoff * 2 ** (attempt - 1), self._config.max_backoff)
                )
                attempt += 1
                continue
            return Reply(model=self.model, time=time.time(), seconds=time.monotonic() - started, **answer)

    async def close(self) -> None:
        """The pool is closed by who made it."""

    def _pick(self, avoid: Endpoint | None) -> Endpoint:
        if len(self._endpoints) == 1:
            return self._endpoints[0]
        now = time.monotonic()
        return min(self._endpoints, key=lambda e: (max(e.paused_until - now, 0.0), e is avoid, e.load))


def body_of(request: Request) -> tuple[dict[str, Any], int]:
    """(the request's JSON without the model, an upper bound of its prompt tokens).

    A byte-level vocabulary has at most a token a byte; a chat template adds a few a turn.
    """
    sampling = request.sampling
    body: dict[str, Any] = {
        "messages": [{"role": m.role, "content": m.content} for m in request.messages],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed + request.sample,
    }
    for name in ("top_k", "min_p"):
        if value := getattr(sampling, name):
            body[name] = value
    return body, sum(len(m.content.encode("utf-8", "surrogatepass")) + 16 for m in request.messages) + 16


class Journaled:
    """A teacher whose answers are looked up in a journal first, and written there before they count.

    Args:
      usage: calls, tokens and seconds of all answers, old and new, are added to it.
    """

    def __init__(self, teacher: Teacher, journal: Journal, usage: Counter[str]):
        self.name, self.model, self.parallel = teacher.name, teacher.model, teacher.parallel
        self._teacher, self._journal, self._usage = teacher, journal, usage
        self._waiting: dict[str, asyncio.Future[Reply]] = {}

    async def ask(self, request: Request) -> Reply:
        key = request.key(self.model)
        if (found := self._journal.get(key)) is not None:
            return self._counted(Reply(**found))
        if key in self._waiting:  # the same question again while the first is under way
            return await asyncio.shield(self._waiting[key])
        future = self._waiting[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._teacher.ask(request)
            self._journal.put(key, reply.prompt_tokens + reply.completion_tokens, reply.to_dict())
            future.set_result(reply)
            return self._counted(reply)
        except BaseException as e:
            future.set_exception(e if isinstance(e, Exception) else CallFailed("cancelled"))
            future.exception()  # retrieved: nobody need be waiting
            raise
        finally:
            del self._waiting[key]

    def _counted(self, reply: Reply) -> Reply:
        self._usage[f"{self.name} calls"] += 1
        for what in ("prompt_tokens", "completion_tokens", "seconds"):
            self._usage[f"{self.name} {what}"] += getattr(reply, what)
        return reply

    async def close(self) -> None:
        await self._teacher.close()
