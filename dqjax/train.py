"""python -m dqjax.train --config FILE [section.key=value ...]: any objective, from a config to a run folder.

    RUN/
      config.yaml               the config of the run, overrides included
      model/                    config.json, tokenizer files, licence of the base
      checkpoints/step_*/       parameters, optimizer, data state, with manifests
      metrics.jsonl tensorboard/ samples.jsonl quarantine.jsonl
      compilations/             compiled programs, so that a restart does not compile again

A run started again in its folder goes on where its newest intact checkpoint left it.
"""

import argparse
import dataclasses
import functools
import json
import logging
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pydantic
import yaml
from pydantic import Field

import dqjax
from dqjax.checkpoint import Checkpoints
from dqjax.commands import run_command
from dqjax.config import ConfigError, Section, dump
from dqjax.config import load as load_config
from dqjax.data.config import DataConfig
from dqjax.data.loader import TrainingData, open_training_data
from dqjax.load import Model, ModelSection, abstract_tree, build_model, read_parameters, start_jax, write_model_files
from dqjax.metrics import Recorder, Writer, scalars
from dqjax.optim import OptimizerConfig, make_optimizer, make_schedule
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import MeshConfig, Rules, make_mesh
from dqjax.steps.sft import SFTConfig, make_sft_loss
from dqjax.steps.state import State, init_state, state_shardings
from dqjax.steps.update import compile_step, make_step
from dqjax.trainer import Evaluating, Saving, announce_compilation, fit, items_of, local_rows, placer, state_from
from dqjax.types import Batch, Loss, Metrics, Params, merge_metrics

log = logging.getLogger("dqjax.train")


class TrainConfig(Section):
    """train: how long and how much at a time.

    run_dir: folder of the run, on a disk that all hosts share; an existing one is resumed. steps: updates in all; or epochs: passes over the data (a
    curriculum counts its own). batch_rows: packed rows of one update, over all devices. accumulate: micro-batches they
    are taken in, to save memory; the result is the same. seed: of parameters (where drawn) and of steps. eval_every:
    steps between evaluations, with the same number of them between samples. max_skipped: steps with a non-finite loss or
    gradient, which change nothing, before the run gives up. sample_tokens: length of the sample at each evaluation; 0
    for none.
    """

    run_dir: str
    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    batch_rows: int = Field(ge=1)
    accumulate: int = Field(1, ge=1)
    seed: int = 0
    eval_every: int = Field(500, ge=1)
    max_skipped: int = Field(10, ge=0)
    sample_tokens: int = Field(256, ge=0)


class CheckpointConfig(Section):
    """checkpoint: every so many steps, and the last; keep: how many of the newest (the best is kept besides)."""

    every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1)


class LogConfig(Section):
    """log: every so many steps one record in metrics.jsonl and TensorBoard; wandb: project name (extra `wandb`)."""

    every: int = Field(10, ge=1)
    wandb: str | None = None


class Config(Section):
    """A training run."""

    objective: SFTConfig
    model: ModelSection
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short_objective(cls, values: Any) -> Any:
        """`objective: sft` is short for `objective: {kind: sft}`."""
        if isinstance(values, dict) and isinstance(values.get("objective"), str):
            values = {**values, "objective": {"kind": values["objective"]}}
        return values

    @pydantic.model_validator(mode="after")
    def _length_of_the_run(self):
        given = [self.train.steps is not None, self.train.epochs is not None, self.data.curriculum is not None]
        if sum(given) != 1:
            raise ValueError("train: give one of train.steps, train.epochs, data.curriculum (whose stages count epochs)")
        return self


def sft(config: Config, model: Model, rules: Rules, data: TrainingData) -> tuple[Loss, dict[str, Sequence[str]]]:
    """The SFT objective: its loss, and the labels of its vector metrics."""
    stages = config.data.curriculum.stages if config.data.curriculum else ()
    labels = {"loss_by_source": data.sources, "loss_by_stage": [str(i) for i in range(len(stages))]}
    groups = {name.removeprefix("loss_by_"): len(names) for name, names in labels.items() if len(names) > 1}
    return make_sft_loss(model.decoder, rules, z_loss=config.objective.z_loss, groups=groups), labels


OBJECTIVES = {"sft": sft}


def train(config: Config) -> int:
    """Runs (or goes on with) the training run of a config; returns the exit code.

    Raises:
      ConfigError: before anything is compiled, if the config cannot be run.
    """
    run = pathlib.Path(config.train.run_dir)
    if "://" in config.train.run_dir:
        raise ConfigError(f"train.run_dir: expected a path, got {config.train.run_dir}; mount the bucket (gcsfuse) on all hosts")
    _refuse_another_config(config, run)
    try:
        rules = Rules(make_mesh(**config.mesh.model_dump()))
    except ValueError as e:
        raise ConfigError(str(e)) from None
    rows, parts = config.train.batch_rows, rules.batch_shards * config.train.accumulate
    if rows % parts:
        raise ConfigError(
            f"train.batch_rows: {rows} rows do not divide into {rules.batch_shards} batch shards of the mesh × "
            f"{config.train.accumulate} micro-batches; expected a multiple of {parts}"
        )
    model = build_model(config.model, rules)
    quarantine = config.data.quarantine or str(run / "quarantine.jsonl")
    data = open_training_data(
        config.data.model_copy(update={"quarantine": quarantine}),
        model.tokenizer,
        batch_rows=rows,
        local_rows=local_rows(rules, rows),
    )
    steps = config.train.steps or (data.loader.batches_of(config.train.epochs) if config.train.epochs else data.loader.total_batches)
    log.info("data: %s", "  ".join(f"{k} {v}" for k, v in data.counts.items()))

    optimizer = make_optimizer(config.optimizer, steps)
    shardings = state_shardings(optimizer, model.decoder.shapes(), model.decoder.shardings())
    checkpoints = Checkpoints(run / "checkpoints", keep=config.checkpoint.keep)
    state, meta = _start(config, model, optimizer, shardings, checkpoints)
    data.loader.set_state(meta["data"]) if meta else None
    if jax.process_index() == 0:
        write_model_files(model, run / "model")
        _write(run / "config.yaml", dump(config))

    loss, labels = OBJECTIVES[config.objective.kind](config, model, rules, data)
    step = compile_step(make_step(loss, optimizer, accumulate=config.train.accumulate), shardings)
    place, start = placer(rules, rows), int(state.step)
    writer = Writer(run, resume_step=start, wandb=config.log.wandb)
    shape = model.config
    recorder = Recorder(
        writer,
        steps=steps,
        every=config.log.every,
        max_skipped=config.train.max_skipped,
        matmul_parameters=shape.matmul_parameters,
        attention_width=shape.num_layers * shape.num_heads * shape.head_dim,
        schedule=make_schedule(config.optimizer, steps),
        names=labels,
        counters=meta.get("counters"),
        start=start,
    )
    evaluating = None
    if data.validation is not None:
        evaluate = make_evaluation(config, model, rules, data, loss, labels, place, run)
        evaluating = Evaluating(evaluate, writer, recorder, every=config.train.eval_every, steps=steps)
    saving = Saving(
        checkpoints,
        data.loader,
        recorder,
        every=config.checkpoint.every,
        steps=steps,
        meta={"environment": environment()},
        score=evaluating.score if evaluating else lambda step: None,
    )
    try:
        with announce_compilation() as compiling:
            hooks = [compiling, recorder, *([evaluating] if evaluating else []), saving]
            state = fit(state, None, step, data.loader, steps=steps, place=place, hooks=hooks)
        recorder.close()
    finally:
        checkpoints.close()
        data.loader.close()
        writer.close()
    if saving.stopped_by is not None:
        log.warning("stopped after step %d of %d; the same command goes on from there", int(state.step), steps)
        return 128 + saving.stopped_by
    log.info("done: %d steps in %s", int(state.step), run)
    return 0


def _start(config: Config, model: Model, optimizer: Any, shardings: State, checkpoints: Checkpoints) -> tuple[State, Mapping]:
    """The state of the newest intact checkpoint with its meta data, or a fresh one with none."""
    shapes = model.decoder.shapes()
    fresh = jax.eval_shape(functools.partial(init_state, optimizer=optimizer, seed=config.train.seed, shardings=shardings), shapes)
    found = checkpoints.restore(items_of(abstract_tree(fresh, shardings)))
    if found is not None:
        step, items, meta = found
        changed = {k: (v, environment().get(k)) for k, v in meta["environment"].items() if environment().get(k) != v}
        if changed:
            log.warning("resumed in another environment, bit-exactness is not promised: %s", changed)
        log.info("resuming after step %d", step)
        return state_from(items), meta
    return init_state(read_parameters(model), optimizer, config.train.seed, shardings), {}


def make_evaluation(
    config: Config,
    model: Model,
    rules: Rules,
    data: TrainingData,
    loss: Loss,
    labels: Mapping[str, Sequence[str]],
    place: Callable[[Batch], Batch],
    run: pathlib.Path,
) -> Callable[[Params], tuple[dict[str, float], dict[str, str]]]:
    """Held-out metrics of the objective, and a greedy sample for a held-out prompt (appended to samples.jsonl)."""
    measure = jax.jit(lambda params, batch, key: loss(params, None, batch, key)[1])
    prompt = Prompt(tuple(data.validation.documents.prompt(0).tolist()), 0)
    engine = Engine(
        model.decoder,
        stop_ids=model.chat.stop_ids,
        vocab=model.vocab,
        sampling=Sampling(temperature=0.0),
        rows=rules.batch_shards,
        max_new_tokens=max(config.train.sample_tokens, 1),
    )

    def evaluate(params: Params) -> tuple[dict[str, float], dict[str, str]]:
        total: Metrics = {}
        for batch in data.validation:
            total = merge_metrics(total, measure(params, place(batch), jax.random.key(0)))
        numbers = scalars(total, labels)
        if not config.train.sample_tokens:
            return numbers, {}
        sample = next(engine.generate(params, [prompt]))
        text = model.tokenizer.decode(list(sample.token_ids))
        if jax.process_index() == 0:
            row = {"prompt": model.tokenizer.decode(list(prompt.token_ids)), "text": text, "finish_reason": sample.finish_reason}
            with (run / "samples.jsonl").open("a", encoding="utf-8") as f:
                f.write(json.dumps({"loss": numbers.get("loss"), **row}, ensure_ascii=False) + "\n")
        return numbers, {"sample": text}

    return evaluate


def environment() -> dict[str, Any]:
    """What bit-exact resumption depends on besides the config."""
    devices = jax.devices()
    return {
        "dqjax": dqjax.__version__,
        "jax": jax.__version__,
        "numpy": np.__version__,
        "device": devices[0].device_kind,
        "devices": len(devices),
    }


def _refuse_another_config(config: Config, run: pathlib.Path) -> None:
    """A run folder belongs to one config: what the run computes must not change under it."""
    path = run / "config.yaml"
    if not path.is_file():
        if run.exists() and not run.is_dir():
            raise ConfigError(f"train.run_dir: {run} is a file")
        return
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid YAML ({e}); move the run folder away or restore the file") from None
    now = config.model_dump(mode="json")
    free = {"mesh", "checkpoint", "log"}
    sections = [name for name in now if name not in free and before.get(name) != now[name]]
    changed = [
        f"{name}.{key}"
        for name in sections
        for key in now[name]
        if (before.get(name) or {}).get(key) != now[name][key] and f"{name}.{key}" not in MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"{run} holds a run with another {', '.join(changed)}; use another train.run_dir, or the config in {path}"
        )


# What a run may be resumed with although it was begun without: how it is computed and watched, not what it computes.
MAY_CHANGE = {
    "train.run_dir",
    "train.accumulate",
    "train.eval_every",
    "train.max_skipped",
    "train.sample_tokens",
    "model.remat",
    "model.attention_backend",
    "data.quarantine",
    "data.cache_dir",
    "data.workers",
    "data.prefetch",
    "data.max_bad_share",
}


def _write(path: pathlib.Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.train",
        description="Train a student with the objective that the config names.",
        epilog="example: python -m dqjax.train --config configs/debug/sft.yaml train.steps=20 optimizer.learning_rate=1e-3",
    )
    parser.add_argument("--config", required=True, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace those of the file")
    arguments = parser.parse_args(argv)
    config = load_config(Config, arguments.config, arguments.overrides)
    start_jax(pathlib.Path(config.train.run_dir) / "compilations")
    return train(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
