"""Benchmark of a supervised training step: its time, tokens and model FLOPs a second, and memory, beside transformers.

    python -m dqjax.bench train --model qwen3-0.6b --rows 8 --tokens 4096 --mean-document 1024 --out h200.json
    python -m dqjax.bench train --model qwen3-0.6b --layers 4 --rows 2 --check-only
    JAX_PLATFORMS=cpu python -m dqjax.bench train --model miniature --rows 2 --tokens 128 --mean-document 40

Random weights, random tokens, full rows. First the gradients: with the attention kernel that the device gets and with
naive attention, each beside float32 throughout. Then every candidate starts from the same weights; one whose first loss
or gradient norm is not that of float32 is wrong, and not timed. Ours keeps float32 weights and moments; "holds" says
what a peer keeps. Every candidate has a process, and so the device's memory, to itself. Model FLOPs are 6 a matrix
parameter and token, the output table counted, and attention's over the pairs of its documents (`metrics.work_of`).
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.util
import json
import logging
import multiprocessing
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from dqjax.bench.peers import TransformersStep, time_transformers
from dqjax.bench.rows import packed_rows
from dqjax.bench.student_step import Case, check_gradients, describe, time_student
from dqjax.config import ConfigError
from dqjax.metrics import PEAK_FLOPS, work_of
from dqjax.models.config import SIZES, read_config
from dqjax.models.decoder import REMAT_POLICIES
from dqjax.optim import OptimizerConfig

log = logging.getLogger(__name__)

LOSS_TOLERANCE = {"bfloat16": 2e-3, "float32": 1e-4}
NORM_TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-3}
"""Relative distance from float32 that counts as right."""

GRADIENT_ALLOWANCE = {"bfloat16": 2**-5, "float32": 1e-4}
"""What a parameter's gradient may be off beyond twice what naive attention in the same dtype is off."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code, 1 where our own step failed or was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-0.6b", metavar="SIZE|DIR", help=f"{', '.join(SIZES)}, or a folder")
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the model's own number")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="default %(default)s")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of a row; default %(default)s")
    documents = "tokens; 0: one document a row; default %(default)s"
    parser.add_argument("--mean-document", type=int, default=1024, metavar="N", help=documents)
    parser.add_argument(
        "--remat", choices=("none", *REMAT_POLICIES), nargs="+", default=["full"], help="of ours; each is timed"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--micro-batches", type=int, default=1, metavar="N", help="parts of the rows, for all")
    parser.add_argument("--compile", action="store_true", help="transformers under torch.compile too")
    parser.add_argument("--peers", nargs="*", metavar="NAME", help="of the ways of transformers; default: all of them")
    parser.add_argument("--check-only", action="store_true", help="leave the timing out")
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="a time is (t(2N) - t(N)) / N")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="the median counts; default %(default)s")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args(argv)
    case = _case(options)
    results: dict[str, Any] = {"options": {**vars(options), "out": None}, "candidates": {}}
    try:
        _measure(case, options, results)
    finally:
        if options.out:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results, indent=1))
    return int(any("error" in r for name, r in results["candidates"].items() if name.startswith("dqjax")))


def _case(options: argparse.Namespace) -> Case:
    counts = options.rows, options.micro_batches, options.repetitions, options.rounds
    if min(counts) < 1 or options.tokens < 2 or options.mean_document < 0 or (options.layers or 1) < 1:
        raise ConfigError(
            "--rows, --micro-batches, --repetitions, --rounds, --layers: expected at least 1; --tokens: at least 2; "
            "--mean-document: 0 or more"
        )
    if options.rows % options.micro_batches:
        raise ConfigError(f"--rows {options.rows} do not divide into --micro-batches {options.micro_batches}")
    config = SIZES[options.model] if options.model in SIZES else read_config(options.model)
    return Case(
        dataclasses.replace(config, num_layers=options.layers or config.num_layers),
        packed_rows(config.vocab_size, options.rows, options.tokens, options.mean_document),
        options.dtype,
        options.micro_batches,
        OptimizerConfig(schedule="constant", warmup=0),
        options.repetitions,
        0 if options.check_only else options.rounds,
    )


def _measure(case: Case, options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Fills `results` as far as it gets."""
    results |= _alone(describe, case.dtype)
    log.info("%(device)s, jax %(jax)s", results["machine"])
    peers = _chosen(_peers(options, results["machine"]["platform"]), options.peers)
    work = work_of(case.batch, case.config.matmul_parameters, _attention_width(case))
    results["work"] = work._asdict()
    with tempfile.TemporaryDirectory() as folder:
        student = pathlib.Path(folder)
        results["check"] = check = _summary(_alone(check_gradients, case, student))
        log.info("gradients: %s", json.dumps(check))
        _refuse(check, case.dtype)
        tasks: dict[str, tuple[Any, ...]] = {f"dqjax_{remat}": (time_student, case, remat) for remat in options.remat}
        for how in peers:
            tasks[how.name] = (time_transformers, case, how, student)
        for name, task in tasks.items():
            try:
                found = _alone(*task)
                _agree(found, check["exact"], case.dtype)
                results["candidates"][name] = found | _rates(found, results)
            except Exception as error:  # a peer's failure is a result, not the end of the run
                results["candidates"][name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            _show(name, results["candidates"][name])


def _alone(task: Callable, *arguments: Any) -> Any:
    """The result of `task(*arguments)` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, initializer=_start_logging) as process:
        return process.submit(task, *arguments).result()


def _start_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    for noisy in ("jax", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _attention_width(case: Case) -> int:
    return case.config.num_layers * case.config.num_heads * case.config.head_dim


def _peers(options: argparse.Namespace, platform: str) -> list[TransformersStep]:
    """The ways transformers is asked to do it on this platform."""
    if platform not in ("cpu", "gpu"):  # torch runs on no TPU of ours
        return []
    attentions = ["sdpa"]
    if platform == "gpu" and options.mean_document:
        attentions.insert(0, "flex_attention")  # skips other documents; has no backward pass on a CPU
    peers: list[TransformersStep] = []
    for attention in attentions:
        plain = [TransformersStep(attention, checkpointing=True), TransformersStep(attention)]
        peers += plain
        if platform == "gpu" and importlib.util.find_spec("liger_kernel"):
            peers += [dataclasses.replace(how, liger=True) for how in plain]
        if options.compile:
            peers += [dataclasses.replace(how, compiled=True) for how in plain]
    if options.dtype != "float32":
        peers.append(TransformersStep(attentions[0], checkpointing=True, autocast=True))
    return peers


def _chosen(peers: list[TransformersStep], names: list[str] | None) -> list[TransformersStep]:
    """Those of these names; all where there are none."""
    if names is None:
        return peers
    known = {how.name: how for how in peers}
    if unknown := sorted(set(names) - known.keys()):
        raise ConfigError(f"--peers: here are {', '.join(known) or 'none'}; got {', '.join(unknown)}")
    return [how for name, how in known.items() if name in names]


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """The check with the parameter that is furthest off in place of all of them."""
    ours, naive = found["dqjax"].pop("errors"), found["reference"].pop("errors")
    excess = {name: ours[name] - 2 * naive[name] for name in ours}
    worst = max(excess, key=excess.__getitem__)
    return found | {"worst_parameter": {"name": worst, "dqjax": ours[worst], "reference": naive[worst]}}


def _refuse(check: dict[str, Any], dtype: str) -> None:
    """Raises where our gradients are wrong."""
    for name in ("dqjax", "reference"):
        found = check[name]
        _agree({"losses": [found["loss"]], "gradient_norms": [found["gradient_norm"]]}, check["exact"], dtype)
    worst = check["worst_parameter"]
    allowed = 2 * worst["reference"] + GRADIENT_ALLOWANCE[dtype]
    if not worst["dqjax"] <= allowed:
        raise FloatingPointError(
            f"the gradient of {worst['name']} is off by {worst['dqjax']:.3g} with attention {check['backend']!r}, "
            f"allowed {allowed:.3g}: naive attention is off by {worst['reference']:.3g}"
        )


def _agree(found: dict[str, Any], exact: dict[str, float], dtype: str) -> None:
    """Raises where the first step is not that of float32."""
    checks = ("loss", found["losses"], LOSS_TOLERANCE), ("gradient_norm", found["gradient_norms"], NORM_TOLERANCE)
    for what, (got, *_), tolerance in checks:
        want, allowed = exact[what], tolerance[dtype]
        off = abs(got / want - 1)
        if not off <= allowed:
            raise FloatingPointError(f"{what} {got:.6g}, float32: {want:.6g}; off by {off:.2g}, allowed {allowed:.2g}")


def _rates(found: dict[str, Any], results: dict[str, Any]) -> dict[str, float]:
    if "seconds" not in found:
        return {}
    work, device = results["work"], results["machine"]["device"]
    flops = work["flops"] / found["seconds"]
    rates = {
        "tokens_per_second": work["tokens"] / found["seconds"],
        "model_flops_per_second": flops,
        "share_of_product": flops / results["product_flops"],
    }
    datasheet = next((rate for name, rate in PEAK_FLOPS.items() if name in device), None)
    return rates | ({"share_of_datasheet": flops / datasheet} if datasheet else {})


def _show(name: str, found: dict[str, Any]) -> None:
    if "error" in found:
        log.info("%-40s %s", name, found["error"])
        return
    memory = f"{found['peak_bytes'] / 2**30:.1f} GiB" if found["peak_bytes"] else "memory unknown"
    speed = "not timed"
    if "seconds" in found:
        speed = f"{found['seconds']:.4f} s ±{found['spread'] / 2:.0%}, {found['tokens_per_second']:,.0f} tokens/s, "
        speed += f"{found['share_of_product']:.1%} of the product rate"
    log.info("%-40s %s, %s, loss %.5f", name, speed, memory, found["losses"][0])
