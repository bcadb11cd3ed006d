"""python -m dqjax.train --config FILE [section.key=value ...]: any objective, from a config to a run folder.

    RUN/
      config.yaml               the config of the run, overrides included
      model/                    config.json, tokenizer files, licence of the base
      checkpoints/step_*/       parameters, optimizer, data state, with manifests
      metrics.jsonl tensorboard/ samples.jsonl quarantine.jsonl rollouts.jsonl
      compilations/             compiled programs, so that a restart does not compile again

A run started again in its folder goes on where its newest intact checkpoint left it.
"""

import argparse
import functools
import logging
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import yaml

import dqjax
from dqjax.checkpoint import Checkpoints
from dqjax.commands import out_of_memory, run_command, wanted
from dqjax.config import ConfigError, dump, load
from dqjax.load import abstract_tree, build_model, start_jax, write_model_files
from dqjax.metrics import Recorder, Writer
from dqjax.objectives.distill import distill
from dqjax.objectives.grpo import grpo
from dqjax.objectives.lora import with_lora
from dqjax.objectives.preference import preference
from dqjax.objectives.reward import reward
from dqjax.objectives.scorer import scorer
from dqjax.objectives.setup import Setup
from dqjax.objectives.sft import sft
from dqjax.optim import make_optimizer, make_schedule
from dqjax.sharding import Rules, make_mesh
from dqjax.steps.state import State, init_state, state_shardings
from dqjax.steps.update import compile_step, make_step
from dqjax.train_config import Config
from dqjax.trainer import Evaluating, Saving, announce_compilation, fit, items_of, placer, state_from

log = logging.getLogger("dqjax.train")


OBJECTIVES = {"sft": sft, "distill": distill, "reward": reward, "scorer": scorer, "preference": preference, "grpo": grpo}


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
    setup = OBJECTIVES[config.objective.kind](config, model, rules, run)
    if config.lora is not None:
        setup = with_lora(setup, config.lora, seed=config.train.seed, dtype=model.decoder.dtype)
    steps = setup.steps

    optimizer = make_optimizer(config.optimizer, steps)
    shardings = state_shardings(optimizer, setup.trainable.shapes(), setup.trainable.shardings())
    checkpoints = Checkpoints(run / "checkpoints", keep=config.checkpoint.keep)
    state, meta = _start(config, setup, optimizer, shardings, checkpoints)
    if meta:
        setup.source.set_state(meta["data"])
    if jax.process_index() == 0:
        write_model_files(model, run / "model")
        _write(run / "config.yaml", dump(config))

    step = compile_step(make_step(setup.loss, optimizer, accumulate=config.train.accumulate), shardings)
    writer = Writer(run, resume_step=int(state.step), wandb=config.log.wandb)
    recorder = Recorder(
        writer,
        steps=steps,
        every=config.log.every,
        max_skipped=config.train.max_skipped,
        matmul_parameters=model.config.matmul_parameters,
        attention_width=model.config.num_layers * model.config.num_heads * model.config.head_dim,
        schedule=make_schedule(config.optimizer, steps),
        names=setup.labels,
        counters=meta.get("counters"),
        start=int(state.step),
        source=setup.source,
    )
    evaluating = None
    if setup.evaluate is not None:
        evaluate = functools.partial(setup.evaluate, frozen=setup.frozen)
        evaluating = Evaluating(evaluate, writer, recorder, every=config.train.eval_every, steps=steps, score=setup.score)
    saving = Saving(
        checkpoints,
        setup.source,
        recorder,
        every=config.checkpoint.every,
        steps=steps,
        meta={"environment": environment()},
        score=evaluating.score if evaluating else lambda step: None,
    )
    try:
        with announce_compilation() as compiling:
            hooks = [compiling, recorder, *([evaluating] if evaluating else []), saving]
            state = fit(state, setup.frozen, step, setup.source, steps=steps, place=placer(rules, rows), hooks=hooks)
        recorder.close()
    except jax.errors.JaxRuntimeError as e:
        if not out_of_memory(e):
            raise
        raise OutOfMemory(explain_out_of_memory(config, setup.trainable.shapes(), shardings, wanted(e))) from None
    finally:
        checkpoints.close()
        setup.close()
        writer.close()
    if saving.stopped_by is not None:
        log.warning("stopped after step %d of %d; the same command goes on from there", int(state.step), steps)
        return 128 + saving.stopped_by
    log.info("done: %d steps in %s", int(state.step), run)
    return 0


def _start(config: Config, setup: Setup, optimizer: Any, shardings: State, checkpoints: Checkpoints) -> tuple[State, Mapping]:
    """The state of the newest intact checkpoint with its meta data, or a fresh one with none."""
    make = functools.partial(init_state, optimizer=optimizer, seed=config.train.seed, shardings=shardings)
    fresh = jax.eval_shape(make, setup.trainable.shapes())
    found = checkpoints.restore(items_of(abstract_tree(fresh, shardings)))
    if found is not None:
        step, items, meta = found
        changed = {k: (v, environment().get(k)) for k, v in meta["environment"].items() if environment().get(k) != v}
        if changed:
            log.warning("resumed in another environment, bit-exactness is not promised: %s", changed)
        log.info("resuming after step %d", step)
        return state_from(items), meta
    return make(setup.initial()), {}


class OutOfMemory(ValueError):
    """A step that does not fit on the device; the message says what fills it and which keys change that."""


def explain_out_of_memory(config: Config, shapes: Any, shardings: State, wanted: str) -> str:
    """One line: what was asked of the device, its largest arrays, and the keys to change, cheapest first."""
    train, places = config.train, shardings.params
    micro = train.batch_rows // train.accumulate
    arrays = [
        (math.prod(place.shard_shape(leaf.shape)) * 4 * 3, f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.shape}")
        for (path, leaf), place in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(places), strict=True)
    ]
    largest = ", ".join(f"{name} {size / 2**30:.2f} GiB" for size, name in sorted(arrays, reverse=True)[:3])
    return (
        f"the device is out of memory{wanted}: {micro} rows of data.row_length = {config.data.row_length} at a time, "
        f"model.remat = {config.model.remat}; largest arrays with their optimizer state, a device: {largest}. Less memory, "
        f"from cheapest: train.accumulate over {train.accumulate}, model.remat: full, mesh.fsdp or mesh.tensor over more "
        "devices, optimizer.mu_dtype: bfloat16, data.row_length down"
    )


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
        for key in {**(before.get(name) or {}), **(now[name] or {})}
        if (before.get(name) or {}).get(key) != (now[name] or {}).get(key) and f"{name}.{key}" not in MAY_CHANGE
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
    "objective.table",
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
    config = load(Config, arguments.config, arguments.overrides)
    start_jax(pathlib.Path(config.train.run_dir) / "compilations")
    return train(config)


if __name__ == "__main__":
    sys.exit(run_command(main))
