"""Shards put together: the same file that one run without `--shard` writes."""

import argparse
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator

from dqjax.config import ConfigError
from dqjax.data.config import SourceConfig
from dqjax.data.sources import decode, read_rows
from dqjax.data.stage import Shard
from dqjax.data.writing import RowWriter

HELP = "put the outputs of --shard runs together"
EXAMPLE = "python -m dqjax.data merge runs/factory/generate.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", metavar="FILE", help="the output as it is called without --shard")


def run(args: argparse.Namespace) -> None:
    for name, rows in merge(args.output).items():
        print(f"{rows:>9,}  {name}")


def merge(output: str | pathlib.Path) -> dict[str, int]:
    """Writes FILE, its rejected rows and its counts from the shards; returns rows by file name.

    Raises:
      ConfigError: no shards, shards of different counts or settings, or some are missing.
    """
    output = pathlib.Path(output)
    form = re.compile(rf"{re.escape(output.stem)}\.shard-\d+-of-(\d+){re.escape(output.suffix)}")
    counts = {int(m[1]) for p in output.parent.glob(f"{output.stem}.shard-*") if (m := form.fullmatch(p.name))}
    if len(counts) != 1:
        found = f"shards of {' and of '.join(map(str, sorted(counts)))}" if counts else "none"
        raise ConfigError(f"expected one set of shards of {output}, found {found}")
    (count,) = counts
    parts = [Shard(i, count).path(output) for i in range(count)]
    if missing := [part.name for part in parts if not part.exists()]:
        raise ConfigError(f"{len(missing)} of {count} shards are not there yet: {', '.join(missing[:5])}")
    reports = [json.loads(_beside(part, "counts.json").read_text()) for part in parts]
    if any(report["settings"] != reports[0]["settings"] for report in reports):
        raise ConfigError(f"the shards of {output} were made with different settings; make them again")
    totals = {key: _sum([report[key] for report in reports]) for key in ("counts", "usage")}
    merged = {output.name: _join(parts, output)}
    rejected = _beside(output, "rejected.jsonl")
    merged[rejected.name] = _join([_beside(part, "rejected.jsonl") for part in parts], rejected)
    said = {**reports[0], "stamp": "", **totals}
    _beside(output, "counts.json").write_text(json.dumps(said, indent=1) + "\n")
    return merged


def _sum(reports: list[dict[str, float]]) -> dict[str, float]:
    """Counts added up; a zero stays, since it says that something was looked for."""
    total: Counter[str] = Counter()
    for report in reports:
        total.update(report)
    return dict(total)


def _join(parts: list[pathlib.Path], output: pathlib.Path) -> int:
    with RowWriter(output) as writer:
        for row in _rows(parts):
            writer.write(row)
    return writer.rows


def _rows(parts: list[pathlib.Path]) -> Iterator[dict]:
    for part in parts:
        for raw in read_rows(SourceConfig(path=str(part))):
            yield decode(raw)


def _beside(path: pathlib.Path, suffix: str) -> pathlib.Path:
    return path.with_name(f"{path.stem}.{suffix}")
