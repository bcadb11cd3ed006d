"""Conversations to token ids, exactly as they are served.

A served answer is sampled behind `apply_chat_template(..., add_generation_prompt=True)`, so a training document is
those prompt ids followed by the ids that should be sampled, the mark that ends the turn included::

    <|im_start|>user\\n3+4?<|im_end|>\\n<|im_start|>assistant\\n | <think>\\n3+4=7\\n</think>\\n\\n7<|im_end|>
    -------------------------- prompt, not in the loss --------- | ------------- answer, in the loss --------

Where the border lies is decided here, once, from the template: a template that opens the block in its generation prompt
(`<think>\\n` at the end) leaves the opening tag to the prompt, any other leaves it to the answer; the empty block that
`enable_thinking=false` adds is prompt. SFT, rollouts, the format reward, evaluation and export all ask `ChatFormat`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dqjax.config import ConfigError
from dqjax.data.records import BadRow, Message, Record

OPEN, CLOSE = "<think>", "</think>"


class Response(NamedTuple):
    """A sampled text taken apart. `thinking` is None without a think block; `closed` is False where one never ends."""

    thinking: str | None
    answer: str
    closed: bool


def parse_response(text: str, *, opened: bool = False) -> Response:
    """Splits a sampled text at its think block.

    A block that is opened and never closed has no answer: the sample was cut while thinking. Text behind the *first*
    `</think>` is the answer.

    Args:
      text: the sample, without the mark that ends the turn.
      opened: the prompt already holds the opening tag.
    """
    head, tag, rest = text.partition(OPEN)
    if tag and not head.strip():
        text = rest
    elif not opened:
        return Response(None, text.lstrip("\n"), True)
    thinking, closed, answer = text.partition(CLOSE)
    return Response(thinking.strip("\n"), answer.lstrip("\n"), bool(closed))


class Turn(NamedTuple):
    """One training document: `ids[:answer_start]` is the prompt, the rest is what the model should sample."""

    id: str
    ids: np.ndarray
    answer_start: int
    thinking: bool


@dataclasses.dataclass(frozen=True)
class ChatFormat:
    """A tokenizer's chat template, with the answers to the questions it leaves open.

    Attributes:
      tokenizer: a transformers tokenizer with a chat template.
      end_id: the token that ends an assistant's turn.
      stop_ids: the tokens at which sampling stops; `end_id` is among them.
      has_switch: `enable_thinking` changes the prompt.
      opens_block: in thinking mode, the prompt ends with the opening tag.
      always_opens: it does so even with `enable_thinking=False`.
    """

    tokenizer: Any
    end_id: int
    stop_ids: tuple[int, ...]
    has_switch: bool
    opens_block: bool
    always_opens: bool

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatFormat":
        """Reads the template by rendering probes.

        Raises:
          ConfigError: no template, one whose prompt is not a token prefix of prompt + answer, or no end-of-turn token.
        """
        if not tokenizer.chat_template:
            raise ConfigError("the tokenizer has no chat template; set model.chat_template: think to use ours")
        ask = [{"role": "user", "content": "3+4?"}]
        on, off = (_render(tokenizer, ask, thinking) for thinking in (True, False))
        format = cls(
            tokenizer=tokenizer,
            end_id=-1,
            stop_ids=(),
            has_switch=on != off,
            opens_block=on.rstrip("\n").endswith(OPEN),
            always_opens=off.rstrip("\n").endswith(OPEN),
        )
        end_id = _probe(format)
        stops = {end_id, tokenizer.eos_token_id, tokenizer.get_added_vocab().get("<|endoftext|>")} - {None}
        return dataclasses.replace(format, end_id=end_id, stop_ids=tuple(sorted(stops)))

    def prompt_text(self, messages: Sequence[Message], *, thinking: bool) -> str:
        """The prompt behind which an answer to `messages` is sampled.

        Raises:
          ValueError: `thinking=False` with a template that always opens a think block.
        """
        if self.always_opens and not thinking:
            raise ValueError("this chat template always opens a think block; set thinking: on, or use another template")
        return _render(self.tokenizer, [m.to_dict() for m in messages], thinking)

    def prompt_ids(self, messages: Sequence[Message], *, thinking: bool) -> list[int]:
        """Token ids of `prompt_text`, equal to `apply_chat_template(..., add_generation_prompt=True)`."""
        return self.encode([self.prompt_text(messages, thinking=thinking)])[0]

    def answer_text(self, message: Message, *, thinking: bool) -> str:
        """What the model should write, without the end mark; the chain is left out where `thinking` is False."""
        content = message.content.lstrip("\n")
        if not thinking:
            return content
        if message.reasoning is None:
            raise ValueError("an answer in thinking mode needs a chain")
        return f"{self._opening}{message.reasoning.strip(chr(10))}\n{CLOSE}\n\n{content}"

    def parse(self, text: str, *, thinking: bool) -> Response:
        """`parse_response` for a sample behind a prompt of this template."""
        return parse_response(text, opened=self.opens_block and thinking)

    @functools.cached_property
    def closing_ids(self) -> tuple[int, ...]:
        """What ends thinking by force: the closing tag on a line of its own, as `answer_text` has it."""
        return tuple(self.encode([f"\n{CLOSE}\n\n"])[0])

    def thinking_ended(self, ids: Sequence[int]) -> bool:
        """Whether a sample holds the closing tag already, in whatever tokens."""
        return CLOSE in self.tokenizer.decode(list(ids))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole texts; nothing is added to them."""
        if not texts:
            return []
        # not verbose: a document over the tokenizer's model_max_length is data.row_length's business
        made = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return made["input_ids"]

    def turns(self, records: Sequence[Record], modes: Sequence[str]) -> list[list[Turn] | BadRow]:
        """The training documents of each record: one an assistant turn, each rendered as it is served.

        Args:
          records: conversations, rendered together since one call of the tokenizer is much faster than many.
          modes: for each record `on` (turns that have a chain, in thinking mode), `off` (all turns, without chains), or
            `turn` (each turn in thinking mode if it has a chain).

        Returns:
          For each record its documents, with ids `record.id`, or `record.id/k` for turn k where there are several; or
          the `BadRow` that says why there are none.
        """
        plans, texts = [], []
        for record, mode in zip(records, modes, strict=True):
            try:
                plan = self._plan(record, mode)
            except BadRow as bad:
                plans.append(bad)
                continue
            plans.append(plan)
            texts += [text for _, _, prompt, answer in plan for text in (prompt, answer)]
        ids = iter(self.encode(texts))
        result: list[list[Turn] | BadRow] = []
        for record, plan in zip(records, plans):
            if isinstance(plan, BadRow):
                result.append(plan)
                continue
            turns = []
            for k, thinking, _, _ in plan:
                prompt, answer = next(ids), next(ids)
                name = record.id if len(plan) == 1 else f"{record.id}/{k}"
                turns.append(
                    (Turn(name, np.array([*prompt, *answer, self.end_id], np.int32), len(prompt), thinking), answer)
                )
            stray = any(not set(self.stop_ids).isdisjoint(answer) for _, answer in turns)
            result.append(BadRow("a stop token inside the answer") if stray else [turn for turn, _ in turns])
        return result

    def _plan(self, record: Record, mode: str) -> list[tuple[int, bool, str, str]]:
        plan = []
        for i, message in enumerate(record.messages):
            if message.role != "assistant":
                continue
            thinking = mode != "off" and message.reasoning is not None
            if mode == "on" and not thinking:
                continue
            try:
                prompt = self.prompt_text(record.messages[:i], thinking=thinking)
            except Exception as e:  # templates raise jinja's errors, and whatever their raise_exception is made of
                raise BadRow(f"the chat template refuses it: {e}") from None
            plan.append((i, thinking, prompt, self.answer_text(message, thinking=thinking)))
        if not plan:
            raise BadRow("no answer with a chain, and thinking is on" if mode == "on" else "no answer to train on")
        return plan

    @functools.cached_property
    def _opening(self) -> str:
        """What of `<think>\\n` the answer has to write itself."""
        if not self.opens_block:
            return f"{OPEN}\n"
        return "" if _render(self.tokenizer, [{"role": "user", "content": "3+4?"}], True).endswith("\n") else "\n"


def _render(tokenizer: Any, messages: list[dict], thinking: bool, *, prompt: bool = True) -> str:
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=False, enable_thinking=thinking
    )  # fmt: skip


def _probe(format: ChatFormat) -> int:
    """Checks that whole conversations are prompt + answer + end mark, in text and in tokens; returns the end mark."""
    one = [Message("user", "3+4?")]
    many = [Message("system", "Be brief."), *one, Message("assistant", "7", "3+4=7"), Message("user", "Less 2?")]
    end_id = None
    for before in (one, many):
        for thinking in (True, False):
            if format.always_opens and not thinking:
                continue
            last = Message("assistant", "The answer is 5.", "The 7 less 2 is 5" if thinking else None)
            prompt, answer = format.prompt_text(before, thinking=thinking), format.answer_text(last, thinking=thinking)
            block = f"{OPEN}\n{last.reasoning}\n{CLOSE}\n\n{last.content}" if thinking else last.content
            said = [m.to_dict() for m in before] + [{"role": "assistant", "content": block}]
            whole = _render(format.tokenizer, said, thinking, prompt=False)
            mode = f"with thinking {'on' if thinking else 'off'}"
            if not whole.startswith(prompt + answer):
                raise ConfigError(
                    f"{mode}, this chat template does not render a conversation as prompt + answer: expected "
                    f"{(prompt + answer)[-60:]!r}, got {whole[max(0, len(prompt) - 40) :]!r}; training would not match "
                    "serving. Set model.chat_template: think to use ours"
                )
            prompt_ids, answer_ids, whole_ids = format.encode([prompt, answer, whole])
            joined = prompt_ids + answer_ids
            if whole_ids[: len(joined)] != joined:
                raise ConfigError(
                    f"{mode}, the prompt of this chat template is not a token prefix of prompt + answer: the tokenizer "
                    f"joins {prompt[-20:]!r} and {answer[:20]!r}. Set model.chat_template: think to use ours"
                )
            rest = whole_ids[len(joined) :]
            mark = rest[0] if rest else format.tokenizer.eos_token_id
            if mark is None or (end_id is not None and mark != end_id) or not _is_special(format.tokenizer, mark):
                ending = whole[len(prompt + answer) :]
                raise ConfigError(f"{mode}, this chat template ends a turn with {ending!r}, not with one stop token")
            end_id = mark
    return end_id


def _is_special(tokenizer: Any, id: int) -> bool:
    return id in tokenizer.all_special_ids or id in tokenizer.get_added_vocab().values()
