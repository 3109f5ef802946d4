"""Settings: YAML files under ``configs/`` read into pydantic models that forbid unknown keys.

A file's name is the name a user types. A file may extend one other of its folder. What is wrong with a file is answered
with the file, the line and the nearest right word.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from r1distill.data.errors import RequestError

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, ten times as fast, where PyYAML was built with it

Location = tuple[str | int, ...]


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values don't change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The values that decide content, without those declared with ``execution`` (they only decide how)."""
        return {
            name: _identity(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if not (isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution"))
        }


S = TypeVar("S", bound=Settings)


def execution(default: Any = ..., **constraints: Any) -> Any:
    """A field that decides how a thing is computed and not what comes out: it stays out of fingerprints."""
    return Field(default, json_schema_extra={"execution": True}, **constraints)


def _identity(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.identity()
    if isinstance(value, (list, tuple)):
        return [_identity(item) for item in value]
    if isinstance(value, dict):
        return {key: _identity(item) for key, item in value.items()}
    return value


def names(folder: str) -> list[str]:
    """The names a user can type for one kind of configuration."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def load(folder: str, name: str, model: Any, overrides: dict[str, Any] | None = None) -> Any:
    """Read ``configs/<folder>/<name>.yaml`` (or the YAML file that ``name`` is a path of) into ``model``.

    ``model`` is a settings class, or a union of them told apart by ``kind``. ``overrides`` maps dotted keys to values
    (from ``--set``). Raises RequestError for an unknown name, a misspelt key or a value of the wrong type.
    """
    path, values, lines = _read(folder, name)
    values.setdefault("name", path.stem)
    return _made(model, values, overrides or {}, path, lines)


def changed(settings: S, overrides: dict[str, Any]) -> S:
    """The settings with ``overrides`` as ``load`` takes them. Raises as that does."""
    return cast(S, _made(type(settings), settings.model_dump(), overrides, Path(type(settings).__name__.lower()), {}))


def _made(model: Any, values: dict[str, Any], overrides: dict[str, Any], path: Path, lines: dict[Location, str]) -> Any:
    for key, value in overrides.items():
        _put(values, key.split("."), value)
    try:
        return TypeAdapter(model).validate_python(values)
    except ValidationError as error:
        raise RequestError(_explain(error, model, path, lines, overrides)) from None


def parse_overrides(pairs: Sequence[str], sections: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Turn ``--set student.sft.epochs=2`` into {"student": {"sft.epochs": 2}}; values are read as YAML."""
    result: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        section, _, rest = key.strip().partition(".")
        if not equals or not rest:
            raise RequestError(f"--set takes SECTION.KEY=VALUE, found '{pair}'. Example: --set student.sft.epochs=2")
        if section not in result:
            raise RequestError(f"--set {pair}: there is no section '{section}'.{nearest(section, sections)}")
        try:
            result[section][rest] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RequestError(f"--set {pair}: the value is not YAML ({error}).") from None
    return result


def nearest(word: str, choices: Sequence[str]) -> str:
    """A closing sentence that names the nearest right word, or all of them."""
    close = difflib.get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(str(choice) for choice in choices)}." if choices else ""


def _read(folder: str, name: str, seen: tuple[Path, ...] = ()) -> tuple[Path, dict[str, Any], dict[Location, str]]:
    """The merged values of a file and those it extends, and where each key stands (``file:line``)."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / folder / f"{name}.yaml"
    singular = folder.removesuffix("s") if folder != "hardware" else folder
    if not path.is_file():
        raise RequestError(f"there is no {singular} '{name}' ({path} is not a file).{nearest(name, names(folder))}")
    if path in seen:
        raise RequestError(f"{path}: 'extends' goes in a circle.")
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=LOADER)
        values = yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise RequestError(f"{path} can't be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(f"{path} should hold a mapping of keys to values, found {type(values).__name__}.")
    lines: dict[Location, str] = {}
    for key, line in _lines(node):
        if key in lines:
            name = ".".join(map(str, key))
            raise RequestError(f"{path}:{line}: '{name}' stands there twice, first at {lines[key]}. Make one of them.")
        lines[key] = f"{path}:{line}"
    if parent := values.pop("extends", None):
        if seen:
            raise RequestError(f"{seen[-1]}: it extends {path.name}, which extends another; one level is the limit.")
        _, base, base_lines = _read(folder, str(parent), (*seen, path))
        values, lines = _merge(base, values), base_lines | lines
    return path, values, lines


def _lines(node: yaml.Node | None, prefix: Location = ()) -> typing.Iterator[tuple[Location, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _lines(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _lines(value, (*prefix, index))


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``top`` over ``base``: mappings key by key, but an empty one, or one of another ``kind``, replaces."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = value
        if not (isinstance(old, dict) and isinstance(value, dict) and value):
            continue
        if value.get("kind", old.get("kind")) == old.get("kind"):
            merged[key] = _merge(old, value)
    return merged


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        child = values.get(key)
        if isinstance(child, list) and keys[keys.index(key) + 1].isdigit():
            return _put_in_list(child, keys[keys.index(key) + 1 :], value)
        if not isinstance(child, dict):
            child = values[key] = {}
        values = child
    values[keys[-1]] = value


def _put_in_list(items: list[Any], keys: list[str], value: Any) -> None:
    index = int(keys[0])
    if index >= len(items):
        raise RequestError(f"--set: the list has {len(items)} entries, there is no number {index}.")
    if len(keys) == 1:
        items[index] = value
    elif isinstance(items[index], dict):
        _put(items[index], keys[1:], value)
    else:
        raise RequestError(f"--set: number {index} of the list is {items[index]!r}, it has no '{'.'.join(keys[1:])}'.")


def _explain(
    error: ValidationError, model: Any, path: Path, lines: dict[Location, str], overrides: dict[str, Any]
) -> str:
    messages = []
    for problem in error.errors():
        location = problem["loc"]
        plain = _without_tags(location, lines)
        key = ".".join(str(part) for part in plain)
        where = next((lines[plain[:end]] for end in range(len(plain), 0, -1) if plain[:end] in lines), str(path))
        if any(key == name or key.startswith(name + ".") for name in overrides):
            where = f"--set {key}"
        if problem["type"] == "extra_forbidden":
            siblings = _fields_at(model, location[:-1])
            messages.append(f"{where}: unknown key '{key}'.{nearest(str(location[-1]), siblings)}")
        elif problem["type"] == "missing":
            messages.append(f"{where}: '{key}' is required and missing.")
        elif problem["type"] == "union_tag_not_found":
            messages.append(f"{where}: '{'.'.join((*filter(None, [key]), 'kind'))}' is required and missing.")
        elif problem["type"] == "union_tag_invalid":
            kinds = problem["ctx"]["expected_tags"].replace("'", "").split(", ")
            where = lines.get((*plain, "kind"), where)
            messages.append(f"{where}: unknown kind '{problem['ctx']['tag']}'.{nearest(problem['ctx']['tag'], kinds)}")
        else:
            found = "" if isinstance(problem["input"], dict) else f" (found {problem['input']!r})"
            which = f"'{key}': " if key else ""  # none where it is about several together
            messages.append(f"{where}: {which}{problem['msg'].removeprefix('Value error, ')}{found}.")
    return "\n".join(dict.fromkeys(messages))


def _without_tags(location: Location, lines: dict[Location, str]) -> Location:
    """pydantic puts the chosen kind of a tagged union into the location; it is no key of the file."""
    plain: Location = ()
    after_tag = False
    for part in location:
        is_tag = isinstance(part, str) and (*plain, part) not in lines and (*plain, "kind") in lines
        if is_tag and not after_tag:
            after_tag = True
        else:
            plain, after_tag = (*plain, part), False
    return plain


def _fields_at(model: Any, location: Location) -> list[str]:
    """The keys that are allowed at ``location``, found by walking the annotations of the models."""
    for part in location:
        choices = [choice for choice in _models_in(model) if isinstance(part, str)]
        if not choices:
            continue
        tagged = [choice for choice in choices if _tag(choice) == part]
        if tagged:
            model = tagged[0]
            continue
        model = next((c.model_fields[part].annotation for c in choices if part in c.model_fields), None)
    return sorted({name for choice in _models_in(model) for name in choice.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType, list, tuple, dict):
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _tag(model: type[BaseModel]) -> str | None:
    kind = model.model_fields.get("kind")
    return str(typing.get_args(kind.annotation)[0]) if kind and typing.get_args(kind.annotation) else None
