"""python -m dqjax.plan: compile a whole training step for TPUs or GPUs that are not here, and say what it takes.

libtpu and jax's CUDA plugin hold the real compilers and run on any CPU (`topology.py`). A step that compiles fits and is
legal for the chip; that says nothing about its speed.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dqjax.commands import run_command
from dqjax.config import ConfigError, load
from dqjax.convert.source import resolve_model
from dqjax.load import abstract_tree
from dqjax.models.config import SIZES, ModelConfig
from dqjax.models.decoder import Decoder
from dqjax.optim import make_optimizer
from dqjax.sharding import Rules, make_mesh
from dqjax.steps.sft import make_sft_loss
from dqjax.steps.state import init_state, state_shardings
from dqjax.steps.update import compile_step, make_step
from dqjax.topology import HBM_GIB, devices_of
from dqjax.train_config import Config
from dqjax.types import Batch

SEQUENCES = 64  # side-array columns of the planned batch; their memory is negligible
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a compiled step takes, a device.

    Attributes:
      state, temporaries, peak: bytes: of parameters and optimizer; of everything else at its height; together.
      hbm: bytes the device has; None where the datasheet is not in `HBM_GIB`.
      model_flops: of the whole step at full rows, all devices, by the convention of `metrics.work_of`.
      collectives: kind → (operations in the program, bytes they produce a device when each runs once).
    """

    devices: int
    state: int
    temporaries: int
    peak: int
    hbm: int | None
    model_flops: float
    collectives: dict[str, tuple[int, int]]


def plan_step(config: Config, shape: ModelConfig, topology: str) -> Plan:
    """Compiles the step of `config` for a topology such as "v5p:2x2x2" or "h200:8".

    Raises:
      ConfigError: the compiler is not installed, or the topology, mesh or batch do not fit together.
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED where the step does not fit into the device's memory.
    """
    if config.objective.kind != "sft":
        raise ConfigError(f"objective: plans are made for sft, got {config.objective.kind}")
    if config.lora is not None:
        raise ConfigError("lora: plans are made for whole weights; leave the section out")
    rules = Rules(_mesh(config, topology))
    rows, length = config.train.batch_rows, config.data.row_length
    if rows % (rules.batch_shards * config.train.accumulate):
        raise ConfigError(
            f"train.batch_rows: {rows} is not a multiple of {rules.batch_shards} batch shards × {config.train.accumulate} "
            "micro-batches"
        )
    decoder = Decoder(
        shape, rules, jnp.dtype(config.model.dtype), config.model.remat, config.model.attention_backend
    )
    optimizer = make_optimizer(config.optimizer, config.train.steps or 1000)
    shardings = state_shardings(optimizer, decoder.shapes(), decoder.shardings())
    fresh = functools.partial(init_state, optimizer=optimizer, seed=0, shardings=shardings)
    state = abstract_tree(jax.eval_shape(fresh, decoder.shapes()), shardings)

    def of_rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=rules.sharding(("batch",), (rows,)))

    ints, floats = of_rows(jnp.int32, length), of_rows(jnp.float32, length)
    batch = Batch(ints, ints, ints, ints, floats, ints, {"source": of_rows(jnp.int32, SEQUENCES)})
    loss = make_sft_loss(decoder, rules, z_loss=config.objective.z_loss)
    step = compile_step(make_step(loss, optimizer, accumulate=config.train.accumulate), shardings)
    with tempfile.TemporaryDirectory() as dump:
        options = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
        memory = step.lower(state, None, batch).compile(compiler_options=options).memory_analysis()
        collectives = _collectives(dump)
    pairs = rows * length * (length + 1) / 2
    width = shape.num_layers * shape.num_heads * shape.head_dim
    hbm = HBM_GIB.get(topology.split(":")[0])
    return Plan(
        devices=rules.mesh.size,
        state=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        hbm=hbm and hbm * 2**30,
        model_flops=6.0 * shape.matmul_parameters * rows * length + 3.5 * 4 * width * pairs,
        collectives=collectives,
    )


def _mesh(config: Config, topology: str) -> jax.sharding.Mesh:
    devices = devices_of(topology)
    try:
        return make_mesh(**config.mesh.model_dump(), devices=devices)
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _collectives(dump: str) -> dict[str, tuple[int, int]]:
    """Counts the communication in the compiler's dump of the optimised program (jax cannot print it for TPU)."""
    files = glob.glob(os.path.join(dump, "*jit_step*after_optimizations.txt"))
    found: dict[str, list[int]] = collections.defaultdict(list)
    pattern = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")
    for file in files:
        with open(file, encoding="utf-8") as f:
            for match in filter(None, map(pattern.search, f)):
                found[match[2]].append(_bytes_of(match[1], started=bool(match[3])))
    return {kind: (len(sizes), sum(sizes)) for kind, sizes in sorted(found.items())}


def _bytes_of(shape: str, *, started: bool) -> int:
    """Bytes of an HLO shape; an asynchronous start names its operand too, and the result is the larger."""
    bits = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "f32": 32, "s32": 32, "u32": 32, "f64": 64}
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * bits.get(dtype, 32) // 8
        for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shape)
    ]
    return max(sizes, default=0) if started else sum(sizes)


def report(plan: Plan) -> str:
    """The plan as a few lines of text."""
    gib = lambda n: f"{n / 2**30:.2f} GiB"  # noqa: E731
    room = f" of {gib(plan.hbm)} ({plan.peak / plan.hbm:.0%})" if plan.hbm else ""
    lines = [
        f"devices                   {plan.devices}",
        f"a device: state           {gib(plan.state)}",
        f"a device: temporaries     {gib(plan.temporaries)}",
        f"a device: peak            {gib(plan.peak)}{room}",
        f"model FLOPs of a step     {plan.model_flops:.3e} (full rows, each one document)",
    ]
    for kind, (count, size) in plan.collectives.items():
        lines.append(f"{kind:<25} {count} in the program, {gib(size)} a device if each runs once")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.plan",
        description="Compile a training step for TPUs or GPUs that are not here; prints memory, FLOPs and collectives.",
        epilog="example: python -m dqjax.plan --config configs/sft/qwen2.5-7b-v5p.yaml --topology v5p:2x2x2",
    )
    parser.add_argument("--config", required=True, help="a training config with objective: sft")
    parser.add_argument("--topology", required=True, help="v5e:4x4, v5p:2x2x2, … (pip install libtpu), h100:8, h200:1 (jax[cuda13])")
    parser.add_argument("--size", choices=sorted(SIZES), help="the model's shape, where model.init_from cannot be read here")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # the plan runs on the host, also where an accelerator is
    config = load(Config, arguments.config, arguments.overrides)
    shape = SIZES[arguments.size] if arguments.size else resolve_model(config.model.init_from).config()
    print(report(plan_step(config, shape, arguments.topology)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
