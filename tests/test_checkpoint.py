import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dqjax.checkpoint import Checkpoints, DamagedCheckpoint


def tree(value):
    return {"a": jnp.full((64, 8), value, jnp.float32), "b": {"c": jnp.arange(5) + value}}


SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree(0))


def saved(folder, *steps, keep=10, scores=None):
    checkpoints = Checkpoints(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, {"params": tree(step)}, {"data": {"next_row": step}}, score=(scores or {}).get(step))
    checkpoints.close()
    return checkpoints


def restore(folder, step=None):
    return Checkpoints(folder).restore({"params": SHAPES}, step=step)


def files_of(folder, step):
    root = folder / f"step_{step:08d}"
    return sorted((p for p in root.rglob("*") if p.is_file() and "manifest-" not in p.name), key=lambda p: p.stat().st_size)


def test_round_trip(tmp_path):
    saved(tmp_path, 3, 7)
    step, items, meta = restore(tmp_path)
    assert step == 7 and meta["data"] == {"next_row": 7}
    jax.tree.map(np.testing.assert_array_equal, items["params"], tree(7))
    assert restore(tmp_path, 3)[0] == 3


def test_nothing_saved(tmp_path):
    assert restore(tmp_path) is None
    with pytest.raises(ValueError, match="no complete checkpoint of step 5; it has none"):
        restore(tmp_path, 5)


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, 4, 5, keep=2, scores={2: 0.1, 4: 0.5})
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best() == 2


@pytest.mark.parametrize("item", ["largest", "smallest"])
def test_a_flipped_bit_is_found_and_the_step_before_used(tmp_path, caplog, item):
    saved(tmp_path, 1, 2)
    path = files_of(tmp_path, 2)[-1 if item == "largest" else 1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert restore(tmp_path)[0] == 1
    assert path.name in caplog.text and "SHA-256" in caplog.text
    with pytest.raises(DamagedCheckpoint, match=path.name):
        restore(tmp_path, 2)


def test_truncated_and_missing_files(tmp_path, caplog):
    saved(tmp_path, 1, 2, 3)
    big = files_of(tmp_path, 3)[-1]
    big.write_bytes(big.read_bytes()[:-1])
    files_of(tmp_path, 2)[-1].unlink()
    assert restore(tmp_path)[0] == 1
    assert "bytes, expected" in caplog.text and "is missing" in caplog.text
    files_of(tmp_path, 1)[-1].unlink()
    with pytest.raises(DamagedCheckpoint):  # never a silent start from scratch
        restore(tmp_path)


def test_without_its_manifest_a_step_does_not_exist(tmp_path, caplog):
    saved(tmp_path, 1, 2)
    manifest = tmp_path / "step_00000002" / "manifest-0-of-1.json"
    manifest.write_text(manifest.read_text()[:100])
    assert restore(tmp_path)[0] == 1
    assert "not finished" in caplog.text
    saved(tmp_path, 2)  # and it can be written again
    assert restore(tmp_path)[0] == 2


def test_a_failed_save_is_reported_by_the_next(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"params": tree(1)}, {})
    checkpoints.wait()
    checkpoints._failure = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(2, {"params": tree(2)}, {})


def test_saved_values_survive_donation(tmp_path):
    """The arrays are copied off before save returns: the next step may overwrite their memory."""
    checkpoints = Checkpoints(tmp_path)
    update = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 1, t), donate_argnums=0)
    for step in range(1, 6):
        state = tree(step)
        checkpoints.save(step, {"params": state}, {})
        update(state)
    checkpoints.close()
    for step in checkpoints.steps():
        jax.tree.map(np.testing.assert_array_equal, restore(tmp_path, step)[1]["params"], tree(step))


KILLED = textwrap.dedent(
    """
    import sys, jax, jax.numpy as jnp
    from dqjax.checkpoint import Checkpoints
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    for step in range(1, 10_000):
        checkpoints.save(step, {"params": {"a": jnp.full((256, 256), step, jnp.float32)}}, {"step": step})
        checkpoints.wait()
        print(step, flush=True)
    """
)


@pytest.mark.parametrize("delay", [0.0, 0.013, 0.031, 0.047])
def test_sigkill_at_any_moment_leaves_an_intact_checkpoint(tmp_path, delay):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    last = 0
    while last < 4:
        last = int(process.stdout.readline())
    time.sleep(delay)
    os.kill(process.pid, signal.SIGKILL)
    last = max([last, *(int(line) for line in process.stdout.read().split())])
    shapes = {"a": jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=SHAPES["a"].sharding)}
    step, items, meta = Checkpoints(tmp_path).restore({"params": shapes})
    assert step >= last  # a step that was reported proved is there, or a newer one
    assert meta["step"] == step
    np.testing.assert_array_equal(items["params"]["a"], np.full((256, 256), step, np.float32))


def test_the_manifest_names_every_file(tmp_path):
    saved(tmp_path, 1)
    manifest = json.loads((tmp_path / "step_00000001" / "manifest-0-of-1.json").read_text())
    names = {str(p.relative_to(tmp_path / "step_00000001")) for p in files_of(tmp_path, 1)}
    assert set(manifest["files"]) == names
