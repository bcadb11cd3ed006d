"""Weights in and out: bit for bit, sharded or not, tensor by tensor; and what is wrong with a file is said."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.convert.huggingface import INDEX, load_params, save_params, stored_dtype
from dqjax.convert.names import Layout, axis_sizes, entries, stored_tensors
from dqjax.convert.tensor_file import Writer, read_header, split_by_size
from dqjax.models.config import SIZES, read_config
from dqjax.models.decoder import Decoder
from dqjax.sharding import Rules, make_mesh

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.load_file(file)
    return found


def load(folder, dtype=None, **mesh):
    devices = jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]
    decoder = Decoder(read_config(folder), Rules(make_mesh(**mesh, devices=devices)))
    return decoder, load_params(folder, decoder.config, decoder.shardings(), dtype)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype, shard", [("float32", "5GB"), ("bfloat16", "40KB")])
def test_round_trip_is_bit_exact(folder_of, tmp_path, family, tied, dtype, shard):
    folder = folder_of(family, tied, dtype, shard)
    assert (folder / INDEX).exists() == (shard != "5GB")
    decoder, params = load(folder, fsdp=2, tensor=2)
    for leaf, shape, where in zip(*map(jax.tree.leaves, (params, decoder.shapes(), decoder.shardings()))):
        assert leaf.shape == shape.shape and leaf.dtype == dtype and leaf.sharding.is_equivalent_to(where, leaf.ndim)
    out = tmp_path / "out"
    save_params(params, decoder.config, out, dtype=dtype, max_shard_bytes=40_000)
    original, written = tensors_of(folder), tensors_of(out)
    assert original.keys() == written.keys()
    for name, tensor in original.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name
    index = json.loads((out / INDEX).read_text())
    assert index["weight_map"].keys() == original.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in original.values())
    for file in out.glob("*.safetensors"):
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_float32_masters_hold_bfloat16_exactly(folder_of, tmp_path):
    folder = folder_of(dtype="bfloat16")
    assert stored_dtype(folder) == jnp.bfloat16
    decoder, params = load(folder, jnp.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    save_params(jax.tree.map(np.asarray, params), decoder.config, tmp_path / "out")  # numpy leaves, too
    for name, tensor in tensors_of(folder).items():
        assert torch.equal(tensor, tensors_of(tmp_path / "out")[name])


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"tensor": 4, "data": 2}, {"fsdp": 2, "tensor": 4}], ids=str)
def test_every_mesh_gets_the_same_parameters(folder_of, mesh):
    folder = folder_of("qwen2", False)
    _, params = load(folder, **mesh)
    for a, b in zip(*map(jax.tree.leaves, (params, load(folder)[1]))):
        np.testing.assert_array_equal(a, b)


def test_a_new_export_replaces_the_files_of_the_old(folder_of, tmp_path):
    decoder, params = load(folder_of())
    out = tmp_path / "out"
    save_params(params, decoder.config, out, max_shard_bytes=30_000)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    save_params(params, decoder.config, out)
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors"]
    save_params(params, decoder.config, out, max_shard_bytes=30_000)
    assert not (out / "model.safetensors").exists()


def test_a_tied_model_may_store_its_table_twice(folder_of):
    folder = folder_of("qwen2", tied=True)
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    table = tensors["model.embed_tokens.weight"]
    safetensors.save_file(tensors | {"lm_head.weight": table.clone()}, file)
    load(folder)
    safetensors.save_file(tensors | {"lm_head.weight": table + 1}, file)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        load(folder)


def test_rotary_buffers_of_old_exports_are_ignored(folder_of):
    folder = folder_of("llama")
    change(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    load(folder)


def change(folder, edit):
    file = folder / "model.safetensors"
    safetensors.save_file(edit(safetensors.load_file(file)), file, {"format": "pt"})


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    "edit, named",
    [
        (without("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is missing"),
        (without("lm_head.weight"), "'lm_head.weight' is missing"),
        (lambda t: t | {"model.layers.3.mlp.up_proj.weight": torch.ones(2)}, "unexpected tensor 'model.layers.3.mlp.up_proj"),
        (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}, "unexpected tensor 'model.layers.0.self"),
        (lambda t: t | {"model.norm.weight": torch.ones(9)}, r"'model.norm.weight' has shape \[9\], config.json asks for \[48\]"),
        (lambda t: t | {"model.norm.weight": torch.ones(48, dtype=torch.int32)}, "'model.norm.weight' is I32"),
        (lambda t: {k: v.T.contiguous() if "gate_proj" in k else v for k, v in t.items()}, r"gate_proj.*2 more such tensors"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder_of, edit, named):
    folder = folder_of("qwen3", tied=False)
    change(folder, edit)
    with pytest.raises(ValueError, match=named) as error:
        load(folder)
    assert str(folder) in str(error.value)


def corrupted(data, kind):
    """A safetensors file's bytes with one thing wrong."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    first, second = [k for k in header if k != "__metadata__"][:2]
    match kind:
        case "cut in the data":
            return data[:-5]
        case "cut in the header":
            return data[: length // 2]
        case "empty":
            return b""
        case "a flipped length":
            return struct.pack("<Q", length ^ 1 << 40) + data[8:]
        case "a flipped brace":
            return data[:8] + bytes([data[8] ^ 1]) + data[9:]
        case "a byte that is no text":
            return data[:20] + b"\xff" + data[21:]
        case "too long":
            return data + b"\0"
        case "a list":
            header = []
        case "an entry without a shape":
            del header[first]["shape"]
        case "a negative offset":
            header[first]["data_offsets"][0] = -4
        case "a wrong size":
            header[first]["data_offsets"][1] += 4
        case "an overlap":
            header[second] |= {"dtype": header[first]["dtype"], "shape": header[first]["shape"]}
            header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


KINDS = (
    "cut in the data", "cut in the header", "empty", "a flipped length", "a flipped brace", "a byte that is no text",
    "too long", "a list", "an entry without a shape", "a negative offset", "a wrong size", "an overlap",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_corrupt_file_is_named(folder_of, kind, shard):
    folder = folder_of(shard=shard)
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(corrupted(file.read_bytes(), kind))
    with pytest.raises(ValueError, match="truncated or corrupt") as error:
        load(folder)
    assert str(file) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../secret.safetensors"}}', '{"weight_map": {}}']
)
def test_a_corrupt_index_is_named(folder_of, text):
    folder = folder_of(shard="40KB")
    (folder / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX} is corrupt"):
        load(folder)


def test_a_missing_file_is_named(folder_of):
    folder = folder_of(shard="40KB")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} does not exist"):
        load(folder)


def test_pickles_are_refused(folder_of):
    folder = folder_of()
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pickles only"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no weights in"):
        load(folder)


def test_an_export_that_fails_leaves_no_file(folder_of, tmp_path):
    decoder, params = load(folder_of())
    broken = dict(params) | {"final_norm": {"scale": jnp.ones(7)}}
    with pytest.raises(ValueError, match=r"final_norm.scale has shape \(7,\)"):
        save_params(broken, decoder.config, tmp_path / "out", max_shard_bytes=30_000)
    with pytest.raises(ValueError, match="no final_norm.scale"):
        save_params({k: v for k, v in params.items() if k != "final_norm"}, decoder.config, tmp_path / "out")
    with pytest.raises(ValueError, match="int32"):
        save_params(params, decoder.config, tmp_path / "out", dtype="int32")
    assert not any((tmp_path / "out").iterdir())


def test_the_writer_insists_on_what_was_announced(tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="b was announced"):
        with Writer(file, {"a": (2,), "b": (1,)}, jnp.float32) as out:
            out.write("a", np.ones(2))
    with pytest.raises(ValueError, match="expected a of shape"):
        with Writer(file, {"a": (2,)}, jnp.float32) as out:
            out.write("a", np.ones(3))
    assert not any(tmp_path.iterdir())
    with Writer(file, {"a": (2,), "empty": (0, 3)}, jnp.float32) as out:
        out.write("empty", np.zeros((0, 3)))
        out.write("a", np.arange(2))
    assert read_header(file)["a"].map().tolist() == [0, 1]
    assert read_header(file)["empty"].map().shape == (0, 3)


def test_files_are_cut_by_size():
    assert split_by_size([("a", (4,)), ("b", (4,)), ("c", (9,)), ("d", (1,))], 2, 16) == [
        {"a": (4,), "b": (4,)},
        {"c": (9,)},
        {"d": (1,)},
    ]


@pytest.mark.parametrize("text", ["(N H) D -> D N H", "D (N H) -> N H D", "(K H) -> K H", "F D -> D F", "D -> D"])
def test_layouts_take_any_block_and_restore_the_whole(text):
    config = SIZES["miniature"]
    layout, sizes = Layout.parse(text), axis_sizes(config)
    stored = np.random.default_rng(0).standard_normal(layout.shape_there(config)).astype(np.float32)
    whole = layout.take(stored, (slice(None),) * len(layout.here), config)
    assert whole.shape == layout.shape_here(config)
    np.testing.assert_array_equal(layout.restore(whole, config), stored)
    for axis, letter in enumerate(layout.here):
        block = [slice(None)] * len(layout.here)
        block[axis] = slice(sizes[letter] // 2, sizes[letter])
        np.testing.assert_array_equal(layout.take(stored, block, config), whole[tuple(block)])


@pytest.mark.parametrize("size", SIZES)
def test_the_table_covers_the_tree(size):
    """Every parameter of every size has exactly one line, of its shape; and no line lacks a parameter."""
    config = SIZES[size]
    shapes = Decoder(config, Rules(make_mesh(devices=jax.devices()[:1]))).shapes()
    ours = {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}
    assert {e.path: e.shape_here(config) for e in entries(config)} == ours
    assert sum(int(np.prod(shape)) for _, shape, _, _ in stored_tensors(config)) == config.num_parameters
