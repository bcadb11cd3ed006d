"""python -m dqjax.eval, from the command line to the files."""

import json
import subprocess
import sys

import pytest

from dqjax.config import ConfigError
from dqjax.eval import __main__ as command
from dqjax.eval.run import read_records


@pytest.fixture
def benchmark(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(
        "".join(
            json.dumps({"id": f"p{i}", "question": f"{i}?", "answer": i, "difficulty": i % 2}) + "\n" for i in range(6)
        )
    )
    return path


@pytest.fixture
def run(tmp_path, benchmark, monkeypatch, scripted):
    """run(*options) → the sampler that was used; the model is a script that is right below 4, and once more at sample 1."""

    def call(*options, out="out"):
        sampler = scripted(lambda r: r.problem.answer if int(r.problem.answer) < 4 or r.index == 1 else "none of them")
        monkeypatch.setattr(command, "endpoint_sampler", lambda arguments, config: sampler)
        arguments = [
            "--endpoint",
            "http://x/v1",
            "--model",
            "m",
            "--benchmark",
            str(benchmark),
            "--out",
            str(tmp_path / out),
            *options,
        ]
        assert command.main(arguments) == 0
        return sampler

    return call


def test_writes_the_report_and_goes_on(run, tmp_path, capsys):
    assert len(run("--samples", "2", "--k", "1,2").asked) == 12
    printed = capsys.readouterr().out
    assert "| accuracy | 83.3% [" in printed and "pass@2" in printed and "By difficulty" in printed
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "report.json",
        "report.md",
        "records.jsonl",
        "problems.jsonl",
        "settings.json",
    }
    report = json.loads((out / "report.json").read_text())
    assert report["modes"]["thinking on"]["accuracy"]["value"] == pytest.approx((4 + 0.5 * 2) / 6)
    assert len(report["fingerprint"]) == 12 and report["settings"]["graders"]["math-verify"]
    assert report["settings"]["files"]["test.jsonl"]
    assert len(run("--samples", "2", "--k", "1,2").asked) == 0
    assert len(run("--samples", "3").asked) == 6
    assert len(read_records(out / "records.jsonl")) == 18
    with pytest.raises(ConfigError, match="other settings .temperature was 0.6, is 1.0"):
        run("--temperature", "1.0")


def test_both_modes_and_a_comparison_with_another_run(run, tmp_path):
    run("--samples", "2")
    run("--samples", "2", "--thinking", "both", "--against", str(tmp_path / "out"), out="other")
    report = json.loads((tmp_path / "other" / "report.json").read_text())
    assert list(report["modes"]) == ["thinking on", "thinking off"]
    names = list(report["comparisons"])
    assert names[0] == "thinking on minus off" and names[1].startswith("thinking on, minus")
    assert report["comparisons"][names[1]]["pass_at_1"]["value"] == 0.0
    with pytest.raises(ConfigError, match="holds no records"):
        run("--against", str(tmp_path / "none"), out="third")


def test_plots_and_overlap(run, tmp_path, benchmark):
    pytest.importorskip("matplotlib")
    training = tmp_path / "train.jsonl"
    training.write_text(json.dumps({"question": "3?", "answer": "3"}) + "\n")
    run("--plots", "--training-data", str(training), "--instruction", "Think.")
    assert (tmp_path / "out" / "pass_at_k.png").exists() and (tmp_path / "out" / "accuracy_against_tokens.png").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["overlap"].startswith("1 of 6 questions occur")


def test_a_config_file_under_options(run, tmp_path, benchmark):
    config = tmp_path / "eval.yaml"
    config.write_text("benchmark: other\nsamples: 2\nk: [1, 2]\nseed: 3\n")
    sampler = run("--config", str(config), "--seed", "4", "grading.answer.kind=number")
    assert len(sampler.asked) == 12
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["seed"], settings["samples"], settings["grading"]["answer"]["kind"]) == (4, 2, "number")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "http://x"], "--endpoint needs --model"),
        (["--endpoint", "http://x", "--model", "m"], "--benchmark or --config is missing"),
        (["--endpoint", "http://x", "--model", "m", "--benchmark", "mth500"], "did you mean math500"),
        (["--endpoint", "http://x", "--model", "m", "--benchmark", "x", "--k", "4"], "pass@4 needs"),
        (["--endpoint", "http://x", "--model", "m", "--benchmark", "x", "--top-p", "2"], "top_p"),
        (["--endpoint", "http://x", "--model", "m", "--benchmark", "x", "a=1"], "none is given"),
        (["--endpoint", "http://x", "--model", "m", "--benchmark", "x", "--thinking-budget", "9"], "cannot be told to end"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        command.main(options)


def test_bad_files_are_refused_before_anything_is_loaded(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a", "answer": "1"}\n{"question": "b"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "dqjax.eval", "--checkpoint", str(tmp_path / "no_model"), "--benchmark", str(path)],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "bad.jsonl:2: no reference answer" in done.stderr and "Traceback" not in done.stderr


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0 and "python -m dqjax.eval --checkpoint runs/student" in capsys.readouterr().out


def test_a_real_checkpoint_end_to_end(tmp_path, benchmark):
    """A random Qwen3 in Hugging Face form: samples come from the engine, and a second call adds to them."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from dqjax.data.tokenizer import train_tokenizer

    torch.manual_seed(0)
    model = tmp_path / "model"
    train_tokenizer(["0? 1? 2? think answer"] * 3, 300).save_pretrained(model)
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=64,
    )
    Qwen3ForCausalLM(
        Qwen3Config(vocab_size=320, max_position_embeddings=512, tie_word_embeddings=True, **sizes)
    ).save_pretrained(model)

    def run(out, samples, *more):
        arguments = [
            "--checkpoint",
            str(model),
            "--benchmark",
            str(benchmark),
            "--out",
            str(tmp_path / out),
            "--samples",
            samples,
            *more,
        ]
        settings = ["--max-new-tokens", "8", "--rows", "8", "--dtype", "float32", "--limit", "2"]
        assert command.main([*arguments, *settings]) == 0
        return read_records(tmp_path / out / "records.jsonl")

    first = run("out", "1")
    both = run("out", "2")
    assert len(first) == 2 and both[:2] == first and [g.sample for g in both[2:]] == [1, 1]
    assert all(0 < g.tokens <= 8 for g in both) and len({g.text for g in both}) > 1
    ended = run("ended", "1", "--thinking-budget", "2", "--cache-gib", "0.01")
    assert all("\n</think>\n\n" in g.text for g in ended)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["parameters"] and settings["template"] and settings["dtype"] == "float32"
