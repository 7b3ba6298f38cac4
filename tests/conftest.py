"""What the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

# --- recipes and data -------------------------------------------------------------------------------------------

Rows = Sequence[dict[str, Any]]
ROWS: Rows = [{"source": f"copy the word {word}", "references": [word]} for word in ("one", "two", "three")]


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """`write_data(rows, **splits)`: a folder of JSONL splits, `rows` wherever a split is not given its own."""
    from tests.runs import write_splits

    def write(rows: Rows = ROWS, **splits: Rows) -> Path:
        return write_splits(tmp_path / "data", rows, **splits)

    return write


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[Any], Path]:
    """`write_recipe(tree)`: a YAML file that holds the tree."""

    def write(tree: Any) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
        return file

    return write


# --- runs ---------------------------------------------------------------------------------------------------------

HOSTILE = (
    '<script>document.title = "hacked"</script><img src=x onerror="document.title=1">&lt;b&gt; </script> {{ 7 * 7 }}'
)
SOURCES = ("a cat sat on the mat", "the dog barked", HOSTILE, "rain fell on the hill")


@pytest.fixture
def finished_run(tmp_path: Path) -> Callable[..., Path]:
    """`finished_run(name, dqn, ...)`: the folder that a run leaves, without its model, from given responses."""
    from lmdqn.episodes import Example
    from lmdqn.recipe import validate
    from lmdqn.results.evaluate import score_responses
    from lmdqn.results.run_folder import RunFolder
    from lmdqn.results.significance import paired_significance
    from lmdqn.text.rewards import Reward

    def make(
        name: str, dqn: Sequence[str], sources: Sequence[str] = SOURCES, samples: int = 100, **sections: Any
    ) -> Path:
        tree = {"model": {"name": "a/model"}, "data": {"path": "data"}, "output": {"dir": str(tmp_path / name)}}
        recipe = validate({**tree, **sections}, "test")
        folder = RunFolder.check(recipe.output)
        folder.begin(recipe)
        examples = [Example(source, (source, f"{source} indeed"), (1,), ((2,),), source) for source in sources]
        responses = {"start": [""] * len(sources), "mle": ["the cat sat on a hill"] * len(sources), "dqn": list(dqn)}
        reward = Reward(recipe.only_task.reward)
        test = {phase: score_responses(texts, examples, reward) for phase, texts in responses.items()}
        significance = paired_significance(test, "mle", [e.references for e in examples], samples)
        folder.save_results(test, significance, {"mle": 61.0, "dqn": 120.0, "total": 7200.0}, examples)
        lines = [{"phase": "mle", "step": step, "loss": 1 / step} for step in (1, 2)]
        lines += [
            {
                "phase": "dqn",
                "step": step,
                "loss": 2.0,
                "reward": step / 40,
                "validation_reward": 50.0 + step * (30 - step),
            }
            for step in (0, 10, 20)
        ]
        folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        return folder.path

    return make


# --- the command line ---------------------------------------------------------------------------------------------


class Ran(NamedTuple):
    """How the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`command_line("train", recipe, ...)`: `lmdqn train recipe ...`, in this process."""
    from lmdqn.cli import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["lmdqn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Ran(int(ended.value.code or 0), out, err)

    return run


# --- tokenizers and models ----------------------------------------------------------------------------------------


@pytest.fixture
def byte_tokenizer() -> Any:
    """A tokenizer that knows only single bytes: as many tokens as ASCII characters. Pad is 0, <s> 1, EOS 2."""
    from lmdqn.model.loading import train_tokenizer

    return train_tokenizer([], 300)
