from typing import Annotated, Literal

import pydantic
import pytest

from dqjax.config import ConfigError, Section, dump, load, validate


class Sft(Section):
    kind: Literal["sft"] = "sft"
    z_loss: float = 0.0


class Grpo(Section):
    kind: Literal["grpo"] = "grpo"
    clip_high: float = 0.2
    group: int = 8


class Optimizer(Section):
    learning_rate: float = 1e-3
    nesterov: bool = False
    schedule: Literal["cosine", "linear"] = "cosine"
    warmup: int | None = None
    thinking: Literal["on", "off", "row"] = "on"


class Config(Section):
    objective: Annotated[Sft | Grpo, pydantic.Field(discriminator="kind")] = Sft()
    optimizer: Optimizer = Optimizer()
    parts: tuple[Optimizer, ...] = ()
    ks: tuple[int, ...] | None = None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"learning_rat": 1}}, "optimizer.learning_rat: unknown key; did you mean learning_rate?"),
        ({"optimiser": {}}, "optimiser: unknown key; did you mean optimizer?"),
        ({"zzz": {}}, "zzz: unknown key; valid here: ks, objective, optimizer, parts"),
        ({"optimizer": {"learning_rate": "fast"}}, "optimizer.learning_rate: input should be a valid number"),
        ({"optimizer": {"warmup": "3"}}, "optimizer.warmup: expected a whole number, got '3'"),
        ({"optimizer": {"warmup": 3.0}}, "optimizer.warmup: expected a whole number, got 3.0"),
        ({"optimizer": {"warmup": True}}, "optimizer.warmup: expected a whole number, got True"),
        ({"optimizer": {"nesterov": 1}}, "optimizer.nesterov: expected true or false, got 1"),
        ({"optimizer": {"schedule": "cosin"}}, "optimizer.schedule: 'cosin' is not among the choices; did you mean cosine?"),
        ({"objective": {"kind": "grp"}}, "objective.kind: unknown kind 'grp'; did you mean grpo?"),
        ({"objective": {"kind": "grpo", "clip_hig": 1}}, "objective.clip_hig: unknown key; did you mean clip_high?"),
        ({"objective": {"kind": "grpo", "group": "8"}}, "objective.group: expected a whole number, got '8'"),
        ({"parts": [{"warmupp": 1}]}, "parts.0.warmupp: unknown key; did you mean warmup?"),
    ],
)
def test_errors_name_the_key_and_its_neighbour(values, message):
    with pytest.raises(ConfigError) as e:
        validate(Config, values, where="run.yaml")
    assert str(e.value).startswith(f"run.yaml: {message}")


def test_yaml_traps():
    """PyYAML reads 2e-5 as text and a bare `on` as true."""
    config = validate(Config, {"optimizer": {"learning_rate": "2e-5", "thinking": False}}, where="run.yaml")
    assert config.optimizer.learning_rate == 2e-5
    assert config.optimizer.thinking == "off"
    assert validate(Config, {"ks": [1, 4]}, where="run.yaml").ks == (1, 4)


def test_overrides_and_round_trip(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("objective: grpo\noptimizer: {learning_rate: 2e-5}\n")
    with pytest.raises(ConfigError):  # the short form is a matter of the top-level config
        load(Config, path)
    config = load(Config, path, ["objective.group=16", "optimizer.schedule=linear", "optimizer.warmup=5"])
    assert config.objective == Grpo(group=16)
    assert config.optimizer == Optimizer(learning_rate=2e-5, schedule="linear", warmup=5)
    path.write_text(dump(config))
    assert load(Config, path) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("a: [", [], "is not valid YAML"),
        ("- 1", [], "expected sections with keys"),
        ("", ["optimizer.warmup"], "expected section.key=value"),
        ("optimizer: 3", ["optimizer.warmup=1"], "not a section"),
    ],
)
def test_unreadable(tmp_path, text, overrides, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(Config, path, overrides)


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "slow.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*slow\.yaml"):
        load(Config, tmp_path / "slwo.yaml")


def test_frozen():
    with pytest.raises(pydantic.ValidationError):
        Config().optimizer.warmup = 3
