"""Where samples come from: an engine in this process, or a server that speaks the OpenAI protocol.

A `Sampler` maps requests to samples, in order and as they get ready. Everything behind it (grading, records, reports) does
not know which one it was.
"""

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat, Response, parse_response
from dqjax.data.records import Message, Record

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """Sample number `index` of a problem, with thinking on or off."""

    problem: Record
    index: int
    thinking: bool
    seed: int

    @property
    def key(self) -> tuple[str, bool, int]:
        return self.problem.id, self.thinking, self.index


@dataclasses.dataclass(frozen=True, slots=True)
class Sampled:
    """What came back for a request.

    Attributes:
      text: all that was written, thinking included.
      response: the text taken apart.
      tokens, thinking_tokens: written in all, and inside the think block.
      truncated: cut at the token limit.
      opened: the prompt held the opening tag.
    """

    text: str
    response: Response
    tokens: int
    thinking_tokens: int
    truncated: bool
    opened: bool = False


class Sampler(Protocol):
    """Yields one `Sampled` a request, in order."""

    def __call__(self, requests: Sequence[Request]) -> Iterator[Sampled]: ...


def sample_seed(seed: int, problem: str, index: int) -> int:
    """A 31-bit seed for a sample: the same whatever else is sampled, so that an evaluation can be resumed or extended."""
    digest = hashlib.blake2b(f"{seed}\0{problem}\0{index}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFFFFFF


class EngineSampler:
    """Samples from a model in this process.

    Args:
      chat: renders prompts and takes samples apart, as in training.
      generate: (token ids, seed, thinking budget) → (new token ids, "stop" or "length"), in order; the stop token may be
        included.
      thinking_budget: of samples in thinking mode; None: none.
    """

    def __init__(
        self,
        chat: ChatFormat,
        generate: Callable[[Iterable[tuple[list[int], int, int | None]]], Iterable[tuple[Sequence[int], str]]],
        thinking_budget: int | None = None,
    ):
        self._chat, self._generate, self._budget = chat, generate, thinking_budget

    def __call__(self, requests: Sequence[Request]) -> Iterator[Sampled]:
        prompts = (
            (self._chat.prompt_ids(r.problem.messages, thinking=r.thinking), r.seed, self._budget if r.thinking else None)
            for r in requests
        )
        for request, (ids, reason) in zip(requests, self._generate(prompts)):
            ids = list(ids)
            tokens = len(ids)
            if ids and ids[-1] in self._chat.stop_ids:
                ids.pop()
            text = self._chat.tokenizer.decode(ids)
            response = self._chat.parse(text, thinking=request.thinking)
            opened = self._chat.opens_block and request.thinking
            thought = self._thinking_tokens(response, len(ids))
            yield Sampled(text, response, tokens, thought, reason == "length", opened)

    def _thinking_tokens(self, response: Response, tokens: int) -> int:
        if response.thinking is None:
            return 0
        return len(self._chat.encode([response.thinking])[0]) if response.closed else tokens


class EndpointSampler:
    """Samples from an OpenAI-compatible chat endpoint (vLLM, SGLang, `transformers serve`, a hosted model).

    The key is read from the environment variable OPENAI_API_KEY ("none" for servers without one) and never written
    anywhere. Failing requests are tried again by the client with growing pauses.

    Thinking is switched by `chat_template_kwargs: {enable_thinking: ...}`, sent only if `switch` is set: servers that do
    not know the field refuse it. Servers that split the chain off (`reasoning_content`) and servers that do not are both
    read. Where the server does not count reasoning tokens, `count` does; without it the chain's share of the characters is
    taken.

    Args:
      url: the base, such as http://host:8000/v1.
      temperature, top_p, max_new_tokens: standard fields.
      top_k, min_p: sent in the body's extensions when set; vLLM and SGLang know them.
      parallel: requests in flight.
      count: tokens of a text.

    Raises (when called):
      ConfigError: the server refuses the request, or cannot be reached.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        max_new_tokens: int,
        switch: bool = False,
        parallel: int = 16,
        timeout: float = 3600.0,
        count: Callable[[str], int] | None = None,
    ):
        import openai

        self._openai = openai
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = openai.OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=5)
        self._url, self._switch, self._parallel, self._count = url, switch, parallel, count
        self._fields = {"model": model, "temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens}
        self._more = {name: value for name, value in (("top_k", top_k), ("min_p", min_p)) if value}

    def __call__(self, requests: Sequence[Request]) -> Iterator[Sampled]:
        pool = concurrent.futures.ThreadPoolExecutor(self._parallel)
        try:
            waiting = [pool.submit(self._ask, request) for request in requests]
            for future in waiting:
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, request: Request) -> Sampled:
        more = dict(self._more)
        if self._switch:
            more["chat_template_kwargs"] = {"enable_thinking": request.thinking}
        try:
            reply = self._client.chat.completions.create(
                messages=[_plain(m) for m in request.problem.messages],
                seed=request.seed,
                extra_body=more,
                **self._fields,
            )
        except self._openai.APIConnectionError as e:
            raise ConfigError(f"no answer from {self._url}: {e.__cause__ or e}") from None
        except self._openai.APIStatusError as e:
            raise ConfigError(f"{self._url} refuses the request with status {e.status_code}: {e.message}") from None
        return self._read(reply)

    def _read(self, reply: Any) -> Sampled:
        if not reply.choices:
            raise ConfigError(f"{self._url} answered without choices")
        choice = reply.choices[0]
        content, extra = choice.message.content or "", choice.message.model_extra or {}
        reasoning = extra.get("reasoning_content") or extra.get("reasoning")
        truncated = choice.finish_reason == "length"
        if reasoning:
            # A server that splits leaves the answer empty when the sample was cut while thinking.
            response = Response(reasoning.strip("\n"), content.lstrip("\n"), closed=bool(content) or not truncated)
            text = f"<think>\n{response.thinking}\n" + (f"</think>\n\n{response.answer}" if response.closed else "")
        else:
            text = content
            # Templates that open the block in the prompt leave only the closing tag to the sample.
            response = parse_response(
                text, opened="</think>" in text and "<think>" not in text.partition("</think>")[0]
            )
        usage = reply.usage
        tokens = usage.completion_tokens if usage else self._tokens_of(text)
        return Sampled(text, response, tokens, self._thinking_tokens(response, text, tokens, usage), truncated)

    def _tokens_of(self, text: str) -> int:
        if self._count is None:
            raise ConfigError(f"{self._url} sends no token usage; give --tokenizer DIR so that tokens can be counted")
        return self._count(text)

    def _thinking_tokens(self, response: Response, text: str, tokens: int, usage: Any) -> int:
        if response.thinking is None:
            return 0
        if not response.closed:
            return tokens
        details = getattr(usage, "completion_tokens_details", None)
        if details is not None and details.reasoning_tokens:
            return details.reasoning_tokens
        if self._count is not None:
            return self._count(response.thinking)
        return round(tokens * len(response.thinking) / max(len(text), 1))


def _plain(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}
