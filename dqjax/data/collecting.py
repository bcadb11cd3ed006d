"""`collect` as the first step of a pipeline: the training problems are its output, OUT/NAME/train.jsonl."""

import pathlib

from dqjax.data.collect import CollectConfig, collect
from dqjax.data.stage import Job

HELP = "problems from several sources, de-duplicated and decontaminated"


class Config(CollectConfig):
    """The keys of CollectConfig; `out` is the pipeline's."""

    out: str = ""


def run(config: Config, job: Job) -> None:
    """Writes train.jsonl, and test.jsonl and validation.jsonl where problems are held out, into the step's folder."""
    made = collect(config.model_copy(update={"out": str(job.output.parent)}))
    files = {name: count for name, count in made.items() if name.endswith(".jsonl")}
    job.counts.update({"out": files.get("train.jsonl", 0), **{k: v for k, v in made.items() if k not in files}})
    job.counts.update({pathlib.Path(name).stem: count for name, count in files.items()})
    job.write_counts()


def inputs(config: Config) -> tuple[str, ...]:
    """The files that decide the outcome, for the step's stamp."""
    benchmarks = config.decontaminate.benchmarks if config.decontaminate else ()
    return tuple(source.path for source in (*config.sources, *benchmarks) if source.path is not None)
