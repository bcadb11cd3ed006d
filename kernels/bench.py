"""Benchmark of the kernels: ours, every installed peer, and the machine's ceilings, in one run.

    python -m dqjax.bench kernels --out kernels/results/h200.json      shapes of Qwen3 training and sampling
    python -m dqjax.bench kernels --size small --only decode           seconds on a CPU; proves that it runs
    python -m dqjax.bench kernels --table kernels/results/h200.json    the table of earlier results, in Markdown

Every candidate is checked against float32 logits on part of the problem before it is timed (`measure.py`); one that is
missing, wrong or fails is listed with the reason. Times are milliseconds, memory bytes beyond the inputs with outputs
counted; FLOPs are those of the visible pairs only, so nothing skipped is ever claimed.
"""

import argparse
import json
import logging
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dqjax.kernels import peers
from dqjax.kernels.attention.api import attention, make_plan, packed_backend
from dqjax.kernels.decode_attention.api import decode_attention
from dqjax.kernels.decode_attention.api import default_backend as decode_backend
from dqjax.kernels.linear_logprob.api import TeacherHead, linear_cross_entropy, linear_kl, linear_logprob
from dqjax.kernels.linear_logprob.api import default_backend as head_backend
from dqjax.kernels.linear_logprob.mosaic_gpu import why_not_mosaic_gpu
from dqjax.kernels.measure import (
    Candidate,
    document_lengths,
    jax_candidate,
    machine,
    measure,
    product_rate,
    torch_candidate,
)

log = logging.getLogger(__name__)

TOLERANCE = 2.0**-6
"""Relative error of a bfloat16 candidate that counts as right."""


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


CASES: dict[str, dict[str, list[Any]]] = {
    "full": {
        "attention": [
            AttentionCase(2, 8192, 1024, 32, 8, 128),
            AttentionCase(1, 32768, 2048, 32, 8, 128),
            AttentionCase(4, 4096, 0, 32, 8, 128),
            AttentionCase(1, 16384, 0, 32, 8, 128),
            AttentionCase(4, 4096, 0, 14, 2, 64),
            AttentionCase(1, 32768, 0, 28, 4, 128),
        ],
        "decode": [DecodeCase(64, 8192, 32, 8, 128), DecodeCase(256, 2048, 16, 8, 128)],
        "vocabulary": [VocabularyCase(16384, 1024, 151936), VocabularyCase(8192, 4096, 151936)],
    },
    "small": {
        "attention": [AttentionCase(1, 256, 0, 4, 2, 32), AttentionCase(2, 256, 64, 4, 2, 32)],
        "decode": [DecodeCase(4, 256, 4, 2, 32)],
        "vocabulary": [VocabularyCase(256, 64, 2048)],
    },
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 where one of our own kernels was wrong or failed."""
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.bench kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write; e.g. kernels/results/h200.json")
    parser.add_argument("--table", type=pathlib.Path, metavar="FILE", help="print this file's results and stop")
    parser.add_argument("--size", choices=CASES, default="full")
    parser.add_argument("--only", choices=CASES["full"], nargs="+", default=list(CASES["full"]))
    parser.add_argument("--repetitions", type=int, default=4, help="n of n and 2n")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(argv)
    if options.table:
        print("\n\n".join(markdown(json.loads(options.table.read_text()))))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: dict[str, Any] = {"machine": machine(), "ceilings": _ceilings(options), "cases": []}
    failed = False
    for kind in options.only:
        for case in CASES[options.size][kind]:
            for direction, flops, candidates in GENERATORS[kind](case):
                row = {"kernel": kind, "direction": direction, **case._asdict()}
                row["results"] = _run(candidates, flops, options)
                failed |= any("error" in r and name.startswith("dqjax") for name, r in row["results"].items())
                results["cases"].append(row)
                _show(row)
                if options.out:
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


def markdown(results: dict[str, Any]) -> list[str]:
    """A table for each kernel: milliseconds of the best candidate of each library, the least of a row in bold."""
    kernels = dict.fromkeys(row["kernel"] for row in results["cases"])
    return [_table([row for row in results["cases"] if row["kernel"] == kernel]) for kernel in kernels]


def _table(rows: list[dict[str, Any]]) -> str:
    best = [_milliseconds(row) for row in rows]
    names = list(dict.fromkeys(name for ms in best for name in ms))
    titles = [*_shape(rows[0]), "Pass", *names]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for row, ms in zip(rows, best, strict=True):
        least = min(ms[name] for name in ms if name not in CEILINGS)
        figures = (f"**{ms[n]:.2f}**" if ms.get(n) == least else f"{ms[n]:.2f}" if n in ms else "" for n in names)
        lines.append("| " + " | ".join([*_shape(row).values(), row["direction"], *figures]) + " |")
    return "\n".join(lines)


CEILINGS = ("read",)
"""Candidates that do less than the work: what the machine could do at best."""


def _milliseconds(row: dict[str, Any]) -> dict[str, float]:
    """Of the best candidate of each library that was timed."""
    ms: dict[str, float] = {}
    for name, result in row["results"].items():
        library = name.split("_")[0]
        if "ms" in result:
            ms[library] = min(result["ms"], ms.get(library, math.inf))
    return ms


def _shape(row: dict[str, Any]) -> dict[str, str]:
    """The case in words, by the titles of its columns."""
    if row["kernel"] == "vocabulary":
        return {"Tokens × width × vocabulary": f"{row['M']} × {row['D']} × {row['V']}"}
    heads = f"{row['N']}/{row['K']} of {row['H']}"
    if row["kernel"] == "decode":
        return {"Sequences × slots": f"{row['B']} × {row['S']}", "Heads": heads}
    documents = f"documents of about {row['mean']}" if row["mean"] else "one document"
    return {"Rows": f"{row['B']} × {row['T']}, {documents}", "Heads": heads}


Named = dict[str, Callable[[], Candidate]]


def _attention(case: AttentionCase) -> Iterable[tuple[str, float, Named]]:
    rng = np.random.default_rng(0)
    B, T, mean, N, K, H = case
    lengths = [document_lengths(rng, T, mean) for _ in range(B)] if mean else None
    rows = lengths or [[T]] * B
    ids = np.stack([np.repeat(np.arange(1, len(row) + 1), row) for row in rows]).astype(np.int32)
    shapes = {"q": (B, T, N, H), "k": (B, T, K, H), "v": (B, T, K, H), "d_out": (B, T, N, H)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    q, k, v, d_out = (jnp.asarray(x, jnp.bfloat16) for x in arrays.values())
    segment_ids = jnp.asarray(ids)
    useful = 2.0 * N * H * sum(length**2 for row in rows for length in row)
    want = _attention_head(q, k, v, segment_ids)

    def ours(backend):
        def f(q, k, v):  # the plan counts
            plan = make_plan(segment_ids, backend=backend)
            return attention(q, k, v, q_segment_ids=segment_ids, backend=backend, plan=plan)

        return f

    functions = {f"dqjax_{backend}": ours(backend) for backend in _ours(packed_backend(jax.devices()[0], q.dtype, H))}
    for more in (lambda: peers.jax_attention(lengths, segment_ids), lambda: peers.flash_attention_3(lengths)):
        functions |= _installed(more)

    def right(f):
        return lambda q, k, v: f(q, k, v)[0, :, : N // K]

    def candidate(f, backward):
        def make():
            _check(jax.jit(right(f))(q, k, v), want)
            if not backward:
                return jax_candidate(f, (q, k, v))
            return jax_candidate(lambda q, k, v, d_out: jax.vjp(f, q, k, v)[1](d_out), (q, k, v, d_out))

        return make

    for backward in (False, True):
        named = {name: candidate(f, backward) for name, f in functions.items()}
        in_torch = _installed(lambda: peers.torch_attention(arrays, lengths, ids, backward))  # noqa: B023
        named |= {name: (lambda f=f: torch_candidate(f)) for name, f in in_torch.items()}
        yield ("forward+backward" if backward else "forward"), useful * (3.5 if backward else 1), named


def _attention_head(q, k, v, segment_ids):
    """The first row's first key-value head by float32 logits, some queries at a time, [T, G, H]."""
    G = q.shape[2] // k.shape[2]
    q, k, v = q[0, :, :G].astype(jnp.float32), k[0, :, 0].astype(jnp.float32), v[0, :, 0].astype(jnp.float32)

    def one(args):
        t, q, segment = args
        see = (segment_ids[0] == segment) & (jnp.arange(len(k)) <= t)
        logits = jnp.where(see, q @ k.T * q.shape[-1] ** -0.5, -jnp.inf)
        return jax.nn.softmax(logits, axis=-1) @ v

    return jax.lax.map(one, (jnp.arange(len(q)), q, segment_ids[0]), batch_size=256)


def _decode(case: DecodeCase) -> Iterable[tuple[str, float, Named]]:
    rng = np.random.default_rng(0)
    B, S, N, K, H = case
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((B, N, H), (B, S, K, H), (B, S, K, H)))
    lengths = jnp.full(B, S, jnp.int32)
    want = decode_attention(q[:1], k[:1], v[:1], lengths[:1], backend="reference")

    def candidate(backend):
        def f(q, k, v):
            return decode_attention(q, k, v, lengths, backend=backend)

        def make():
            _check(jax.jit(f)(q, k, v)[:1], want)
            return jax_candidate(f, (q, k, v))

        return make

    best = decode_backend(jax.devices()[0], q.dtype, H, S)
    named: Named = {f"dqjax_{backend}": candidate(backend) for backend in _ours(best)}
    named["read_the_cache"] = lambda: jax_candidate(lambda q, k, v: (k.sum(), v.sum()), (q, k, v))
    yield "forward", 4.0 * B * S * N * H, named


def _vocabulary(case: VocabularyCase) -> Iterable[tuple[str, float, Named]]:
    rng = np.random.default_rng(0)
    M, D, V = case
    arrays = rng.normal(size=(M, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32) * 0.02
    labels_np = rng.integers(0, V, M).astype(np.int32)
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in arrays)
    labels, weight = jnp.asarray(labels_np), jnp.full(M, 1 / M, jnp.float32)
    part = slice(0, 64)
    want = linear_logprob(x[part], w, labels[part], backend="reference")[0]

    def cross_entropy(backend):
        return lambda x, w: linear_cross_entropy(x, w, labels, weight, backend=backend)

    def logprob(backend):
        def f(x, w):
            results = linear_logprob(x, w, labels, backend=backend)
            return jnp.sum(weight * sum(results)), results[0]

        return f

    def kl(backend):
        teacher = TeacherHead(x * 2, w)
        return lambda x, w: linear_kl(x, w, teacher, weight, beta=0.5, backend=backend)

    def candidate(f, checked):
        def make():
            if checked:
                _check(jax.jit(f)(x, w)[1][part], want)
            return jax_candidate(jax.grad(lambda x, w: f(x, w)[0], argnums=(0, 1)), (x, w))

        return make

    for name, products, make in (("cross_entropy", 3, cross_entropy), ("logprob", 4, logprob), ("jsd", 4, kl)):
        best = "xla" if name == "jsd" else head_backend(jax.devices()[0], why_not_mosaic_gpu(w, varying=False))
        named = {f"dqjax_{backend}": candidate(make(backend), name != "jsd") for backend in _ours(best)}
        named["full_logits"] = candidate(make("reference"), name != "jsd")
        if name == "cross_entropy":
            in_torch = _installed(lambda: peers.torch_cross_entropy(*arrays, labels_np))
            named |= {name: (lambda f=f: torch_candidate(f)) for name, f in in_torch.items()}
        yield f"{name} forward+backward", 2.0 * products * M * D * V, named


GENERATORS: dict[str, Callable[[Any], Iterable[tuple[str, float, Named]]]] = {
    "attention": _attention,
    "decode": _decode,
    "vocabulary": _vocabulary,
}


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


def _check(got: Any, want: Any) -> None:
    got, want = (np.asarray(x, np.float32).reshape(-1) for x in (got, want))
    error = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    if not error <= TOLERANCE:
        raise ArithmeticError(f"wrong by {error:.3g}, allowed {TOLERANCE:.3g}")


def _run(named: Named, flops: float, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Results of all candidates; an error stands in place of the figures of one that cannot be timed."""
    results: dict[str, dict[str, Any]] = {}
    ready: dict[str, Candidate] = {}
    for name, make in named.items():
        try:
            ready[name] = make()
        except Exception as error:  # a peer's failure is a result, not the end of the run
            results[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    for name, timing in measure(ready, repetitions=options.repetitions, rounds=options.rounds).items():
        results[name] = {
            "ms": timing.ms,
            "spread": timing.spread,
            "tflops": flops / timing.ms / 1e9,
            "memory_bytes": ready[name].memory,
        }
    return results


def _ceilings(options: argparse.Namespace) -> dict[str, float]:
    """The rate of a large bfloat16 product, and of a copy, in this run."""
    n = 8192 if options.size == "full" else 256
    copy = jax_candidate(lambda a: a + 1, (jax.random.normal(jax.random.key(1), (n, n)),))
    ms = measure({"copy": copy}, repetitions=options.repetitions, rounds=options.rounds)["copy"].ms
    return {"product_tflops": product_rate(n) / 1e12, "copy_terabytes_per_second": 2 * 4 * n**2 / ms / 1e9}


def _show(row: dict[str, Any]) -> None:
    shape = " ".join(f"{k}={v}" for k, v in row.items() if isinstance(v, int))
    log.info("%s %s %s", row["kernel"], row["direction"], shape)
    for name, result in row["results"].items():
        if "error" in result:
            log.info("  %-24s %s", name, result["error"])
        else:
            memory = result["memory_bytes"] / 2**20
            log.info(
                "  %-24s %9.3f ms ±%2.0f%%  %7.1f TFLOP/s  %9.1f MiB",
                name,
                result["ms"],
                100 * result["spread"] / 2,
                result["tflops"],
                memory,
            )


if __name__ == "__main__":
    raise SystemExit(main())
