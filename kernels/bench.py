"""Benchmark of the kernels: ours, every installed peer, and the machine's ceilings, in one run.

    python -m dqjax.bench kernels --out kernels/results/h200.json      shapes of Qwen3 training and sampling
    python -m dqjax.bench kernels --only attention --cases 0 1 --out FILE    two of its shapes; other rows of FILE stay
    python -m dqjax.bench kernels --size small --only decode           seconds on a CPU; proves that it runs
    python -m dqjax.bench kernels --table kernels/results/h200.json    the tables of earlier results, in Markdown
    python -m dqjax.bench kernels --tune --only decode vocabulary      times our legal choices of blocks; writes the
                                                                       table that kernels on such a device read

Every candidate is checked against float64 on part of the problem before it is timed (`exact.py`), gradients where it
computes them; one that is missing, wrong or fails is listed with the reason. Times are milliseconds, memory bytes beyond
the inputs with outputs counted; FLOPs are those of the visible pairs only, so nothing skipped is ever claimed.
"""

import argparse
import json
import logging
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from dqjax.kernels.exact import TOLERANCE, relative_error
from dqjax.kernels.measure import Candidate, jax_candidate, machine, measure, product_rate
from dqjax.kernels.tuning.lookup import path_for
from dqjax.kernels.tuning.tune import tune
from dqjax.kernels.workloads import CASES, GENERATORS, Work

CEILINGS = ("read",)
"""Candidates that do less than the work: what the machine could do at best."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 where one of our own kernels was wrong or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write; rows measured again are replaced in it")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="print this file's results and stop")
    parser.add_argument("--size", choices=CASES, default="full")
    parser.add_argument("--only", choices=CASES["full"], nargs="+", default=list(CASES["full"]))
    parser.add_argument("--cases", type=int, nargs="+", metavar="I", help="these shapes of each kernel, counted from 0")
    parser.add_argument("--tune", action="store_true", help="write a table of blocks, to --out or beside the kernels")
    parser.add_argument("--repetitions", type=int, default=4, help="n of n and 2n")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(argv)
    if options.table:
        print("\n\n".join(markdown(json.loads(options.table.read_text()))))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    chosen = [
        (kernel, case)
        for kernel in options.only
        for i, case in enumerate(CASES[options.size][kernel])
        if options.cases is None or i in options.cases
    ]
    if not chosen:
        parser.error(f"--cases: {options.only} have no shape of these numbers {options.cases}")
    if options.tune:
        works = (work for kernel, case in chosen for work in GENERATORS[kernel](case))
        tune(works, options.out or path_for(jax.devices()[0].device_kind), options.repetitions, options.rounds)
        return 0
    rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    run = {
        "machine": machine(),
        "ceilings": _ceilings(options),
        "repetitions": options.repetitions,
        "rounds": options.rounds,
    }
    failed = False
    for kernel, case in chosen:
        for work in GENERATORS[kernel](case):
            row = {"kernel": kernel, "direction": work.direction, **case._asdict()}
            row |= {"run": run, "results": _run(work, options)}
            failed |= any("error" in r and name.startswith("dqjax") for name, r in row["results"].items())
            _show(row)
            rows = with_row(rows, row)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return int(failed)


def with_row(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with this one in place of an earlier one of the same work, else behind those of its kernel."""

    def work(row):
        return [(name, value) for name, value in row.items() if name not in ("run", "results")]

    if any(work(other) == work(row) for other in rows):
        return [row if work(other) == work(row) else other for other in rows]
    place = max((i + 1 for i, other in enumerate(rows) if other["kernel"] == row["kernel"]), default=len(rows))
    return [*rows[:place], row, *rows[place:]]


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    """A table for each kernel, for packed rows and for dense: milliseconds of the best candidate of each library, the
    least of a row, and what ties with it within the spread of its rounds, in bold."""
    tables: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault((row["kernel"], row.get("mean", 0) > 0), []).append(row)
    return [_table(of) for of in tables.values()]


def _table(rows: list[dict[str, Any]]) -> str:
    best = [_best(row) for row in rows]
    names = list(dict.fromkeys(name for results in best for name in results))
    titles = [*_shape(rows[0]), "Pass", *names]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row, results in zip(rows, best, strict=True):
        figures = (_figure(name, results) for name in names)
        lines.append("| " + " | ".join([*_shape(row).values(), row["direction"], *figures]) + " |")
    return "\n".join(lines)


def _best(row: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The result of the fastest candidate of each library that was timed."""
    best: dict[str, dict[str, float]] = {}
    for name, result in row["results"].items():
        library = name.split("_")[0]
        if "ms" in result and (library not in best or result["ms"] < best[library]["ms"]):
            best[library] = result
    return best


def _figure(name: str, results: dict[str, dict[str, float]]) -> str:
    if name not in results:
        return ""
    result = results[name]
    least = min((r for n, r in results.items() if n not in CEILINGS), key=lambda r: r["ms"])
    tie = result["ms"] <= least["ms"] * (1 + max(result["spread"], least["spread"]))
    return f"**{result['ms']:.2f}**" if tie and name not in CEILINGS else f"{result['ms']:.2f}"


def _shape(row: dict[str, Any]) -> dict[str, str]:
    """The case in words, by the titles of its columns."""
    if row["kernel"] == "vocabulary":
        return {"Tokens × width × vocabulary": f"{row['M']} × {row['D']} × {row['V']}"}
    heads = f"{row['N']}/{row['K']} of {row['H']}"
    if row["kernel"] == "decode":
        return {"Sequences × slots": f"{row['B']} × {row['S']}", "Heads": heads}
    documents = f"documents of about {row['mean']}" if row["mean"] else "one document"
    return {"Rows": f"{row['B']} × {row['T']}, {documents}", "Heads": heads}


def _run(work: Work, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Results of all candidates; an error stands in place of the figures of one that cannot be timed."""
    results: dict[str, dict[str, Any]] = {}
    ready: dict[str, Candidate] = {}
    with ThreadPoolExecutor() as pool:
        made = {name: pool.submit(make).result for name, make in work.candidates.items()}
    for name, make in (made | work.in_torch).items():
        try:
            candidate = make()
            error = relative_error(work.part(candidate.results()), work.want)
            if not error <= TOLERANCE and name not in work.approximate:
                raise ArithmeticError(f"wrong by {error:.3g}, allowed {TOLERANCE:.3g}")
            ready[name], results[name] = candidate, {"relative_error": error}
        except Exception as error:  # a peer's failure is a result, not the end of the run
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    for name, timing in measure(ready, repetitions=options.repetitions, rounds=options.rounds).items():
        results[name] |= {
            "ms": timing.ms,
            "spread": timing.spread,
            "tflops": work.flops / timing.ms / 1e9,
            "memory_bytes": ready[name].memory,
        }
    return results


def _ceilings(options: argparse.Namespace) -> dict[str, float]:
    """The rate of a large bfloat16 product, and of a copy, in this run."""
    n = 8192 if options.size == "full" else 256
    copy = jax_candidate(lambda a: a + 1, (jax.random.normal(jax.random.key(1), (n, n)),))
    ms = measure({"copy": copy}, repetitions=options.repetitions, rounds=options.rounds)["copy"].ms
    return {"product_tflops": product_rate(n) / 1e12, "copy_terabytes_per_second": 2 * 4 * n**2 / ms / 1e9}


def _show(row: dict[str, Any]) -> None:
    shape = " ".join(f"{k}={v}" for k, v in row.items() if isinstance(v, int))
    lines = [f"{row['kernel']} {row['direction']} {shape}"]
    for name, result in row["results"].items():
        if "error" in result:
            lines.append(f"  {name:24} {result['error']}")
            continue
        time = f"{result['ms']:9.3f} ms ±{50 * result['spread']:2.0f}%  {result['tflops']:7.1f} TFLOP/s"
        memory = f"{result['memory_bytes'] / 2**20:9.1f} MiB"
        lines.append(f"  {name:24} {time}  {memory}  off by {result['relative_error']:.1e}")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
