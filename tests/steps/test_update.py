"""The step counts the work of the whole batch, which no host sees whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dqjax.metrics import work_of
from dqjax.steps.state import State
from dqjax.steps.update import make_step
from dqjax.types import Batch


def test_work_is_that_of_the_global_batch():
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]])
    batch = Batch(
        tokens=np.ones_like(segments),
        targets=np.ones_like(segments),
        segment_ids=segments,
        positions=np.array([[0, 1, 2, 0, 1, 7], [0, 1, 7, 7, 7, 7]]),
        token_weight=np.array([[0, 0.2, 0.2, 0, 0.2, 0], [0.2, 0.2, 0, 0, 0, 0]], np.float32),
        sequence_index=np.zeros_like(segments),
    )
    optimizer, params = optax.sgd(1.0), {"x": jnp.ones(())}
    state = State(jnp.int32(0), params, optimizer.init(params), jax.random.key_data(jax.random.key(0)))
    step = make_step(lambda params, frozen, batch, key: (params["x"] * jnp.sum(batch.token_weight), {}), optimizer)
    work = step(state, None, batch)[1]["work"].total
    np.testing.assert_array_equal(work, [7, 5, (1 + 2 + 3) + (1 + 2) + (1 + 2)])
    tokens, trained, flops = work_of(batch, matmul_parameters=10, attention_width=4)
    assert (tokens, trained) == (7, 5) and flops == 6 * 10 * 7 + 3.5 * 4 * 4 * 12
