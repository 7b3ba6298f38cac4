"""From YAML and `key=value` overrides to a validated recipe and back, and the telling of what is wrong with one."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lmdqn.errors import UserError
from lmdqn.recipe.recipe import Recipe
from lmdqn.recipe.section import HubName, Place, nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is one without a point, too. A key may stand but once in a mapping."""

    def get_single_node(self) -> yaml.Node | None:
        document = super().get_single_node()
        nodes = [document]
        while nodes:  # aliases cannot make a circle of what is one mapping of settings, and are few
            node = nodes.pop()
            if isinstance(node, yaml.MappingNode):
                _refuse_twins([key for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
                nodes += [value for _, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                nodes += node.value
        return document


def _refuse_twins(keys: list[yaml.ScalarNode]) -> None:
    seen: set[str] = set()
    for key in keys:
        if key.value in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands there twice", key.start_mark)
        seen.add(key.value)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted `key=value` overrides in order, and validate the whole.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown (the nearest one is named), a value
            has the wrong type, or two settings exclude each other.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as model: and data:, not {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return validate(tree, str(path))


def validate(tree: dict[str, Any], origin: str) -> Recipe:
    """The recipe that a plain tree of keys and values describes; `origin` names it in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_first_problem(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """The dotted keys whose values differ."""
    first, second = (_flat(recipe.model_dump(mode="json")) for recipe in (one, other))
    return [key for key in {**first, **second} if first.get(key) != second.get(key)]


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) and value else {f"{path}{key}": value}
    return flat


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON schema, with which an editor completes, explains and checks recipe files."""
    dialect = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**dialect, **Recipe.model_json_schema(), "title": "lmdqn recipe"}


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must read key=value, such as qlearning.max_steps=200")
    *parents, last = key.split(".")
    value = _meant(text, _annotation_at([*parents, last]), override)
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    tree[last] = value


def _meant(text: str, annotation: Any, override: str) -> Any:
    """The value of an override: text as it stands, whatever YAML would take it for (`Q: {source} #1`), else as YAML."""
    is_text = _holds_text(annotation)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if is_text and not quoted and text.lower() not in ("", "null", "~"):
        return text
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if is_text:  # such as "{source}" in "English"
            return text
        raise UserError(f"override {override!r}: the value is not valid YAML") from error


def _annotation_at(keys: list[str]) -> Any:
    """The type of what stands at a dotted key; None where the recipe knows none."""
    section: type[BaseModel] | None = Recipe
    annotation: Any = None
    for key in keys:
        field = section.model_fields.get(key) if section is not None else None
        annotation = None if field is None else field.annotation
        if field is not None:  # and it is no name that the user gave, such as that of a task
            section = next(_sections_of(annotation), None)
    return annotation


def _holds_text(annotation: Any) -> bool:
    """Whether a type is text, a choice of texts, or one of these or null."""
    if get_origin(annotation) in (Union, UnionType):
        return all(kind is NoneType or _holds_text(kind) for kind in get_args(annotation))
    if get_origin(annotation) is Literal:
        return all(isinstance(choice, str) for choice in get_args(annotation))
    return annotation in (str, Place, HubName)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(_key(problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *parents, last = [str(part) for part in problem["loc"]]
        return f"unknown key {key!r}{nearest(last, _keys_at(parents))}"
    if problem["type"] == "missing":
        return f"{key!r} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _key(loc: tuple[int | str, ...]) -> list[str]:
    """A location without pydantic's marks of which member of a union was tried."""
    section: type[BaseModel] | None = Recipe
    for depth, part in enumerate(loc):
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None:
            break
        section = next(_sections_of(field.annotation), None)
        if section is None and "dict" not in str(field.annotation):
            return [str(part) for part in loc[: depth + 1]]
    return [str(part) for part in loc]


def _keys_at(parents: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for parent in parents:
        if parent in section.model_fields:  # and is no name that the user gave, such as that of a task
            section = next(_sections_of(section.model_fields[parent].annotation))
    return list(section.model_fields)


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_of(argument)
