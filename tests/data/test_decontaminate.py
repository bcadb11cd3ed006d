"""Benchmark problems and near-duplicates in data: planted copies are found, unrelated problems are not."""

import difflib
import json
import random

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from dqjax.config import ConfigError
from dqjax.data.__main__ import main
from dqjax.data.canonical import number_bag, tokens
from dqjax.data.collect import CollectConfig, collect
from dqjax.data.config import SourceConfig
from dqjax.data.decontaminate import (
    Benchmarks, DecontaminateConfig, bit_masks, decontaminate, indel_similarity, longest_common_subsequence,
)  # fmt: skip
from dqjax.data.near_duplicates import NearConfig, Signer, find_near_duplicates
from dqjax.data.records import parse_row
from dqjax.data.sources import read_rows
from tests.data.factory import read_jsonl, write_jsonl

BENCHMARK = [
    "Let $\\triangle ABC$ be a right triangle with legs $AB = 12$ and $BC = 35$. Find the radius of the circle inscribed in it.",
    "A train leaves the station at 60 miles per hour. Two hours later a second train follows it at 90 miles per hour. "
    "After how many hours does the second train overtake the first?",
    "Compute $\\displaystyle\\sum_{k=1}^{100} \\dfrac{1}{k(k+1)}$ and give the answer as a common fraction.",
    "In how many ways can eight distinguishable books be arranged on a shelf so that the three mathematics books stand together?",
    "The polynomial $x^3 - 6x^2 + 11x - 6$ has three real roots. What is the sum of the squares of these roots?",
    "A fair coin is tossed twenty-five times. What is the expected number of runs of exactly three heads in a row?",
    "What is the smallest positive integer $n$ such that $n^2 + 2{,}000$ is divisible by $1{,}001$?",
    "If $f(x) = \\frac{2x + 3}{x - 1}$ for all $x \\ne 1$, what is the value of $f(f(5))$?",
    "Evelyn buys 3 boxes of pencils with 24 pencils in each box and gives half of them to her sister. How many are left?",
    "Find all real numbers $x$ for which $\\sqrt{x + 7} + \\sqrt{x - 1} = 4$ holds, and prove that there are no others.",
    "How many ordered pairs $(a, b)$ of integers satisfy $a^2 + b^2 < 26$ and $ab \\geq 0$?",
    "Determine the remainder when the sum $1! + 2! + 3! + \\cdots + 50!$ is divided by fifteen.",
]  # fmt: skip
WORDS = {
    "3": "three",
    "24": "twenty-four",
    "12": "twelve",
    "35": "thirty-five",
    "60": "sixty",
    "90": "ninety",
    "100": "one hundred",
    "26": "twenty-six",
}


def worded(text):
    for digits, word in WORDS.items():
        text = text.replace(f" {digits} ", f" {word} ")
    return text.replace("eight ", "8 ").replace("three ", "3 ").replace("twenty-five", "25").replace("fifteen", "15")


COPIES = {
    "as it is": lambda t: t,
    "upper case": str.upper,
    "spaces and lines": lambda t: "  \n".join(t.split(" ")),
    "no dollars": lambda t: t.replace("$", ""),
    "brackets for dollars": lambda t: " ".join(f"\\({p}\\)" if i % 2 else p for i, p in enumerate(t.split("$"))),
    "LaTeX spacing": lambda t: t.replace(" = ", "\\,=\\;").replace("$", "$ \\! ").replace("frac", "frac "),
    "display style": lambda t: t.replace("$", "$\\displaystyle ").replace("\\frac", "\\dfrac"),
    "wording of numbers": worded,
    "another first word": lambda t: "Please solve this. " + t,
    "another end": lambda t: t + " Put the final answer in a box.",
    "a word changed": lambda t: t.replace("the", "this", 1).replace("Find", "Determine").replace("What is", "Compute"),
    "an unrelated text around": lambda t: (
        "Here is an exercise that I saw in a book yesterday evening. " + t + " Thank you for any help."
    ),
}


def record(text):
    return parse_row({"prompt": text})[0]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    rows = [{"id": f"b{i}", "question": text, "answer": "1"} for i, text in enumerate(BENCHMARK)]
    path = write_jsonl(tmp_path_factory.mktemp("benchmark") / "bench.jsonl", rows)
    return Benchmarks(DecontaminateConfig(benchmarks=[path]))


def unrelated(n):
    """Problems of many tasks of reasoning-gym, none about the benchmark's."""
    gym = pytest.importorskip("reasoning_gym")
    names = [
        "gsm_symbolic",
        "basic_arithmetic",
        "age",
        "family_relationships",
        "knights_knaves",
        "leg_counting",
        "gcd",
        "lcm",
    ]
    known = [name for name in names if name in gym.factory.DATASETS]
    each = -(-n // len(known))
    return [item["question"] for name in known for item in gym.create_dataset(name, seed=5, size=each)][:n]


@pytest.mark.parametrize("kind", list(COPIES))
def test_planted_copies_are_all_found(benchmarks, kind):
    for i, text in enumerate(BENCHMARK):
        match = benchmarks.find(record(COPIES[kind](text)))
        assert match is not None and match.problem == f"b{i}", (kind, COPIES[kind](text))
        assert match.benchmark == "bench" and match.text == text and match.score >= 0.8


def test_no_false_hit_in_a_thousand_unrelated_problems(benchmarks):
    texts = unrelated(1000)
    assert len(set(texts)) > 900
    assert [t for t in texts if benchmarks.find(record(t)) is not None] == []


def test_a_task_does_not_match_itself(tmp_path):
    """Problems that differ in their numbers alone share a long instruction."""
    gym = pytest.importorskip("reasoning_gym")
    items = gym.create_dataset("chain_sum", seed=1, size=300, min_terms=3, max_terms=4, min_digits=2, max_digits=2)
    rows = [{"id": i, "question": item["question"], "answer": item["answer"]} for i, item in enumerate(items)]
    index = Benchmarks(DecontaminateConfig(benchmarks=[write_jsonl(tmp_path / "b.jsonl", rows[:100])]))
    found = [row["id"] for row in rows if index.find(record(row["question"]))]
    held = {row["question"] for row in rows[:100]}
    assert found == [row["id"] for row in rows if row["question"] in held]


def test_each_test_says_which_it_was(benchmarks):
    assert benchmarks.find(record(BENCHMARK[0].lower())).test == "equal"
    assert benchmarks.find(record("First of all: " + BENCHMARK[1] + " Be brief.")).test == "10-gram"
    changed = (
        BENCHMARK[1]
        .replace("leaves", "left")
        .replace("later", "after")
        .replace("follows", "pursues")
        .replace("many", "few")
    )
    match = benchmarks.find(record(changed))
    assert match.test == "similarity" and 0.8 <= match.score < 1


def lcs(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], diagonal + 1 if x == y else max(row[j + 1], row[j])
    return row[-1]


@hypothesis.given(st.text("abcd", max_size=90), st.text("abcde", max_size=90))
def test_bit_parallel_lcs_is_the_dynamic_programme(a, b):
    assert longest_common_subsequence(bit_masks(a), len(a), b) == lcs(a, b)
    assert indel_similarity(a, b) == pytest.approx(indel_similarity(b, a))
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()
    assert indel_similarity(a, b) >= blocks - 1e-12  # difflib's matching blocks are one common subsequence


def test_indel_similarity_by_hand():
    assert indel_similarity("kitten", "sitting") == pytest.approx(2 * 4 / 13)
    assert indel_similarity("", "") == 1 and indel_similarity("a", "") == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two hundred and five", "200 and 5"),
        ("twenty-five and twenty five", "25 and 25"),
        ("one hundred twenty-three thousand four hundred six", "123406"),
        ("1,000 is $1{,}000$", "1000 is 1000"),
        ("x^2-1=0", "x ^ 2 - 1 = 0"),
        ("\\dfrac{1}{2}", "frac 1 2"),
        ("nine-ten", "9 - 10"),
        ("3.5 of 7", "3.5 of 7"),
    ],
)
def test_canonical_text(text, expected):
    assert " ".join(tokens(text)) == expected


def test_numbers_make_a_problem():
    assert number_bag(tokens("3 apples and 24 pears")) == number_bag(tokens("twenty-four pears, three apples"))
    assert number_bag(tokens("3 apples")) != number_bag(tokens("4 apples"))


def test_near_duplicates_are_found_and_others_are_not():
    rng = random.Random(1)
    vocabulary = [f"word{i}" for i in range(400)]
    texts = [" ".join(rng.choice(vocabulary) for _ in range(60)) for _ in range(500)]
    copies = {}
    for i in rng.sample(range(500), 100):
        words = texts[i].split()
        words[rng.randrange(60)] = "changed"
        copies[len(texts)] = i
        texts.append(" ".join(words))
    sign = Signer(NearConfig())
    original = find_near_duplicates((sign(texts[i : i + 64]) for i in range(0, len(texts), 64)), 0.7)
    expected = np.arange(len(texts))
    for copy, i in copies.items():
        expected[copy] = i
    assert (original == expected).mean() > 0.995 and (original <= expected).all()


def test_signatures_estimate_jaccard():
    sign = Signer(NearConfig(shingle=1))
    for share in (0.2, 0.5, 0.8):
        n = 300
        common = int(2 * n * share / (1 + share))
        a = [f"a{i}x" for i in range(common)] + [f"b{i}x" for i in range(n - common)]
        b = [f"a{i}x" for i in range(common)] + [f"c{i}x" for i in range(n - common)]
        signatures, _ = sign([" ".join(a), " ".join(b)])
        assert abs((signatures[0] == signatures[1]).mean() - common / (2 * n - common)) < 0.13


def test_collect_removes_and_reports(tmp_path):
    stories = [f"Story {i}: {' '.join(f'w{i}x{j}' for j in range(30))} has {i} birds." for i in range(20)]
    rows = [{"id": f"s{i}", "prompt": text, "answer": "1"} for i, text in enumerate(stories)]
    rows += [{"id": "near", "prompt": stories[3].replace("w3x7", "other"), "answer": "1"}]
    rows += [{"id": "other numbers", "prompt": stories[4].replace("4 birds", "5 birds"), "answer": "1"}]
    rows += [{"id": "leak", "prompt": BENCHMARK[1].upper(), "answer": "1"}, rows[5]]
    source = write_jsonl(tmp_path / "a.jsonl", rows)
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"id": "b1", "question": BENCHMARK[1], "answer": "3"}])
    settings = {"near_duplicates": {}, "decontaminate": {"benchmarks": [bench]}}
    counts = collect(CollectConfig(out=str(tmp_path / "out"), sources=[source], **settings))
    kept = [row["id"] for row in read_jsonl(tmp_path / "out/train.jsonl")]
    assert kept == [f"s{i}" for i in range(20)] + ["other numbers"]
    assert counts["near-duplicates"] == 1 and counts["contaminated by bench"] == 1 and counts["duplicates"] == 1
    removed = {row["id"]: row for row in read_jsonl(tmp_path / "out/removed.jsonl")}
    assert removed["leak"]["of"] == "bench:b1" and removed["leak"]["text"] == BENCHMARK[1]
    assert removed["near"]["count"] == "near-duplicates"


def test_the_command_keeps_rows_as_they_are(tmp_path, capsys):
    chains = [{"thought": "think", "solution": "7", "odd": None}]
    rows = [
        {"question": text, "reasoning": chains, "note": [1, {"a": 2}]}
        for text in ("What is 3+4, my friend?", worded(BENCHMARK[8]))
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    bench = write_jsonl(
        tmp_path / "bench.jsonl", [{"id": i, "question": t, "answer": "3"} for i, t in enumerate(BENCHMARK)]
    )
    out = tmp_path / "clean.jsonl"
    assert main(["decontaminate", str(data), "--against", bench, "--out", str(out)]) == 0
    assert read_jsonl(out) == rows[:1]
    found = read_jsonl(tmp_path / "clean.contaminated.jsonl")
    assert found[0]["problem"] == "8" and found[0]["line"] == 2 and found[0]["question"] == worded(BENCHMARK[8])
    assert found[1]["test"] == "unusable" and "not valid JSON" in found[1]["text"]
    assert "clean" in capsys.readouterr().out
    assert main(["decontaminate", str(data), "--against", str(tmp_path / "no.jsonl"), "--out", str(out)]) == 2


def test_processes_find_the_same(tmp_path):
    texts = unrelated(2100) + BENCHMARK
    data = write_jsonl(tmp_path / "data.jsonl", [{"id": i, "prompt": t} for i, t in enumerate(texts)])
    bench = write_jsonl(
        tmp_path / "bench.jsonl", [{"id": i, "question": t, "answer": "3"} for i, t in enumerate(BENCHMARK)]
    )
    config = DecontaminateConfig(benchmarks=[bench])
    counts = decontaminate(data, config, tmp_path / "two.jsonl", workers=2)
    assert counts["clean"] == 2100 and sum(counts.values()) == 2112
    assert len(list(read_rows(SourceConfig(path=str(tmp_path / "two.jsonl"))))) == 2100


def test_an_empty_or_broken_benchmark_is_refused(tmp_path):
    for content, said in [("", "holds no problems"), ('{"x": 1}\n', "no known form")]:
        (tmp_path / "b.jsonl").write_text(content)
        with pytest.raises(ConfigError, match=said):
            Benchmarks(DecontaminateConfig(benchmarks=[str(tmp_path / "b.jsonl")]))
