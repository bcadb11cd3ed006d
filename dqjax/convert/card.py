"""The model card (README.md) of an exported model."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import yaml

import dqjax
from dqjax.convert.classifier import LABELS
from dqjax.convert.licence import Licence

Thinking = Literal["hybrid", "always", "none"]

_MODES = {
    "hybrid": (
        "Thinks by default, inside `<think>…</think>`; `enable_thinking=False` in the chat template asks for an answer "
        "without it."
    ),
    "always": "Thinks before every answer, inside `<think>…</think>`; the answer follows the closing tag.",
    "none": "Answers without a think block.",
}

_RESEARCH = (
    "**Research use only.** The base is licensed for research and evaluation; commercial use of it, and of this model, "
    "which is derived from it, needs a licence from its owner. See LICENSE."
)

_GENERATE = (
    "```python",
    "from transformers import AutoModelForCausalLM, AutoTokenizer",
    "",
    'folder = "."  # this folder',
    "tokenizer = AutoTokenizer.from_pretrained(folder)",
    "model = AutoModelForCausalLM.from_pretrained(folder)",
    'chat = [{"role": "user", "content": "What is 17 * 23?"}]',
    'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
    "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=4096)[0]))",
    "```\n",
    "`generation_config.json` holds the recommended sampling and the stop tokens; greedy decoding of long chains",
    "tends to loop.\n",
)

_SCORE = """```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
chat = {chat}
inputs = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
print(model(**inputs).logits)
```

Or behind vLLM's pooling server, which answers with the same numbers in `data[0].probs`:

```bash
vllm serve . --runner pooling --dtype {dtype} --pooler-config '{{"use_activation": false}}'
curl http://localhost:8000/classify -H 'Content-Type: application/json' -d '{{"messages": {chat}}}'
```

{reading} They are raw, read at the last token of the whole conversation as the chat template ends it.
"""

_IN_CONTENT = (
    "Send a chain inside `content`, between its tags, as above: vLLM 0.32 drops the field `reasoning_content` from a "
    "conversation without a word, and scores the rest.\n"
)

_READING = {
    LABELS["reward"]: "One logit: the higher, the better the answer.",
    LABELS["scorer"]: "Ten logits a label: its level is the mean of 0 to 9 under their softmax.",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card tells.

    Attributes:
      title: of the model.
      base: name of the model it was trained from; None for one trained from random parameters.
      licence: of the base.
      teachers, data: names; empty where nothing is recorded.
      thinking: whether and when it thinks.
      sampling: recommended parameters, as in generation_config.json.
      parameters: how many.
      training_config: of the run, as YAML; None for a model that was only converted.
      step: of the checkpoint.
      labels: names of a classifier's logits; empty for a language model.
      dtype: of the weights.
    """

    title: str
    base: str | None
    licence: Licence
    teachers: tuple[str, ...]
    data: tuple[str, ...]
    thinking: Thinking
    sampling: Mapping[str, Any]
    parameters: int
    training_config: str | None = None
    step: int | None = None
    labels: tuple[str, ...] = ()
    dtype: str = "bfloat16"

    def text(self) -> str:
        """The card in the hub's form: front matter, then Markdown."""
        task = "text-classification" if self.labels else "text-generation"
        front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task, "tags": ["dqjax"]}
        if self.licence.on_hub:
            front["license"] = self.licence.id
        elif self.licence.id not in ("unknown", "none"):
            front |= {"license": "other", "license_name": self.licence.id, "license_link": "LICENSE"}
        if self.base is not None and self.base.count("/") == 1:
            front["base_model"] = self.base
        trained = self.training_config is not None
        parts = [
            f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
            f"# {self.title}\n",
            *([_RESEARCH + "\n"] if self.licence.research_only else []),
            "| | |\n|---|---|",
            f"| Base | {self.base or 'none: trained from random parameters'} |",
            f"| Licence of the base | {self._licence()} |",
            f"| Teachers | {', '.join(self.teachers) or 'not recorded'} |",
            f"| Data | {', '.join(self.data) or 'not recorded'} |",
            *([f"| Logits | {', '.join(self.labels)} |"] if self.labels else self._generation_rows()),
            f"| Parameters | {self.parameters:,} |",
            f"| Made with | dqjax {dqjax.__version__}{f', checkpoint of step {self.step}' if trained else ''} |",
            "",
            "## Use\n",
            *(self._scoring() if self.labels else _GENERATE),
        ]
        if trained:
            parts += ["## Training configuration\n", f"```yaml\n{self.training_config.strip()}\n```\n"]
        return "\n".join(parts)

    def _generation_rows(self) -> list[str]:
        sampling = ", ".join(f"{k} {v}" for k, v in self.sampling.items())
        return [f"| Thinking | {_MODES[self.thinking]} |", f"| Recommended sampling | {sampling} |"]

    def _scoring(self) -> list[str]:
        chain = "" if self.thinking == "none" else "<think>\n17 * 20 = 340\n17 * 3 = 51\n</think>\n\n"
        said = [("user", "What is 17 * 23?"), ("assistant", f"{chain}391")]
        chat = json.dumps([{"role": role, "content": content} for role, content in said])  # a Python literal, too
        text = _SCORE.format(chat=chat, dtype=self.dtype, reading=_READING.get(self.labels, "One logit a label."))
        return [text, *([_IN_CONTENT] if chain else [])]

    def _licence(self) -> str:
        if self.base is None:
            return "none: no base"
        return f"{self.licence.name} (recognised by {self.licence.evidence})"
