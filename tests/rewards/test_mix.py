"""The weighted sum of terms: arithmetic, style for correct samples only, failures that kill nothing."""

import numpy as np
import pytest

from dqjax.config import ConfigError, load, validate
from dqjax.rewards.mix import TERMS, Mix, MixConfig, Sources
from dqjax.rewards.types import Grade
from dqjax.rewards.verbosity import Labels

GOOD, BAD, MESSY = "<think>\na\n</think>\n\n5", "<think>\na\n</think>\n\n6", "5"


def config(**terms):
    return validate(MixConfig, terms, where="test")


def labels(completions):
    return [Labels(4.0, 4.0)] * len(completions)


def test_the_sum_is_the_formula(complete):
    mix_config = config(
        correct={"weight": 1.0}, format={"weight": 0.5}, model={"weight": 0.25}, verbosity={"weight": 0.2},
        difficulty={"weight": 0.1}, style={"verbosity": 1.0, "difficulty": 4.0}, reward_model={"squash": "none"},
    )  # fmt: skip
    with Mix(mix_config, Sources(style=labels, score=lambda c: [2.0] * len(c))) as mix:
        rewards = mix([complete(GOOD, "5"), complete(BAD, "5"), complete(MESSY, "5")])
    style = 0.2 * (1 - 3 / 9) + 0.1 * 1.0
    np.testing.assert_allclose(rewards.total, [1 + 0.5 + 0.5 + style, 0.5 + 0.5, 1 + 0.5 + style])
    assert list(rewards.terms) == ["correct", "format", "verbosity", "difficulty", "model"]
    np.testing.assert_array_equal(rewards.correct, [True, False, True])
    np.testing.assert_array_equal(rewards.counted["verbosity"], [True, False, True])
    sums = rewards.sums()
    assert sums["reward/correct"] == (2.0, 3.0) and sums["reward_counted/verbosity"] == (2.0, 3.0)
    assert sums["reward"] == (pytest.approx(float(rewards.total.sum())), 3.0)
    assert sums["reward/verbosity"] == (pytest.approx(2.0), 3.0)  # logged for wrong samples too


def test_style_can_be_made_to_count_for_all(complete):
    both = [complete(GOOD, "5", tokens=20), complete(BAD, "5", tokens=10)]
    with Mix(config(length={"weight": 1.0})) as mix:
        np.testing.assert_allclose(mix(both).total, [1 - 0.5, 0.0])
    with Mix(config(length={"weight": 1.0, "correct_only": False})) as mix:
        np.testing.assert_allclose(mix(both).total, [1 - 0.5, 0.5])


def test_overlong_counts_for_all(complete):
    settings = dict(overlong={"weight": 1.0}, overlong_punishment={"limit": 100, "buffer": 50})
    with Mix(config(**settings)) as mix:
        np.testing.assert_allclose(
            mix([complete(BAD, "5", tokens=100), complete(GOOD, "5", tokens=75)]).total, [-1.0, 0.5]
        )


def test_weights_of_zero_are_logged_and_add_nothing(complete):
    with Mix(config(format={"weight": 0.0})) as mix:
        rewards = mix([complete(GOOD, "5")])
    assert rewards.total[0] == 1.0 and rewards.sums()["reward/format"] == (1.0, 1.0)


@pytest.mark.parametrize("fault", ["raises", "short", "nan"])
def test_a_broken_term_is_counted_and_kills_nothing(complete, fault, caplog):
    def score(completions):
        if fault == "raises":
            raise RuntimeError("the reward model is gone")
        return [] if fault == "short" else [float("nan")] * len(completions)

    with Mix(config(model={"weight": 1.0}), Sources(score=score)) as mix:
        rewards = mix([complete(GOOD, "5"), complete(BAD, "5")])
    np.testing.assert_allclose(rewards.total, [1.0, 0.0])
    assert rewards.failed["model"].all() and not rewards.counted["model"].any()
    assert rewards.sums()["reward_failed/model"] == (2.0, 2.0) and rewards.sums()["reward/model"] == (0.0, 0.0)
    assert all(g.failed for g in rewards.grades["model"])
    assert fault == "nan" or "reward model could not grade 2 samples" in caplog.text


def test_a_sample_whose_correctness_fails_earns_no_style(complete, monkeypatch):
    class Half:
        def __call__(self, completions):
            return [Grade(1.0, failed="timeout"), Grade(1.0)]

    monkeypatch.setitem(TERMS, "correct", lambda config, sources: Half())
    with Mix(config(length={"weight": 1.0, "correct_only": True})) as mix:
        rewards = mix([complete(GOOD, "5", tokens=1), complete(GOOD, "5", tokens=3)])
    np.testing.assert_allclose(rewards.total, [0.0, 1 - 0.5])
    assert rewards.sums()["reward/correct"] == (1.0, 1.0)


@pytest.mark.parametrize("error", [NotImplementedError, ConfigError])
def test_what_would_fail_every_time_is_raised(complete, error):
    def score(completions):
        raise error("no sandbox")

    with Mix(config(model={"weight": 1.0}), Sources(score=score)) as mix, pytest.raises(error):
        mix([complete(GOOD, "5")])
    with Mix(config()) as mix, pytest.raises(ConfigError, match="unknown grader 'oracle'"):
        mix([complete(GOOD, "5", grader="oracle")])


def test_an_empty_batch(complete):
    with Mix(config(format={"weight": 1.0})) as mix:
        assert mix([]).total.shape == (0,) and mix([]).sums()["reward"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"correct": None}, "no term is left"),
        ({"overlong": {"weight": 1.0}}, "overlong_punishment"),
        ({"correct": None, "length": {"weight": 1.0}}, "length: counts for correct samples only"),
        ({"verbosty": {"weight": 1.0}}, "did you mean verbosity"),
        ({"format": {"wieght": 1.0}}, "did you mean weight"),
    ],
)
def test_configs_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


def test_terms_need_their_models():
    with pytest.raises(ValueError, match="reward.model needs a reward model"):
        Mix(config(model={"weight": 1.0}))
    with pytest.raises(ValueError, match="reward.verbosity needs an RV/CD scorer"):
        Mix(config(verbosity={"weight": 1.0}))


def test_yaml(tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text("correct: {weight: 1}\nlength: {weight: 0.2}\ngrading: {answer: {kind: number}}\n")
    loaded = load(MixConfig, path, ["length.weight=0.3"])
    assert loaded.length.weight == 0.3 and loaded.length.correct_only and loaded.grading.answer.kind == "number"
