"""What a run may delete and replace, and what is left of an end that is no longer true."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmdqn.errors import UserError
from lmdqn.recipe import OutputSection, Recipe, validate
from lmdqn.results.run_folder import RunFolder
from lmdqn.whole_files import swap_in
from tests.conftest import SOURCES


def recipe_for(folder: Path, **sections: Any) -> Recipe:
    tree = {"model": {"name": "a/model"}, "data": {"path": "data"}, "output": {"dir": str(folder), "overwrite": True}}
    return validate({**tree, **sections}, "test")


def test_an_old_run_goes_whole(finished_run: Callable[..., Path]) -> None:
    path = finished_run("run", SOURCES)
    (path / ".model.old").mkdir()  # of a save that was cut off
    recipe = recipe_for(path)
    RunFolder.check(recipe.output).begin(recipe)
    assert [file.name for file in path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("resume", [False, True])
def test_what_no_run_wrote_is_never_deleted(resume: bool, tmp_path: Path) -> None:
    """A folder with a recipe of the user's own looks like a run that has barely begun."""
    (tmp_path / "recipe.yaml").write_text("mine")
    (tmp_path / "my_reward.py").write_text("mine, too")
    recipe = recipe_for(tmp_path)
    with pytest.raises(UserError, match=r"holds my_reward\.py, which no run wrote"):
        RunFolder.check(recipe.output, resume).begin(recipe)
    assert (tmp_path / "recipe.yaml").read_text() == "mine"
    assert (tmp_path / "my_reward.py").read_text() == "mine, too"


def test_a_link_to_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    recipe = recipe_for(tmp_path / "run")
    RunFolder.check(recipe.output).begin(recipe)
    assert (tmp_path / "disk" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("key", "sections"),
    [
        ("data.path", {"data": {"path": "{}/pairs"}}),
        ("model.name", {"model": {"name": "{}/model"}}),
        ("offline.path", {"offline": {"path": "{}/log.jsonl"}}),
        ("tasks.a.data.path", {"data": None, "tasks": {"a": {"data": {"path": "{}"}, "reward": {}}}}),
    ],
)
def test_a_run_does_not_replace_what_it_reads(key: str, sections: dict[str, Any], tmp_path: Path) -> None:
    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: placed(held) for name, held in value.items()}
        return value.format(tmp_path) if isinstance(value, str) else value

    recipe = recipe_for(tmp_path, **placed(sections))
    with pytest.raises(UserError, match=f"{key}=.* lies in output.dir"):
        recipe.check_new()
    recipe.model_copy(update={"output": OutputSection(dir=f"{tmp_path}/other")}).check_new()


def test_a_run_that_goes_on_has_no_results_until_it_ends(finished_run: Callable[..., Path]) -> None:
    folder = RunFolder(finished_run("run", SOURCES))
    folder.report.write_text("")
    folder.go_on(recipe_for(folder.path))
    assert not any(file.exists() for file in (folder.results, folder.predictions, folder.report))
    assert folder.metrics.exists()
    with pytest.raises(UserError, match="it has not ended"):
        folder.read_results()


def test_folders_in_a_model_are_saved_too(byte_tokenizer: Any, tmp_path: Path) -> None:
    """As transformers writes a tokenizer's chat templates, where there are several."""
    byte_tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    swap_in(tmp_path / "model", byte_tokenizer.save_pretrained)
    assert list((tmp_path / "model").rglob("tool_use*"))
