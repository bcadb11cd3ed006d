"""The problems that the benchmark times, and all that solve them: ours and every installed peer."""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dqjax.kernels import attention_peers, exact, vocabulary_peers
from dqjax.kernels.attention.api import attention, make_plan, packed_backend
from dqjax.kernels.decode_attention.api import decode_attention
from dqjax.kernels.decode_attention.api import default_backend as decode_backend
from dqjax.kernels.linear_logprob.api import TeacherHead, linear_cross_entropy, linear_kl, linear_logprob
from dqjax.kernels.linear_logprob.api import default_backend as head_backend
from dqjax.kernels.linear_logprob.mosaic_gpu import why_not_mosaic_gpu
from dqjax.kernels.measure import Candidate, document_lengths, jax_candidate, torch_candidate

log = logging.getLogger(__name__)

ROWS_CHECKED = 64
"""Of a vocabulary's problem."""

LONGEST_IN_XLA = 8192
"""The longest row for which our plain XLA form is timed beside a kernel."""


class AttentionCase(NamedTuple):
    """B rows of T tokens; documents of `mean` tokens on average, 0 for one a row."""

    B: int
    T: int
    mean: int
    N: int
    K: int
    H: int


class DecodeCase(NamedTuple):
    B: int
    S: int
    N: int
    K: int
    H: int


class VocabularyCase(NamedTuple):
    M: int
    D: int
    V: int


# Of full size are problems whose inputs fill more than a GPU's cache, so that none finds them there.
CASES: dict[str, dict[str, list[Any]]] = {
    "full": {
        "attention": [
            AttentionCase(2, 8192, 1024, 32, 8, 128),
            AttentionCase(1, 32768, 2048, 32, 8, 128),
            AttentionCase(4, 4096, 0, 32, 8, 128),
            AttentionCase(1, 16384, 0, 32, 8, 128),
            AttentionCase(16, 4096, 0, 14, 2, 64),
            AttentionCase(1, 32768, 0, 28, 4, 128),
        ],
        "decode": [
            DecodeCase(64, 8192, 32, 8, 128),
            DecodeCase(256, 2048, 16, 8, 128),
            DecodeCase(256, 512, 16, 8, 128),
        ],
        "vocabulary": [VocabularyCase(16384, 1024, 151936), VocabularyCase(8192, 4096, 151936)],
    },
    "small": {
        "attention": [AttentionCase(1, 256, 0, 4, 2, 32), AttentionCase(2, 256, 64, 4, 2, 32)],
        "decode": [DecodeCase(4, 256, 4, 2, 32)],
        "vocabulary": [VocabularyCase(256, 64, 2048)],
    },
}


class Work(NamedTuple):
    """One pass over one problem.

    Attributes:
      direction: which pass, in words.
      flops: of the arithmetic that the result needs.
      want: part of the right results, in float64.
      part: cuts the results of a candidate, by name, down to that part.
      candidates: by name, LIBRARY_how; to be compiled side by side.
      in_torch: likewise, to be made one after the other.
      approximate: candidates to time however far they are from `want`.
    """

    direction: str
    flops: float
    want: exact.Part
    part: Callable[[dict[str, Any]], dict[str, Any]]
    candidates: dict[str, Callable[[], Candidate]]
    in_torch: dict[str, Callable[[], Candidate]] = {}  # noqa: RUF012
    approximate: tuple[str, ...] = ()


def attention_work(case: AttentionCase) -> Iterable[Work]:
    """Causal attention, forward and then with its backward pass; the building of plans and masks counts."""
    B, T, mean, N, K, H = case
    rng = np.random.default_rng(0)
    lengths = [document_lengths(rng, T, mean) for _ in range(B)] if mean else None
    rows = lengths or [[T]] * B
    segment_ids = jnp.asarray(np.stack([np.repeat(np.arange(1, len(r) + 1), r) for r in rows]), jnp.int32)
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "d_out": (B, T, N, H)}
    arrays = _random(shapes)
    want = exact.attention_head(*arrays.values(), segment_ids)
    useful = 2.0 * N * H * sum(length**2 for row in rows for length in row)

    def part(results):
        heads = {"out": slice(N // K), "dq": slice(N // K), "dk": 0, "dv": 0}
        return {name: x[0, :, heads[name]] for name, x in results.items()}

    def ours(backend, q, k, v, segment_ids):
        plan = make_plan(segment_ids, backend=backend)
        return attention(q, k, v, q_segment_ids=segment_ids, backend=backend, plan=plan)

    best = packed_backend(jax.devices()[0], jnp.bfloat16, H)
    backends = _ours(best) if T <= LONGEST_IN_XLA else (best,)
    functions = {f"dqjax_{backend}": functools.partial(ours, backend) for backend in backends}
    functions |= _installed(lambda: attention_peers.jax_attention(lengths, T))
    functions |= _installed(lambda: attention_peers.flash_attention_3(lengths))
    functions |= _installed(lambda: attention_peers.tokamax_attention(lengths))

    q, k, v, d_out = arrays.values()

    def candidate(f, backward, options=None):
        if not backward:
            return jax_candidate(lambda *operands: {"out": f(*operands)}, (q, k, v, segment_ids))

        def gradients(q, k, v, segment_ids, d_out):
            pullback = jax.vjp(lambda q, k, v: f(q, k, v, segment_ids), q, k, v)[1]
            return dict(zip(("dq", "dk", "dv"), pullback(d_out), strict=True))

        return jax_candidate(gradients, (q, k, v, segment_ids, d_out), options)

    for backward in (False, True):
        candidates = {name: functools.partial(candidate, f, backward) for name, f in functions.items()}
        if backward and "cudnn_jax" in functions:
            options = attention_peers.DETERMINISTIC
            candidates["cudnn-deterministic_jax"] = functools.partial(candidate, functions["cudnn_jax"], True, options)
        torch = _installed(lambda: attention_peers.torch_attention(arrays, lengths, segment_ids, backward))  # noqa: B023
        in_torch = {name: functools.partial(torch_candidate, f, graph=True) for name, f in torch.items()}
        direction = "forward+backward" if backward else "forward"
        yield Work(direction, useful * (3.5 if backward else 1), want, part, candidates, in_torch)


def decode_work(case: DecodeCase) -> Iterable[Work]:
    """One query a sequence against a full cache, beside reading that cache."""
    B, S, N, K, H = case
    q, k, v = _random({"q": (B, N, H), "k": (B, S, K, H), "v": (B, S, K, H)}).values()
    lengths = jnp.full(B, S, jnp.int32)

    def ours(backend, q, k, v):
        return {"out": decode_attention(q, k, v, lengths, backend=backend)}

    def part(results):
        return {name: x[0] for name, x in results.items() if name == "out"}

    best = decode_backend(jax.devices()[0], q.dtype, H, S)
    candidates = {
        f"dqjax_{backend}": functools.partial(jax_candidate, functools.partial(ours, backend), (q, k, v))
        for backend in _ours(best)
    }
    candidates["read_the_cache"] = lambda: jax_candidate(lambda q, k, v: {"k": k.sum(), "v": v.sum()}, (q, k, v))
    yield Work("forward", 4.0 * B * S * N * H, exact.decode_sequence(q, k, v), part, candidates)


def vocabulary_work(case: VocabularyCase) -> Iterable[Work]:
    """The vocabulary's losses with their gradients in x and w: cross-entropy, where the weights of the rows are known
    beforehand; the sum of log-probability, lse and entropy; and the divergence from a teacher with sharper logits."""
    M, D, V = case
    x, w = _random({"x": (M, D), "w": (V, D)}).values()
    w, x_teacher = w * 0.02, x * 2
    labels = jax.random.randint(jax.random.key(1), (M,), 0, V)
    weight = jnp.full(M, 1 / M, jnp.float32)
    few = slice(0, ROWS_CHECKED)

    def cross_entropy(backend, x, w):
        return linear_cross_entropy(x, w, labels, weight, backend=backend)

    def logprob(backend, x, w):
        results = linear_logprob(x, w, labels, backend=backend)
        return jnp.sum(weight * sum(results)), results[0]

    def jsd(backend, x, w, x_teacher):
        return linear_kl(x, w, TeacherHead(x_teacher, w), weight, beta=0.5, backend=backend)

    def part(results):
        return {name: y[few] for name, y in results.items() if name != "dw"}

    def candidate(f, operands):
        def gradients(*operands):
            (dx, dw), per_row = jax.grad(f, argnums=(0, 1), has_aux=True)(*operands)
            return {"dx": dx, "dw": dw, "per_row": per_row}

        return jax_candidate(gradients, operands)

    hopper = head_backend(jax.devices()[0], why_not_mosaic_gpu(w, varying=False))
    full, exactly = (vocabulary_peers.full_logits(of, 1 / M) for of in (labels, labels[few]))
    for name, products, f, best, operands in (
        ("cross_entropy", 3, cross_entropy, hopper, (x, w)),
        ("logprob", 4, logprob, hopper, (x, w)),
        ("jsd", 4, jsd, hopper, (x, w, x_teacher)),
    ):
        functions = {f"dqjax_{backend}": functools.partial(f, backend) for backend in _ours(best)}
        functions["full_logits"] = full[name]
        candidates = {key: functools.partial(candidate, of, operands) for key, of in functions.items()}
        torch = _installed(lambda: vocabulary_peers.torch_losses(name, x, w, labels, x_teacher))  # noqa: B023
        in_torch = {key: functools.partial(torch_candidate, of, graph=False) for key, of in torch.items()}
        want = exact.vocabulary_rows(exactly[name], x[few], w, *(a[few] for a in operands[2:]))
        flops = 2.0 * products * M * D * V
        yield Work(f"{name} forward+backward", flops, want, part, candidates, in_torch, vocabulary_peers.APPROXIMATE)


GENERATORS: dict[str, Callable[[Any], Iterable[Work]]] = {
    "attention": attention_work,
    "decode": decode_work,
    "vocabulary": vocabulary_work,
}


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Normal bfloat16 numbers."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = jax.jit(jax.random.normal, static_argnums=(1, 2))
    return {name: draw(key, shape, jnp.bfloat16) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def _ours(best: str) -> tuple[str, ...]:
    """The backends of ours to time: the one that the device gets, and plain XLA."""
    return tuple(dict.fromkeys((best, "xla")))


def _installed(find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a peer offers on this machine: nothing off CUDA, or without its library."""
    if jax.default_backend() != "gpu":
        return {}
    try:
        return find()
    except (ImportError, RuntimeError) as error:
        log.info("peer left out: %s", error)
        return {}
