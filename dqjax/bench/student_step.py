"""Our supervised step on one device: what it gives in exact arithmetic, and what it takes.

Each function has a process to itself, since XLA keeps the memory it once took.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dqjax.convert.huggingface import save_params, write_text
from dqjax.kernels.attention.api import packed_backend
from dqjax.kernels.measure import Candidate, machine, measure, product_rate
from dqjax.metrics import scalars
from dqjax.models.config import ModelConfig, to_huggingface
from dqjax.models.decoder import Decoder, Remat
from dqjax.models.layers import precision_of
from dqjax.optim import OptimizerConfig, make_optimizer
from dqjax.sharding import Rules, make_mesh
from dqjax.steps.accumulate import accumulated_gradients
from dqjax.steps.sft import make_sft_loss
from dqjax.steps.state import init_state, state_shardings
from dqjax.steps.update import compile_step, make_step
from dqjax.types import Batch, Params

CHECKED_STEPS = 2
"""Steps before the timing, whose losses and gradient norms every candidate reports."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One training step, whoever makes it.

    Attributes:
      batch: numpy arrays.
      dtype: of activations and products.
      micro_batches: parts that the batch is split into.
      optimizer: with a constant rate, so that every implementation has it.
      repetitions, rounds: of `kernels.measure`; 0 rounds leave the timing out.
    """

    config: ModelConfig
    batch: Batch
    dtype: str
    micro_batches: int
    optimizer: OptimizerConfig
    repetitions: int
    rounds: int


def describe(dtype: str) -> dict[str, Any]:
    """The machine, and the FLOPs a second of a large product in `dtype` on it."""
    n = 512 if jax.default_backend() == "cpu" else 8192
    rate = product_rate(n, jnp.dtype(dtype), precision_of(jnp.dtype(dtype)))
    return {"machine": machine(), "product_flops": rate}


def check_gradients(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """Loss and gradients with the device's attention kernel and with naive attention, beside float32 throughout.

    Args:
      folder: gets the weights that every candidate starts from, in the case's dtype, as a Hugging Face folder.

    Returns:
      "exact", "reference" and "dqjax", each with "loss" and "gradient_norm"; the last two with their "errors",
      parameter → relative L2 distance of its gradient from the exact one, a layer each; "backend", the kernel's.
    """
    place = jax.sharding.NamedSharding(_rules().mesh, jax.sharding.PartitionSpec())
    params, batch = _weights(case), jax.device_put(case.batch, place)
    save_params(params, case.config, folder, dtype=case.dtype)
    write_text(folder / "config.json", json.dumps(to_huggingface(case.config, dtype=case.dtype)))
    rows = len(case.batch.tokens)

    def gradients(dtype: str, backend: str | None, parts: int):
        loss = make_sft_loss(_decoder(case, dtype=dtype, backend=backend), _rules())

        @jax.jit
        def run(params):
            key = jax.random.key(0)  # of dropout and the like; this loss draws nothing
            grads, value, _ = accumulated_gradients(loss, params, None, batch, key, parts)
            return grads, {"loss": value, "gradient_norm": optax.tree.norm(grads)}

        grads, found = run(params)
        return grads, jax.tree.map(float, found)

    exact, found = gradients("float32", "reference", rows)  # naive attention has room for a row at a time
    results: dict[str, Any] = {"backend": _backend(case), "exact": found}
    for name, backend, parts in (("reference", "reference", rows), ("dqjax", None, case.micro_batches)):
        grads, found = gradients(case.dtype, backend, parts)
        results[name] = found | {"errors": _errors(grads, exact)}
    return results


def time_student(case: Case, remat: Remat) -> dict[str, Any]:
    """The step that `dqjax.train` runs, state donated.

    Returns:
      "losses" and "gradient_norms" of the first steps, "peak_bytes", and, where the case has rounds, "seconds" a step
      with their relative "spread".
    """
    rules, decoder = _rules(), _decoder(case, remat=remat)
    optimizer = make_optimizer(case.optimizer, steps=1)
    shardings = state_shardings(optimizer, decoder.shapes(), decoder.shardings())
    state = init_state(_weights(case), optimizer, 0, shardings)
    batch = jax.device_put(case.batch, rules.sharding((), ()))
    step = compile_step(make_step(make_sft_loss(decoder, rules), optimizer, accumulate=case.micro_batches), shardings)
    compiled = step.lower(state, None, batch).compile()
    first = []
    for _ in range(CHECKED_STEPS):
        state, metrics = compiled(state, None, batch)
        first.append(scalars({name: metrics[name] for name in ("objective", "gradient_norm")}))
    results: dict[str, Any] = {
        "losses": [m["objective"] for m in first],
        "gradient_norms": [m["gradient_norm"] for m in first],
        "peak_bytes": compiled.memory_analysis().peak_memory_in_bytes,
    }

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, None, batch)
        jax.block_until_ready((state, metrics))

    return results | timed(run, case)


def timed(run: Any, case: Case) -> dict[str, float]:
    """{"seconds", "spread"} of a step, where the case has rounds; `run` makes that many steps, to the end."""
    if not case.rounds:
        return {}
    candidate = {"step": Candidate(run, None)}
    timing = measure(candidate, repetitions=case.repetitions, rounds=case.rounds)["step"]
    return {"seconds": timing.ms / 1e3, "spread": timing.spread}


def _rules() -> Rules:
    return Rules(make_mesh(devices=jax.devices()[:1]))  # one device, as the peers


def _decoder(case: Case, *, dtype: str | None = None, remat: Remat = "full", backend: str | None = None) -> Decoder:
    return Decoder(case.config, _rules(), jnp.dtype(dtype or case.dtype), remat, backend)


def _backend(case: Case) -> str:
    return packed_backend(jax.devices()[0], jnp.dtype(case.dtype), case.config.head_dim)


def _weights(case: Case) -> Params:
    """Random float32 parameters that the case's dtype holds exactly, so that no candidate's are rounded."""
    rounded = lambda tree: jax.tree.map(lambda x: x.astype(case.dtype).astype(jnp.float32), tree)  # noqa: E731
    return jax.jit(rounded)(_decoder(case).init(jax.random.key(0)))


def _errors(grads: Params, exact: Params) -> dict[str, float]:
    """Relative L2 distance of every parameter's gradient, "layers.mlp.up.kernel[3]" for one of stacked layers."""

    def distance(path, got, want):
        axes = tuple(range(int(_stacked(path)), want.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(got - want), axes) / jnp.sum(jnp.square(want), axes))

    distances = jax.device_get(jax.jit(functools.partial(jax.tree_util.tree_map_with_path, distance))(grads, exact))
    errors: dict[str, float] = {}
    for path, of in jax.tree_util.tree_leaves_with_path(distances):
        name = ".".join(key.key for key in path)
        errors |= {f"{name}[{i}]": float(e) for i, e in enumerate(of)} if _stacked(path) else {name: float(of)}
    return errors


def _stacked(path: tuple) -> bool:
    return path[0].key == "layers"
