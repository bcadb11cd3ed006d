"""What a data file holds: form, lengths, the share in the loss, and one row coloured by its loss mask."""

import argparse
import contextlib
import dataclasses
import sys
from collections import Counter

import numpy as np

from dqjax.config import ConfigError, validate
from dqjax.data.chat import ChatFormat
from dqjax.data.config import ColumnsConfig, DataConfig, SourceConfig
from dqjax.data.records import BadRow, Record, detect_form
from dqjax.data.sources import Rejected, decode, read_rows, records_in
from dqjax.data.tokenise import turn_mode
from dqjax.data.tokenizer import load_tokenizer

HELP = "print the form of a data file, its lengths in tokens, and a row with its loss mask"
EXAMPLE = "python -m dqjax.data inspect data/train.jsonl --tokenizer Qwen3-0.6B --row-length 4096"

_PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
_PROMPT, _LOSS, _RESET = "\x1b[2m", "\x1b[32m", "\x1b[0m"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="jsonl or parquet file, folder, or `datasets` name")
    parser.add_argument("--tokenizer", help="folder of a tokenizer; without it lengths are in characters")
    parser.add_argument("--chat-template", choices=("keep", "think"), default="keep", help="as model.chat_template")
    parser.add_argument("--row-length", type=int, default=4096, help="as data.row_length")
    parser.add_argument("--thinking", choices=("on", "off", "row"), default="row", help="as data.thinking")
    parser.add_argument("--rows", type=int, default=10_000, help="rows to read at most")
    parser.add_argument("--show", type=int, default=1, help="number of the row to print, from 1")


def run(args: argparse.Namespace) -> None:
    source = SourceConfig.model_validate(args.file)
    tokenizer = load_tokenizer(args.tokenizer, chat_template=args.chat_template) if args.tokenizer else None
    settings = {"sources": [args.file], "row_length": args.row_length, "thinking": args.thinking}
    config = validate(DataConfig, settings, where="inspect")
    chat = ChatFormat.of(tokenizer) if tokenizer is not None else None
    forms, reasons, records, rows, shown = Counter(), Counter(), [], 0, None
    for raw in read_rows(source):
        if rows == args.rows:
            break
        rows += 1
        for item in records_in(raw, ColumnsConfig(), source.label):
            if isinstance(item, Rejected):
                reasons[item.reason] += 1
                continue
            records += _conversations(item)
            if rows >= args.show and shown is None:
                shown = _conversations(item)[0]
        with contextlib.suppress(BadRow):
            forms[detect_form(decode(raw))] += 1
    if not rows:
        raise ConfigError(f"{args.file}: no rows")
    print(f"rows        {rows:,}{' (the first ones)' if rows == args.rows else ''}; {len(records):,} records")
    print(f"form        {', '.join(f'{form} ({count:,})' for form, count in forms.most_common()) or 'none known'}")
    for reason, count in reasons.most_common(5):
        print(f"unusable    {count:,}: {reason}")
    if chat is None:
        lengths = [sum(len(m.content) + len(m.reasoning or "") for m in r.messages) for r in records]
        _print_lengths(np.array(lengths), "characters")
        return
    made = chat.turns(records, [turn_mode(r, config) for r in records])
    for reason, count in Counter(str(m) for m in made if isinstance(m, BadRow)).most_common(5):
        print(f"no document {count:,}: {reason}")
    bare = [r for r, m in zip(records, made, strict=True) if isinstance(m, BadRow) and r.messages[-1].role == "user"]
    prompts = [chat.prompt_text(r.messages, thinking=args.thinking != "off") for r in bare]
    _print_lengths(np.array([len(ids) for ids in chat.encode(prompts)]), "prompts")
    turns = [turn for m in made if not isinstance(m, BadRow) for turn in m]
    if turns:
        lengths = np.array([len(t.ids) for t in turns])
        answers = lengths - np.array([t.answer_start for t in turns])
        _print_lengths(lengths, "tokens")
        over = lengths > args.row_length
        print(f"over {args.row_length:<6,} {over.sum():,} of {len(turns):,} documents ({over.mean():.1%})")
        print(f"in the loss {answers.sum():,} of {lengths.sum():,} tokens ({answers.sum() / lengths.sum():.1%})")
        print(f"thinking    {sum(t.thinking for t in turns):,} on, {sum(not t.thinking for t in turns):,} off")
    if shown is not None and not isinstance(document := chat.turns([shown], [turn_mode(shown, config)])[0], BadRow):
        for turn in document:
            print(f"\n{turn.id}")
            print(_coloured(tokenizer, turn, colour=sys.stdout.isatty()))


def _conversations(record: Record) -> list[Record]:
    """The record, or for a preference its two conversations."""
    if record.chosen is None:
        return [record]
    return [dataclasses.replace(record, messages=(*record.messages, m)) for m in (record.chosen, record.rejected)]


def _print_lengths(lengths: np.ndarray, unit: str) -> None:
    if len(lengths):
        cells = (f"p{p} {int(np.percentile(lengths, p)):,}" for p in _PERCENTILES)
        print(f"{unit:<11} {'  '.join(cells)}")


def _coloured(tokenizer, turn, *, colour: bool) -> str:
    """The document's text: prompt dim, loss green on a terminal; elsewhere the loss between brackets."""
    prompt, answer = tokenizer.decode(turn.ids[: turn.answer_start]), tokenizer.decode(turn.ids[turn.answer_start :])
    if colour:
        return f"{_PROMPT}{prompt}{_RESET}{_LOSS}{answer}{_RESET}"
    return f"{prompt}[[{answer}]]"
