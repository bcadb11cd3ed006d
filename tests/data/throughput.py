"""Requests a second of the teacher client, against the ideal: python -m tests.data.throughput [--in-flight 200] [--latency 0.05]

The server runs in a process of its own. Reported are bare sockets, which show what the server itself lets through, the
client alone, the client with its journal, and a whole generate stage.
"""

import argparse
import asyncio
import multiprocessing
import pathlib
import tempfile
import time
from collections import Counter

import uvloop

from dqjax.data.endpoint import Endpoint, EndpointConfig, open_session
from dqjax.data.journal import Journal
from dqjax.data.limits import Budget
from dqjax.data.records import Message
from dqjax.data.teacher import EndpointTeacher, Journaled, Request, SamplingConfig, TeacherConfig
from tests.data.chat_server import Say, reply
from tests.data.factory import endpoint, problems, run, teacher, write_jsonl


class Answering(asyncio.Protocol):
    """The least that a server can do: a fixed answer, `latency` after each call."""

    ANSWER = reply(Say("<think>\ntwice\n</think>\n\n7"))

    def __init__(self, latency):
        self.latency, self.buffer = latency, b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            at = self.buffer.find(b"Content-Length: ")
            length = int(self.buffer[at + 16 : self.buffer.find(b"\r\n", at)])
            if len(self.buffer) < end + 4 + length:
                return
            self.buffer = self.buffer[end + 4 + length :]
            asyncio.get_running_loop().call_later(self.latency, self.transport.write, self.ANSWER)


class Asking(asyncio.Protocol):
    """The least that a client can do: the same bytes again after each answer."""

    REQUEST = b"POST / HTTP/1.1\r\nContent-Length: 200\r\n\r\n" + b" " * 200

    def __init__(self, todo, done):
        self.todo, self.done = todo, done

    def connection_made(self, transport):
        self.transport = transport
        self.ask()

    def data_received(self, data):
        self.ask()

    def ask(self):
        if next(self.todo, None) is not None:
            self.transport.write(self.REQUEST)
        else:
            self.transport.close()
            self.done.release()


def serve(latency, url):
    async def main():
        server = await asyncio.get_running_loop().create_server(
            lambda: Answering(latency), "127.0.0.1", 0, backlog=2000
        )
        url.put(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        await server.serve_forever()

    uvloop.run(main())


async def ask_bare(url, in_flight, calls):
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    todo, done = iter(range(calls)), asyncio.Semaphore(0)
    for _ in range(in_flight):
        await asyncio.get_running_loop().create_connection(lambda: Asking(todo, done), host, int(port))
    for _ in range(in_flight):
        await done.acquire()


async def ask_many(url, in_flight, calls, journal):
    config = TeacherConfig(name="t", endpoints=[EndpointConfig(url=url, model="m", concurrency=in_flight)])
    sampling, todo = SamplingConfig(), iter(range(calls))
    async with open_session() as session:
        asked = EndpointTeacher(config, [Endpoint(config.endpoints[0], session)], Budget())
        if journal is not None:
            asked = Journaled(asked, journal, Counter())

        async def worker():
            for i in todo:
                await asked.ask(Request((Message("user", f"What is {i} plus {i}?"),), sampling))

        await asyncio.gather(*(worker() for _ in range(in_flight)))


def generate(url, in_flight, calls, folder):
    steps = [{"stage": "generate", "teachers": ["t"], "input": write_jsonl(folder / "p.jsonl", problems(calls))}]
    run(folder, [teacher(endpoint(url, concurrency=in_flight))], steps)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-flight", type=int, default=200)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--calls", type=int, default=20_000)
    args = parser.parse_args()
    ideal, n, calls = args.in_flight / args.latency, args.in_flight, args.calls
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=serve, args=(args.latency, queue), daemon=True)
    process.start()
    url = queue.get()
    print(f"{calls} calls, {n} in flight; the ideal is {ideal:.0f} a second")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for what, work in {
            "bare sockets": lambda: uvloop.run(ask_bare(url, n, calls)),
            "client": lambda: uvloop.run(ask_many(url, n, calls, None)),
            "with journal": lambda: uvloop.run(ask_many(url, n, calls, Journal(folder / "j.jsonl"))),
            "generate stage": lambda: generate(url, n, calls, folder),
        }.items():
            cpu, started = time.process_time(), time.perf_counter()
            work()
            rate, cpu = calls / (time.perf_counter() - started), (time.process_time() - cpu) / calls
            print(
                f"{what:14} {rate:5.0f} calls/s, {rate / ideal:.1%} of the ideal; {1e6 * cpu:3.0f} us of CPU a call, "
                f"so at most {1 / cpu:.0f} calls/s on one core",
                flush=True,
            )
    process.terminate()


if __name__ == "__main__":
    main()
