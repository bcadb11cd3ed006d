"""objective: grpo. Problems with a reference, into groups of the policy's own samples and the loss that weighs them."""

import dataclasses
import logging
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from dqjax.config import ConfigError
from dqjax.data.config import DataConfig, SourceConfig
from dqjax.data.documents import write_rejected
from dqjax.data.records import Record, question_key
from dqjax.data.sources import Rejected, merge_columns, read_rows, records_in
from dqjax.data.split import hold_out, weigh, without_questions
from dqjax.eval.run import evaluate as sample_and_grade
from dqjax.eval.samplers import EngineSampler
from dqjax.load import Model, read_parameters
from dqjax.objectives.groups import Groups, PolicyConfig, Question
from dqjax.objectives.setup import Evaluate, Setup, with_sample
from dqjax.rewards.correct import Correctness
from dqjax.rewards.mix import Mix
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import Rules
from dqjax.steps.grpo import make_grpo_loss
from dqjax.train_config import Config
from dqjax.types import Params

log = logging.getLogger(__name__)

# Keys of `data:` that speak of written answers; here the policy writes them.
NOT_HERE = ("too_long", "thinking", "no_think_share", "train_on_prompt", "curriculum")


def grpo(config: Config, model: Model, rules: Rules, run: pathlib.Path) -> Setup:
    """Reads the problems and makes the sampler, the graders and the loss.

    Raises:
      ConfigError: data that cannot be used, or a reward that needs what is not there.
      NotImplementedError: several processes.
    """
    objective = config.objective
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"objective grpo samples and grades in one process, and there are {jax.process_count()}; run it on one host"
        )
    if config.train.steps is None:
        raise ConfigError("train.steps: objective grpo needs the number of updates; it does not count epochs")
    if given := [f"data.{name}" for name in NOT_HERE if name in config.data.model_fields_set]:
        raise ConfigError(f"{', '.join(given)}: nothing to objective grpo, whose answers are sampled; leave it out")

    train, held = read_problems(config.data, run / "quarantine.jsonl", reference=objective.reward.correct is not None)
    questions = ask(train.records, model, objective, config.data.row_length)
    if len(questions) < objective.prompts:
        raise ConfigError(f"objective.prompts: {objective.prompts} problems an update, and the data have {len(questions)}")
    log.info("data: problems %d  held_out %d", len(questions), len(held) if held is not None else 0)
    mix = _make_mix(objective)
    limits = {"stop_ids": model.chat.stop_ids, "vocab": model.vocab, "max_new_tokens": objective.max_new_tokens}
    shards = rules.batch_shards
    rows = -(-(objective.decode_rows or objective.prompts * objective.group_size) // shards) * shards
    sampling = Sampling(temperature=objective.temperature)
    engine = Engine(model.decoder, sampling=sampling, rows=rows, seed=config.train.seed, **limits)
    source = Groups(
        questions,
        engine,
        model.chat,
        mix,
        objective,
        row_length=config.data.row_length,
        row_multiple=config.train.batch_rows,
        seed=config.data.seed,
        table=run / "rollouts.jsonl",
    )
    correctness = Correctness(objective.reward.grading)
    evaluate = None
    if held is not None:
        thinking = objective.thinking == "on"
        greedy = Engine(model.decoder, sampling=Sampling(temperature=0.0), rows=rows, **limits)
        evaluate = measure_accuracy(greedy, model, held.records, correctness, thinking=thinking)
        if config.train.sample_tokens:
            prompt = model.chat.prompt_ids(held.records[0].messages, thinking=thinking)
            evaluate = with_sample(evaluate, model, prompt, config.train.sample_tokens, run / "samples.jsonl")

    def close() -> None:
        mix.close()
        correctness.close()

    return Setup(
        trainable=model.decoder,
        initial=lambda: read_parameters(model),
        loss=make_grpo_loss(
            model.decoder, rules, objective.options(), temperature=objective.temperature, vocab=model.vocab
        ),
        source=source,
        steps=config.train.steps,
        labels={},
        evaluate=evaluate,
        frozen={"reference": read_parameters(model)} if objective.kl else None,
        close=close,
    )


@dataclasses.dataclass(frozen=True)
class Problems:
    """Problems in the order of their sources.

    Attributes:
      records: conversations that end with the user's turn, one a problem.
      source: number of the source of each.
    """

    records: Sequence[Record]
    source: Int[np.ndarray, " N"]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def question(self) -> Int[np.ndarray, " N"]:
        """A hash of each question, by which problems are held out."""
        return np.array([question_key(record) for record in self.records], np.int64)

    def take(self, numbers: Int[np.ndarray, " some"]) -> "Problems":
        """These problems alone, in this order."""
        return Problems([self.records[n] for n in numbers.tolist()], self.source[numbers])


def read_problems(
    config: DataConfig, quarantine: pathlib.Path, *, reference: bool
) -> tuple[Problems, Problems | None]:
    """(problems to train on, held-out problems or None) of a `data:` section; an epoch holds them by `weight` or `share`.

    Args:
      quarantine: file for unusable rows, where the config names none.
      reference: problems need a reference answer, or tests.

    Raises:
      ConfigError: sources that cannot be read or leave no problem, or too many unusable rows.
    """
    path = config.quarantine or str(quarantine)
    problems = _read(config, config.sources, path, reference=reference)
    held, train = None, np.arange(len(problems))
    if isinstance(config.validation, str):
        held = _read(config, [SourceConfig(path=config.validation)], None, reference=True)
        train = without_questions(problems, held)
    elif config.validation is not None:
        out, train = hold_out(problems, config.validation, config.seed)
        held = problems.take(out)
    if not len(train):
        raise ConfigError("data: every problem to train on is a held-out one")
    return problems.take(weigh(config.sources, problems.source, train, config.seed)), held


def ask(problems: Sequence[Record], model: Model, objective: PolicyConfig, row_length: int) -> list[Question]:
    """The prompts of the problems; those that leave no room for the longest sample are left out, and counted.

    Raises:
      ConfigError: none is left.
    """
    texts = [model.chat.prompt_text(p.messages, thinking=objective.thinking == "on") for p in problems]
    asked = [Question(p, tuple(ids)) for p, ids in zip(problems, model.chat.encode(texts))]
    room = row_length - objective.max_new_tokens
    fitting = [q for q in asked if len(q.prompt) <= room]
    if not fitting:
        raise ConfigError(
            f"data.row_length: {row_length} tokens less objective.max_new_tokens = {objective.max_new_tokens} hold no "
            f"prompt; the shortest of {len(asked)} has {min(len(q.prompt) for q in asked)}"
        )
    if left := len(asked) - len(fitting):
        log.warning("%d of %d prompts have more than %d tokens and were left out", left, len(asked), room)
    return fitting


def measure_accuracy(
    engine: Engine, model: Model, problems: Sequence[Record], grader: Correctness, *, thinking: bool
) -> Evaluate:
    """An evaluation: one sample of `engine` for each held-out problem."""

    def evaluate(params: Params, _frozen: object) -> tuple[dict[str, float], dict[str, str]]:
        def generate(prompts: Iterable[tuple[list[int], int]]) -> Iterator[tuple[Sequence[int], str]]:
            for sample in engine.generate(params, (Prompt(tuple(ids), seed) for ids, seed in prompts)):
                yield sample.token_ids, sample.finish_reason

        graded = sample_and_grade(EngineSampler(model.chat, generate), problems, modes=(thinking,), grader=grader)
        names = {"accuracy": "correct", "response_tokens": "tokens", "truncated": "truncated"}
        return {name: float(np.mean([getattr(g, of) for g in graded])) for name, of in names.items()}, {}

    return evaluate


def _make_mix(objective: PolicyConfig) -> Mix:
    try:
        return Mix(objective.reward)
    except ValueError as e:
        raise ConfigError(f"objective.{e}") from None


def _read(config: DataConfig, sources: Sequence[SourceConfig], quarantine: str | None, *, reference: bool) -> Problems:
    records: dict[str, Record] = {}
    source_of, rejected, rows = [], [], 0
    for number, source in enumerate(sources):
        columns = merge_columns(config.columns, source.columns)
        for raw in read_rows(source):
            rows += 1
            for record in records_in(raw, columns, source.label):
                problem = record if isinstance(record, Rejected) else _problem_of(record)
                if isinstance(problem, Rejected):
                    rejected.append(problem)
                elif reference and problem.answer is None and "tests" not in problem.extra:
                    rejected.append(Rejected(raw.file, raw.line, "no reference answer, and no tests"))
                elif problem.id not in records:  # another chain of a problem asks nothing new
                    records[problem.id] = problem
                    source_of.append(number)
    write_rejected(rejected, rows, max_share=config.max_bad_share, path=quarantine)
    if not records:
        raise ConfigError(f"data: no problem in {', '.join(s.label for s in sources)}")
    return Problems(list(records.values()), np.array(source_of, np.int64))


def _problem_of(record: Record) -> Record:
    """The problem of a row of any form: its last answer, if it has one, is taken off and serves as the reference."""
    messages, answer = record.messages, record.answer
    if messages[-1].role == "assistant":
        answer = messages[-1].content if answer is None else answer
        messages = messages[:-1]
    return dataclasses.replace(record, id=record.problem, messages=messages, answer=answer)
