"""The JSON schema that editors read: every shipped recipe agrees with it, and wrong ones do not."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from lmdqn.recipe import dump_recipe, load_recipe, recipe_schema
from lmdqn.shipped import shipped_recipes

SCHEMA = recipe_schema()


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_agrees_with_the_schema(name: str) -> None:
    file = shipped_recipes()[name]
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    jsonschema.validate(written, SCHEMA)
    jsonschema.validate(yaml.safe_load(dump_recipe(load_recipe(file))), SCHEMA)  # every default written out


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "unknown section": lambda tree: tree.update(rewards={}),
    "unknown key": lambda tree: tree["qlearning"].update(max_step=3),
    "wrong type": lambda tree: tree["qlearning"].update(max_steps="many"),
    "no such choice": lambda tree: tree["optimisation"].update(schedule="stepwise"),
    "too small": lambda tree: tree["qlearning"].update(beta=0),
    "no data": lambda tree: tree.pop("data"),
    "no such tracker": lambda tree: tree["output"].update(trackers=["tensorbord"]),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_recipes_do_not(kind: str) -> None:
    tree = yaml.safe_load(dump_recipe(load_recipe(shipped_recipes()["quickstart_dialogue"])))
    wrong = copy.deepcopy(tree)
    WRONG[kind](wrong)
    jsonschema.validate(tree, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def properties(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for section in (schema, *schema["$defs"].values()):
        yield from section.get("properties", {}).items()


def test_every_key_is_explained() -> None:
    for key, meaning in properties(SCHEMA):
        assert meaning.get("description"), key


def test_the_command_prints_it(command_line: Callable[..., Any], tmp_path: Path) -> None:
    ran = command_line("recipes", "schema")
    assert ran.code == 0
    assert json.loads(ran.out) == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
