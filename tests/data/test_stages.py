"""Each stage on rows whose outcome is known by hand, and all of them against one scripted teacher."""

import collections
import json
import math
import pathlib

import datasets
import pytest

from dqjax.config import ConfigError
from dqjax.data.__main__ import main
from dqjax.data.chain_rows import DIFFICULTY, VERBOSITY, record_of
from dqjax.data.config import SourceConfig
from dqjax.data.select import Config as SelectConfig
from dqjax.data.select import DrawConfig, choose, log_weight
from dqjax.data.sources import Rejected, read_records
from dqjax.data.stage import Shard
from dqjax.rewards.verbosity import StyleConfig
from tests.data.chat_server import ChatServer, Fail, Say
from tests.data.factory import (
    chain,
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

ONE = problems(1)[0]


def labelled(k, verbosity, difficulty, **more):
    labels = {VERBOSITY: verbosity, DIFFICULTY: difficulty}
    return chain(ONE, k, thought=f"way {k}", correct=True, **{n: v for n, v in labels.items() if v is not None}, **more)


def step(folder, rows, **settings):
    """One step over rows, without a teacher; its output rows."""
    out = run(folder, [], [{"input": write_jsonl(folder / "in.jsonl", rows), **settings}])
    return read_jsonl(out / f"{settings['stage']}.jsonl")


def reasons(folder, name):
    return collections.Counter(row["reason"] for row in read_jsonl(folder / f"out/{name}.rejected.jsonl"))


# verify


def test_verify_by_graders(tmp_path):
    rows = [chain(p) for p in problems(3)] + [chain(problems(4)[3], solution="9")]
    rows += [
        {k: v for k, v in chain(problems(5)[4]).items() if k != "answer"},
        {"id": "bare", "prompt": "x?", "answer": "1"},
    ]
    out = step(tmp_path, rows, stage="verify")
    assert [row.get("correct") for row in out] == [True, True, True, False, None]
    said = counts(tmp_path / "out", "verify")
    assert (said["correct"], said["incorrect"], said["correctness missing"], said["rejected"]) == (3, 1, 1, 1)
    assert reasons(tmp_path, "verify") == {"no chain to verify": 1}
    note = next(e for e in out[0]["provenance"] if e["field"] == "correct")
    assert note["stage"] == "verify" and note["by"] == "grader answer"
    assert len(step(tmp_path / "kept", rows, stage="verify", keep="correct")) == 3


def test_verify_by_judge_takes_only_verdicts(tmp_path):
    said = {"0": "1", "1": "0", "2": "probably right", "3": "2", "4": "Verdict: 1"}

    def script(question, before, sent):
        return Say(said[question.split("What is ")[1][0]])

    rows = [chain(p) for p in problems(5)] + [{k: v for k, v in chain(problems(6)[5]).items() if k != "answer"}]
    with ChatServer(script) as server:
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        out = run(
            tmp_path, [teacher(endpoint(server.url))], [{"stage": "verify", "by": "judge", "judge": "t", "input": path}]
        )
        assert server.total == 5
    made = read_jsonl(out / "verify.jsonl")
    assert [row.get("correct") for row in made] == [True, False, None, None, True, None]
    assert counts(out, "verify")["correctness missing"] == 3
    (note,) = [e for e in made[0]["provenance"] if e["field"] == "correct"]
    assert note["by"] == "m" and note["prompt"] == "judge@1" and json.loads(note["sampling"])["temperature"] == 0
    assert note["time"].startswith("20")


def test_verify_auto_asks_the_judge_only_where_graders_fail(tmp_path):
    rows = [chain(ONE), chain(problems(2)[1], solution="it depends") | {"grader": "code"}]
    with ChatServer(lambda q, b, s: Say("1")) as server:
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        out = run(tmp_path, [teacher(endpoint(server.url))], [{"stage": "verify", "judge": "t", "input": path}])
        assert server.total == 1
    assert [row["correct"] for row in read_jsonl(out / "verify.jsonl")] == [True, True]


# annotate


def test_nonsense_never_makes_a_score(tmp_path):
    nonsense = [
        "great!",
        "10",
        "3 or 4",
        "-1",
        "",
        "4.5",
        "<think>\n4",
        "I would say about 7 of them",
        "six",
        "0 1",
        "null",
        "[5]x",
    ]

    def script(question, before, sent):
        text = nonsense[int(question.split("What is ")[1].split()[0]) % len(nonsense)]
        return Say(text) if text else Fail("empty")

    rows = [chain(p, correct=True) for p in problems(24)]
    with ChatServer(script) as server:
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        steps = [{"stage": "annotate", "judge": "t", "input": path}, {"stage": "stats"}]
        out = run(tmp_path, [teacher(endpoint(server.url), attempts=2)], steps)
    made = read_jsonl(out / "annotate.jsonl")
    assert len(made) == 24
    assert all(name not in row for row in made for name in (VERBOSITY, DIFFICULTY, "Logical_Correctness", "difficulty"))
    said = counts(out, "annotate")
    assert said[f"{VERBOSITY} missing"] == 24 and f"{VERBOSITY} given" not in said
    assert json.loads((out / "stats.json").read_text())["chains"]["counts"]["RV missing"] == 24
    assert "100.0%" in (out / "stats.html").read_text()


def test_annotate_one_call_a_label(tmp_path):
    def script(question, before, sent):
        system = sent["messages"][0]["content"]
        return Say("6" if "Verbosity" in system else "Difficulty: 3" if "Difficulty" in system else "1")

    with ChatServer(script) as server:
        path = write_jsonl(tmp_path / "in.jsonl", [chain(p) for p in problems(4)])
        out = run(tmp_path, [teacher(endpoint(server.url))], [{"stage": "annotate", "judge": "t", "input": path}])
        assert server.total == 12
    for row in read_jsonl(out / "annotate.jsonl"):
        assert (row[VERBOSITY], row[DIFFICULTY], row["Logical_Correctness"], row["difficulty"]) == (6, 3, 1, 3)
        assert {e["field"]: e["prompt"] for e in row["provenance"]} == {
            VERBOSITY: "annotate_verbosity@1", DIFFICULTY: "annotate_difficulty@1", "Logical_Correctness": "annotate_correctness@1",
        }  # fmt: skip
        assert record_of(row).difficulty == 3


def test_votes_give_median_and_spread_and_need_a_majority(tmp_path):
    said = {0: ["2", "7", "3", "4", "9"], 1: ["5", "?", "8", "?", "6"], 2: ["5", "?", "?", "?", "8"]}
    rows = [chain(p) for p in problems(3)]
    with ChatServer(lambda q, b, s: Say(said[int(q.split("What is ")[1][0])][s["seed"]])) as server:
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        settings = {"votes": 5, "sampling": {"temperature": 0.7}, "labels": ["verbosity"]}
        out = run(
            tmp_path, [teacher(endpoint(server.url))], [{"stage": "annotate", "judge": "t", "input": path, **settings}]
        )
        assert server.total == 15
    made = read_jsonl(out / "annotate.jsonl")
    assert [(row.get(VERBOSITY), row.get(f"{VERBOSITY}_spread")) for row in made] == [(4, 7), (6, 3), (None, None)]
    assert counts(out, "annotate")[f"{VERBOSITY} votes missing"] == 5


def test_labels_by_length(tmp_path):
    rows = [chain(problems(n)[n - 1], thought="word " * n) for n in (1, 10, 100)]
    scale = {"shortest": 1, "longest": 100, "few": 1, "many": 10}
    out = step(tmp_path, rows, stage="annotate", length_rule=scale, labels=["verbosity", "difficulty"])
    assert [row[VERBOSITY] for row in out] == [0, 4.5, 9] and {row[DIFFICULTY] for row in out} == {0}


# refine and lengths


def test_refine_expands_simplifies_keeps_and_gives_up(tmp_path):
    """0 medium, 1 easy, 2 hard and right at the third attempt, 3 hard and never right, 4 nonsense, 5 incorrect."""
    ratings = {0: "medium", 1: "Easy.", 2: "hard", 3: "hard", 4: "whatever"}
    asked = collections.Counter()

    def script(question, before, sent):
        i = int(question.split("What is ")[1].split()[0])
        system = sent["messages"][0]["content"]
        if "You play a student" in system:
            return Say(ratings[i])
        asked["expand" if "add what is left out" in system else "simplify"] += 1
        right = i == 1 or (i == 2 and sent["seed"] == 2)
        return Say(f"<think>\nbetter {i}\n</think>\n\n{2 * i if right else 'nothing'}")

    rows = [chain(p, correct=True) for p in problems(5)] + [chain(problems(6)[5], solution="1", correct=False)]
    with ChatServer(script) as server:
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        settings = {"critic": "t", "rethinker": "t", "attempts": 3}
        out = run(tmp_path, [teacher(endpoint(server.url))], [{"stage": "refine", "input": path, **settings}])
    made = {row["id"]: row for row in read_jsonl(out / "refine.jsonl")}
    assert asked == {"expand": 1, "simplify": 6}
    assert made["p0#t/0"]["suitable"] is True and made["p1#t/0"]["suitable"] is False
    refined = made["p1#t/0~refined"]
    assert refined["refined_from"] == "p1#t/0" and refined["suitable"] and refined["correct"]
    assert refined["messages"][-1] == {"role": "assistant", "content": "2", "reasoning_content": "better 1"}
    assert "p2#t/0~refined" in made and "p3#t/0~refined" not in made and made["p3#t/0"]["suitable"] is False
    assert "suitable" not in made["p4#t/0"] and "suitable" not in made["p5#t/0"]
    assert reasons(tmp_path, "refine") == {"rewritten chain: no longer reaches the reference answer": 1}
    said = counts(out, "refine")
    assert said["critique missing"] == 1 and said["verified at attempt 3"] == 1
    kept = step(tmp_path / "select", list(made.values()), stage="select")
    assert {row["id"] for row in kept} == {"p0#t/0", "p1#t/0~refined", "p2#t/0~refined", "p4#t/0"}


@pytest.mark.parametrize(("stage", "direction"), [("long2short", "shorter"), ("short2long", "longer")])
def test_lengths(tmp_path, stage, direction):
    """0 is rewritten as asked; 1 comes back as long as before; 2 comes back wrong."""

    def script(question, before, sent):
        i = int(question.split("What is ")[1].split()[0])
        words = 10 if i == 1 else 2 if direction == "shorter" else 30
        return Say(f"<think>\n{'step ' * words}\n</think>\n\n{99 if i == 2 else 2 * i}")

    rows = [chain(p, thought="step " * 10, correct=True, **{VERBOSITY: 5}) for p in problems(3)]
    with ChatServer(script) as server:
        path = write_jsonl(tmp_path / "in.jsonl", rows)
        settings = {"teacher": "t", "attempts": 2}
        out = run(tmp_path, [teacher(endpoint(server.url))], [{"stage": stage, "input": path, **settings}])
        assert server.total == 5
    made = read_jsonl(out / f"{stage}.jsonl")
    assert [row["id"] for row in made] == [f"p0#t/0~{direction}", "p1#t/0", "p2#t/0"]
    assert VERBOSITY not in made[0] and VERBOSITY in made[1]  # the label was the other chain's
    assert len(reasons(tmp_path, stage)) == 2


# select


def test_filters_say_why(tmp_path):
    rows = [
        labelled(0, 5, 5), labelled(1, 1, 5), labelled(2, 5, 9), labelled(3, None, 5), labelled(4, 5, 5) | {"correct": False},
        {k: v for k, v in labelled(5, 5, 5).items() if k != "correct"}, labelled(6, 5, 5, suitable=False), labelled(7, "5", 5),
    ]  # fmt: skip
    out = step(tmp_path, rows, stage="select", verbosity=[2, 8], difficulty=[0, 8])
    assert [row["id"] for row in out] == ["p0#t/0"]
    assert reasons(tmp_path, "select") == {
        f"{VERBOSITY} out of range": 1, f"{DIFFICULTY} out of range": 1, f"{VERBOSITY} missing": 2, "incorrect": 1,
        "correctness missing": 1, "unsuitable for the student": 1,
    }  # fmt: skip
    assert len(step(tmp_path / "len", rows[:1], stage="select", length=[1, 3])) == 0
    assert len(step(tmp_path / "tok", [rows[0] | {"tokens": 7}], stage="select", tokens=[7, 7])) == 1


def test_the_draw_follows_the_formula():
    draw = DrawConfig(
        target=StyleConfig(verbosity=None, verbosity_at_0=1, verbosity_at_9=8, difficulty=4),
        difficulty_weight=0.5,
        temperature=2.0,
    )
    row = labelled(0, 6, 9)
    assert log_weight(row, draw) == pytest.approx(-((6 - 8) ** 2 + 0.5 * (9 - 4) ** 2) / (2 * 2.0**2))
    assert log_weight(labelled(0, None, 5), draw) is None
    config = SelectConfig(draw=draw)
    chains = [labelled(0, 3, 4), labelled(1, 8, 8), labelled(2, 4, 4)]
    weights = [math.exp(log_weight(row, draw)) for row in chains]
    drawn = collections.Counter()
    for i in range(4000):
        group = [row | {"id": f"{i}/{k}"} for k, row in enumerate(chains)]
        (kept,) = [out for out in choose(group, config) if isinstance(out, dict)]
        drawn[int(kept["id"][-1])] += 1
    for k in range(3):
        assert drawn[k] / 4000 == pytest.approx(weights[k] / sum(weights), abs=0.03)


def test_draw_and_cap_by_problem_wherever_the_rows_stand(tmp_path):
    rows = [labelled(k, 4, 4) | {"id": f"{p}/{k}", "problem_id": p} for k in range(4) for p in ("a", "b", "c")]
    out = step(tmp_path, rows, stage="select", draw={"per_problem": 3}, per_problem_cap=2)
    assert [row["problem_id"] for row in out] == ["a", "a", "b", "b", "c", "c"]
    assert reasons(tmp_path, "select") == {"not drawn": 3, "over the cap of its problem": 3}
    grouped = sorted(rows, key=lambda row: row["problem_id"])
    assert step(tmp_path / "grouped", grouped, stage="select", draw={"per_problem": 3}, per_problem_cap=2) == out


def test_missing_labels_can_stay_beside_the_drawn(tmp_path):
    rows = [labelled(0, 4, 4), labelled(1, None, 4)]
    assert len(step(tmp_path / "a", rows, stage="select", draw={})) == 1
    assert len(step(tmp_path / "b", rows, stage="select", draw={}, missing="keep")) == 2


def test_the_mixture_keeps_the_nearest_in_each_bin(tmp_path):
    rows = []
    for i, (verbosity, difficulty) in enumerate(
        [(1, 0), (5, 1), (2, 2.5), (4, 3), (9, 5), (5, 6), (5, 9), (1, 8), (3, None)]
    ):
        rows.append(labelled(i, verbosity, difficulty) | {"problem_id": f"p{i}", "id": f"r{i}"})
    out = step(tmp_path, rows, stage="select", mixture={"rows": [2, 1, 1], "target": {"verbosity": 4.0}})
    assert [row["id"] for row in out] == ["r1", "r2", "r3", "r5"]
    assert counts(tmp_path / "out", "select")["CD bin [3, 6)"] == 1
    assert reasons(tmp_path, "select") == {"its CD bin is full": 4, "RV or CD missing": 1}
    path = write_pipeline(
        tmp_path, [], [{"stage": "select", "input": str(tmp_path / "in.jsonl"), "mixture": {"rows": 1}}]
    )
    assert main(["select", "--config", path, "--shard", "0/2"]) == 2


# pairs


def test_right_against_wrong(tmp_path):
    rows = [chain(ONE, k, thought=f"way {k}", correct=c) for k, c in enumerate([True, True, False, False, None])]
    rows += [chain(problems(2)[1], correct=True), chain(problems(2)[1], 1, thought=None, solution="3", correct=False)]
    out = step(tmp_path, rows, stage="pairs", kind="correctness", per_problem=3)
    assert [row["id"] for row in out] == ["p0#t/0>p0#t/2", "p0#t/1>p0#t/3", "p0#t/0>p0#t/3"]
    assert reasons(tmp_path, "pairs") == {"no correctness pair": 1}
    made = record_of(out[0])
    assert made.chosen.reasoning == "way 0" and made.rejected.reasoning == "way 2" and made.problem == "p0"
    assert len(step(tmp_path / "many", rows, stage="pairs", kind="correctness", per_problem=99)) == 4


def test_near_against_far(tmp_path):
    rows = [
        labelled(0, 4, 4),
        labelled(1, 9, 9),
        labelled(2, 4.5, 4),
        labelled(3, None, 4),
        labelled(4, 9, 9) | {"correct": False},
    ]
    target = {"target": {"verbosity": 4.0}}
    (pair,) = step(tmp_path, rows, stage="pairs", kind="style", target=target, per_problem=5)
    assert pair["id"] == "p0#t/0>p0#t/1" and pair["distance"] == pytest.approx(50**0.5, abs=1e-3)


def test_cogpo_has_three_gaps_with_their_betas(tmp_path):
    rows = [
        chain(ONE, 0, thought="hard", correct=True, suitable=False),
        chain(ONE, 0, thought="simpler", correct=True, suitable=True)
        | {"id": "p0#t/0~refined", "refined_from": "p0#t/0"},
        chain(ONE, 2, thought="wrong", solution="9", correct=False),
    ]
    out = step(tmp_path, rows, stage="pairs", kind="cogpo")
    assert [(row["id"], row["gap"], row["beta"]) for row in out] == [
        ("p0#t/0~refined>p0#t/0", "small", 0.1), ("p0#t/0>p0#t/2", "medium", 0.2), ("p0#t/0~refined>p0#t/2", "large", 0.5),
    ]  # fmt: skip
    assert all(record_of(row).extra["beta"] == row["beta"] for row in out)


def test_quality_pairs_ask_twice(tmp_path):
    def script(question, before, sent):
        if "expert" in sent["messages"][0]["content"]:
            return Say("A long and good answer.", reasoning="Let me see." if "2" in question else None)
        return Say("A long and good answer." if "1" in question else "Dunno.")

    with ChatServer(script) as server:
        path = write_jsonl(tmp_path / "in.jsonl", problems(3))
        out = run(
            tmp_path,
            [teacher(endpoint(server.url))],
            [{"stage": "pairs", "kind": "quality", "teacher": "t", "input": path}],
        )
        assert server.total == 6
    (pair,) = read_jsonl(out / "pairs.jsonl")
    assert pair["chosen"][0]["content"] == "A long and good answer." and pair["rejected"][0]["content"] == "Dunno."
    assert {e["prompt"] for e in pair["provenance"]} == {"quality_high@1", "quality_low@1"}
    unlike = "the two prompts gave one answer with a chain and one without"  # no loss can compare these
    assert reasons(tmp_path, "pairs") == {"the two prompts gave the same answer": 1, unlike: 1}


# split, formats


def test_split_by_problem_in_all_formats(tmp_path):
    rows = [chain(p, k, thought=f"way {k}", metadata={"x": i}) for i, p in enumerate(problems(40)) for k in range(3)]
    rows += [
        chain(p | {"prompt": p["prompt"].upper()}, 9) | {"problem_id": f"again{i}", "id": f"again{i}"}
        for i, p in enumerate(problems(40))
    ]
    step(tmp_path, rows, stage="split", validation=0.25)
    out = tmp_path / "out"
    train, held = read_jsonl(out / "split.jsonl"), read_jsonl(out / "split.validation.jsonl")
    key = lambda row: row["messages"][0]["content"].upper()  # noqa: E731
    assert len(train) + len(held) == 160 and not {key(r) for r in train} & {key(r) for r in held}
    assert len({key(r) for r in held}) == 10 and "metadata" not in train[0]
    plain = read_jsonl(out / "split.messages.jsonl")
    assert plain[0]["messages"][1] == {"role": "assistant", "content": "<think>\nway 0\n</think>\n\n0"} and set(
        plain[0]
    ) == {"id", "messages"}
    assert [r["id"] for r in plain] == [r["id"] for r in train]
    for name in ("split", "split.validation", "split.messages"):
        loaded = datasets.load_dataset(
            "json", data_files=str(out / f"{name}.jsonl"), split="train", cache_dir=str(tmp_path / "hf")
        )
        assert loaded.num_rows == len(read_jsonl(out / f"{name}.jsonl"))
    again = [
        next(iter(read_records(SourceConfig(path=str(out / f"{name}.jsonl"))))) for name in ("split", "split.messages")
    ]
    assert again[0].messages == again[1].messages and again[0].messages[-1].reasoning == "way 0"


def test_split_refuses_an_empty_side(tmp_path):
    with pytest.raises(ConfigError, match="1 problems, of which 1 would be held out"):
        step(tmp_path, [chain(ONE)], stage="split", validation=1)


def test_parquet_in_and_out(tmp_path):
    rows = [chain(p, correct=True) for p in problems(5)]
    path = write_pipeline(tmp_path, [], [{"stage": "verify", "input": write_jsonl(tmp_path / "in.jsonl", rows)}])
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "in.parquet")
    assert (
        main(
            [
                "verify",
                "--config",
                path,
                "--input",
                str(tmp_path / "in.parquet"),
                "--output",
                str(tmp_path / "v.parquet"),
            ]
        )
        == 0
    )
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "v.parquet"), split="train", cache_dir=str(tmp_path / "hf")
    )
    assert loaded["correct"] == [True] * 5 and loaded["id"] == [row["id"] for row in rows]
    lone = [
        "select",
        "--input",
        str(tmp_path / "v.parquet"),
        "per_problem_cap=1",
        "--output",
        str(tmp_path / "s.jsonl"),
    ]
    assert main(lone) == 0 and len(read_jsonl(tmp_path / "s.jsonl")) == 5
    assert main(["select", "--input", str(tmp_path / "v.parquet")]) == 2
    assert main([*lone, "cap=1"]) == 2


def test_omnithought_goes_in_as_it_is(tmp_path):
    chains = [
        {"thought": "add", "solution": "7", "full_response": "x", "teacher": "R1", "thought_correctness_verify": True,
         "Reasoning_Verbosity": 4, "Cognitive_Difficulty": 2},
        {"thought": "add\n" * 9, "solution": "7", "teacher": "QwQ", "thought_correctness_verify": True, "Reasoning_Verbosity": 9,
         "Cognitive_Difficulty": 2},
        {"thought": "guess", "solution": "8", "teacher": "QwQ", "thought_correctness_verify": False, "Reasoning_Verbosity": 1,
         "Cognitive_Difficulty": 1},
        {"thought": "", "solution": "", "teacher": "QwQ"},
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "omni.jsonl", [{"id": "q", "question": "3+4?", "reasoning": chains}])
    steps = [
        {"stage": "collect", "sources": [path]},
        {"stage": "select", "draw": {"per_problem": 1, "temperature": 0.1, "target": {"verbosity": 4.0}}},
        {"stage": "pairs", "kind": "correctness", "input": "collect"},
    ]
    with pytest.raises(ConfigError, match="max_bad_share"):
        run(tmp_path, [], steps)
    steps[0]["max_bad_share"] = 0.5
    out = run(tmp_path, [], steps)
    (row,) = read_jsonl(out / "select.jsonl")
    assert row["id"] == "q#0" and row["teacher"] == "R1" and row[VERBOSITY] == 4 and row["correct"] is True
    assert len(read_jsonl(out / "pairs.jsonl")) == 1


# shards, resume


def solver(question, before, sent):
    i = int(question.split("What is ")[1].split()[0])
    return Say(f"<think>\ntwice\n</think>\n\n{2 * i if i % 5 else 1}")


def test_shards_merge_to_the_whole(tmp_path, capsys):
    rows = write_jsonl(tmp_path / "p.jsonl", [*problems(23), {"id": "bad", "prompt": 3}])
    steps = [
        {"stage": "generate", "teachers": ["t"], "chains": 2, "input": rows}, {"stage": "verify"},
        {"stage": "select", "draw": {}, "missing": "keep"},
    ]  # fmt: skip
    with ChatServer(solver) as server:
        whole = run(tmp_path / "whole", [teacher(endpoint(server.url))], steps)
        path = write_pipeline(tmp_path / "parts", [teacher(endpoint(server.url))], steps)
        out = tmp_path / "parts/out"
        for stage in ("generate", "verify", "select"):
            assert main(["merge", str(out / f"{stage}.jsonl")]) == 2
            for i in (2, 0, 3):
                assert main([stage, "--config", path, "--shard", f"{i}/4"]) == 0
            assert main(["merge", str(out / f"{stage}.jsonl")]) == 2
            assert "1 of 4 shards are not there yet" in capsys.readouterr().err
            assert main([stage, "--config", path, "--shard", "1/4"]) == 0
            assert main(["merge", str(out / f"{stage}.jsonl")]) == 0
            assert timeless(out / f"{stage}.jsonl") == timeless(whole / f"{stage}.jsonl")
            assert read_jsonl(out / f"{stage}.rejected.jsonl") == read_jsonl(whole / f"{stage}.rejected.jsonl")
            assert counts(out, stage) == counts(whole, stage)
        assert server.total == 92


@pytest.mark.parametrize(("rows", "count"), [(0, 3), (1, 3), (10, 3), (7, 7), (5, 9)])
def test_shards_partition(rows, count):
    bounds = [Shard(i, count).bounds(rows) for i in range(count)]
    assert bounds[0][0] == 0 and bounds[-1][1] == rows and all(a[1] == b[0] for a, b in zip(bounds, bounds[1:]))


def test_a_pipeline_goes_on_where_it_stopped(tmp_path):
    rows = write_jsonl(tmp_path / "p.jsonl", problems(6))
    steps = [{"stage": "generate", "teachers": ["t"], "input": rows}, {"stage": "verify"}, {"stage": "select"}]
    with ChatServer(solver) as server:
        out = run(tmp_path, [teacher(endpoint(server.url))], steps)
        times = {name: (out / f"{name}.jsonl").stat().st_mtime_ns for name in ("generate", "verify", "select")}
        run(tmp_path, [teacher(endpoint(server.url))], steps)
        assert times == {name: (out / f"{name}.jsonl").stat().st_mtime_ns for name in times}
        steps[2]["per_problem_cap"] = 1
        run(tmp_path, [teacher(endpoint(server.url))], steps)
        changed = {name for name in times if (out / f"{name}.jsonl").stat().st_mtime_ns != times[name]}
        assert changed == {"select"} and server.total == 6


def test_failures_do_not_stop_a_run_and_are_asked_again_on_demand(tmp_path):
    down = [True]
    rows = write_jsonl(tmp_path / "p.jsonl", problems(6))
    steps = [{"stage": "generate", "teachers": ["t"], "input": rows}, {"stage": "verify"}]
    with ChatServer(lambda q, b, s: Fail("400") if down[0] and "3 plus" in q else solver(q, b, s)) as server:
        out = run(tmp_path, [teacher(endpoint(server.url))], steps)
        assert len(read_jsonl(out / "verify.jsonl")) == 5 and counts(out, "generate")["failed"] == 1
        down[0] = False
        run(tmp_path, [teacher(endpoint(server.url))], steps)
        assert server.total == 6
        run(tmp_path, [teacher(endpoint(server.url))], steps, again=True)
        assert server.total == 7 and len(read_jsonl(out / "verify.jsonl")) == 6


def test_unusable_rows_are_reported_with_their_line(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(chain(ONE)) + "\nnot json\n" + json.dumps({"id": "x", "prompt": ""}) + "\n")
    out = run(tmp_path, [], [{"stage": "verify", "input": str(path)}])
    assert len(read_jsonl(out / "verify.jsonl")) == 1
    assert [row["id"] for row in read_jsonl(out / "verify.rejected.jsonl")] == [f"{path}:2", f"{path}:3"]
    assert not [r for r in read_records(SourceConfig(path=str(out / "verify.jsonl"))) if isinstance(r, Rejected)]


def test_the_report_needs_nothing_else(tmp_path):
    rows = [labelled(k, k, 9 - k, teacher="<b>bold</b>") for k in range(5)]
    out = run(tmp_path, [], [{"stage": "select", "verbosity": [1, 3], "input": write_jsonl(tmp_path / "in.jsonl", rows)},
                             {"stage": "stats", "title": "A & B", "input": str(tmp_path / "in.jsonl")}])  # fmt: skip
    page = (out / "stats.html").read_text()
    assert "A &amp; B" in page and "<b>bold" not in page and "http" not in page
    figures = json.loads((out / "stats.json").read_text())
    assert figures["chains"]["rv_cd"][9][0] == 1 and figures["chains"]["counts"]["chains"] == 5
    assert figures["steps"][0]["counts"]["rejected"] == 2 and "Reasoning_Verbosity out of range" in page
    assert pathlib.Path(out / "stats.png").stat().st_size > 5000
