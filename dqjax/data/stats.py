"""A report of a run: rows at every step, reasons, RV × CD, lengths, missing labels, tokens; one HTML page.

Beside stats.html stand stats.json (the figures) and, where matplotlib is installed, stats.png.
"""

import html
import json
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from dqjax.config import Section
from dqjax.data.chain_rows import DIFFICULTY, VERBOSITY, Row, has_chain, label_of, thought_of
from dqjax.data.charts import bars, heat_map, page, table
from dqjax.data.stage import Job

HELP = "write a report: counts at every step, RV x CD heat map, length histograms, rejection reasons"


class Config(Section):
    """stats. title: of the page."""

    title: str = "Chains of thought"


def run(config: Config, job: Job) -> None:
    """Reads the counts of all steps in the folder, and the chains of the step's input."""
    job.refuse_shard("stats")
    folder = job.output.parent
    figures = {"steps": step_reports(folder), "chains": chain_figures(row for group in job.groups() for row in group)}
    job.output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    job.output.with_suffix(".html").write_text(as_page(figures, config.title), encoding="utf-8")
    draw(figures["chains"], job.output.with_suffix(".png"))


def step_reports(folder: pathlib.Path) -> list[dict[str, Any]]:
    """What OUT.counts.json of each step says, in the pipeline's order."""
    order: list[str] = []
    if (plan := folder / "pipeline.yaml").exists():
        steps = yaml.safe_load(plan.read_text(encoding="utf-8"))["steps"]
        order = [str(step.get("name") or step["stage"]) for step in steps]
    paths = [*folder.glob("*.counts.json"), *folder.glob("*/train.counts.json")]
    reports = [
        json.loads(path.read_text()) for path in paths if ".shard-" not in path.name and path.parent.name != "estimate"
    ]
    key = lambda r: (order.index(r["step"]) if r["step"] in order else len(order), r["step"])  # noqa: E731
    return [{name: report[name] for name in ("step", "counts", "usage")} for report in sorted(reports, key=key)]


def chain_figures(rows: Iterable[Row]) -> dict[str, Any]:
    """Counts of chains by RV and CD, length, teacher and correctness, from one pass over the rows."""
    grid, lengths, words = Counter(), Counter(), 0
    counts: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    teachers: Counter[str] = Counter()
    for row in rows:
        if not has_chain(row):
            counts["without a chain"] += 1
            continue
        counts["chains"] += 1
        problems[row["problem_id"]] += 1
        teachers[str(row.get("teacher", "unknown"))] += 1
        counts[_correctness(row)] += 1
        verbosity, difficulty = label_of(row, VERBOSITY), label_of(row, DIFFICULTY)
        counts["RV missing"] += verbosity is None
        counts["CD missing"] += difficulty is None
        if verbosity is not None and difficulty is not None:
            grid[round(verbosity), round(difficulty)] += 1
        n = len((thought_of(row) or "").split())
        words += n
        lengths[n.bit_length()] += 1
    per_problem = Counter(problems.values())
    return {
        "counts": {"problems": len(problems), **counts},
        "rv_cd": [[grid[v, d] for v in range(10)] for d in range(10)],
        "words": {_range(bits): lengths[bits] for bits in range(max(lengths, default=0) + 1)},
        "mean_words": words / max(counts["chains"], 1),
        "chains_per_problem": {str(n): per_problem[n] for n in sorted(per_problem)},
        "teachers": dict(teachers.most_common()),
    }


def as_page(figures: Mapping[str, Any], title: str) -> str:
    """The HTML page."""
    steps, chains = figures["steps"], figures["chains"]
    names = ("in", "out", "rejected", "failed")
    flow = [[s["step"], *(f"{s['counts'].get(name, 0):,}" for name in names)] for s in steps]
    more = [
        [s["step"], name, f"{count:,}"]
        for s in steps
        for name, count in s["counts"].items()
        if name not in names and not name.startswith("reason: ")
    ]
    reasons = [
        [s["step"], name.removeprefix("reason: "), f"{count:,}"]
        for s in steps
        for name, count in sorted(s["counts"].items(), key=lambda item: -item[1])
        if name.startswith("reason: ")
    ]
    usage = [[s["step"], name, f"{count:,.0f}"] for s in steps for name, count in s["usage"].items()]
    counts, total = chains["counts"], max(chains["counts"].get("chains", 0), 1)
    missing = [
        [name, f"{counts.get(f'{name} missing', 0):,}", f"{counts.get(f'{name} missing', 0) / total:.1%}"]
        for name in ("RV", "CD", "correctness")
    ]
    return page(
        title,
        [
            ("Rows at each step", table(["step", "in", "out", "rejected", "failed"], flow)),
            ("Chains", table(["", "count"], [[html.escape(n), f"{c:,}"] for n, c in counts.items()])),
            ("Missing labels", table(["label", "missing", "share"], missing)),
            ("Reasoning Verbosity and Cognitive Difficulty", heat_map(chains["rv_cd"], "RV", "CD")),
            (f"Words of a chain (mean {chains['mean_words']:,.0f})", bars(chains["words"])),
            ("Chains of a problem", bars(chains["chains_per_problem"])),
            ("Teachers", bars(chains["teachers"])),
            ("Why rows went no further", table(["step", "reason", "rows"], reasons)),
            ("What the steps counted", table(["step", "what", "count"], more)),
            ("Calls and tokens", table(["step", "what", "count"], usage)),
        ],
    )


def draw(chains: Mapping[str, Any], path: pathlib.Path) -> bool:
    """The heat map and the lengths as one PNG; False, and no file, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    image = left.imshow(chains["rv_cd"], origin="lower", cmap="viridis")
    left.set(
        xlabel="Reasoning Verbosity", ylabel="Cognitive Difficulty", xticks=range(10), yticks=range(10), title="chains"
    )
    figure.colorbar(image, ax=left)
    right.bar(list(chains["words"]), list(chains["words"].values()), color="#31688e")
    right.tick_params(axis="x", rotation=60)
    right.set(xlabel="words of a chain", ylabel="chains")
    figure.savefig(path, dpi=110)
    return True


def _correctness(row: Row) -> str:
    correct = row.get("correct")
    return "correct" if correct is True else "incorrect" if correct is False else "correctness missing"


def _range(bits: int) -> str:
    return "0" if bits == 0 else str(1) if bits == 1 else f"{1 << bits - 1}-{(1 << bits) - 1}"
