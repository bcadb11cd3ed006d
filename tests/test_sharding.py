import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dqjax.sharding import DEFAULT_TABLE, Rules, make_mesh


def test_names_to_axes():
    rules = Rules(make_mesh(data=2, fsdp=2, tensor=2))
    assert rules.spec(("batch", "length", None)) == P(("data", "fsdp"), None, None)
    assert rules.spec(("layers", "embed", "heads", "head_dim")) == P(None, "fsdp", "tensor", None)
    assert rules.spec(("vocab", "table")) == P(("tensor", "fsdp"), None)
    assert rules.batch_shards == 4


def test_axes_of_size_one_are_left_out():
    assert Rules(make_mesh(data=8)).spec(("layers", "embed", "heads", "head_dim")) == P(None, None, None, None)


def test_sizes_that_do_not_divide_are_whole():
    rules = Rules(make_mesh(fsdp=2, tensor=4))
    assert rules.spec(("embed", "kv_heads", "head_dim"), (64, 2, 16)) == P("fsdp", None, None)
    assert rules.spec(("vocab", "table"), (340, 64)) == P("tensor", None)
    assert rules.spec(("vocab", "table"), (344, 64)) == P(("tensor", "fsdp"), None)


def test_one_mesh_axis_cannot_split_two_dimensions():
    rules = Rules(make_mesh(fsdp=8), tuple(DEFAULT_TABLE.items()) + (("mlp", ("fsdp",)),))
    with pytest.raises(ValueError, match="both lie on mesh axis 'fsdp'"):
        rules.spec(("embed", "mlp"))


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown logical axis 'heads_'"):
        Rules(make_mesh(data=8)).spec(("heads_",))


def test_mesh_takes_what_is_left():
    assert make_mesh(data=-1, tensor=2).shape["data"] == 4
    assert make_mesh(fsdp=-1).size == 8


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "fsdp": 3}, {"data": -1, "fsdp": -1}])
def test_mesh_that_does_not_fit(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(**sizes)


def test_rules_are_values():
    a, b = Rules(make_mesh(data=8)), Rules(make_mesh(data=8))
    assert a == b and hash(a) == hash(b)
    constrained = jax.jit(lambda x: a.constrain(x, "batch", None))(jnp.zeros((8, 4)))
    assert constrained.sharding.spec == P("data")
