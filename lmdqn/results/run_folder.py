"""A run's folder: the contract that other tools read. Everything in it is written beside and swapped in."""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lmdqn.episodes import Example
from lmdqn.errors import UserError
from lmdqn.model.qnetwork import QNetwork
from lmdqn.recipe import OutputSection, Recipe, dump_recipe
from lmdqn.results.evaluate import Evaluation


class RunFolder:
    """Paths of a run, and how its files are written."""

    def __init__(self, path: Path):
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.predictions = path / "predictions.jsonl"
        self.model = path / "model"  # the best on validation
        self.last = path / "last"  # the target network at the end

    @classmethod
    def check(cls, output: OutputSection) -> "RunFolder":
        """The run's paths, nothing written yet.

        Raises:
            UserError: the folder holds something and `output.overwrite` is off, or is not a run that may go.
        """
        path = Path(output.dir)
        if blocking := next((p for p in (path, *path.parents) if p.is_file()), None):
            raise UserError(f"output.dir {path} cannot be made: {blocking} is a file")
        if path.is_dir() and any(path.iterdir()):
            if not output.overwrite:
                raise UserError(f"{path} already holds a run: choose another output.dir, or set output.overwrite=true")
            if not (path / "recipe.yaml").exists():
                raise UserError(f"{path} is not empty and no run of lmdqn: output.overwrite does not delete it")
        return cls(path)

    def begin(self, recipe: Recipe) -> None:
        """Create the folder (dropping an old run that `check` allowed to go) with the resolved recipe."""
        try:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            self.path.mkdir(parents=True)
            _write(self.recipe, dump_recipe(recipe))
        except OSError as error:
            raise UserError(f"cannot write to output.dir {self.path}: {error.strerror}") from error

    def save_model(self, network: QNetwork, tokenizer: Any, folder: Path) -> None:
        """Save what ordinary transformers or peft loads, with the value head in a file of its own beside it."""

        def fill(fresh: Path) -> None:
            with network.active() as model:
                if network.adapter is None:
                    model.save_pretrained(fresh)
                else:
                    model.save_pretrained(fresh, selected_adapters=[network.adapter])
                    model.generation_config.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            head = {name: p.detach().cpu().contiguous() for name, p in network.value_head.state_dict().items()}
            save_file(head, fresh / "value_head.safetensors", metadata={"scale": str(network.value_head.scale)})

        _swap_in(folder, fill)

    def save_results(
        self,
        test: Mapping[str, Evaluation],
        p_values: Mapping[str, float],
        seconds: Mapping[str, float],
        examples: Sequence[Example],
    ) -> None:
        """Write `results.json`, and `predictions.jsonl` with one line for each test example."""
        results = {
            "test": {name: _rounded(evaluation.metrics) for name, evaluation in test.items()},
            "p_value": _rounded(p_values),
            "seconds": _rounded(seconds),
        }
        _write(self.results, json.dumps(results, indent=2) + "\n")
        lines = [
            {
                "source": example.source,
                "references": list(example.references),
                **{name: evaluation.responses[i] for name, evaluation in test.items()},
            }
            for i, example in enumerate(examples)
        ]
        _write(self.predictions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in numbers.items()}


def _write(file: Path, text: str) -> None:
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def _swap_in(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a fresh folder and put it in place of the old one only when it is complete."""
    fresh, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    fresh.mkdir()
    fill(fresh)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    if old.exists():
        shutil.rmtree(old)
