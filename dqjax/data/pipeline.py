"""Steps in a row from one YAML file: each reads what an earlier one wrote.

    out: runs/factory
    teachers:
      - {name: r1, endpoints: [{url: https://host/v1, model: deepseek-reasoner}]}
    steps:
      - {stage: collect, sources: [...]}
      - {stage: generate, teachers: [r1], chains: 4}
      - {stage: verify}
      - {stage: pairs, name: right_wrong, kind: correctness, input: verify}

A step's `name` is its stage's unless given; `input` names earlier steps or files, and is the step before unless given.
Step NAME writes `out/NAME.jsonl` and the files that `stage` lists. A step whose output is there, made with the same
settings from the same inputs, is not run again.
"""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pydantic
import yaml

from dqjax.config import ConfigError, Section, dump, load, validate
from dqjax.data import annotate, collecting, generate, holdout, lengths, pairs, refine, select, stats, verify
from dqjax.data.estimate import Trial, scaled_report
from dqjax.data.models import Models
from dqjax.data.staff import Staff
from dqjax.data.stage import Job, Shard
from dqjax.data.teacher import TeacherConfig

log = logging.getLogger(__name__)

STAGES = {
    "collect": collecting,
    "generate": generate,
    "verify": verify,
    "refine": refine,
    "annotate": annotate,
    "long2short": lengths.LONG2SHORT,
    "short2long": lengths.SHORT2LONG,
    "select": select,
    "pairs": pairs,
    "split": holdout,
    "stats": stats,
}
SILENT = {"collect", "select", "split", "stats"}  # these ask nobody


class PipelineConfig(Section):
    """The file of `python -m dqjax.data pipeline`, and of each stage's own command.

    out: folder for all outputs. teachers: see `teacher`. steps: see the module; their keys are those of the stages.
    max_total_tokens: what all teachers together may cost, prompts and answers; reaching it ends the run with exit code
      3.
    """

    out: str
    teachers: tuple[TeacherConfig, ...] = ()
    steps: tuple[dict[str, Any], ...] = pydantic.Field(min_length=1)
    max_total_tokens: int | None = pydantic.Field(None, ge=1)


class StepHead(Section):
    """What every step has beside its stage's keys."""

    stage: str
    name: str | None = None
    input: tuple[str, ...] = ()

    @pydantic.field_validator("input", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


@dataclasses.dataclass(frozen=True)
class Step:
    """A validated step: its stage's module and settings, where it reads and writes."""

    name: str
    stage: str
    config: Section
    inputs: tuple[str, ...]
    output: pathlib.Path

    @property
    def module(self) -> Any:
        return STAGES[self.stage]


def read_pipeline(path: str, overrides: Sequence[str] = ()) -> tuple[PipelineConfig, list[Step]]:
    """The file, with `key=value` for its own keys and `STEP.key=value` for those of a step.

    Raises:
      ConfigError: naming file, step and key.
    """
    raw = load(PipelineConfig, path)
    names = [str(step.get("name") or step.get("stage")) for step in raw.steps]
    own = [o for o in overrides if o.partition("=")[0].partition(".")[0] not in names]
    config = load(PipelineConfig, path, own)
    steps: list[Step] = []
    for i, values in enumerate(config.steps):
        where = f"{path}: steps[{i}]"
        head = validate(StepHead, {k: v for k, v in values.items() if k in StepHead.model_fields}, where=where)
        if head.stage not in STAGES:
            raise ConfigError(f"{where}: there is no stage {head.stage!r}; there are {', '.join(STAGES)}")
        name = head.name or head.stage
        if name in {step.name for step in steps}:
            raise ConfigError(f"{where}: two steps are called {name!r}; give one a name of its own")
        settings = {k: v for k, v in values.items() if k not in StepHead.model_fields}
        for text in overrides:
            key, _, value = text.partition("=")
            if key.startswith(f"{name}."):
                _assign(settings, key.removeprefix(f"{name}.").split("."), yaml.safe_load(value))
        stage_config = validate(STAGES[head.stage].Config, settings, where=f"{where} ({name})")
        out = pathlib.Path(config.out)
        collects = head.stage == "collect"
        inputs = collecting.inputs(stage_config) if collects else _inputs(head, steps, where)
        output = out / name / "train.jsonl" if collects else out / f"{name}.jsonl"
        steps.append(Step(name, head.stage, stage_config, inputs, output))
    return config, steps


def lone_step(stage: str, inputs: Sequence[str], output: str, settings: Sequence[str]) -> tuple[PipelineConfig, Step]:
    """A step without a file, for stages that need no teacher; `settings` are `key=value` of the stage's own keys."""
    values: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: expected key=value")
        _assign(values, key.split("."), yaml.safe_load(value))
    path = pathlib.Path(output)
    config = PipelineConfig(out=str(path.parent), steps=({"stage": stage},))
    return config, Step(path.stem, stage, validate(STAGES[stage].Config, values, where=stage), tuple(inputs), path)


def run_pipeline(
    config: PipelineConfig,
    steps: Sequence[Step],
    *,
    models: Models | None = None,
    again: bool = False,
) -> None:
    """Runs the steps in order; those that are done already are passed over.

    Args:
      again: run steps that had failures once more: what is answered stays, what failed is asked again.
    """
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "pipeline.yaml").write_text(dump(config))
    staff = Staff(config.teachers, models, config.max_total_tokens)
    for step in steps:
        job = Job(step.name, step.inputs, step.output, staff=staff, settings=step.config)
        if done := _done(step, job, again):
            log.info("%s: done already, %s rows", step.name, f"{done['counts'].get('out', 0):,}")
            continue
        step.module.run(step.config, job)
        log.info("%s: %s", step.name, summary(job.counts))


def run_step(
    config: PipelineConfig,
    step: Step,
    *,
    models: Models | None = None,
    shard: Shard | None = None,
    limit: int | None = None,
) -> Job:
    """Runs one step, or a shard of it, whether it is done or not."""
    staff = Staff(config.teachers, models, config.max_total_tokens)
    job = Job(step.name, step.inputs, step.output, staff=staff, settings=step.config, shard=shard, limit=limit)
    step.module.run(step.config, job)
    return job


def estimate(
    config: PipelineConfig,
    steps: Sequence[Step],
    *,
    models: Models | None = None,
    rows: int = 20,
) -> str:
    """Runs the steps that ask, and those that they read, on a few rows, in `out/estimate`; says what the whole would cost.

    A step whose rows come from a file or from `collect` takes the first `rows` of them; the others take what that leaves.
    The answers go to the journals of the real run: nothing is paid for twice.
    """
    out, trial = pathlib.Path(config.out), pathlib.Path(config.out) / "estimate"
    staff = Staff(config.teachers, models, config.max_total_tokens)
    tried = {str(step.output): str(trial / step.output.relative_to(out)) for step in steps}
    trials: dict[str, Trial] = {}  # by output, of all steps but collect
    for step in _asking(steps):
        few = [trials[path] for path in step.inputs if path in trials]
        job = Job(
            step.name,
            [tried.get(path, path) for path in step.inputs],
            tried[str(step.output)],
            staff=staff,
            settings=step.config,
            limit=None if len(few) == len(step.inputs) or step.stage == "collect" else rows,
        )
        job.journal_path = step.output.with_name(f"{step.output.stem}.journal.jsonl")
        total = job.count_rows() if job.limit else max((t.total for t in few), default=0)
        sampled = min(rows, total) if job.limit else max((t.sampled for t in few), default=0)
        step.module.run(step.config, job)
        if step.stage != "collect":
            trials[str(step.output)] = Trial(step.name, job.usage, sampled, total)
    return scaled_report(list(trials.values()), config.teachers)


def _asking(steps: Sequence[Step]) -> list[Step]:
    """The steps that may ask a teacher, and those that they read."""
    found: list[Step] = []
    read: set[str] = set()
    for step in reversed(steps):
        if step.stage not in SILENT or str(step.output) in read:
            found.insert(0, step)
            read.update(step.inputs)
    return found


def summary(counts: Mapping[str, int]) -> str:
    """One line of counts, the reasons left out."""
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if not name.startswith("reason:"))


def _done(step: Step, job: Job, again: bool) -> dict | None:
    report = step.output.with_name(f"{step.output.stem}.counts.json")
    if step.stage == "stats" or not (report.exists() and step.output.exists()):
        return None
    said = json.loads(report.read_text())
    if said["stamp"] != job.stamp or (again and said["counts"].get("failed")):
        return None
    return said


def _inputs(head: StepHead, earlier: Sequence[Step], where: str) -> tuple[str, ...]:
    known = {step.name: str(step.output) for step in earlier}
    if not head.input:
        if not earlier:
            raise ConfigError(f"{where}: the first step needs an input, or must be collect")
        return (str(earlier[-1].output),)
    for name in head.input:
        if name not in known and "/" not in name and "." not in name:
            raise ConfigError(f"{where}: input {name!r} is no earlier step ({', '.join(known)}) and no file")
    return tuple(known.get(name, name) for name in head.input)


def _assign(values: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value
