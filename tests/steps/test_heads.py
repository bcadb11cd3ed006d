"""The classifier: its parameters, their layout on the mesh, and transformers' scores of the same weights."""

import dataclasses

import jax
import numpy as np
import pytest

from dqjax.losses.scores import last_tokens, sequence_scores
from dqjax.models.heads import Classifier
from dqjax.sharding import Rules, make_mesh
from tests.steps import tiny


def untied(rules: Rules) -> Classifier:
    decoder = tiny.tiny_decoder(rules)
    decoder = dataclasses.replace(decoder, config=dataclasses.replace(decoder.config, tie_embeddings=False))
    return Classifier(decoder, labels=3)


def test_parameters():
    """No language-model head, though the trunk's config unties it; scores start near 0."""
    model = untied(tiny.one_device())
    params = model.init(jax.random.key(0))
    assert set(params) == {"embed", "layers", "final_norm", "score"}
    assert params["score"]["kernel"].shape == (3, 32)
    same = jax.tree.map(lambda p, s: p.shape == s.shape and p.dtype == s.dtype, dict(params), model.shapes())
    assert all(jax.tree.leaves(same))
    batch = tiny.on_device(tiny.pack([[tiny.tokens_of(*s)] for s in tiny.sequences(0, 4)]))
    hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    scores = sequence_scores(hidden, model.output_table(params), batch, 8)
    assert 0 < np.abs(scores).max() < 0.05


def test_the_same_head_on_every_mesh():
    """A trained trunk takes a fresh head; sharded initialisation equals that of one device."""
    rules = Rules(make_mesh(fsdp=4, tensor=2))
    here, there = untied(tiny.one_device()), untied(rules)
    params = there.init(jax.random.key(1))
    assert all(jax.tree.leaves(jax.tree.map(lambda p, s: p.sharding == s, dict(params), there.shardings())))
    want = here.init(jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, params["score"], want["score"])
    trained = {**{k: v for k, v in want.items() if k != "score"}, "score": here.init_head(jax.random.key(9))}
    assert jax.tree.structure(trained) == jax.tree.structure(dict(want))


def test_scores_are_read_at_the_last_token():
    """Packed or alone, and with no memory of what a row holds behind the sequence."""
    made = tiny.sequences(2, 6)
    model, params = tiny.Bigram(rows=2), tiny.Bigram(rows=2).init(0)
    batch = tiny.on_device(
        tiny.pack([[tiny.tokens_of(ids, p, {"row": i})] for i, (ids, p) in enumerate(made)], rows=4)
    )
    hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    scores = np.asarray(sequence_scores(hidden, params["table"], batch, 8))
    rows = np.asarray(batch.side["row"])
    for i, (ids, _) in enumerate(made):
        logits = tiny.torch_logits(tiny.torch_copy(params), ids)[-1].detach().numpy()
        np.testing.assert_allclose(scores[rows == i][0], logits, rtol=1e-5, atol=1e-6)
    assert not scores[rows == -1].any()
    places = np.asarray(last_tokens(batch, 8))
    assert (places[rows == -1] == batch.tokens.shape[1]).all()


def test_scores_equal_transformers(tmp_path):
    """`Qwen3ForSequenceClassification` on right-padded texts, with our weights under its names."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from dqjax.convert.names import entries
    from dqjax.models.config import to_huggingface

    model = untied(tiny.one_device())
    config, params = model.trunk.config, tiny.random_like(model.shapes())
    values = {k: v for k, v in to_huggingface(config, dtype="float32").items() if k != "architectures"}
    settings = transformers.Qwen3Config(**values, num_labels=3, pad_token_id=0)
    theirs = transformers.Qwen3ForSequenceClassification(settings)
    state = {"score.weight": params["score"]["kernel"]}
    for entry in entries(config):
        array = params
        for key in entry.path:
            array = array[key]
        for name, part in zip(entry.stored_names, array if entry.layers else [array], strict=True):
            state[name] = entry.layout.restore(np.asarray(part), config)
    theirs.load_state_dict({name: torch.tensor(np.asarray(x)) for name, x in state.items()})
    made = [np.maximum(ids, 1) for ids, _ in tiny.sequences(4, 5)]
    width = max(map(len, made))
    tokens = torch.tensor(np.stack([np.pad(ids, (0, width - len(ids))) for ids in made]), dtype=torch.long)
    with torch.no_grad():
        want = theirs(tokens, attention_mask=(tokens != 0).long()).logits.numpy()
    batch = tiny.on_device(tiny.pack([[tiny.tokens_of(ids, 0, {"row": i})] for i, ids in enumerate(made)]))
    hidden, _ = model.apply(params, batch.tokens, batch.positions, batch.segment_ids)
    scores = np.asarray(sequence_scores(hidden, model.output_table(params), batch, 8))
    rows = np.asarray(batch.side["row"])
    for i in range(len(made)):
        np.testing.assert_allclose(scores[rows == i][0], want[i], rtol=1e-4, atol=1e-5)
