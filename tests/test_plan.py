"""Whole training steps compiled by the real TPU compiler, on the CPU."""

import re

import pytest

from dqjax.config import ConfigError, load
from dqjax.models.config import SIZES
from dqjax.plan import plan_step, report
from dqjax.topology import why_no_cuda_compiler
from dqjax.train_config import Config
from tests.workspace import ROOT

RECIPE = ROOT / "configs" / "sft" / "qwen2.5-7b-v5p.yaml"

pytest.importorskip("libtpu")


def test_the_7b_recipe_fits_its_slice_as_its_header_says():
    plan = plan_step(load(Config, RECIPE), SIZES["qwen2.5-7b"], "v5p:2x2x2")
    header = float(re.search(r"peak ([\d.]+) GiB of 95 GiB", RECIPE.read_text())[1])
    assert plan.devices == 8
    assert plan.peak / 2**30 == pytest.approx(header, rel=0.03)
    # 12 bytes a parameter (float32 and two moments), split over 8 chips, and nothing of it replicated
    assert plan.state == pytest.approx(12 * SIZES["qwen2.5-7b"].num_parameters / 8, rel=0.01)
    assert plan.collectives["all-gather"][0] > 0
    assert "95.00 GiB" in report(plan)


def test_what_does_not_fit_is_said():
    config = load(Config, RECIPE, ["train.batch_rows=60"])
    with pytest.raises(ConfigError, match="train.batch_rows: 60 is not a multiple"):
        plan_step(config, SIZES["qwen2.5-7b"], "v5p:2x2x2")
    with pytest.raises(ConfigError, match="expected for example v5p:2x2x2"):
        plan_step(config, SIZES["qwen2.5-7b"], "v99:2x2")


@pytest.mark.skipif(why_no_cuda_compiler() is not None, reason=str(why_no_cuda_compiler()))
@pytest.mark.parametrize("mesh", [["mesh.fsdp=1"], ["mesh.fsdp=1", "mesh.tensor=2"]])
def test_a_step_on_hopper_gpus(mesh):
    """One GPU, and heads split over two."""
    overrides = ["data.row_length=4096", "train.batch_rows=2", "train.accumulate=1", *mesh]
    gpus = 2 if len(mesh) > 1 else 1
    plan = plan_step(load(Config, RECIPE, overrides), SIZES["qwen3-0.6b"], f"h200:{gpus}")
    assert plan.state == pytest.approx(12 * SIZES["qwen3-0.6b"].num_parameters / gpus, rel=0.01)
    assert "140.00 GiB" in report(plan)
