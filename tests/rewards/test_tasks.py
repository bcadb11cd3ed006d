"""reasoning-gym's own scorers."""

import pytest

pytest.importorskip("reasoning_gym")

import reasoning_gym

from dqjax.rewards.correct import Correctness
from dqjax.rewards.tasks import TaskGrader, TasksConfig

TASKS = ["chain_sum", "countdown", "gcd", "knights_knaves", "mini_sudoku", "letter_counting"]


@pytest.fixture(scope="module")
def grader():
    grader = TaskGrader(TasksConfig(workers=1, timeout=30.0))
    yield grader
    grader.close()


@pytest.mark.parametrize("task", TASKS)
def test_reference_answers_are_right_in_any_wrapping_and_others_wrong(grader, complete, task):
    item = reasoning_gym.create_dataset(task, size=1, seed=3)[0]
    row = dict(question=item["question"], metadata=item["metadata"])
    texts = [
        item["answer"],
        f"<think>\nhm\n</think>\n\n\\boxed{{{item['answer']}}}",
        f"So: <answer>{item['answer']}</answer>",
        "no idea",
    ]
    if task in ("mini_sudoku", "knights_knaves"):
        texts[1] = item["answer"]  # grids and sentences are not put into boxes
    grades = grader([complete(text, item["answer"], **row) for text in texts])
    assert [g.score for g in grades] == [1.0, 1.0, 1.0, 0.0] and not any(g.failed for g in grades)


def test_partial_credit_is_not_correct(grader, complete):
    """countdown gives 0.05 for a wrong expression and 0.01 for nothing at all."""
    item = reasoning_gym.create_dataset("countdown", size=1, seed=3)[0]
    row = dict(question=item["question"], metadata=item["metadata"])
    wrong = complete("1 + 1", item["answer"], **row)
    assert grader([wrong])[0].score == 0.0
    partial = TaskGrader(TasksConfig(workers=1, partial=True, timeout=30.0))
    try:
        assert 0 < partial([wrong])[0].score < 0.99
    finally:
        partial.close()


def test_an_answer_cut_while_thinking_is_wrong(grader, complete):
    item = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    grade = grader([complete(f"<think>\n{item['answer']}", item["answer"], metadata=item["metadata"])])[0]
    assert grade.score == 0.0 and grade.failed is None


def test_unknown_tasks_fail(grader, complete):
    unknown = complete("1", metadata={"source_dataset": "no_such_task"})
    assert "no_such_task" in grader([unknown])[0].failed
    assert "source_dataset" in grader([complete("1")])[0].failed


def test_the_router_sends_each_problem_to_its_grader(complete):
    item = reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0]
    batch = [
        complete(item["answer"], item["answer"], metadata=item["metadata"]),
        complete(r"\boxed{\frac{1}{2}}", "0.5"),
        complete("Answer: B", "B", choices=["x", "y"]),
        complete("4", "5"),
    ]
    with Correctness() as correct:
        assert [g.score for g in correct(batch)] == [1.0, 1.0, 1.0, 0.0]
        with pytest.raises(ValueError, match="unknown grader 'oracle'; one of answer, tasks, code"):
            correct([complete("1", grader="oracle")])
