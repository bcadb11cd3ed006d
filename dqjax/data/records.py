"""Rows of any known form, made into `Record`s: immutable conversations with stable ids.

Forms, in the order in which they are looked for:

    preference   prompt?, chosen, rejected          texts, or lists of messages
    problems     question, reasoning: [{...}, ...]  OmniThought: a row is a problem with several chains
    messages     messages: [{role, content, reasoning_content?}]
    sharegpt     conversations: [{from, value}]
    instruction  instruction, input?, output
    response     prompt, response, reasoning?       also completion; the prompt is a text or messages
    answer       prompt, answer                     a problem with its reference answer, for RL and evaluation
    prompt       prompt                             a problem alone

Answers that hold their chain between `<think>` or `<|begin_of_thought|>` tags are split into chain and answer.
"""

import dataclasses
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from dqjax.data.config import ColumnsConfig

ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
}  # fmt: skip

USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "id": ("id", "uuid", "uid", "sample_id"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt"),
    "prompt": ("prompt", "instruction", "question", "problem", "query"),
    "response": ("response", "completion", "output"),
    "reasoning": ("reasoning", "reasoning_content", "thought"),
    "answer": ("answer", "ground_truth", "reference_answer", "final_answer"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "thinking": ("thinking", "enable_thinking"),
    "difficulty": ("difficulty", "cognitive_difficulty", "Cognitive_Difficulty"),
}

_TAGS = (
    re.compile(r"\s*<think>(?P<thought>.*?)</think>(?P<answer>.*)", re.S),
    re.compile(
        r"\s*<\|begin_of_thought\|>(?P<thought>.*?)<\|end_of_thought\|>\s*"
        r"(?:<\|begin_of_solution\|>(?P<answer>.*?)(?:<\|end_of_solution\|>)?\s*)?",
        re.S,
    ),
    re.compile(r"(?P<thought>(?:(?!<think>).)*?)</think>(?P<answer>.*)", re.S),  # the opening tag was in the prompt
)
_OPENING = re.compile(r"\s*(?:<think>|<\|begin_of_thought\|>)")


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason, as the quarantine file shows it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning` is the chain of thought before an assistant's `content`; None where there is none."""

    role: str
    content: str
    reasoning: str | None = None

    def to_dict(self) -> dict[str, str]:
        """The form that chat templates read."""
        row = {"role": self.role, "content": self.content}
        return row if self.reasoning is None else {**row, "reasoning_content": self.reasoning}


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """One sample, from source to gradient under the same `id`.

    Attributes:
      id: the row's own id, else a hash of its content.
      messages: the conversation; for a preference or a bare problem, the prompt alone.
      problem: the id of the problem; the chains of one problem share it.
      source: label of the source it came from.
      answer: reference answer for graders.
      chosen, rejected: the two answers of a preference.
      thinking: the row's own wish; None if it has none.
      difficulty: any number, larger is harder; None if unknown.
      extra: the other columns, untouched.
    """

    id: str
    messages: tuple[Message, ...]
    problem: str
    source: str = ""
    answer: str | None = None
    chosen: Message | None = None
    rejected: Message | None = None
    thinking: bool | None = None
    difficulty: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def question(self) -> str:
        """All that the user says, which is what makes two records the same problem."""
        return "\n".join(m.content for m in self.messages if m.role == "user")

    def to_row(self) -> dict[str, Any]:
        """The record as a jsonl row, which `parse_row` reads back to an equal record."""
        row: dict[str, Any] = {"id": self.id}
        if self.problem != self.id:
            row["problem_id"] = self.problem
        prompt_only = self.chosen is not None or all(m.role != "assistant" for m in self.messages)
        row["prompt" if prompt_only else "messages"] = [m.to_dict() for m in self.messages]
        if self.chosen is not None:
            row |= {"chosen": [self.chosen.to_dict()], "rejected": [self.rejected.to_dict()]}
        for key in ("answer", "thinking", "difficulty"):
            if (value := getattr(self, key)) is not None:
                row[key] = value
        if self.source:
            row["source"] = self.source
        return row | dict(self.extra)


def detect_form(row: Mapping[str, Any], columns: ColumnsConfig = ColumnsConfig()) -> str:
    """The name of the form in the module's table that `row` has.

    Raises:
      BadRow: none of them.
    """
    has = lambda key: _find(row, key, columns)[0] is not None  # noqa: E731
    if has("chosen") and has("rejected"):
        return "preference"
    if has("prompt") and isinstance(_find(row, "reasoning", columns)[1], list):
        return "problems"
    if has("messages"):
        turns = _find(row, "messages", columns)[1]
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, Mapping) and "from" in first else "messages"
    if "instruction" in row and has("response"):
        return "instruction"
    if has("prompt"):
        return "response" if has("response") else "answer" if has("answer") else "prompt"
    raise BadRow(
        f"columns {sorted(row)} are no known form (messages, conversations, prompt and response, ...); "
        "name them under data.columns"
    )


def parse_row(row: Any, *, columns: ColumnsConfig = ColumnsConfig(), source: str = "") -> list[Record | BadRow]:
    """The records of one row: one, or one a chain for the form `problems`, where a `BadRow` stands for a bad chain.

    Args:
      row: a decoded jsonl line or a parquet row.
      columns: names for columns that detection would miss.
      source: label put into the records; a row's own `source` column wins over an empty label.

    Raises:
      BadRow: nothing of the row can be used; with the reason.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"expected an object with columns, got {type(row).__name__}")
    form = detect_form(row, columns)
    used: set[str] = set()

    def take(key: str) -> Any:
        name, value = _find(row, key, columns)
        if name is not None and "." not in name:  # a column that a dotted name reads inside of stays: graders need it whole
            used.add(name)
        return value

    given_id, system = take("id"), take("system")
    common = {
        "thinking": _flag(take("thinking")),
        "difficulty": _number(take("difficulty")),
        "answer": _text(take("answer")),
    }
    head = [Message("system", _required(system, "system"))] if system else []
    own: dict[str, Any] = {}  # fields that only this form has
    chains: Sequence[Any] | None = None
    match form:
        case "preference":
            messages, own["chosen"], own["rejected"] = _preference(take("prompt"), take("chosen"), take("rejected"))
        case "problems":
            messages, chains = _turns(take("prompt"), "question"), take("reasoning")
        case "messages" | "sharegpt":
            messages = _turns(take("messages"), "messages", role=None)
        case "instruction" | "response":
            messages = _turns(take("prompt"), "prompt")
            if form == "instruction" and (more := row.get("input")):
                messages = [Message("user", f"{messages[0].content}\n\n{_required(more, 'input')}")]
                used.add("input")
            messages += _turns(take("response"), "response", role="assistant")
            if reasoning := take("reasoning"):
                messages[-1] = dataclasses.replace(messages[-1], reasoning=_required(reasoning, "reasoning"))
        case "answer" | "prompt":
            messages = _turns(take("prompt"), "prompt")
    messages = messages if messages[0].role == "system" else head + messages

    used |= {"source", "problem_id"}
    extra = {key: value for key, value in row.items() if key not in used and value is not None}
    id = str(given_id) if given_id not in (None, "") else _content_id([messages, own])
    common |= own | {"source": source or _text(row.get("source")) or ""}
    if chains is None:
        _check_turns(messages)
        problem = _text(row.get("problem_id")) or id
        return [Record(id=id, problem=problem, messages=tuple(messages), extra=extra, **common)]
    if not chains:
        raise BadRow("reasoning: the list of chains is empty")
    records: list[Record | BadRow] = []
    for k, chain in enumerate(chains):
        try:
            turn, difficulty, more = _omnithought(chain)
            _check_turns([*messages, turn])
        except BadRow as bad:
            records.append(BadRow(f"chain {k}: {bad}"))
            continue
        fields = common if difficulty is None else common | {"difficulty": difficulty}
        records.append(Record(id=f"{id}#{k}", problem=id, messages=(*messages, turn), extra=extra | more, **fields))
    return records


def split_tags(text: str) -> tuple[str | None, str]:
    """(chain, answer) of an answer that holds its chain between tags; (None, text) where there are no tags."""
    for pattern in _TAGS:
        if match := pattern.fullmatch(text):
            answer = match["answer"] or ""
            return match["thought"].strip("\n"), answer.strip() if "begin_of" in pattern.pattern else answer.lstrip(
                "\n"
            )
    return None, text


def normalise_question(text: str) -> str:
    """The question without what does not change it: Unicode form, case, spacing, LaTeX's spacing commands.

    Spaces stay only between two word characters, so "3 + 4" equals "3+4" but "1 2" is not "12".
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"\\[,;:! ]|\\(?:left|right|quad|qquad)(?![a-z])|~", " ", text)
    return re.sub(r"(?<!\w) | (?!\w)", "", " ".join(text.split()))


def question_key(record: Record) -> int:
    """A 63-bit hash of the normalised question: equal for records of the same problem."""
    digest = hashlib.blake2b(normalise_question(record.question).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _find(row: Mapping[str, Any], key: str, columns: ColumnsConfig) -> tuple[str | None, Any]:
    """(column name, value) for a canonical key; (None, None) where no such column holds a value."""
    named = getattr(columns, key)
    if named is None:
        for name in USUAL_NAMES[key]:
            if (value := row.get(name)) is not None:
                return name, value
        return None, None
    value = row
    for part in [named] if named in row else named.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return (None, None) if value is None else (named, value)


def _required(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name}: expected text, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name}: not valid Unicode (a lone surrogate)") from None
    if not value.strip():
        raise BadRow(f"{name}: empty")
    return value


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, (Mapping, list, tuple)):
        return None
    return value if isinstance(value, str) else str(value)


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, (Mapping, list, tuple)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"difficulty: expected a number, got {value!r}") from None
    return None if math.isnan(number) else number


def _flag(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    flags = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}
    if isinstance(value, str) and value.lower() in flags:
        return flags[value.lower()]
    raise BadRow(f"thinking: expected true or false, got {value!r}")


def _turns(value: Any, name: str, role: str | None = "user") -> list[Message]:
    """A text (one turn of `role`; None: refused) or a list of messages as messages."""
    if isinstance(value, str) and role is not None:
        return [_message(role, value, None, name)]
    if isinstance(value, list) and not value:
        raise BadRow(f"{name}: an empty list")
    if not isinstance(value, list):
        raise BadRow(f"{name}: expected {'text or ' if role else ''}a list of messages, got {type(value).__name__}")
    turns = []
    for i, turn in enumerate(value):
        where = f"{name}[{i}]"
        if not isinstance(turn, Mapping):
            raise BadRow(f"{where}: expected an object, got {type(turn).__name__}")
        kind = turn.get("role", turn.get("from"))
        if not isinstance(kind, str) or kind not in ROLES:
            raise BadRow(f"{where}: unknown role {kind!r}")
        content = turn["content"] if "content" in turn else turn.get("value")
        if ROLES[kind] == "system" and i == 0 and content in ("", None):
            continue  # an empty system prompt is none
        turns.append(_message(ROLES[kind], content, turn.get("reasoning_content") or turn.get("reasoning"), where))
    if not turns:
        raise BadRow(f"{name}: only an empty system prompt")
    return turns


def _message(role: str, content: Any, reasoning: Any, name: str) -> Message:
    content = _required(content, name)
    if role != "assistant":
        return Message(role, content)
    if reasoning:
        return Message(role, content.lstrip("\n"), _required(reasoning, f"{name}.reasoning_content").strip("\n"))
    thought, answer = split_tags(content)
    if thought is None and _OPENING.match(content):
        raise BadRow(f"{name}: a chain that is never closed")
    if not answer.strip():
        raise BadRow(f"{name}: a chain without an answer")
    return Message(role, answer.lstrip("\n"), thought if thought and thought.strip() else None)


def _omnithought(chain: Any) -> tuple[Message, float | None, dict[str, Any]]:
    """(turn, difficulty, other columns) of one chain of a problem."""
    if not isinstance(chain, Mapping):
        raise BadRow(f"expected an object, got {type(chain).__name__}")
    if chain.get("solution") is not None:
        turn = _message("assistant", chain["solution"], chain.get("thought"), "solution")
    else:
        turn = _message("assistant", chain.get("full_response"), None, "full_response")
    more = {k: v for k, v in chain.items() if k not in ("solution", "thought", "full_response") and v is not None}
    difficulty = next((chain[n] for n in USUAL_NAMES["difficulty"] if chain.get(n) is not None), None)
    return turn, _number(difficulty), more


def _preference(prompt: Any, chosen: Any, rejected: Any) -> tuple[list[Message], Message, Message]:
    """The prompt and the two last turns; without a prompt column, the messages shared by both are the prompt."""
    good, bad = _turns(chosen, "chosen", role="assistant"), _turns(rejected, "rejected", role="assistant")
    turns = _turns(prompt, "prompt") if prompt is not None else good[:-1]
    if prompt is None and good[:-1] != bad[:-1]:
        raise BadRow("chosen and rejected have different prompts")
    if not turns:
        raise BadRow("prompt: missing")
    if good[-1].role != "assistant" or bad[-1].role != "assistant":
        raise BadRow("chosen and rejected must end with the assistant's turn")
    if good[-1] == bad[-1]:
        raise BadRow("chosen and rejected are equal")
    return turns, good[-1], bad[-1]


def _check_turns(messages: Sequence[Message]) -> None:
    roles = [m.role for m in messages]
    if "user" not in roles:
        raise BadRow("no user turn")
    if "system" in roles[1:]:
        raise BadRow("a system turn that is not the first")
    if roles[roles[0] == "system"] == "assistant" or any(a == b == "assistant" for a, b in zip(roles, roles[1:])):
        raise BadRow("an assistant turn that answers nobody")


def _content_id(content: Any) -> str:
    plain = json.dumps(content, ensure_ascii=True, sort_keys=True, default=lambda m: dataclasses.astuple(m))
    return hashlib.blake2b(plain.encode(), digest_size=10).hexdigest()
