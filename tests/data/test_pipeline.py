"""Whole pipelines: the shipped example against a teacher that solves sums, and our own model behind HTTP and in process."""

import contextlib
import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import yaml

from dqjax.convert.__main__ import main as convert
from dqjax.data.__main__ import OwnModels, main
from dqjax.data.chain_rows import DIFFICULTY, VERBOSITY
from dqjax.data.chains import write_chain
from dqjax.data.config import SourceConfig
from dqjax.data.pipeline import STAGES, read_pipeline
from dqjax.data.records import Message, normalise_question
from dqjax.data.sources import read_records
from dqjax.data.teacher import TeacherConfig
from dqjax.generate import Generator
from dqjax.rollout.sampling import Sampling
from tests.data.chat_server import ChatServer, Say
from tests.data.factory import (
    counts,
    endpoint,
    problems,
    read_jsonl,
    run,
    teacher,
    timeless,
    write_jsonl,
    write_pipeline,
)
from tests.test_train import run as run_training
from tests.workspace import make_workspace

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = ROOT / "configs/data/example.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return make_workspace(tmp_path_factory.mktemp("workspace"), 60)


def solver(question, before, sent):
    """Solves chain_sum in the asked style; every fourth sample is wrong; a judge that goes by the number of lines."""
    system = sent["messages"][0]["content"] if sent["messages"][0]["role"] == "system" else ""
    expression = re.search(r"arithmetic problem: ([-+\d ]+?) =", question)[1]
    answer = str(eval(expression))  # digits and signs alone
    if "You play a student" in system:
        return Say("easy" if expression.count(" ") == 4 else "medium")
    if "Verbosity" in system:
        return Say(str(min(question.count("\n"), 9)))
    if "Cognitive Difficulty" in system:
        return Say("no idea" if sent["seed"] % 2 else str(expression.count(" ")))
    if "Reply with one digit" in question:
        return Say("1")
    if "careless" in system:
        return Say("<think>\nhm\n</think>\n\nSomething.")
    style = "columns" if "add what is left out" in system else "running"
    chain = write_chain(expression, answer, style)
    if "shorten" in system:
        chain = chain[: len(chain) // 2]
    wrong = not system and sent["seed"] % 4 == 3
    return Say(chain and f"<think>\n{chain}\n</think>\n\n{int(answer) + wrong}", tokens=(30, len(chain)))


def example(workspace, url):
    """The shipped example with a served teacher and judge, and with every stage it leaves out for want of one."""
    config = yaml.safe_load(EXAMPLE.read_text().replace("runs/", f"{workspace}/runs/"))
    config["teachers"] = [teacher(endpoint(url), name="tiny")]
    steps = {step.get("name", step["stage"]): step for step in config["steps"]}
    steps["collect"]["sources"][0]["size"] = 40
    steps["verify"]["judge"] = "tiny"
    steps["annotate"].pop("length_rule")
    steps["annotate"] |= {"judge": "tiny", "labels": ["verbosity", "difficulty", "correctness"]}
    steps["long2short"]["at_least"] = 20
    steps["select"]["missing"] = "keep"
    more = [{"stage": "pairs", "name": "quality", "kind": "quality", "teacher": "tiny", "input": "collect"}]
    more += [{"stage": "pairs", "name": "style", "kind": "style", "min_distance": 0.5, "input": "annotate"}]
    config["steps"] = [*config["steps"][:-1], *more, config["steps"][-1]]
    return config


def test_the_example_from_problems_to_a_file_that_trains(workspace):
    from dqjax.train import main as train

    with ChatServer(solver) as server:
        config = example(workspace, server.url)
        path = workspace / "example.yaml"
        path.write_text(yaml.safe_dump(config))
        assert main(["pipeline", "--config", str(path)]) == 0
        asked = server.total
        assert main(["pipeline", "--config", str(path)]) == 0
        assert server.total == asked
    out = workspace / "runs/factory"
    made = counts(out, "generate")["out"]
    assert made == 4 * counts(out / "collect", "train")["out"] > 100
    assert counts(out, "verify")["incorrect"] == made // 4 and counts(out, "verify")["correct"] == 3 * made // 4
    assert counts(out, "refine")["critique easy"] > 0 and counts(out, "refine")["verified at attempt 1"] > 0
    assert counts(out, "annotate")[f"{VERBOSITY} given"] > 0
    chains = read_jsonl(out / "split.jsonl")
    assert all(row["correct"] and row.get("suitable") is not False for row in chains)
    assert {e["field"] for e in chains[0]["provenance"]} >= {"messages", "correct", VERBOSITY, DIFFICULTY}
    test = {
        normalise_question(row["prompt"][0]["content"])
        for row in read_jsonl(workspace / "runs/chain_sum/data/test.jsonl")
    }
    assert not test & {normalise_question(row["messages"][0]["content"]) for row in chains}
    for name in ("right_wrong", "cogpo", "quality", "style"):
        assert counts(out, name)["out"] > 0, name
        rows = list(read_records(SourceConfig(path=str(out / f"{name}.jsonl"))))
        assert rows and all(row.chosen is not None for row in rows)
    assert {(row["gap"], row["beta"]) for row in read_jsonl(out / "cogpo.jsonl")} == {
        ("small", 0.1),
        ("medium", 0.2),
        ("large", 0.5),
    }
    base = workspace / "runs/chain_sum"
    run_to = [f"model.init_from={base}/student", f"data.sources={out}/split.jsonl", f"data.cache_dir={workspace}/cache"]
    run_to += [
        f"data.validation={out}/split.validation.jsonl",
        f"train.run_dir={workspace}/trained",
        "train.sample_tokens=0",
    ]
    assert train(["--config", str(ROOT / "configs/debug/sft.yaml"), *run_to]) == 0


def test_every_mapping_stage_merges_to_the_whole(workspace, tmp_path, capsys):
    """Each step of the example in two parts, over what the step before has merged; the others refuse to be cut."""
    with ChatServer(solver) as server:
        config = example(workspace, server.url)
        folders = {name: tmp_path / name for name in ("whole", "parts")}
        for name, folder in folders.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config | {"out": str(folder)}))
        whole, parts = folders.values()
        assert main(["pipeline", "--config", str(tmp_path / "whole.yaml")]) == 0
        shutil.copytree(whole / "collect", parts / "collect")
        cut = []
        for step in config["steps"][1:]:
            name = step.get("name", step["stage"])
            command = [step["stage"], "--config", str(tmp_path / "parts.yaml"), "--step", name]
            if step["stage"] in ("split", "stats"):
                assert main([*command, "--shard", "0/2"]) == 2
                assert "looks at all rows: run it without --shard" in capsys.readouterr().err
                assert main(command) == 0
                continue
            for i in (1, 0):
                assert main([*command, "--shard", f"{i}/2"]) == 0
            assert main(["merge", str(parts / f"{name}.jsonl")]) == 0
            cut.append(step["stage"])
            assert timeless(parts / f"{name}.jsonl") == timeless(whole / f"{name}.jsonl") != [], name
            assert timeless(parts / f"{name}.rejected.jsonl") == timeless(whole / f"{name}.rejected.jsonl"), name
            assert counts(parts, name) == counts(whole, name), name
    assert set(cut) == set(STAGES) - {"collect", "split", "stats"}
    for name in ("split", "split.validation", "split.messages"):
        assert timeless(parts / f"{name}.jsonl") == timeless(whole / f"{name}.jsonl")


@contextlib.contextmanager
def served(generator):
    """The miniature model behind an OpenAI-compatible HTTP server, one request at a time."""
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            messages = [Message(m["role"], m["content"]) for m in sent["messages"]]
            with lock:
                (sample,) = generator.generate([messages])
                text = generator.text_of(sample)
            usage = {"prompt_tokens": len(generator.prompt_ids(messages)), "completion_tokens": len(sample.token_ids)}
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": sample.finish_reason,
            }
            body = json.dumps({"choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()


def test_our_model_behind_a_server(workspace, tmp_path):
    """An untrained student writes nonsense up to its limit; the pipeline says so and makes nothing of it."""
    student = str(workspace / "runs/chain_sum/student")
    generator = Generator(student, sampling=Sampling(1.0), max_new_tokens=16, rows=1, dtype="float32")
    rows = write_jsonl(tmp_path / "p.jsonl", problems(6))
    with served(generator) as url:
        steps = [{"stage": "generate", "teachers": ["t"], "input": rows}, {"stage": "verify"}, {"stage": "stats"}]
        out = run(tmp_path, [teacher(endpoint(url, concurrency=4))], steps)
    said = counts(out, "generate")
    assert said["in"] == 6 and said.get("out", 0) + said["rejected"] == 6 and "failed" not in said
    assert json.loads((out / "generate.counts.json").read_text())["usage"]["t calls"] == 6


def test_our_model_in_process(workspace, tmp_path, monkeypatch):
    """The same chains whatever is decoded together, and on a rerun without the model."""
    monkeypatch.chdir(workspace)  # a request's key, and so its sample, depends on the checkpoint's name
    local = {"checkpoint": "runs/chain_sum/student", "rows": 8, "dtype": "float32", "thinking": False}
    teachers = [{"name": "t", "local": local}]
    step = {"stage": "generate", "teachers": ["t"], "chains": 2, "sampling": {"max_tokens": 12, "temperature": 1.0}}
    outs = []
    for n in (5, 9):
        rows = write_jsonl(tmp_path / f"{n}.jsonl", problems(n))
        outs.append(run(tmp_path / str(n), teachers, [{**step, "input": rows}], models=OwnModels()))
    journals = [
        {row["key"]: row["reply"]["text"] for row in read_jsonl(out / "generate.journal.jsonl")} for out in outs
    ]  # fmt: skip
    failed = counts(outs[1], "generate").get("failed", 0)  # an untrained student may stop at once: an empty answer
    assert len(journals[0]) == 10 and len(journals[1]) == 18 - failed and failed < 4
    assert all(journals[1][key] == text for key, text in journals[0].items())
    before = timeless(outs[0] / "generate.rejected.jsonl")
    run(tmp_path / "5", teachers, [{**step, "input": str(tmp_path / "5.jsonl")}], again=True)
    assert timeless(outs[0] / "generate.rejected.jsonl") == before
    path = write_pipeline(tmp_path / "cli", teachers, [{**step, "input": str(tmp_path / "5.jsonl")}])
    assert main(["generate", "--config", path, "--estimate"]) == 0


def test_the_shipped_files_are_valid():
    config, steps = read_pipeline(str(EXAMPLE))
    assert {step.stage for step in steps} == set(STAGES) and isinstance(config.teachers[0], TeacherConfig)
    _, steps = read_pipeline(str(EXAMPLE.with_name("four_series.yaml")))
    assert {"slow", "adaptive", "cogpo", "rewards", "labels"} <= {step.name for step in steps}


@pytest.mark.slow
def test_the_shipped_example_as_it_is(tmp_path):
    """On the student that launch/quickstart.sh trains."""
    if not (ROOT / "runs/chain_sum/columns/checkpoints").exists():
        pytest.skip("run launch/quickstart.sh first")
    assert main(["pipeline", "--config", str(EXAMPLE), f"out={tmp_path}"]) == 0
    assert counts(tmp_path, "verify")["correct"] > 100
    assert len(read_jsonl(tmp_path / "split.jsonl")) > 50


@contextlib.contextmanager
def transformers_serve(model, folder):
    """The URL of `transformers serve`, a real OpenAI-compatible server, which calls the model by its folder."""
    for package in ("torch", "uvicorn", "fastapi", "rich"):  # the extra `test` has them
        pytest.importorskip(package)
    (folder / "hub").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(pathlib.Path(sys.executable).with_name("transformers"))
    command = [program, "serve", model, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "hub")}
    with subprocess.Popen(command, env=environment) as server:
        try:
            deadline = time.monotonic() + 240
            while not _is_up(f"http://127.0.0.1:{port}/health"):
                assert server.poll() is None and time.monotonic() < deadline, "transformers serve did not start"
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def run_example(workspace, folder, url, model, problems, *overrides):
    """The shipped example with a served teacher."""
    config = yaml.safe_load(EXAMPLE.read_text().replace("runs/chain_sum/data", f"{workspace}/runs/chain_sum/data"))
    config["teachers"] = [teacher(endpoint(url, model=model, concurrency=8), name="tiny", attempts=2)]
    config["steps"][0]["sources"][0]["size"] = problems
    (folder / "example.yaml").write_text(yaml.safe_dump(config))
    return main(["pipeline", "--config", str(folder / "example.yaml"), f"out={folder}/out", *overrides])


def test_the_stages_against_transformers_serve(workspace, tmp_path, capsys):
    """A student of a few steps: every call is answered, nothing that it says is right, and so nothing is left to split."""
    model = str(tmp_path / "export")
    assert run_training(workspace, "hardly", "train.steps=30", "data.validation=null") == 0
    assert convert(["to-hf", str(workspace / "hardly"), model, "--dtype", "float32"]) == 0
    with transformers_serve(model, tmp_path) as url:
        few = ["generate.sampling.max_tokens=24", "generate.chains=2"]
        assert run_example(workspace, tmp_path, url, model, 2, *few) == 2
    assert "split: 0 problems" in capsys.readouterr().err
    said = json.loads((tmp_path / "out/generate.counts.json").read_text())
    assert said["usage"]["tiny calls"] == said["counts"]["rejected"] + said["counts"].get("out", 0) == 4
    assert all((tmp_path / f"out/{name}.counts.json").exists() for name in ("verify", "refine", "annotate", "select"))


@pytest.mark.slow
def test_all_stages_against_transformers_serve(workspace, tmp_path):
    """The student that launch/quickstart.sh trains, behind a real server; its chains are right."""
    trained = ROOT / "runs/chain_sum/columns"
    if not (trained / "checkpoints").exists():
        pytest.skip("run launch/quickstart.sh first")
    model = str(tmp_path / "export")
    assert convert(["to-hf", str(trained), model, "--dtype", "float32"]) == 0
    with transformers_serve(model, tmp_path) as url:
        assert run_example(workspace, tmp_path, url, model, 8, "split.validation=2") == 0
    said = counts(tmp_path / "out", "generate")
    assert said["in"] == 8 and said.get("out", 0) + said.get("rejected", 0) == 32 and "failed" not in said
    assert len(read_jsonl(tmp_path / "out/split.jsonl")) > 4


def _is_up(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False
