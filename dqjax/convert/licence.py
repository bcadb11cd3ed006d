"""The licence of a base model, recognised from its LICENSE, its card, or its shape."""

import dataclasses
import pathlib
import re

from dqjax.models.config import SIZES, ModelConfig

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*")

# (what the text says, the hub's identifier, name for people); the first that matches counts.
_TEXTS = (
    (r"qwen research licen[sc]e", "qwen-research", "Qwen Research License Agreement"),
    (r"(qwen|tongyi qianwen) licen[sc]e agreement", "qwen", "Qwen License Agreement"),
    (r"llama [\d.]+ community licen[sc]e", "llama", "Llama Community License"),
    (r"apache license\s+version 2\.0", "apache-2.0", "Apache License 2.0"),
    (r"\bmit license\b", "mit", "MIT License"),
)
_HUB_IDS = {"apache-2.0", "mit"}  # the others are `other` with a name on the hub


@dataclasses.dataclass(frozen=True)
class Licence:
    """A licence as a model card states it.

    Attributes:
      id: the hub's identifier, or "unknown".
      name: for people.
      evidence: what it was recognised by.
      research_only: no commercial use.
    """

    id: str
    name: str
    evidence: str
    research_only: bool = False

    @property
    def on_hub(self) -> bool:
        """Whether `id` is a value of the card's `license` key by itself."""
        return self.id in _HUB_IDS


NO_BASE = Licence("none", "none", "there is no base")
"""Of a model trained from random parameters: nothing is inherited."""


def licence_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """LICENSE and NOTICE files of a model folder."""
    return sorted(path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file())


def recognise_licence(folder: pathlib.Path, config: ModelConfig) -> Licence:
    """The licence of the model whose files lie in `folder`.

    Looked for in LICENSE, then in the card's front matter; a model of Qwen2.5-3B's shape without either counts as under
    its research licence, which is the careful reading.
    """
    for path in licence_files(folder):
        text = " ".join(path.read_text(encoding="utf-8", errors="replace").lower().split())
        for pattern, id, name in _TEXTS:
            if re.search(pattern, text[:5000]):
                return Licence(id, name, path.name, id == "qwen-research")
    card = folder / "README.md"
    if card.is_file():
        named = dict(re.findall(r"^(license|license_name):\s*(\S+)\s*$", front_matter(card), re.MULTILINE))
        id = named.get("license_name", named.get("license"))
        if id is not None and id != "other":
            name = next((n for _, known, n in _TEXTS if known == id), id)
            return Licence(id, name, "the base's model card", id == "qwen-research")
    if _same_shape(config, SIZES["qwen2.5-3b"]):
        name = "Qwen Research License Agreement"
        return Licence("qwen-research", name, "its shape, which is Qwen2.5-3B's", True)
    return Licence("unknown", "unknown", "nothing: neither LICENSE nor a card came with the base")


def front_matter(card: pathlib.Path) -> str:
    """The YAML block that opens a model card, or ""."""
    found = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    return found[1] + "\n" if found else ""


def _same_shape(a: ModelConfig, b: ModelConfig) -> bool:
    keys = ("family", "hidden_size", "mlp_size", "num_layers", "num_heads", "num_kv_heads")
    return all(getattr(a, key) == getattr(b, key) for key in keys)
