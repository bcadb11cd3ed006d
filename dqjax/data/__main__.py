"""python -m dqjax.data COMMAND: the data commands, each with HELP, EXAMPLE, add_arguments and run."""

import argparse
import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence

import dqjax.data.collect
import dqjax.data.decontaminate
import dqjax.data.inspect
import dqjax.data.merge
import dqjax.data.train_tokenizer
from dqjax.commands import run_command
from dqjax.data.command import PipelineCommand, StageCommand
from dqjax.data.limits import BudgetSpent
from dqjax.data.local import LocalTeacher
from dqjax.data.models import ScorerConfig
from dqjax.data.pipeline import STAGES
from dqjax.data.teacher import SamplingConfig, TeacherConfig
from dqjax.rewards.verbosity import StyleScorer
from dqjax.sharding import MeshConfig, Rules, make_mesh

BUDGET_SPENT = 3  # exit code: max_total_tokens is reached; a higher one goes on from there


class OwnModels:
    """`models.Models` on the rollout engine and the scorer of the package."""

    def teacher(self, config: TeacherConfig) -> LocalTeacher:
        """From a run folder, a converted checkpoint or a Hugging Face folder."""
        from dqjax.load import load_model
        from dqjax.rollout.engine import Engine, Prompt
        from dqjax.rollout.sampling import Sampling

        rules, local = self._rules, config.local
        model, params = load_model(local.checkpoint, rules, dtype=local.dtype)
        rows = -(-local.rows // rules.batch_shards) * rules.batch_shards
        engines: dict[SamplingConfig, Engine] = {}

        def generate(
            sampling: SamplingConfig, prompts: Iterable[tuple[Sequence[int], int]]
        ) -> Iterator[tuple[Sequence[int], str]]:
            if sampling not in engines:
                engines[sampling] = Engine(
                    model.decoder,
                    stop_ids=model.chat.stop_ids,
                    vocab=model.vocab,
                    sampling=Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p),
                    rows=rows,
                    max_new_tokens=sampling.max_tokens,
                    seed=sampling.seed,
                )
            for sample in engines[sampling].generate(params, (Prompt(tuple(ids), seed) for ids, seed in prompts)):
                yield sample.token_ids, sample.finish_reason

        return LocalTeacher(config.name, config.identity, model.chat, generate, rows=rows, thinking=local.thinking)

    def scorer(self, config: ScorerConfig) -> StyleScorer:
        """From a run folder of `objective: scorer`, or a folder exported from one."""
        from dqjax.scoring import levels_of, load_scorer

        shape = config.model_dump(include={"row_length", "rows", "dtype"})
        return levels_of(load_scorer(config.checkpoint, "scorer", self._rules, where="scorer.checkpoint", **shape))

    @functools.cached_property
    def _rules(self) -> Rules:
        """The mesh of all devices; jax starts when the first model is made."""
        from dqjax.load import start_jax

        start_jax()
        return Rules(make_mesh(**MeshConfig().model_dump()))


COMMANDS = {
    "inspect": dqjax.data.inspect,
    "collect": dqjax.data.collect,
    "tokenizer": dqjax.data.train_tokenizer,
    "decontaminate": dqjax.data.decontaminate,
    "merge": dqjax.data.merge,
    "pipeline": PipelineCommand(OwnModels()),
    **{name: StageCommand(name, module, OwnModels()) for name, module in STAGES.items() if name != "collect"},
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for input or configuration at fault, 3 for a spent budget."""
    parser = argparse.ArgumentParser(prog="python -m dqjax.data", description="Commands for data files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.__doc__.splitlines()[0]}\n\nexample:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    args = parser.parse_args(argv)
    return run_command(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed the pipe: no error of ours, and nothing left to write to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except BudgetSpent as e:
        print(f"error: {e}", file=sys.stderr)
        return BUDGET_SPENT
    return 0


if __name__ == "__main__":
    sys.exit(main())
