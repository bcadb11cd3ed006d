"""Teachers: a thousand rows through every fault, kills, budgets, rates, several endpoints, streams."""

import asyncio
import collections
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

import dqjax.data.endpoint
from dqjax.config import ConfigError
from dqjax.data.__main__ import main
from dqjax.data.estimate import Trial, scaled_report
from dqjax.data.journal import Journal
from dqjax.data.limits import Bucket, Budget, BudgetSpent
from dqjax.data.local import LocalTeacher
from dqjax.data.pipeline import estimate, read_pipeline
from dqjax.data.records import Message
from dqjax.data.teacher import Request, SamplingConfig, TeacherConfig
from tests.data.chat_server import ChatServer, Fail, Say
from tests.data.factory import endpoint, problems, read_jsonl, run, teacher, timeless, write_jsonl, write_pipeline

ROOT = pathlib.Path(__file__).parents[2]
FAULTS = [
    Fail("429"), Fail("429", "0"), Fail("429", "0.05"), Fail("408"), Fail("409"), Fail("500"), Fail("503", "Wed, 21 Oct 2015 07:28:00 GMT"),
    Fail("cut"), Fail("malformed"), Fail("no_choices"), Fail("html"), Fail("empty"), Fail("stall"),
]  # fmt: skip


def number(question):
    return int(question.split()[2])


def solved(question):
    return Say(f"<think>\ntwice {number(question)}\n</think>\n\n{2 * number(question)}")


def generate(path, **more):
    return {"stage": "generate", "teachers": ["t"], "input": path, **more}


@pytest.mark.parametrize("stream", [False, True])
def test_a_thousand_rows_through_every_fault(tmp_path, stream):
    """Every row ends done or in the failure file with its reason; none lost, none doubled; calls counted exactly."""
    rng, plan, attempts = random.Random(7), {}, 5
    for i in range(1000):
        kind = rng.random()
        if kind < 0.02:
            plan[i] = [Fail("400")]
        elif kind < 0.04:
            plan[i] = [rng.choice(FAULTS[:-1]) for _ in range(attempts)]
        else:
            plan[i] = [rng.choice(FAULTS) for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 1, 2, 3]))]

    def script(question, before, sent):
        mine = plan[number(question)]
        return mine[before] if before < len(mine) else solved(question)

    rows = write_jsonl(tmp_path / "p.jsonl", problems(1000))
    with ChatServer(script) as server:
        place = endpoint(server.url, concurrency=100, timeout=1.5, stream=stream)
        out = run(tmp_path, [teacher(place, attempts=attempts)], [generate(rows)])
        done, failed = read_jsonl(out / "generate.jsonl"), read_jsonl(out / "generate.rejected.jsonl")
        lost = [i for i, mine in plan.items() if mine[:1] == [Fail("400")] or len(mine) == attempts]
        assert sorted(row["problem_id"] for row in failed) == sorted(f"p{i}" for i in lost)
        assert all(row["failed"] and row["reason"] for row in failed)
        assert [row["problem_id"] for row in done] == [
            f"p{i}" for i in range(1000) if i not in set(lost)
        ]  # in order, once
        for row in done:
            assert row["messages"][-1]["content"] == row["answer"]
        asked = collections.Counter({number(question): n for (question, _), n in server.calls.items()})
        for i, mine in plan.items():
            assert asked[i] == (1 if mine[:1] == [Fail("400")] else min(len(mine) + 1, attempts)), (i, mine)
        before = server.total
        run(tmp_path, [teacher(place, attempts=attempts)], [generate(rows)], again=True)
        assert server.total - before == len(lost)  # only what failed is asked again; this time it is answered
        assert len(read_jsonl(out / "generate.jsonl")) == 1000


def test_every_reason_is_told(tmp_path):
    said = {"400": "status 400", "500": "status 500", "cut": "cut", "malformed": "malformed", "no_choices": "malformed",
            "html": "content type text/html", "empty": "an empty answer", "stall": "no answer within"}  # fmt: skip
    kinds = list(said)
    rows = write_jsonl(tmp_path / "p.jsonl", problems(len(kinds)))
    with ChatServer(lambda question, before, sent: Fail(kinds[number(question)])) as server:
        out = run(tmp_path, [teacher(endpoint(server.url, timeout=0.3), attempts=2)], [generate(rows)])
        for kind, row in zip(kinds, read_jsonl(out / "generate.rejected.jsonl"), strict=True):
            assert said[kind] in row["reason"]
            assert ("attempt 2" in row["reason"]) == (kind != "400")


def test_kills_lose_nothing_and_repeat_at_most_what_was_in_flight(tmp_path):
    """SIGKILL at ten random moments: the same final files, and repeated calls only for what was in flight."""
    concurrency, n, rng = 16, 400, random.Random(3)
    rows = write_jsonl(tmp_path / "p.jsonl", problems(n))
    with ChatServer(lambda question, before, sent: solved(question), latency=0.02) as server:
        config = write_pipeline(tmp_path, [teacher(endpoint(server.url, concurrency=concurrency))], [generate(rows)])
        # Forked from a process that has imported everything, a run starts at once.
        code = (
            "import os, sys\nfrom dqjax.data.pipeline import read_pipeline, run_pipeline\n"
            f"config, steps = read_pipeline({config!r})\n"
            "for line in sys.stdin:\n"
            "    pid = os.fork()\n"
            "    if not pid:\n"
            "        run_pipeline(config, steps)\n        os._exit(0)\n"
            "    print(pid, flush=True)\n    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)\n"
        )
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
            for _ in range(10):
                wanted = server.total + rng.randrange(1, 30)
                process.stdin.write("run\n")
                process.stdin.flush()
                pid = int(process.stdout.readline())
                deadline = time.monotonic() + 30
                while server.total < wanted and time.monotonic() < deadline:
                    time.sleep(0.001)
                time.sleep(rng.random() * 0.02)
                os.kill(pid, signal.SIGKILL)
                assert int(process.stdout.readline()) == -signal.SIGKILL
                assert not (tmp_path / "out/generate.jsonl").exists()
            process.stdin.write("run\n")
            process.stdin.flush()
            process.stdout.readline()
            assert int(process.stdout.readline()) == 0
            process.stdin.close()
        assert server.total - n <= 10 * concurrency
        assert len(server.calls) == n
        with ChatServer(lambda question, before, sent: solved(question)) as other:
            whole = run(tmp_path / "whole", [teacher(endpoint(other.url))], [generate(rows)])
    assert timeless(tmp_path / "out/generate.jsonl") == timeless(whole / "generate.jsonl")
    assert len(read_jsonl(whole / "generate.jsonl")) == n


def test_a_rerun_asks_nothing_and_a_changed_question_only_itself(tmp_path):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(20))
    with ChatServer(lambda question, before, sent: solved(question)) as server:
        teachers = [teacher(endpoint(server.url))]
        out = run(tmp_path, teachers, [generate(rows, chains=2)])
        assert server.total == 40 and len(read_jsonl(out / "generate.jsonl")) == 40
        (out / "generate.jsonl").unlink()
        before = (out / "generate.journal.jsonl").read_bytes()
        run(tmp_path, teachers, [generate(rows, chains=2)])
        assert server.total == 40 and (out / "generate.journal.jsonl").read_bytes() == before
        write_jsonl(tmp_path / "p.jsonl", problems(21))
        run(tmp_path, teachers, [generate(rows, chains=2)])
        assert server.total == 42
        run(tmp_path, [teacher(endpoint(server.url + "/"), name="t")], [generate(rows, chains=3)])
        assert server.total == 63


def test_the_budget_is_hard_and_has_its_own_exit_code(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(50))
    with ChatServer(lambda question, before, sent: Say("7", tokens=(20, 30))) as server:
        step = generate(rows, sampling={"max_tokens": 30})
        path = write_pipeline(tmp_path, [teacher(endpoint(server.url))], [step], max_total_tokens=1000)
        assert main(["pipeline", "--config", path]) == 3
        assert "raise max_total_tokens" in capsys.readouterr().err
        first = server.total
        assert 50 * first <= 1000 and first > 10
        assert main(["pipeline", "--config", path]) == 3
        assert server.total == first  # what is spent stays spent
        assert not (tmp_path / "out/generate.jsonl").exists()
        assert main(["pipeline", "--config", path, "max_total_tokens=100000"]) == 0
        assert server.total == 50


def test_lost_answers_count_with_all_they_could_have_cost(tmp_path):
    with ChatServer(lambda question, before, sent: Fail("cut")) as server:
        rows = write_jsonl(tmp_path / "p.jsonl", problems(1))
        teachers = [teacher(endpoint(server.url), attempts=2)]
        out = run(tmp_path, teachers, [generate(rows, sampling={"max_tokens": 100})])
        with Journal(out / "generate.journal.jsonl") as journal:
            assert journal.spent > 200 and len(journal) == 0


def test_budget_waits_for_calls_in_flight():
    async def main():
        budget = Budget(100)
        await budget.reserve(60)
        second = asyncio.create_task(budget.reserve(60))
        await asyncio.sleep(0.01)
        assert not second.done()
        budget.settle(60, 10)
        await second
        budget.settle(60, 60)
        with pytest.raises(BudgetSpent, match="70 of 100 tokens are spent"):
            await budget.reserve(31)

    asyncio.run(main())


def test_bucket_spreads_units_over_the_minute():
    now = [0.0]
    bucket = Bucket(60, burst=1.0, now=lambda: now[0])
    assert [bucket.delay(1) for _ in range(5)] == [0, 0, 1, 2, 3]
    now[0] = 100.0
    assert bucket.delay(1) == 0
    tokens = Bucket(6000, burst=0.0, now=lambda: now[0])
    tokens.delay(100)
    tokens.settle(100)
    assert tokens.delay(1) == pytest.approx(2.0)


def test_requests_keep_to_their_rate(tmp_path):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(15))
    with ChatServer(lambda question, before, sent: solved(question)) as server:
        started = time.monotonic()
        run(tmp_path, [teacher(endpoint(server.url, requests_per_minute=600))], [generate(rows)])
        assert time.monotonic() - started > 0.35  # a second's worth goes at once
        assert server.total == 15


def test_concurrency_is_bounded_and_used(tmp_path):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(60))
    with ChatServer(lambda question, before, sent: solved(question), latency=0.05) as server:
        run(tmp_path, [teacher(endpoint(server.url, concurrency=7))], [generate(rows)])
        assert server.most_in_flight == 7


def test_a_prompt_larger_than_all_buffers_arrives_whole(tmp_path, monkeypatch):
    """Where a request cannot be sent at once, the rest of it waits (Python 3.11; newer ones leave that to aiohttp)."""
    waited, resume = [], dqjax.data.endpoint._resume
    monkeypatch.setattr(dqjax.data.endpoint, "_resume", lambda *args: waited.append(1) or resume(*args))
    text = "What is 1 plus 1? " + "x" * 8_000_000
    rows = write_jsonl(tmp_path / "p.jsonl", [{"id": f"p{i}", "prompt": f"{text} {i}"} for i in range(3)])
    sent = []
    with ChatServer(lambda question, before, body: sent.append(len(question)) or solved(question)) as server:
        out = run(tmp_path, [teacher(endpoint(server.url))], [generate(rows)])
    assert len(read_jsonl(out / "generate.jsonl")) == 3 and sent == [len(text) + 2] * 3
    assert waited or sys.version_info >= (3, 12)


def test_endpoints_share_the_work_and_a_dead_one_does_not_swallow_it(tmp_path):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(200))
    with (
        ChatServer(lambda q, b, s: solved(q), latency=0.01) as one,
        ChatServer(lambda q, b, s: solved(q), latency=0.01) as two,
    ):
        places = [
            endpoint(one.url, concurrency=4),
            endpoint(two.url, concurrency=12),
            endpoint("http://127.0.0.1:9/v1", concurrency=4),
        ]
        out = run(tmp_path, [teacher(*places)], [generate(rows)])
        assert len(read_jsonl(out / "generate.jsonl")) == 200
        assert one.total + two.total == 200 and 1.5 < two.total / one.total < 6


def test_retry_after_rests_the_endpoint(tmp_path):
    times = []

    def script(question, before, sent):
        times.append(time.monotonic())
        return Fail("429", "0.6") if len(times) == 1 else solved(question)

    rows = write_jsonl(tmp_path / "p.jsonl", problems(10))
    with ChatServer(script) as server:
        out = run(tmp_path, [teacher(endpoint(server.url, concurrency=1))], [generate(rows)])
        assert len(read_jsonl(out / "generate.jsonl")) == 10 and server.total == 11
    assert times[1] - times[0] > 0.55


def test_keys_come_from_the_environment_and_appear_nowhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEST_KEY", "sk-very-secret")
    rows = write_jsonl(tmp_path / "p.jsonl", problems(2))
    with ChatServer(lambda q, b, s: solved(q)) as server:
        run(tmp_path, [teacher(endpoint(server.url, key_env="TEST_KEY"))], [generate(rows)])
        assert b"Bearer sk-very-secret" in server.headers
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert files and all(b"sk-very" not in data for data in files)
    assert "sk-very" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_wrong_key_or_model_ends_the_run(tmp_path, status, capsys):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(30))
    with ChatServer(lambda q, b, s: Fail(status)) as server:
        path = write_pipeline(tmp_path, [teacher(endpoint(server.url, concurrency=4))], [generate(rows)])
        assert main(["pipeline", "--config", path]) == 2
        assert "check url, model and the key in OPENAI_API_KEY" in capsys.readouterr().err
        assert server.total <= 8


def test_estimate_scales_the_first_rows_and_pays_for_nothing_twice(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(200))
    with ChatServer(lambda q, b, s: Say("<think>\nx\n</think>\n\n7", tokens=(100, 50))) as server:
        place = endpoint(server.url, price_in=1.0, price_out=2.0, concurrency=40)
        path = write_pipeline(tmp_path, [teacher(place)], [generate(rows, chains=2), {"stage": "verify"}])
        assert main(["pipeline", "--config", path, "--estimate"]) == 0
        said = capsys.readouterr().out
        assert "20 of 200 rows" in said and "400 calls" in said and "40,000 + 20,000 tokens" in said
        assert "0.08 money" in said
        assert server.total == 40 and not (tmp_path / "out/generate.jsonl").exists()
        assert main(["pipeline", "--config", path]) == 0
        assert server.total == 400


def test_estimate_takes_a_few_rows_wherever_a_step_reads_them_all(tmp_path, capsys):
    """The second step that asks reads the file too, not what the first one left; the split would find too few rows."""
    rows = write_jsonl(tmp_path / "p.jsonl", problems(200))
    with ChatServer(lambda q, b, s: Say("7", tokens=(10, 5))) as server:
        quality = {"stage": "pairs", "kind": "quality", "teacher": "t", "input": rows}
        steps = [generate(rows), {"stage": "split", "validation": 100}, quality]
        path = write_pipeline(tmp_path, [teacher(endpoint(server.url))], steps)
        assert main(["pipeline", "--config", path, "--estimate"]) == 0
        assert server.total == 60
    said = capsys.readouterr().out
    assert "20 of 200 rows" in said and "200 calls" in said and "400 calls" in said and "600 calls" in said


def test_estimated_hours_follow_slots_and_rates():
    slow = TeacherConfig(name="t", endpoints=[endpoint("http://h", concurrency=10)])
    used = {"t calls": 20, "t prompt_tokens": 2000, "t completion_tokens": 18000, "t seconds": 600}
    said = scaled_report([Trial("generate", used, 20, 20_000)], [slow])
    assert "20,000 calls" in said and "16.67 hours" in said
    limited = TeacherConfig(name="t", endpoints=[endpoint("http://h", concurrency=10, tokens_per_minute=10_000)])
    assert "33.33 hours" in scaled_report([Trial("generate", used, 20, 20_000)], [limited])


def test_estimate_without_rows(tmp_path):
    rows = write_jsonl(tmp_path / "p.jsonl", [])
    config, steps = read_pipeline(
        write_pipeline(tmp_path, [teacher(endpoint("http://127.0.0.1:9/v1"))], [generate(rows)])
    )
    assert "nothing to estimate" in estimate(config, steps)


def test_journal_survives_a_torn_line_and_refuses_a_second_writer(tmp_path):
    path = tmp_path / "j.jsonl"
    keys = [f"{i}" * 32 for i in range(3)]
    with Journal(path) as journal:
        for i, key in enumerate(keys):
            journal.put(key, 10 + i, {"text": "é" * 70_000 * i})
        with pytest.raises(ConfigError, match="another process"):
            Journal(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "0000')
    with Journal(path) as journal:
        assert journal.spent == 33 and len(journal) == 3
        assert [len(journal.get(key)["text"]) for key in keys] == [0, 70_000, 140_000]
        assert journal.get("f" * 32) is None
    assert path.read_bytes() == whole
    path.write_text('{"something": "else"}\n')
    with pytest.raises(ConfigError, match="no journal"):
        Journal(path)


def test_local_teacher_hands_over_what_waits_and_does_not_depend_on_the_batch(chat3):
    batches = []

    def make(sampling, prompts):
        prompts = list(prompts)
        batches.append(len(prompts))
        for ids, seed in prompts:
            yield chat3.encode([f"<think>\nseed {seed % 1000}\n</think>\n\n{len(ids)}"])[0] + [chat3.end_id], "stop"

    async def ask(n):
        tutor = LocalTeacher("tiny", "m", chat3, make, rows=8)
        requests = [
            Request((Message("user", f"What is {i}?"),), SamplingConfig(), k) for i in range(n) for k in range(2)
        ]
        replies = await asyncio.gather(*map(tutor.ask, requests))
        await tutor.close()
        return [(r.text, r.reasoning, r.finish) for r in replies]

    ten = asyncio.run(ask(10))
    assert batches == [20]  # the engine keeps its rows busy; what waits is bounded by `parallel`
    assert asyncio.run(ask(3)) == ten[:6]
    assert len({reasoning for _, reasoning, _ in ten}) > 15 and all(r.startswith("seed ") for _, r, _ in ten)


def test_local_teacher_passes_errors_on(chat3):
    def broken(sampling, prompts):
        raise ValueError("no such luck")

    async def ask():
        await LocalTeacher("tiny", "m", chat3, broken, rows=8).ask(Request((Message("user", "x"),), SamplingConfig()))

    with pytest.raises(ValueError, match="no such luck"):
        asyncio.run(ask())


def test_mistakes_in_a_pipeline_file(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(2))
    good = teacher(endpoint("http://127.0.0.1:9/v1"))
    for teachers, steps, said in [
        ([good], [generate(rows, chians=2)], "steps[0] (generate): chians: unknown key; did you mean chains?"),
        ([good], [{"stage": "genrate"}], "there is no stage 'genrate'"),
        ([good], [{"stage": "generate", "teachers": ["t"]}], "the first step needs an input"),
        ([good], [generate(rows), generate(rows)], "two steps are called 'generate'"),
        ([good], [generate(rows), {"stage": "verify", "input": "x"}], "input 'x' is no earlier step (generate)"),
        ([good], [{"stage": "generate", "teachers": ["x"], "input": rows}], "no teacher is called 'x'; there are t"),
        ([good, good], [generate(rows)], "two have the same name"),
        ([{"name": "t"}], [generate(rows)], "expected either endpoints or local"),
        ([teacher(endpoint("host:80"))], [generate(rows)], "expected http://"),
        ([good], [generate("none.jsonl")], "no data file at none.jsonl"),
        ([good], [generate(rows, prompt="nope")], "no prompt 'nope'; shipped are"),
        ([good], [{"stage": "verify", "by": "judge", "input": rows}], "name the teacher that judges"),
    ]:
        path = write_pipeline(tmp_path, teachers, steps)
        assert main(["pipeline", "--config", path]) == 2
        assert said in capsys.readouterr().err
    path = write_pipeline(tmp_path, [good], [generate(rows)])
    assert main(["verify", "--config", path]) == 2
    assert "has no step of the stage verify" in capsys.readouterr().err
    assert main(["generate", "--config", path, "--shard", "3/3"]) == 2
    assert "expected i/n" in capsys.readouterr().err


def test_overrides_reach_steps(tmp_path):
    path = write_pipeline(tmp_path, [teacher(endpoint("http://127.0.0.1:9/v1"))], [generate("p.jsonl")])
    config, steps = read_pipeline(path, ["out=x", "generate.chains=3", "generate.sampling.temperature=0"])
    assert config.out == "x" and steps[0].config.chains == 3 and steps[0].config.sampling.temperature == 0
    assert str(steps[0].output) == "x/generate.jsonl"
