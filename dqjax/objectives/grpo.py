"""objective: grpo. Problems with a reference, into groups of the policy's own samples and the loss that weighs them."""

import functools
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dqjax.config import ConfigError
from dqjax.data.records import Record
from dqjax.load import Model, read_parameters
from dqjax.metrics import scalars
from dqjax.objectives.graded import completion_of, numbers_of
from dqjax.objectives.groups import Groups, PolicyConfig, Question, Values
from dqjax.objectives.judges import make_sources
from dqjax.objectives.problems import read_problems
from dqjax.objectives.setup import Evaluate, Setup, with_sample
from dqjax.rewards.mix import Mix
from dqjax.rollout.engine import Engine, Prompt
from dqjax.rollout.sampling import Sampling
from dqjax.sharding import Rules
from dqjax.steps.grpo import make_fixed_logprobs, make_grpo_loss
from dqjax.train_config import Config
from dqjax.trainer import own_rows, placer
from dqjax.types import Batch, Params

log = logging.getLogger(__name__)

# Keys of `data:` that speak of written answers; here the policy writes them.
NOT_HERE = ("too_long", "thinking", "no_think_share", "train_on_prompt", "curriculum")


def grpo(config: Config, model: Model, rules: Rules, run: pathlib.Path) -> Setup:
    """Reads the problems and makes the sampler, the graders and the loss.

    Raises:
      ConfigError: data that cannot be used, or a reward that needs what is not there.
    """
    objective, steps = config.objective, config.train.steps
    if steps is None:
        raise ConfigError("train.steps: objective grpo needs the number of updates; it does not count epochs")
    if steps % objective.updates:
        raise ConfigError(
            f"train.steps: {steps} updates are no whole number of rollouts, which feed {objective.updates} each "
            "(objective.minibatches × objective.passes)"
        )
    if given := [f"data.{name}" for name in NOT_HERE if name in config.data.model_fields_set]:
        raise ConfigError(f"{', '.join(given)}: nothing to objective grpo, whose answers are sampled; leave it out")
    graded = objective.reward.correct is not None
    if objective.best == "accuracy" and config.data.validation is not None and not graded:
        raise ConfigError(
            "objective.best: accuracy is not graded; set objective.reward.correct (a weight of 0 only measures) or "
            "objective.best: reward"
        )

    train, held = read_problems(config.data, run / "quarantine.jsonl", reference=graded)
    questions = ask(train.records, model, objective, config.data.row_length)
    if len(questions) < objective.prompts:
        raise ConfigError(f"objective.prompts: {objective.prompts} problems a rollout, and the data have {len(questions)}")
    log.info("data: problems %d  held_out %d", len(questions), len(held) if held is not None else 0)
    sources = make_sources(
        objective.reward,
        rules,
        row_length=config.data.row_length,
        rows=config.train.batch_rows,
        dtype=config.model.dtype,
    )
    mix = Mix(objective.reward, sources)
    limits = {
        "stop_ids": model.chat.stop_ids,
        "vocab": model.vocab,
        "max_new_tokens": objective.max_new_tokens,
        "cache_bytes": None if objective.cache_gib is None else int(objective.cache_gib * 2**30),
    }
    shards = rules.batch_shards
    rows = -(-(objective.decode_rows or objective.prompts * objective.group_size) // shards) * shards
    sampling = Sampling(temperature=objective.temperature)
    longest = max(len(question.prompt) for question in questions)
    engine = Engine(
        model.decoder, sampling=sampling, rows=rows, prompt_tokens=longest, seed=config.train.seed, **limits
    )
    source = Groups(
        questions,
        engine,
        model.chat,
        mix,
        objective,
        row_length=config.data.row_length,
        row_multiple=config.train.batch_rows,
        seed=config.data.seed,
        table=run / "rollouts.jsonl" if jax.process_index() == 0 else None,
        values=_fixed_values(config, model, rules),
        local=functools.partial(own_rows, rules),
    )
    evaluate = None
    if held is not None:
        greedy = Engine(model.decoder, sampling=Sampling(temperature=0.0), rows=rows, **limits)
        evaluate = measure_policy(greedy, model, held.records, mix, thinking=objective.thinking == "on")
        if config.train.sample_tokens:
            prompt = model.chat.prompt_ids(held.records[0].messages, thinking=objective.thinking == "on")
            evaluate = with_sample(evaluate, model, prompt, config.train.sample_tokens, run / "samples.jsonl")
    return Setup(
        trainable=model.decoder,
        initial=lambda: read_parameters(model),
        loss=make_grpo_loss(
            model.decoder, rules, objective.options(), temperature=objective.temperature, vocab=model.vocab
        ),
        source=source,
        steps=steps,
        labels={},
        evaluate=evaluate,
        score=lambda numbers: -numbers[objective.best],
        frozen={"reference": read_parameters(model)} if objective.kl else None,
        close=mix.close,
    )


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


def measure_policy(
    engine: Engine, model: Model, problems: Sequence[Record], mix: Mix, *, thinking: bool
) -> Evaluate:
    """An evaluation: the numbers of `graded` over one sample of `engine` for each held-out problem."""
    ids = model.chat.encode([model.chat.prompt_text(p.messages, thinking=thinking) for p in problems])
    prompts = [Prompt(tuple(prompt), seed) for seed, prompt in enumerate(ids)]

    def evaluate(params: Params, frozen: object) -> tuple[dict[str, float], dict[str, str]]:
        del frozen  # samples and grades need no reference
        samples = engine.generate(params, prompts)
        completions = [completion_of(model.chat, p, s, thinking=thinking) for p, s in zip(problems, samples, strict=True)]
        return scalars(numbers_of(completions, mix(completions))), {}

    return evaluate


def _fixed_values(config: Config, model: Model, rules: Rules) -> Values | None:
    """What a rollout computes once: the log-probabilities of the policy that sampled it, where it moves before they are
    used, and of the reference, where there is one."""
    objective = config.objective
    wanted = {"old_logprobs": objective.updates > 1, "reference_logprobs": objective.kl > 0}
    if not any(wanted.values()):
        return None
    logprobs = make_fixed_logprobs(
        model.decoder, rules, parts=config.train.accumulate, temperature=objective.temperature, vocab=model.vocab
    )
    logprobs = jax.jit(logprobs, out_shardings=rules.sharding(()))  # whole on every host, to be read there
    place = placer(rules, config.train.batch_rows)

    def values(params: Params, frozen: Any, batch: Batch) -> Mapping[str, np.ndarray]:
        placed = place(own_rows(rules, batch))
        by = {"old_logprobs": params, "reference_logprobs": frozen and frozen["reference"]}
        return jax.device_get({name: logprobs(by[name], placed) for name, use in wanted.items() if use})

    return values
