"""Samples from an engine and from a server: a real HTTP server that speaks the protocol, without a model."""

import http.server
import json
import threading

import pytest

from dqjax.config import ConfigError
from dqjax.data.chat import ChatFormat
from dqjax.data.records import parse_row
from dqjax.data.tokenizer import train_tokenizer
from dqjax.eval import evaluate
from dqjax.eval.samplers import EndpointSampler, EngineSampler, Request


def request(question="1+1?", index=0, thinking=True, seed=7):
    return Request(parse_row({"id": question, "question": question, "answer": "2"})[0], index, thinking, seed)


@pytest.fixture(scope="module")
def chat():
    return ChatFormat.of(train_tokenizer(["1+1? think answer 2 3 4"] * 3, 300))


def test_engine_prompts_are_rendered_by_mode_and_samples_taken_apart(chat):
    prompts = []

    def generate(triples):
        texts = ["<think>\nhm 1\n</think>\n\n2", "3", "<think>\nhm", "4"]
        for (ids, seed, budget), text in zip(triples, texts):
            prompts.append((chat.tokenizer.decode(ids), seed, budget))
            stopped = text != "<think>\nhm"
            yield chat.encode([text])[0] + [chat.end_id] * stopped, "stop" if stopped else "length"

    sampler = EngineSampler(chat, generate, thinking_budget=99)
    got = list(sampler([request(), request(thinking=False), request(seed=9), request(thinking=False)]))
    assert prompts[0][0].endswith("<|im_start|>assistant\n") and prompts[1][0].endswith("</think>\n\n")
    assert [rest for _, *rest in prompts] == [[7, 99], [7, None], [9, 99], [7, None]]
    first, second, third, _ = got
    assert (first.response.thinking, first.response.answer, first.truncated) == ("hm 1", "2", False)
    assert first.tokens == len(chat.encode([first.text])[0]) + 1
    assert 0 < first.thinking_tokens < first.tokens
    assert (second.text, second.thinking_tokens, second.tokens) == ("3", 0, 2)
    assert third.truncated and not third.response.closed and third.thinking_tokens == third.tokens
    assert "<|im_end|>" not in first.text


class Server:
    """Answers each chat request by a function of its body: a dict is sent as JSON, an int as an error status."""

    def __init__(self, answer):
        self.bodies = bodies = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bodies.append((body, self.path, self.headers.get("Authorization")))
                reply = answer(body)
                status, data = (reply, {"error": {"message": "no"}}) if isinstance(reply, int) else (200, reply)
                data = json.dumps(data).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Retry-After-Ms", "1")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def reply(content, *, reason="stop", tokens=12, **message):
    choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": tokens + 3}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def endpoint(url, **more):
    return EndpointSampler(url, "m", **({"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 64} | more))


def test_an_endpoint_gets_what_was_asked_for(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with Server(lambda body: reply(body["messages"][-1]["content"])) as server:
        requests = [request(f"q{i}", seed=i, thinking=i % 2 == 0) for i in range(20)]
        got = list(endpoint(server.url, top_k=20, switch=True, parallel=4)(requests))
    assert [s.text for s in got] == [f"q{i}" for i in range(20)]
    body, path, key = next(b for b in server.bodies if b[0]["seed"] == 3)
    assert path == "/v1/chat/completions" and key == "Bearer sk-test"
    assert body == {
        "model": "m", "messages": [{"role": "user", "content": "q3"}], "seed": 3, "temperature": 0.6, "top_p": 0.95,
        "max_tokens": 64, "top_k": 20, "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip


def test_what_the_server_does_not_know_is_not_sent():
    with Server(lambda body: reply("2")) as server:
        list(endpoint(server.url)([request()]))
    assert not {"top_k", "min_p", "chat_template_kwargs"} & server.bodies[0][0].keys()


@pytest.mark.parametrize(
    ("answer", "thinking", "text", "closed", "truncated"),
    [
        (reply("<think>\nhm\n</think>\n\n2"), "hm", "2", True, False),
        (reply("2", reasoning_content="hm"), "hm", "2", True, False),
        (reply("2", reasoning="hm"), "hm", "2", True, False),
        (reply("hm\n</think>\n\n2"), "hm", "2", True, False),
        (reply("2"), None, "2", True, False),
        (reply("<think>\nhm", reason="length"), "hm", "", False, True),
        (reply(None, reason="length", reasoning_content="hm"), "hm", "", False, True),
        (reply("2 and", reason="length", reasoning_content="hm"), "hm", "2 and", True, True),
    ],
)
def test_replies_of_every_kind_of_server(answer, thinking, text, closed, truncated):
    with Server(lambda body: answer) as server:
        (got,) = endpoint(server.url)([request()])
    assert got.response == (thinking, text, closed) and got.truncated is truncated
    assert got.tokens == 12 and (got.thinking_tokens > 0) == (thinking is not None)
    if not closed:
        assert got.thinking_tokens == 12


def test_thinking_tokens_are_the_servers_count_else_ones_own():
    counted = reply("2", reasoning_content="one two three")
    counted["usage"]["completion_tokens_details"] = {"reasoning_tokens": 9}
    with Server(lambda body: counted) as server:
        assert next(iter(endpoint(server.url)([request()]))).thinking_tokens == 9
    with Server(lambda body: reply("2", reasoning_content="one two three")) as server:
        assert next(iter(endpoint(server.url, count=lambda t: len(t.split()))([request()]))).thinking_tokens == 3


def test_errors_are_tried_again_then_said():
    calls = []

    def flaky(body):
        calls.append(1)
        return 503 if len(calls) < 3 else reply("2")

    with Server(flaky) as server:
        assert next(iter(endpoint(server.url)([request()]))).text == "2"
    assert len(calls) == 3
    with Server(lambda body: 400) as server, pytest.raises(ConfigError, match="refuses the request with status 400"):
        list(endpoint(server.url)([request()]))
    without = reply("2")
    del without["usage"]
    with Server(lambda body: without) as server, pytest.raises(ConfigError, match="no token usage; give --tokenizer"):
        list(endpoint(server.url)([request()]))


def test_the_same_graders_for_a_server(problems):
    with Server(lambda body: reply(body["messages"][-1]["content"].split()[-1].rstrip("?"))) as server:
        graded = evaluate(endpoint(server.url), problems(5), samples=2)
    assert all(g.correct for g in graded) and len(graded) == 10
