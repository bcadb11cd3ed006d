"""YAML plus `key=value` overrides into frozen, validated objects.

Every section of a config is a `Section`, defined next to what it builds. Errors name the key, what was expected, what was
got, and the nearest valid name; they are `ConfigError`s, which the commands turn into one message and exit code 2.
"""

import difflib
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used, said in a way its author can act on."""


class Section(pydantic.BaseModel):
    """Base of all config sections: immutable, no unknown keys, every field documented in its class docstring."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _strict_ints_and_bools(cls, values: Any) -> Any:
        """YAML already typed the values: "3" is not 3, `on` is not 1. Floats stay lax, since PyYAML reads 2e-5 as text."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for name, field in cls.model_fields.items():
            value, kinds = values.get(name), _plain_types(field.annotation)
            if isinstance(value, bool) and "on" in _choices(field.annotation):  # YAML reads a bare on as true
                values[name] = value = "on" if value else "off"
            if int in kinds and float not in kinds and isinstance(value, (bool, str, float)):
                if not (isinstance(value, bool) and bool in kinds) and not (isinstance(value, str) and str in kinds):
                    raise ValueError(f"{name}: expected a whole number, got {value!r}")
            if bool in kinds and kinds <= {bool, type(None)} and not isinstance(value, (bool, type(None))):
                raise ValueError(f"{name}: expected true or false, got {value!r}")
            if str in kinds and kinds <= {str, type(None)} and isinstance(value, bool):
                raise ValueError(f"{name}: expected text, got {value!r} (YAML reads yes and no so: quote it)")
        return values


def _plain_types(annotation: Any) -> set[type]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return set().union(*(_plain_types(a) for a in typing.get_args(annotation)))
    if typing.get_origin(annotation) is typing.Literal:
        return {type(a) for a in typing.get_args(annotation)}
    return {annotation} if isinstance(annotation, type) else set()


def _choices(annotation: Any) -> tuple:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


T = TypeVar("T", bound=Section)


def load(kind: type[T], path: str | pathlib.Path, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file, applies `a.b=value` overrides (values are YAML too) and validates the whole as `kind`.

    Raises:
      ConfigError: no such file, not YAML, an override without `=`, or anything `kind` refuses.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        raise ConfigError(f"no config file at {path}" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not valid YAML: {e}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections with keys, got a {type(values).__name__}")
    for text in overrides:
        key, eq, value = text.partition("=")
        if not eq or not key:
            raise ConfigError(f"override {text!r}: expected section.key=value")
        _assign(values, key.split("."), yaml.safe_load(value), text)
    return validate(kind, values, where=str(path))


def validate(kind: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """`kind(**values)`, with pydantic's complaints rewritten one a line; raises `ConfigError`."""
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as e:
        lines = [_explain(kind, error) for error in e.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def dump(config: Section) -> str:
    """The config as YAML, defaults written out; `load` reads it back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _assign(values: dict, keys: list[str], value: Any, text: str) -> None:
    for key in keys[:-1]:
        inner = values.setdefault(key, {})
        if isinstance(inner, str):  # `objective: grpo`, short for `objective: {kind: grpo}`
            inner = values[key] = {"kind": inner}
        if not isinstance(inner, dict):
            raise ConfigError(f"override {text!r}: {key} is {inner!r}, not a section")
        values = inner
    values[keys[-1]] = value


def _explain(kind: type[Section], error: Mapping[str, Any]) -> str:
    loc = [str(part) for part in error["loc"]]
    names, section = _walk(kind, loc)
    name = ".".join(names) or "config"
    message = error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "extra_forbidden":
            return f"{name}: unknown key; {_nearest(loc[-1], list(_walk(kind, loc[:-1])[1].model_fields))}"
        case "missing":
            return f"{name}: this key is required"
        case "union_tag_invalid":
            tags = error["ctx"]["expected_tags"].replace("'", "").split(", ")
            return f"{name}.kind: unknown kind {error['ctx']['tag']!r}; {_nearest(str(error['ctx']['tag']), tags)}"
        case "literal_error":
            options = [o.strip(" '") for o in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
            return f"{name}: {error['input']!r} is not among the choices; {_nearest(str(error['input']), options)}"
        case "value_error":
            field, colon, _ = message.partition(": ")
            inner = colon and field in section.model_fields
            return f"{message}" if name == "config" else f"{name}.{message}" if inner else f"{name}: {message}"
    return f"{name}: {message[0].lower() + message[1:]}, got {error['input']!r}"


def _nearest(name: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, valid, 1, 0.5)
    return f"did you mean {near[0]}?" if near else f"valid here: {', '.join(sorted(valid))}"


def _walk(kind: type[Section], loc: Sequence[str]) -> tuple[list[str], type[Section]]:
    """Follows a pydantic error path to its section; leaves out the tag that pydantic puts behind a union's field."""
    names, path = [], list(loc)
    while path:
        part = path.pop(0)
        names.append(part)
        members = _sections(kind.model_fields[part].annotation) if part in kind.model_fields else []
        if len(members) > 1:
            tag = path.pop(0) if path else None
            kind = next((m for m in members if _tag(m) == tag), members[0])
        elif members:
            kind = members[0]
    return names, kind


def _tag(kind: type[Section]) -> str | None:
    field = kind.model_fields.get("kind")
    return typing.get_args(field.annotation)[0] if field is not None and typing.get_args(field.annotation) else None


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for a in typing.get_args(annotation) for s in _sections(a)]
