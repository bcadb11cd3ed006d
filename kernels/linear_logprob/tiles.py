"""How many logits a chunk holds."""

from jaxtyping import Array, Float

from dqjax.kernels.tuning.lookup import Problem, chosen


def tile_size(kernel: str, backend: str, x: Float[Array, "M D"], columns: int, rule: int) -> int:
    """The rule's number, or the half or quarter that the table of this kind of device prefers: never more, so that the
    rule bounds the memory."""
    (M, D), smaller = x.shape, (rule >> 1, rule >> 2)
    problem = Problem(kernel, backend, x.dtype.name, D, None, M, columns)
    return chosen(problem, [rule, *(tile for tile in smaller if tile < M * columns)], rule)
