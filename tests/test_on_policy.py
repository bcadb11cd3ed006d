"""Batches of the student's own answers: which, behind which prompts, trained where, the same after a resume."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from dqjax.data.config import DataConfig
from dqjax.data.loader import open_training_data
from dqjax.data.tokenizer import train_tokenizer
from dqjax.objectives.on_policy import OnPolicy
from dqjax.rollout.engine import Sample

TEXTS = ["What is 12 + 34? The answer is 46."] * 20


class Echo:
    """Answers with three tokens that the seed and the parameters choose."""

    def generate(self, params, prompts):
        for prompt in prompts:
            ids = np.random.default_rng([prompt.seed, params]).integers(5, 300, 3).tolist()
            yield Sample((*ids, 1), (0.0,) * 4, "stop")


@pytest.fixture
def source(tmp_path):
    def make(fraction):
        rows = [{"id": f"r{i}", "prompt": f"What is {i} + 1?", "response": "1" * (1 + 7 * i % 23)} for i in range(40)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"sources": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache"), "workers": 1}
        data = open_training_data(DataConfig(**settings, row_length=96), train_tokenizer(TEXTS, 300), batch_rows=4)
        return OnPolicy(data.loader, data.documents, Echo(), fraction, seed=3, pad_id=0, local=lambda batch: batch)

    return make


def test_samples_stand_behind_the_prompts_of_the_batch_and_are_trained_alone(source):
    own, texts = source(1.0), source(1e-9)
    for step in range(5):
        batch, plain = own.next(SimpleNamespace(params=step), None), texts.next(None, None)
        assert own.metrics()["on_policy"].total == 1 and texts.metrics()["on_policy"].total == 0
        assert sorted(batch.side["row"][batch.side["row"] >= 0]) == sorted(plain.side["row"][plain.side["row"] >= 0])
        np.testing.assert_allclose(batch.token_weight.sum(), 1, rtol=1e-5)
        for b, s in zip(*np.nonzero(batch.side["row"] >= 0)):
            here = batch.sequence_index[b] == s
            prompt = own.documents.prompt(int(batch.side["row"][b, s]))
            np.testing.assert_array_equal(batch.tokens[b][here][: len(prompt)], prompt)
            assert here.sum() == len(prompt) + 4
            assert (batch.token_weight[b][here] > 0).tolist() == [False] * (len(prompt) - 1) + [True] * 4 + [False]


def test_the_fraction_is_kept_and_the_state_continues_the_same_batches(source):
    mixed, kinds = source(0.5), []
    for step in range(60):
        mixed.next(SimpleNamespace(params=step), None)
        kinds.append(mixed.metrics()["on_policy"].total)
    assert 18 <= sum(kinds) <= 42
    state, other = json.loads(json.dumps(mixed.get_state())), source(0.5)
    other.set_state(state)
    for step in range(6):
        a, b = (s.next(SimpleNamespace(params=step), None) for s in (mixed, other))
        for field in dataclasses.fields(a):
            if field.name != "side":
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
