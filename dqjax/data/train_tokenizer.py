"""The command that trains a small tokenizer on data files."""

import argparse
import pathlib

from dqjax.config import ConfigError
from dqjax.data.config import SourceConfig
from dqjax.data.records import Record
from dqjax.data.sources import read_records
from dqjax.data.tokenizer import train_tokenizer

HELP = "train a small byte-level BPE tokenizer with Qwen's special tokens and chat template"
EXAMPLE = "python -m dqjax.data tokenizer --input data/train.jsonl --vocab-size 512 --out data/tokenizer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="data files in any known form")
    parser.add_argument("--vocab-size", type=int, required=True, help="entries at most, special tokens included")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--rows", type=int, default=20_000, help="records to read at most, over all files")


def run(args: argparse.Namespace) -> None:
    texts: list[str] = []
    read = 0
    for file in args.input:
        for record in read_records(SourceConfig.model_validate(file)):
            if read == args.rows:
                break
            if isinstance(record, Record):
                texts += [text for m in record.messages for text in (m.content, m.reasoning) if text]
                read += 1
    if not texts:
        raise ConfigError(f"no usable row in {', '.join(args.input)}")
    try:
        tokenizer = train_tokenizer(texts, args.vocab_size)
    except ValueError as e:
        raise ConfigError(f"--{e}".replace("_", "-", 1)) from None
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    print(f"{len(tokenizer)} tokens from {read:,} records, in {args.out}")
