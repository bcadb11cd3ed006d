"""The command line of the stages and of the pipeline: one shape for all of them."""

import argparse
import dataclasses
import pathlib
from types import ModuleType

from dqjax.config import ConfigError
from dqjax.data.models import Models
from dqjax.data.pipeline import (
    PipelineConfig,
    Step,
    estimate,
    lone_step,
    read_pipeline,
    run_pipeline,
    run_step,
    summary,
)
from dqjax.data.stage import Shard

class StageCommand:
    """`python -m dqjax.data STAGE`: the steps of that stage in a pipeline's file, or one step on files named here."""

    def __init__(self, stage: str, module: ModuleType, models: Models):
        self.HELP, self.__doc__ = module.HELP, module.__doc__
        self.EXAMPLE = f"python -m dqjax.data {stage} --config configs/data/example.yaml"
        self._stage, self._models = stage, models

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_config(parser, required=False)
        parser.add_argument("--step", metavar="NAME", help="the step to run, where the file has several of this stage")
        parser.add_argument(
            "--input", nargs="+", metavar="FILE", help="read these instead of what the step before wrote"
        )
        parser.add_argument("--output", metavar="FILE", help="write here, .jsonl or .parquet")
        parser.add_argument("--shard", metavar="i/n", help="only part i of n (from 0); `merge` puts the parts together")

    def run(self, args: argparse.Namespace) -> None:
        config, steps = self._steps(args)
        if args.estimate:
            print(estimate(config, steps, models=self._models))
            return
        shard = Shard.parse(args.shard) if args.shard else None
        for step in steps:
            job = run_step(config, step, models=self._models, shard=shard)
            print(f"{job.output}: {summary(job.counts)}")

    def _steps(self, args: argparse.Namespace) -> tuple[PipelineConfig, list[Step]]:
        # Without `--`, a list of inputs takes what follows it.
        inputs = [path for path in args.input or () if "=" not in path]
        overrides = [*(path for path in args.input or () if "=" in path), *args.overrides]
        if args.config is None:
            if not (inputs and args.output):
                raise ConfigError("expected --config FILE, or --input FILE and --output FILE")
            config, step = lone_step(self._stage, inputs, args.output, overrides)
            return config, [step]
        config, steps = read_pipeline(args.config, overrides)
        mine = [step for step in steps if step.stage == self._stage and args.step in (None, step.name)]
        if not mine:
            there = ", ".join(f"{step.name} ({step.stage})" for step in steps)
            raise ConfigError(f"{args.config} has no step {args.step or 'of the stage ' + self._stage}; it has {there}")
        if (inputs or args.output) and len(mine) > 1:
            raise ConfigError(
                f"--input and --output are for one step; name it: --step {' or '.join(s.name for s in mine)}"
            )
        if inputs:
            mine = [dataclasses.replace(mine[0], inputs=tuple(inputs))]
        return config, [dataclasses.replace(mine[0], output=pathlib.Path(args.output))] if args.output else mine


class PipelineCommand:
    """All steps of a file, one after the other; what is done already is passed over."""

    HELP = "run all steps of a file, from problems to training files"
    EXAMPLE = "python -m dqjax.data pipeline --config configs/data/example.yaml"

    def __init__(self, models: Models):
        self._models = models

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        _add_config(parser, required=True)
        parser.add_argument(
            "--again", action="store_true", help="run steps that had failures once more; only those are asked"
        )

    def run(self, args: argparse.Namespace) -> None:
        config, steps = read_pipeline(args.config, args.overrides)
        if args.estimate:
            print(estimate(config, steps, models=self._models))
        else:
            run_pipeline(config, steps, models=self._models, again=args.again)


def _add_config(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--config", required=required, metavar="FILE", help="YAML file: out, teachers, steps")
    parser.add_argument(
        "--estimate", action="store_true", help="run 20 rows, print tokens, money and hours of the whole"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that replace the file's; STEP.key=value for a step's",
    )
