"""Device time and memory of one candidate, the same way for every framework.

A candidate runs n and then 2n dependent repetitions; its time is (t₂ₙ - tₙ) / n, so that launch, transfer and the
host's clock fall out. Candidates take turns, and the median over the rounds is reported with its spread.
"""

import datetime
import importlib.metadata
import logging
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

log = logging.getLogger(__name__)

LIBRARIES = (
    "jaxlib",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "torch",
    "triton",
    "transformers",
    "tokamax",
    "dew-flash-attn-cu13",
    "liger-kernel",
    "cut-cross-entropy",
)
"""Distributions whose versions a result names."""


class Timing(NamedTuple):
    """Milliseconds a repetition.

    Attributes:
      ms: median over the rounds.
      spread: (second largest - second smallest) / median. A ratio within it is a tie.
    """

    ms: float
    spread: float


class Candidate(NamedTuple):
    """Something to time.

    Attributes:
      run: runs that many dependent repetitions, to the end.
      memory: bytes at its peak beyond the inputs, outputs included; None where it is not known.
      results: runs it once and returns what it computes; None where that is not checked.
    """

    run: Callable[[int], None]
    memory: int | None
    results: Callable[[], Any] | None = None


def jax_candidate(
    f: Callable[..., Any], operands: Sequence[jax.Array], compiler_options: dict[str, Any] | None = None
) -> Candidate:
    """A function of JAX arrays.

    Repetitions are a loop in one program, which returns the results of the last. The operands pass through a barrier
    together with a number that every repetition takes from all results of the one before, so that nothing can be moved
    out of the loop, and nothing the size of an operand is written beside the function's own work.
    """
    shapes = jax.eval_shape(f, *operands)

    def repeat(repetitions, *operands):
        def once(_, carry):
            total, *inputs = jax.lax.optimization_barrier((carry[0], *operands))
            results = jax.lax.optimization_barrier(f(*inputs))  # else only what is read was computed
            return sum((r.reshape(-1)[-1].astype(jnp.float32) for r in jax.tree.leaves(results)), total), results

        blank = jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), shapes)
        return jax.lax.fori_loop(0, repetitions, once, (jnp.float32(0), blank))[1]

    compiled = jax.jit(repeat, compiler_options=compiler_options).lower(0, *operands).compile()
    memory = compiled.memory_analysis()
    return Candidate(
        lambda repetitions: jax.block_until_ready(compiled(repetitions, *operands)),
        memory.temp_size_in_bytes + memory.output_size_in_bytes,
        lambda: compiled(1, *operands),
    )


def torch_candidate(f: Callable[[], Any], *, graph: bool) -> Candidate:
    """A function of torch CUDA tensors that it closes over; repetitions on one stream wait for each other.

    Args:
      graph: repetitions are captured once in a CUDA graph, so that nothing waits for the host, unless `f` itself reads
        something back on its way; with False they are launched one by one.
    """
    import torch

    f()  # compiles, and chooses its blocks
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    memory = torch.cuda.max_memory_allocated() - before
    captured: dict[int, Any] = {}

    def capture(repetitions):
        with torch.cuda.graph(whole := torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            for _ in range(repetitions):
                f()
        return whole

    def launch(repetitions):
        for _ in range(repetitions):
            f()
        torch.cuda.synchronize()

    def replay(repetitions):
        if repetitions not in captured:
            captured[repetitions] = capture(repetitions)
        captured[repetitions].replay()
        torch.cuda.synchronize()

    graph = graph and not _reads_back(f)
    if graph:
        captured[1] = capture(1)
    return Candidate(replay if graph else launch, memory, f)


def _reads_back(f: Callable[[], Any]) -> bool:
    """Whether the host waits for the device in it. A capture that fails for that would spoil torch's allocator."""
    import torch

    torch.cuda.set_sync_debug_mode("error")
    try:
        f()
    except RuntimeError as error:
        log.info("not captured in a CUDA graph: %s", str(error).splitlines()[0])
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def measure(candidates: Mapping[str, Candidate], *, repetitions: int, rounds: int) -> dict[str, Timing]:
    """Times all candidates in turns, `rounds` times each, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds + 1):
        for name, candidate in candidates.items():
            single, double = (_seconds(candidate.run, repetitions * k) for k in (1, 2))
            if round_:
                times[name].append((double - single) / repetitions * 1e3)
    return {name: _summary(sorted(of)) for name, of in times.items()}


def product_rate(n: int, dtype: jax.typing.DTypeLike = jnp.bfloat16, precision: Any = None) -> float:
    """FLOPs a second of a product of two random n × n matrices, by the library that XLA calls."""
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), dtype)
    product = jax_candidate(lambda a, b: jnp.matmul(a, b, precision=precision), (a, b))
    return 2 * n**3 / measure({"product": product}, repetitions=8, rounds=5)["product"].ms * 1e3


def document_lengths(rng: np.random.Generator, total: int, mean: int) -> list[int]:
    """Log-normal document lengths of about `mean` tokens that fill a row of `total`."""
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0), 16, total)))
    lengths[-1] -= sum(lengths) - total
    return [length for length in lengths if length > 0]


def machine() -> dict[str, Any]:
    """What results name beside their figures: the day, the device and the versions."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "platform": device.platform,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _seconds(run: Callable[[int], None], repetitions: int) -> float:
    start = time.perf_counter()
    run(repetitions)
    return time.perf_counter() - start


def _summary(ms: list[float]) -> Timing:
    median = statistics.median(ms)
    inner = ms[1:-1] or ms
    return Timing(median, (inner[-1] - inner[0]) / abs(median))
