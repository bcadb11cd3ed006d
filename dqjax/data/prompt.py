"""Prompts as files: `prompts/NAME.txt` in the package, or a file of the user's own.

    version: 2
    # system
    You rate ...
    # user
    Problem: {{question}}

The version is the author's; rows carry `NAME@version`, so a change of wording is a change of version.
"""

import dataclasses
import importlib.resources
import pathlib
import re

from dqjax.config import ConfigError
from dqjax.data.records import Message

_FIELD = re.compile(r"\{\{(\w+)\}\}")
_FILE = re.compile(r"version: *(\w+)\n(?:# system\n(?P<system>.*?)\n)?# user\n(?P<user>.*)", re.S)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A template with `{{fields}}`; `label` is its name and version."""

    label: str
    system: str | None
    user: str

    def __call__(self, **fields: str) -> tuple[Message, ...]:
        """The conversation. A value may hold braces and backslashes: it is inserted as it is.

        Raises:
          ConfigError: the template names a field that this stage does not have.
        """

        def fill(template: str) -> str:
            return _FIELD.sub(lambda match: self._value(match[1], fields), template)

        system = () if self.system is None else (Message("system", fill(self.system)),)
        return (*system, Message("user", fill(self.user)))

    def _value(self, name: str, fields: dict[str, str]) -> str:
        if name not in fields:
            raise ConfigError(
                f"prompt {self.label} has a field {{{{{name}}}}}; known here: {', '.join(sorted(fields))}"
            )
        return fields[name]


def load_prompt(name: str) -> Prompt:
    """A shipped prompt by its name, or a file by its path.

    Raises:
      ConfigError: neither, or not of the module's form.
    """
    path = pathlib.Path(name)
    if path.suffix == ".txt":
        if not path.is_file():
            raise ConfigError(f"no prompt file at {path}")
        text = path.read_text(encoding="utf-8")
    else:
        folder = importlib.resources.files("dqjax.data") / "prompts"
        try:
            text = (folder / f"{name}.txt").read_text(encoding="utf-8")
        except FileNotFoundError:
            known = sorted(entry.name.removesuffix(".txt") for entry in folder.iterdir())
            raise ConfigError(
                f"no prompt {name!r}; shipped are {', '.join(known)}; a path to one ends in .txt"
            ) from None
    match = _FILE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"prompt {name}: expected the lines 'version: N', '# system' (may be left out), '# user'")
    system = match["system"].strip() if match["system"] is not None else None
    return Prompt(f"{path.stem}@{match[1]}", system, match["user"].strip())
