"""Published forms, and what is refused, with its place."""

import base64
import json
import pickle
import zlib

import pytest

from dqjax.config import ConfigError, load, validate
from dqjax.eval.benchmarks import BENCHMARKS, read_problems
from dqjax.eval.config import EvalConfig
from dqjax.rewards.correct import grader_of


def config(benchmark, file=None, **more):
    values = {"benchmark": str(benchmark), "file": None if file is None else str(file), **more}
    return validate(EvalConfig, values, where="test")


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_aime_in_both_spellings(examples):
    a, b = read_problems(config("aime2024", examples / "aime2024.jsonl"))
    assert (a.id, a.answer, b.id, b.answer) == ("60", "24", "2024-II-4", "142")
    assert a.question.endswith("put your final answer within \\boxed{}.") and "$2^{10}$" in a.question


def test_math500(examples):
    problems = read_problems(config("math500", examples / "math500.jsonl"))
    assert [p.difficulty for p in problems] == [1.0, 2.0, 5.0] and problems[0].answer == r"2\sqrt{2}"


def test_gpqa_choices_are_shuffled_by_seed_each_question_by_itself(examples):
    def read(**more):
        return read_problems(config("gpqa_diamond", examples / "gpqa_diamond.csv", **more))

    first, again, other = read(seed=1), read(seed=1), read(seed=2)
    assert [p.to_row() for p in first] == [p.to_row() for p in again]
    assert len({tuple(read(seed=s)[0].extra["choices"]) for s in range(20)}) > 5
    assert read(seed=1, limit=1)[0].extra["choices"] == first[0].extra["choices"]
    assert [p.id for p in other] == ["recAAA", "recBBB"]
    for problems in (first, other):
        for p, right in zip(problems, ("1 s", "Hydrogen")):
            assert p.extra["choices"]["ABCD".index(p.answer)] == right
            assert f"{p.answer}) {right}" in p.question
            assert grader_of(p) == "answer"
    letters = [read(seed=s)[1].answer for s in range(200)]
    assert min(letters.count(x) for x in "ABCD") > 25  # no position is favoured


def test_livecodebench_in_both_forms_with_packed_tests(examples):
    stdin, call = read_problems(config("livecodebench", examples / "livecodebench.jsonl"))
    assert stdin.extra["tests"] == {
        "form": "stdin",
        "cases": [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5\n", "output": "10\n"}],
    }
    assert call.extra["tests"]["function"] == "double" and len(call.extra["tests"]["cases"]) == 2
    assert (stdin.difficulty, call.difficulty) == (1.0, 3.0)
    assert "# YOUR CODE HERE" in stdin.question and "class Solution:" in call.question
    assert {grader_of(p) for p in (stdin, call)} == {"code"}


def test_livecodebench_dates(examples):
    def ids(first, last):
        return [
            p.id
            for p in read_problems(config("livecodebench", examples / "livecodebench.jsonl", released=[first, last]))
        ]

    assert ids("2023-05-01", "2024-05-31") == ["example_a", "example_b"]
    assert ids("2023-06-03", "2023-06-03") == ["example_a"]
    with pytest.raises(ConfigError, match="no problems in these dates"):
        ids("2025-01-01", "2025-12-31")
    with pytest.raises(ConfigError, match="released: expected days"):
        ids("May 2023", "2024-05-31")
    with pytest.raises(ConfigError, match="a first and a last day"):
        config("livecodebench", released=["2024-01-01"])


def test_a_pickle_in_a_file_is_never_executed(examples, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    row = json.loads((examples / "livecodebench.jsonl").read_text().splitlines()[0])
    for value in (Attack(), [1], {"a": 1}):
        row["private_test_cases"] = base64.b64encode(zlib.compress(pickle.dumps(value))).decode()
        with pytest.raises(ConfigError, match=":1: private_test_cases: neither JSON nor packed tests"):
            read_problems(config("livecodebench", write(tmp_path / "x.jsonl", [row])))
    assert not (tmp_path / "owned").exists()


def test_humaneval(examples):
    (problem,) = read_problems(config("humaneval", examples / "humaneval.jsonl"))
    assert problem.extra["tests"]["function"] == "total" and grader_of(problem) == "code"


def test_plain_files_of_any_training_form(tmp_path):
    rows = [
        {"question": "1+1?", "answer": 2},
        {"id": "b", "problem": "2+2?", "answer": "4", "metadata": {"source_dataset": "chain_sum"}},
        {"id": "c", "messages": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]},
        {"id": "d", "prompt": "write", "tests": {"form": "stdin", "cases": []}},
    ]
    problems = read_problems(config(write(tmp_path / "x.jsonl", rows), instruction="Be brief.", system="You add."))
    assert [p.answer for p in problems] == ["2", "4", "6", None]
    assert [grader_of(p) for p in problems] == ["answer", "tasks", "answer", "code"]
    assert all([m.role for m in p.messages] == ["system", "user"] for p in problems)
    assert problems[0].messages[1].content == "1+1?\n\nBe brief."


def test_reasoning_gym_suites(tmp_path):
    pytest.importorskip("reasoning_gym")
    tasks = [
        {"task": "chain_sum", "seed": 5, "size": 3, "columns": {"difficulty": "metadata.num_terms"}},
        {"task": "gcd", "seed": 5, "size": 2},
    ]
    problems = read_problems(config("tasks", tasks=tasks))
    assert [p.source for p in problems] == ["chain_sum"] * 3 + ["gcd"] * 2
    assert all(grader_of(p) == "tasks" for p in problems) and problems[0].difficulty is not None
    with pytest.raises(ConfigError, match="name its sources under tasks"):
        read_problems(config("tasks"))


AIME = {"id": "1", "problem": "p", "answer": "1"}
MATH = {"unique_id": "1", "problem": "p", "answer": "1", "level": 3, "subject": "s"}


@pytest.mark.parametrize(
    ("benchmark", "rows", "messages"),
    [
        ("aime2024", [AIME, {"id": "2", "problem": "p"}], [":2: no column 'answer'"]),
        ("aime2024", [AIME, AIME], [":2: id '1' is that of", ":1 too"]),
        ("aime2024", [AIME | {"answer": "1000"}], [":1: answer: expected a whole number from 0 to 999, got '1000'"]),
        ("aime2024", [AIME | {"answer": 1.5}], [":1: answer: expected str or int, got float 1.5"[:40]]),
        ("aime2024", [AIME, "{bad"], [":2: not valid JSON"]),
        ("aime2024", [AIME, "", "[1]"], [":3: expected an object with columns, got list"]),
        ("aime2024", [AIME | {"problem": ""}], [":1: problem: empty"]),
        ("aime2024", [{"id": "1", "problm": "p", "answer": "1"}], [":1: no column 'problem'; is it 'problm'?"]),
        ("math500", [MATH, MATH | {"unique_id": "2", "level": "3"}], [":2: level: expected int, got str '3'"]),
        ("math500", [MATH | {"level": 9}], [":1: level: expected 1 to 5, got 9"]),
        ("math500", [MATH | {"level": True}], [":1: level: expected int, got bool"]),
        (
            "math500",
            [MATH | {"answer": None}, MATH | {"problem": 3}],
            [":1: no column 'answer'", ":2: problem: expected str, got int"],
        ),
    ],
)
def test_bad_rows_are_refused_with_their_lines(tmp_path, benchmark, rows, messages):
    with pytest.raises(ConfigError) as error:
        read_problems(config(benchmark, write(tmp_path / "x.jsonl", rows)))
    assert all(message in str(error.value) for message in messages), error.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"public_test_cases": "nonsense!"}, "public_test_cases: neither JSON nor packed tests"),
        ({"public_test_cases": '[{"input": "1"}]'}, "public_test_cases[0]: expected input, output and testtype"),
        ({"public_test_cases": '{"a": 1}'}, "public_test_cases: expected a list of tests, got dict"),
        ({"contest_date": "yesterday"}, "contest_date: expected a day"),
        (
            {"public_test_cases": '[{"input": "1", "output": "1", "testtype": "functional"}]'},
            "testtype: expected all stdin or all functional",
        ),
    ],
)
def test_bad_livecodebench_rows(examples, tmp_path, change, message):
    row = json.loads((examples / "livecodebench.jsonl").read_text().splitlines()[0])
    with pytest.raises(ConfigError) as error:
        read_problems(config("livecodebench", write(tmp_path / "x.jsonl", [row | change])))
    assert f":1: {message}" in str(error.value)


def test_bad_plain_rows(tmp_path):
    rows = [
        {"question": "a", "answer": "1", "id": 1},
        {"question": "b"},
        {"question": "", "answer": "1"},
        {"question": "c", "answer": "2", "id": 1},
        {"x": 1},
    ]
    with pytest.raises(ConfigError) as error:
        read_problems(config(write(tmp_path / "x.jsonl", rows)))
    for message in (":2: no reference answer", ":3: ", ":4: id '1' is that of", ":5: "):
        assert message in str(error.value)


def test_bad_csv_rows_name_the_line_where_they_begin(examples, tmp_path):
    text = (examples / "gpqa_diamond.csv").read_text().replace(",Hydrogen,", ",,")
    path = tmp_path / "gpqa.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"gpqa.csv:4: Correct Answer: empty"):
        read_problems(config("gpqa_diamond", path))


def test_many_complaints_are_cut(tmp_path):
    with pytest.raises(ConfigError, match="and 15 more"):
        read_problems(config("aime2024", write(tmp_path / "x.jsonl", [{"id": str(i)} for i in range(25)])))


def test_unknown_names(tmp_path):
    with pytest.raises(ConfigError, match="did you mean math500"):
        read_problems(config("math50"))
    with pytest.raises(ConfigError, match="no data file at"):
        read_problems(config("math500", tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="no data file at"):
        read_problems(config("gpqa_diamond", tmp_path / "none.csv"))
    with pytest.raises(ConfigError, match="give its file with --file"):
        read_problems(config("math500"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no problems"):
        read_problems(config(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("name", ["aime2024", "math500", "gpqa_diamond", "livecodebench_v2"])
def test_published_settings(name):
    import pathlib

    path = pathlib.Path(__file__).parents[2] / "configs" / "eval" / "published" / f"{name}.yaml"
    settings = load(EvalConfig, path)
    assert settings.benchmark in BENCHMARKS and path.read_text().startswith("# python -m dqjax.eval")
    assert (settings.temperature, settings.top_p, settings.top_k, settings.max_new_tokens) == (0.6, 0.95, 20, 32768)
    assert settings.samples >= {"aime2024": 32, "gpqa_diamond": 8}.get(settings.benchmark, 4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"samples": 2, "k": [4]}, "k: pass@4 needs"),
        ({"budgets": [0]}, "budgets"),
        ({"sample": 1}, "did you mean samples"),
        ({"k": [0]}, "k: pass@0"),
    ],
)
def test_configs_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        config("x.jsonl", **values)
