"""python -m dqjax.eval: accuracy, pass@k, thinking tokens and token efficiency of a model on a benchmark.

Writes into --out: report.json and report.md (the figures), records.jsonl (each sample), problems.jsonl (each problem),
settings.json. The same command again goes on where it stopped; more --samples are added to those that are there.
"""

import argparse
import hashlib
import importlib.metadata
import json
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from dqjax.commands import run_command
from dqjax.config import ConfigError, load, validate
from dqjax.eval.benchmarks import BENCHMARKS, benchmark_files, read_problems
from dqjax.eval.config import EvalConfig, fingerprint
from dqjax.eval.overlap import find_overlap, training_records
from dqjax.eval.plots import draw_evaluation
from dqjax.eval.report import MODES, as_text, compare, summarise, write_report
from dqjax.eval.run import Graded, claim_folder, evaluate, read_records
from dqjax.eval.samplers import EndpointSampler, EngineSampler, Sampler
from dqjax.rewards.correct import Correctness

EXAMPLES = """examples:
  python -m dqjax.eval --checkpoint runs/student --benchmark test.jsonl --max-new-tokens 256
  python -m dqjax.eval --checkpoint runs/student --config configs/eval/published/math500.yaml --file math500.jsonl
  python -m dqjax.eval --endpoint http://localhost:8000/v1 --model student --benchmark aime2024 --file aime.jsonl \\
      --samples 32 --k 1,8,32 --max-new-tokens 32768
"""

# Options that set a key of the config: type, text of --help.
OPTIONS: dict[str, tuple[Callable[[str], Any], str | None]] = {
    "benchmark": (str, f"{', '.join([*BENCHMARKS, 'tasks'])}, or a jsonl or parquet file of question and answer"),
    "file": (str, "the file of a named benchmark, in its published form"),
    "limit": (int, "only the first so many problems"),
    "samples": (int, "samples a problem; default 1"),
    "k": (lambda text: [int(part) for part in text.split(",")], "the pass@k to report, such as 1,4,8"),
    "thinking": (str, "on, off, or both, a column of the report each; default on"),
    "temperature": (float, "0 is greedy; default 0.6"),
    "top_p": (float, "the likeliest tokens up to this probability; default 0.95"),
    "top_k": (int, "only so many of the likeliest tokens; 0: all; default 20"),
    "min_p": (float, "tokens of at least so many times the likeliest; default 0"),
    "max_new_tokens": (int, "the limit of a sample; default 4096"),
    "thinking_budget": (int, "end thinking by force after so many tokens; default: never"),
    "instruction": (str, "added to each question"),
    "seed": (int, "of the samples, and of the order of choices"),
    "budgets": (lambda text: [int(part) for part in text.split(",")], "token budgets for accuracy, such as 512,1024"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dqjax.eval",
        description=__doc__.partition(": ")[2].partition("\n\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument(
        "--checkpoint", metavar="DIR", help="a run folder, a converted checkpoint or a Hugging Face folder"
    )
    where.add_argument(
        "--endpoint", metavar="URL", help="an OpenAI-compatible server; its key is read from OPENAI_API_KEY"
    )
    parser.add_argument("--model", metavar="NAME", help="the model's name at the endpoint")
    parser.add_argument("--tokenizer", metavar="DIR", help="counts thinking tokens where the endpoint does not")
    parser.add_argument("--parallel", type=int, default=16, metavar="N", help="requests in flight; default %(default)s")
    parser.add_argument("--out", metavar="DIR", help="default runs/eval/MODEL/BENCHMARK")
    parser.add_argument(
        "--against", metavar="DIR", help="the --out of another evaluation, to be compared problem by problem"
    )
    parser.add_argument(
        "--training-data", metavar="FILE", nargs="+", default=[], help="report which test problems occur in it"
    )
    parser.add_argument("--plots", action="store_true", help="write PNGs (needs the extra dqjax[plots])")
    parser.add_argument("--config", metavar="FILE", help="settings as YAML; options given here win over it")
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=name.upper(), help=text)
    parser.add_argument("--rows", type=int, default=64, help="sequences decoded together; default %(default)s")
    parser.add_argument(
        "--cache-gib", type=float, metavar="G", help="a device's memory for the cache; pages, or fewer rows, if it is short"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default %(default)s")
    parser.add_argument("--step", type=int, help="of a run folder's checkpoint; default: the newest intact one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any other key of --config")
    arguments = parser.parse_args(argv)
    if arguments.endpoint and not arguments.model:
        raise ConfigError("--endpoint needs --model NAME")

    config = config_of(arguments)
    if arguments.endpoint and config.thinking_budget is not None:
        raise ConfigError("thinking_budget: an endpoint cannot be told to end thinking; leave it out")
    problems = read_problems(config)
    overlap = None
    if arguments.training_data:
        bare = read_problems(config, bare=True)
        overlap = str(find_overlap(bare, training_records(arguments.training_data)))
    settings = settings_of(arguments, config)
    out = claim_folder(arguments.out or default_folder(arguments, config), settings)
    with Correctness(config.grading) as grader:
        grader.prepare(problems)
        sampler = endpoint_sampler(arguments, config) if arguments.endpoint else engine_sampler(arguments, config)
        graded = evaluate(
            sampler,
            problems,
            samples=config.samples,
            modes=config.modes,
            seed=config.seed,
            grader=grader,
            records=out / "records.jsonl",
            progress=True,
        )
    report = report_of(out, graded, config, settings, overlap=overlap, against=arguments.against)
    print(as_text(report))
    if arguments.plots:
        runs = {MODES[mode]: [g for g in graded if g.thinking == mode] for mode in config.modes}
        draw_evaluation(out, runs, max_new_tokens=config.max_new_tokens, level=config.level)
    print(f"written to {out}", file=sys.stderr)
    return 0


def config_of(arguments: argparse.Namespace) -> EvalConfig:
    """The config file, if there is one, with the command's options laid over it."""
    given = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    if arguments.config:
        overrides = [f"{name}={json.dumps(value)}" for name, value in given.items()]
        return load(EvalConfig, arguments.config, [*overrides, *arguments.overrides])
    if arguments.overrides:
        raise ConfigError(f"{arguments.overrides[0]}: key=value changes a --config, and none is given")
    if "benchmark" not in given:
        raise ConfigError("--benchmark or --config is missing")
    return validate(EvalConfig, given, where="options")


def engine_sampler(arguments: argparse.Namespace, config: EvalConfig) -> Sampler:
    """Samples from the checkpoint, on this process's devices."""
    from dqjax.load import load_model, start_jax
    from dqjax.rollout.engine import Engine, Prompt
    from dqjax.rollout.sampling import Sampling
    from dqjax.rollout.stops import ThinkingEnd
    from dqjax.sharding import MeshConfig, Rules, make_mesh

    start_jax()
    rules = Rules(make_mesh(**MeshConfig().model_dump()))
    model, params = load_model(arguments.checkpoint, rules, dtype=arguments.dtype, step=arguments.step)
    engine = Engine(
        model.decoder,
        stop_ids=model.chat.stop_ids,
        vocab=model.vocab,
        sampling=Sampling(config.temperature, config.top_k, config.top_p, config.min_p),
        rows=-(-arguments.rows // rules.batch_shards) * rules.batch_shards,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        thinking_end=ThinkingEnd(model.chat.closing_ids, model.chat.thinking_ended),
        cache_bytes=int(arguments.cache_gib * 2**30) if arguments.cache_gib is not None else None,
    )

    def generate(prompts):
        for sample in engine.generate(params, (Prompt(tuple(ids), seed, budget) for ids, seed, budget in prompts)):
            yield sample.token_ids, sample.finish_reason

    return EngineSampler(model.chat, generate, config.thinking_budget)


def endpoint_sampler(arguments: argparse.Namespace, config: EvalConfig) -> Sampler:
    """Samples from a server."""
    count = None
    if arguments.tokenizer:
        from dqjax.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(arguments.tokenizer)
        count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    return EndpointSampler(
        arguments.endpoint,
        arguments.model,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_new_tokens=config.max_new_tokens,
        switch=config.thinking != "on",
        parallel=arguments.parallel,
        count=count,
    )


def settings_of(arguments: argparse.Namespace, config: EvalConfig) -> dict[str, Any]:
    """All that decides what a sample is and how it is graded: two evaluations of equal settings can be compared."""
    settings: dict[str, Any] = config.model_dump(mode="json")
    if arguments.endpoint:
        settings |= {"endpoint": arguments.endpoint, "model": arguments.model}
    else:
        settings |= {"checkpoint": arguments.checkpoint, "dtype": arguments.dtype} | identity(arguments)
    settings["files"] = {path.name: _sha256(path) for path in benchmark_files(config)}
    settings["graders"] = {name: _version(name) for name in ("dqjax", "math-verify", "reasoning-gym")}
    return settings


def identity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Which parameters and which chat template a checkpoint folder holds now."""
    from dqjax.checkpoint import Checkpoints
    from dqjax.convert.source import resolve_model

    source = resolve_model(arguments.checkpoint)
    found: dict[str, Any] = {}
    if source.kind == "run":
        checkpoints = Checkpoints(source.folder / "checkpoints")
        step = arguments.step if arguments.step is not None else max(checkpoints.steps(), default=None)
        checkpoints.close()
        if step is None:
            raise ConfigError(f"{source.folder} has no complete checkpoint yet")
        found["step"] = step
        weights = sorted(checkpoints.path(step).glob("manifest-*.json"))
        stamp = [path.read_text(encoding="utf-8") for path in weights]
    else:
        stamp = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(source.folder.glob("*.safetensors"))]
    found["parameters"] = fingerprint({"stamp": stamp})
    templates = [source.files / name for name in ("chat_template.jinja", "tokenizer_config.json")]
    found["template"] = next((_sha256(path)[:12] for path in templates if path.is_file()), None)
    return found


def default_folder(arguments: argparse.Namespace, config: EvalConfig) -> pathlib.Path:
    """runs/eval/MODEL/BENCHMARK."""
    model = arguments.model if arguments.endpoint else pathlib.Path(arguments.checkpoint).resolve().name
    benchmark = config.benchmark if config.benchmark in BENCHMARKS else pathlib.Path(config.benchmark).stem
    return pathlib.Path("runs", "eval", re.sub(r"[^\w.-]+", "-", model), benchmark)


def report_of(
    out: pathlib.Path,
    graded: Sequence[Graded],
    config: EvalConfig,
    settings: dict[str, Any],
    *,
    overlap: str | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """Summaries of each mode, comparisons of the modes and with another evaluation, written to `out`."""
    by_mode = {mode: [g for g in graded if g.thinking == mode] for mode in config.modes}
    bounds = {"k": config.k, "budgets": config.budgets, "max_new_tokens": config.max_new_tokens, "level": config.level}
    summaries = {MODES[mode]: summarise(mine, **bounds) for mode, mine in by_mode.items()}
    comparisons = {}
    if len(by_mode) == 2:
        comparisons["thinking on minus off"] = compare(by_mode[True], by_mode[False], level=config.level)
    if against is not None:
        theirs = read_records(pathlib.Path(against) / "records.jsonl")
        if not theirs:
            raise ConfigError(f"--against: {against} holds no records.jsonl of an evaluation")
        for mode, mine in by_mode.items():
            if other := [g for g in theirs if g.thinking == mode]:
                comparisons[f"{MODES[mode]}, minus {against}"] = compare(mine, other, level=config.level)
    about = {
        "benchmark": config.benchmark,
        "fingerprint": fingerprint(settings),
        "settings": settings,
        "overlap": overlap,
    }
    return write_report(out, graded, about=about, summaries=summaries, comparisons=comparisons)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(run_command(main))
