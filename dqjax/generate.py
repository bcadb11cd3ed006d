"""python -m dqjax.generate: sample from a trained model, one JSON line a sample.

    {"id": "...", "prompt": "...", "text": "...", "token_ids": [...], "finish_reason": "stop" | "length"}

Where a thinking budget put tokens, `forced` says so: their places in `token_ids`, from the first to behind the last.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dqjax.commands import run_command
from dqjax.config import ConfigError
from dqjax.data.config import ColumnsConfig, SourceConfig
from dqjax.data.records import Message, Record
from dqjax.data.sources import Rejected, read_records
from dqjax.load import load_model, start_jax
from dqjax.rollout.engine import Engine, Prompt, Sample
from dqjax.rollout.sampling import Sampling
from dqjax.rollout.stops import StopStrings, ThinkingEnd, cut
from dqjax.sharding import MeshConfig, Rules, make_mesh


class Generator:
    """Conversations in, samples out: a model, its parameters and an engine, as the commands use them.

    Args:
      name: a run folder, a converted checkpoint, a Hugging Face folder, or a hub name.
      raw: prompts are plain text, to be continued without the chat template.
      thinking_budget: new tokens after which thinking is ended by force; None: never.
      stop: strings that end a sample, besides the tokenizer's marks.
      cache_bytes: see `rollout.engine.Engine`.
    """

    def __init__(
        self,
        name: str,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        rows: int = 64,
        seed: int = 0,
        thinking: bool = True,
        raw: bool = False,
        thinking_budget: int | None = None,
        stop: Sequence[str] = (),
        cache_bytes: int | None = None,
        dtype: str = "bfloat16",
        step: int | None = None,
        rules: Rules | None = None,
    ):
        self.rules = rules or Rules(make_mesh(**MeshConfig().model_dump()))
        self.model, self.params = load_model(name, self.rules, dtype=dtype, step=step)
        self.thinking, self.raw = thinking, raw
        self._budget = thinking_budget if thinking else None
        chat, shards = self.model.chat, self.rules.batch_shards
        self._engine = Engine(
            self.model.decoder,
            stop_ids=chat.stop_ids,
            vocab=self.model.vocab,
            sampling=sampling,
            rows=-(-rows // shards) * shards,
            max_new_tokens=max_new_tokens,
            seed=seed,
            thinking_end=ThinkingEnd(chat.closing_ids, chat.thinking_ended),
            stop_strings=StopStrings(tuple(stop), self.model.tokenizer.decode) if stop else None,
            cache_bytes=cache_bytes,
        )

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation, exactly as training rendered it (or of the bare text, with `raw`)."""
        if self.raw:
            return self.model.chat.encode(["".join(m.content for m in messages)])[0]
        return self.model.chat.prompt_ids(messages, thinking=self.thinking)

    def generate(self, conversations: Iterable[Sequence[Message]], *, samples: int = 1) -> Iterator[Sample]:
        """`samples` samples of each conversation, in order; sample s of conversation i is seeded by i · samples + s."""
        prompts = (
            Prompt(tuple(ids), i * samples + s, self._budget)
            for i, messages in enumerate(conversations)
            for ids in [self.prompt_ids(messages)]
            for s in range(samples)
        )
        yield from self._engine.generate(self.params, prompts)

    def text_of(self, sample: Sample) -> str:
        """The sample as text, without the mark or the string that ended it."""
        ids = list(sample.token_ids)
        if sample.finish_reason == "stop" and sample.stop_string is None:
            ids.pop()
        return cut(self.model.tokenizer.decode(ids), sample.stop_string)


def read_prompts(path: str) -> list[Record]:
    """The conversations of a jsonl or parquet file; an unusable row is an error, nothing is skipped in silence.

    Raises:
      ConfigError: naming file, line and reason.
    """
    records = []
    for record in read_records(SourceConfig(path=path), ColumnsConfig()):
        if isinstance(record, Rejected):
            raise ConfigError(f"{record.file}:{record.line}: {record.reason}")
        records.append(record)
    if not records:
        raise ConfigError(f"{path} holds no prompts")
    return records


def conversation(record: Record) -> tuple[Message, ...]:
    """The turns a sample should follow: all up to the last answer, which is left out."""
    messages = tuple(record.messages)
    return messages[:-1] if messages and messages[-1].role == "assistant" else messages


def add_sampling_arguments(parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int) -> None:
    """The options that `generate` and `eval` share."""
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=temperature, help="0 is greedy; default %(default)s")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens; 0: all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="the likeliest tokens of probability P")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="tokens at least P times the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default %(default)s")
    parser.add_argument("--thinking", choices=("on", "off"), default="on", help="default %(default)s")
    parser.add_argument("--thinking-budget", type=int, metavar="N", help="end thinking by force after N tokens")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a sample; may be repeated")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default %(default)s")
    parser.add_argument("--rows", type=int, default=64, help="sequences decoded together; default %(default)s")
    parser.add_argument(
        "--cache-gib", type=float, metavar="G", help="a device's memory for the cache; pages, or fewer rows, if it is short"
    )
    parser.add_argument("--step", type=int, help="of a run folder's checkpoint; default: the newest intact one")


def generator_of(arguments: argparse.Namespace, *, raw: bool = False) -> Generator:
    """The generator that the shared options ask for; raises ConfigError for values out of range."""
    if arguments.max_new_tokens < 1 or arguments.rows < 1:
        raise ConfigError("--max-new-tokens and --rows: expected at least 1")
    if arguments.thinking_budget is not None and arguments.thinking_budget < 0:
        raise ConfigError(f"--thinking-budget: expected at least 0, got {arguments.thinking_budget}")
    if "" in arguments.stop:
        raise ConfigError("--stop: expected some text, got none")
    try:
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.min_p)
    except ValueError as e:
        raise ConfigError(f"--{str(e).replace('_', '-')}") from None
    start_jax()
    return Generator(
        arguments.checkpoint,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
        rows=arguments.rows,
        seed=arguments.seed,
        thinking=arguments.thinking == "on",
        raw=raw,
        thinking_budget=arguments.thinking_budget,
        stop=arguments.stop,
        cache_bytes=int(arguments.cache_gib * 2**30) if arguments.cache_gib is not None else None,
        dtype=arguments.dtype,
        step=arguments.step,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.generate",
        description="Sample from a run folder, a converted checkpoint or a Hugging Face folder; JSON lines on stdout.",
        epilog="example: python -m dqjax.generate --checkpoint runs/mine --prompt '41 - 54 + 9 =' --temperature 0",
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one prompt")
    what.add_argument("--prompts", metavar="FILE", help="jsonl or parquet, any row form that training reads")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="a prompt; default %(default)s")
    parser.add_argument("--raw", action="store_true", help="continue the bare text, without the chat template")
    add_sampling_arguments(parser, temperature=1.0, max_new_tokens=512)
    arguments = parser.parse_args(argv)

    if arguments.prompts:
        records = read_prompts(arguments.prompts)
        conversations, ids = [conversation(r) for r in records], [r.id for r in records]
    else:
        conversations = [(Message("user", arguments.prompt),)]
        ids = [hashlib.sha256(arguments.prompt.encode()).hexdigest()[:16]]
    generator = generator_of(arguments, raw=arguments.raw)
    n = max(arguments.samples, 1)
    for i, sample in enumerate(generator.generate(conversations, samples=n)):
        prompt = generator.prompt_ids(conversations[i // n])
        row: dict[str, Any] = {
            "id": ids[i // n] if n == 1 else f"{ids[i // n]}/{i % n}",
            "prompt": generator.model.tokenizer.decode(prompt),
            "text": generator.text_of(sample),
            "token_ids": list(sample.token_ids),
            "finish_reason": sample.finish_reason,
        }
        if sample.forced:
            row["forced"] = [sample.forced.start, sample.forced.stop]
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
