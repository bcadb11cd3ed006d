"""What changes from step to step, and where it lies on the mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from dqjax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything a training step rewrites; donated to it. Trees of shapes and of shardings take the same form.

    Attributes:
      step: `[]` int32, steps taken (skipped ones included).
      params: the trained parameters, float32.
      opt_state: the optimizer's state.
      key: base key of the run (raw uint32 data); step n draws from `fold_in(key, n)`.
    """

    step: Any
    params: Any
    opt_state: Any
    key: Any


def state_shardings(optimizer: optax.GradientTransformation, shapes: Any, shardings: Any) -> State:
    """Where each part of the state lies: moments with their parameters, counters everywhere.

    Optimizer state does not inherit the parameters' shardings under jit, so it is told here.

    Args:
      shapes, shardings: of the parameters, equal trees.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    everywhere = NamedSharding(mesh, PartitionSpec())
    moments = optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        shardings,
        transform_non_params=lambda _: everywhere,
    )
    return State(everywhere, shardings, moments, everywhere)


def init_state(params: Params, optimizer: optax.GradientTransformation, seed: int, shardings: State) -> State:
    """The state before the first step; `params` are taken over as they are."""
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    key = jax.device_put(jax.random.key_data(jax.random.key(seed)), shardings.key)
    return State(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), params, opt_state, key)
