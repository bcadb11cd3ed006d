"""A policy's samples as graders see them, and the numbers that the log gets of them."""

from collections.abc import Sequence

from dqjax.data.chat import ChatFormat
from dqjax.data.records import Record
from dqjax.rewards.mix import Rewards
from dqjax.rewards.types import Completion
from dqjax.rollout.engine import Sample
from dqjax.types import Mean, Metrics


def completion_of(chat: ChatFormat, problem: Record, sample: Sample, *, thinking: bool) -> Completion:
    """What graders are shown of a sample behind the prompt of `problem`."""
    cut = sample.finish_reason == "length"
    text = chat.tokenizer.decode(list(sample.token_ids if cut else sample.token_ids[:-1]))
    return Completion(
        problem=problem,
        text=text,
        response=chat.parse(text, thinking=thinking),
        tokens=len(sample.token_ids),
        truncated=cut,
        thinking=thinking,
        opened=chat.opens_block and thinking,
    )


def numbers_of(completions: Sequence[Completion], rewards: Rewards) -> Metrics:
    """Means over graded samples: `reward` and its terms, `accuracy` where it is graded, `response_tokens`, and the share
    `truncated`."""
    n = float(len(completions))
    numbers = {name: Mean(*pair) for name, pair in rewards.sums().items()}
    if "correct" in rewards.terms:
        numbers["accuracy"] = Mean(float(rewards.correct.sum()), n)
    return numbers | {
        "response_tokens": Mean(float(sum(c.tokens for c in completions)), n),
        "truncated": Mean(float(sum(c.truncated for c in completions)), n),
    }
