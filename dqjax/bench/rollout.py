"""Benchmark of the rollout engine: tokens a second beside transformers, and its share of the memory bandwidth.

    python -m dqjax.bench rollout --model qwen3-0.6b --prompt-tokens 256 --new-tokens 256 --batch 256 --out h200.json
    JAX_PLATFORMS=cpu python -m dqjax.bench rollout --model miniature --batch 8 --prompt-tokens 32 --new-tokens 32

Every prompt is random and its own; nothing ends a sample early. A size has random weights, a folder its own
(transformers gets random ones of the same shape). A step of decoding has to read the weights, and the keys and values
cached so far:

    roofline share = (weight bytes + mean cache bytes of a step) / (measured read rate · seconds of a step)
"""

import argparse
import json
import logging
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dqjax.bench.peers import transformers_generate
from dqjax.config import ConfigError
from dqjax.kernels.measure import jax_candidate, machine, measure
from dqjax.models.config import SIZES, ModelConfig, read_config
from dqjax.models.decoder import Decoder
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.layout import position_bytes
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import Rules, make_mesh
from dqjax.types import Params

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.bench rollout", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-0.6b", metavar="SIZE|DIR", help=f"{', '.join(SIZES)}, or a folder")
    parser.add_argument("--prompt-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="sequences; default %(default)s")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--top-k", type=int, default=0, metavar="K")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed runs; the median counts; default %(default)s"
    )
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args(argv)
    if min(options.prompt_tokens, options.new_tokens, options.batch, options.rounds) < 1:
        raise ConfigError("--prompt-tokens, --new-tokens, --batch and --rounds: expected at least 1")
    config = SIZES[options.model] if options.model in SIZES else read_config(options.model)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (options.batch, options.prompt_tokens))
    results = {"machine": machine(), "options": {**vars(options), "out": None}, "read_bytes_per_second": _read_rate()}
    results["dqjax"] = _ours(options, config, prompts, results["read_bytes_per_second"])
    results["transformers"] = _theirs(options, config, prompts)
    if "tokens_per_second" in results["transformers"]:
        results["ratio"] = results["dqjax"]["tokens_per_second"] / results["transformers"]["tokens_per_second"]
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


def _ours(options: argparse.Namespace, config: ModelConfig, prompts: np.ndarray, read_rate: float) -> dict[str, Any]:
    rules = Rules(make_mesh(devices=jax.devices()[:1]))  # one device, as the peer
    decoder = Decoder(config, rules, dtype=jnp.dtype(options.dtype))
    params = _parameters(options.model, decoder)
    engine = Engine(
        decoder,
        stop_ids=[config.vocab_size],  # not a token: every sample runs to its limit
        vocab=config.vocab_size,
        sampling=Sampling(top_k=options.top_k, top_p=options.top_p),
        rows=options.batch,
        max_new_tokens=options.new_tokens,
    )
    asked = [Prompt(tuple(ids), i) for i, ids in enumerate(prompts.tolist())]
    list(engine.generate(params, asked))  # compiles
    seconds: list[float] = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        made = sum(len(sample.token_ids) for sample in engine.generate(params, asked))
        seconds.append(time.perf_counter() - start)
    calls = _timed(engine, "decode"), _timed(engine, "prefill")  # waits for each call: not part of the timed runs
    list(engine.generate(params, asked))
    decode, prefill = map(sum, calls)
    steps = len(calls[0]) * engine.fixed.steps
    size = jnp.dtype(options.dtype).itemsize
    mean_length = options.prompt_tokens + (options.new_tokens - 1) / 2
    cache_bytes = options.batch * mean_length * position_bytes(config, rules, options.dtype)
    weight_bytes = config.matmul_parameters * size
    return {
        "seconds": statistics.median(seconds),
        "tokens_per_second": made / statistics.median(seconds),
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "step_ms": decode / steps * 1e3,
        "weight_bytes": weight_bytes,
        "mean_cache_bytes": cache_bytes,
        "roofline_share": (weight_bytes + cache_bytes) / read_rate / (decode / steps),
    }


def _parameters(model: str, decoder: Decoder) -> Params:
    if model in SIZES:
        return decoder.init(jax.random.key(0))
    from dqjax.convert.huggingface import load_params

    return load_params(model, decoder.config, decoder.shardings())


def _timed(engine: Engine, name: str) -> list[float]:
    """Seconds of each later call of one of the engine's programs, from its inputs being ready to its results being."""
    program: Callable[..., Any] = getattr(engine, name)
    seconds: list[float] = []

    def run(*arguments):
        jax.block_until_ready(arguments)
        start = time.perf_counter()
        result = jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - start)
        return result

    setattr(engine, name, run)
    return seconds


def _theirs(options: argparse.Namespace, config: ModelConfig, prompts: np.ndarray) -> dict[str, Any]:
    """transformers on the same kind of device, after a run to warm up; or why it was left out."""
    devices = {"cpu": "cpu", "gpu": "cuda"}
    platform = jax.default_backend()
    if platform not in devices:
        return {"error": f"torch does not run on {platform}"}
    settings = {"dtype": options.dtype, "top_k": options.top_k, "top_p": options.top_p, "device": devices[platform]}
    try:
        run = transformers_generate(config, prompts, new_tokens=options.new_tokens, **settings)
        run()
        seconds = statistics.median(run() for _ in range(options.rounds))
    except Exception as error:  # a peer's failure is a result, not the end of the run
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"seconds": seconds, "tokens_per_second": options.batch * options.new_tokens / seconds}


def _read_rate() -> float:
    """Bytes a second that a sum over a large array reads: random numbers, since memory moves equal ones faster."""
    array = jax.random.normal(jax.random.key(0), 2**29 if jax.default_backend() != "cpu" else 2**24)
    timing = measure({"read": jax_candidate(jnp.sum, (array,))}, repetitions=4, rounds=5)["read"]
    return array.nbytes / timing.ms * 1e3
