"""Small helpers for tests of the stages: pipelines without files of YAML, rows, and files without times."""

import json

import yaml

from dqjax.data.pipeline import read_pipeline, run_pipeline


def problems(n, start=0):
    return [{"id": f"p{i}", "prompt": f"What is {i} plus {i}?", "answer": str(2 * i)} for i in range(start, start + n)]


def chain(problem, k=0, *, thought="add them", solution=None, **more):
    """A chain row of a problem."""
    solution = problem["answer"] if solution is None else solution
    said = {"role": "assistant", "content": solution}
    said |= {} if thought is None else {"reasoning_content": thought}
    turns = [{"role": "user", "content": problem["prompt"]}, said]
    base = {"id": f"{problem['id']}#t/{k}", "problem_id": problem["id"], "messages": turns, "answer": problem["answer"]}
    return base | more


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def endpoint(url, **more):
    return {"url": url, "model": "m", **more}


def teacher(*endpoints, name="t", attempts=6, backoff=0.01, **more):
    return {"name": name, "endpoints": list(endpoints), "attempts": attempts, "backoff": backoff, **more}


def write_pipeline(folder, teachers, steps, **more):
    path = folder / "pipeline-config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({"out": str(folder / "out"), "teachers": teachers, "steps": steps, **more}))
    return str(path)


def run(folder, teachers, steps, *, models=None, again=False, **more):
    """Runs a pipeline and returns its output folder."""
    config, made = read_pipeline(write_pipeline(folder, teachers, steps, **more))
    run_pipeline(config, made, models=models, again=again)
    return folder / "out"


def counts(out, step):
    return json.loads((out / f"{step}.counts.json").read_text())["counts"]


def timeless(path):
    """The rows of a file without the times of their provenance."""
    rows = read_jsonl(path)
    for row in rows:
        for entry in row.get("provenance", []):
            entry["time"] = ""
    return rows
