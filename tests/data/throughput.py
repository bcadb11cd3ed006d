"""Requests a second of the teacher client, against the ideal: python -m tests.data.throughput [--in-flight 200] [--latency 0.05]

The server runs in a process of its own. Reported are the client alone, the client with its journal, and a whole generate stage.
"""

import argparse
import asyncio
import multiprocessing
import pathlib
import tempfile
import time
from collections import Counter

import aiohttp
import uvloop

from dqjax.data.endpoint import Endpoint, EndpointConfig
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


def serve(latency, url):
    async def main():
        server = await asyncio.get_running_loop().create_server(
            lambda: Answering(latency), "127.0.0.1", 0, backlog=2000
        )
        url.put(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        await server.serve_forever()

    uvloop.run(main())


async def ask_many(url, in_flight, calls, journal):
    config = TeacherConfig(name="t", endpoints=[EndpointConfig(url=url, model="m", concurrency=in_flight)])
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        asked = EndpointTeacher(config, [Endpoint(config.endpoints[0], session)], Budget())
        if journal is not None:
            asked = Journaled(asked, journal, Counter())
        todo = iter(range(calls))

        async def worker():
            for i in todo:
                await asked.ask(Request((Message("user", f"What is {i} plus {i}?"),), SamplingConfig()))

        cpu, started = time.process_time(), time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return calls / (time.perf_counter() - started), 1e6 * (time.process_time() - cpu) / calls


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--in-flight", type=int, default=200)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--calls", type=int, default=20_000)
    args = parser.parse_args()
    ideal = args.in_flight / args.latency
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=serve, args=(args.latency, queue), daemon=True)
    process.start()
    url = queue.get()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for name in ("client", "with journal"):
            journal = Journal(folder / "j.jsonl") if name == "with journal" else None
            rate, cpu = uvloop.run(ask_many(url, args.in_flight, args.calls, journal))
            print(
                f"{name:14} {rate:7.0f} calls/s, {rate / ideal:.1%} of the ideal {ideal:.0f}; {cpu:.0f} us of CPU a call",
                flush=True,
            )
        rows = write_jsonl(folder / "p.jsonl", problems(args.calls))
        cpu, started = time.process_time(), time.perf_counter()
        run(
            folder,
            [teacher(endpoint(url, concurrency=args.in_flight))],
            [{"stage": "generate", "teachers": ["t"], "input": rows}],
        )
        rate = args.calls / (time.perf_counter() - started)
        cpu = 1e6 * (time.process_time() - cpu) / args.calls
        print(
            f"{'generate stage':14} {rate:7.0f} calls/s, {rate / ideal:.1%} of the ideal {ideal:.0f}; {cpu:.0f} us of CPU a call"
        )
    process.terminate()


if __name__ == "__main__":
    main()
