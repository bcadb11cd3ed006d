"""A scripted OpenAI-compatible server: asyncio, HTTP/1.1 with kept connections, in a thread or a process of its own.

What it does with a call is decided by a function of (question, how often it was asked before): an answer, or a fault.
"""

import asyncio
import collections
import dataclasses
import json
import threading

HEAD = "HTTP/1.1 {status} X\r\nContent-Type: {type}\r\nContent-Length: {length}\r\n{more}\r\n"


@dataclasses.dataclass(frozen=True)
class Say:
    """An answer, `delay` seconds after the call. `tokens`: what usage says it cost."""

    text: str
    reasoning: str | None = None
    finish: str = "stop"
    delay: float = 0.0
    tokens: tuple[int, int] = (10, 5)


@dataclasses.dataclass(frozen=True)
class Fail:
    """A fault: a status, or cut, malformed, html, empty, stall, no_choices."""

    kind: str
    retry_after: str | None = None


class ChatServer:
    """Runs in a thread; `script(question, before, body)` returns `Say` or `Fail`.

    Attributes:
      calls: how often each (question, seed) was asked. in_flight, most_in_flight: calls that wait for their answer.
      headers: of the last call.
    """

    def __init__(self, script, latency=0.0):
        self._script, self.latency = script, latency
        self.calls = collections.Counter()
        self.answered = collections.Counter()
        self.in_flight = self.most_in_flight = 0
        self.headers = b""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def total(self):
        return sum(self.calls.values())

    async def _serve(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=2000)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()

    def receive(self, body, connection):
        sent = json.loads(body)
        question = sent["messages"][-1]["content"]
        key = (question, sent.get("seed"))
        before = self.calls[key]
        self.calls[key] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        act = self._script(question, before, sent)
        delay = self.latency + (act.delay if isinstance(act, Say) else 0.0)
        if isinstance(act, Fail) and act.kind == "stall":
            return  # never answers; the connection's end gives the slot back
        self._loop.call_later(delay, self._answer, act, sent, key, connection)

    def _answer(self, act, sent, key, connection):
        if connection.lost:
            return
        self.in_flight -= 1
        connection.waiting = False
        if isinstance(act, Say):
            self.answered[key] += 1
            connection.transport.write(_stream(act) if sent.get("stream") else reply(act))
            return
        whole = reply(Say("the answer is long enough to be cut in two"))
        match act.kind:
            case "cut":
                data = (
                    _stream(Say("long enough to be cut"), cut=True) if sent.get("stream") else whole[: len(whole) - 30]
                )
                connection.transport.write(data)
                connection.transport.close()
            case "malformed":
                connection.transport.write(_raw(200, b'{"choices": [{"message": {"content": "7"'))
            case "no_choices":
                connection.transport.write(_raw(200, b'{"choices": []}'))
            case "html":
                connection.transport.write(_raw(200, b"<html>please log in</html>", type="text/html"))
            case "empty":
                connection.transport.write(reply(Say("")))
            case status:
                more = f"Retry-After: {act.retry_after}\r\n" if act.retry_after is not None else ""
                connection.transport.write(_raw(int(status), b'{"error": {"message": "no"}}', more=more))


class _Connection(asyncio.Protocol):
    def __init__(self, server):
        self.server, self.buffer, self.lost, self.waiting = server, b"", False, False

    def connection_made(self, transport):
        self.transport = transport

    def connection_lost(self, error):
        self.lost = True
        if self.waiting:
            self.server.in_flight -= 1

    def data_received(self, data):
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:end]
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self.buffer) < end + 4 + length:
                return
            body, self.buffer = self.buffer[end + 4 : end + 4 + length], self.buffer[end + 4 + length :]
            self.server.headers = head
            self.waiting = True
            self.server.receive(body, self)


def reply(say):
    message = {"role": "assistant", "content": say.text}
    if say.reasoning is not None:
        message["reasoning_content"] = say.reasoning
    usage = {"prompt_tokens": say.tokens[0], "completion_tokens": say.tokens[1]}
    choice = {"index": 0, "message": message, "finish_reason": say.finish}
    return _raw(200, json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode())


def _raw(status, body, *, type="application/json", more=""):
    return HEAD.format(status=status, type=type, length=len(body), more=more).encode() + body


def _stream(say, cut=False):
    half = len(say.text) // 2
    deltas = [{"reasoning_content": say.reasoning}] if say.reasoning else []
    deltas += [{"content": say.text[:half]}, {"content": say.text[half:]}]
    events = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": say.finish}]})
    events.append({"choices": [], "usage": {"prompt_tokens": say.tokens[0], "completion_tokens": say.tokens[1]}})
    lines = [f"data: {json.dumps(e)}\n\n" for e in (events[: len(deltas) - 1] if cut else events)]
    body = "".join(lines) + ("" if cut else "data: [DONE]\n\n")
    chunk = f"{len(body.encode()):x}\r\n{body}\r\n" + ("" if cut else "0\r\n\r\n")
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return (head + chunk).encode()
