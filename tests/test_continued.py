"""Learning on from a finished run: what it takes from it, what it refuses, and that it never writes there."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lmdqn
from lmdqn.episodes import Episode, Example
from lmdqn.errors import Stopped
from lmdqn.learn.replay import Replay
from lmdqn.recipe import ReplaySection, dump_recipe, load_recipe, validate
from lmdqn.results.tracking import Tracker
from tests.conftest import Ran
from tests.runs import contents, write_splits

OLD = [{"source": f"say {w}", "references": [f"it is {w}", f"we say {w}"]} for w in ("one", "two", "three", "four")]
NEW = [{"source": f"now say {w}", "references": [f"it is {w}"]} for w in ("five", "six", "seven")]
SIZE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
HELD = 12  # episodes that the finished run's replay holds: 2 steps of 3 prompts and 2 samples


def tree_of(folder: Path, run: str) -> dict[str, Any]:
    return {
        "seed": 3,
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": SIZE}},
        "data": {"path": str(folder / "old"), "max_response_tokens": 8},
        "warm_start": {"epochs": 2, "batch_examples": 4},
        "rollout": {"prompts": 3, "samples": 2},
        "replay": {"batch_groups": 3, "fresh_share": 0.5},
        "qlearning": {"max_steps": 2},
        "evaluation": {"every_steps": 2, "bootstrap_samples": 100},
        "output": {"dir": str(folder / run), "log_every_steps": 1},
    }


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than the runs."""
    monkeypatch.setattr("lmdqn.pipeline.write_report", lambda folder: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Old and new data, and a run that has finished on the old."""
    folder = tmp_path_factory.mktemp("continued")
    write_splits(folder / "old", OLD)
    write_splits(folder / "new", NEW)
    lmdqn.train(validate(tree_of(folder, "run"), "test"), Tracker())
    return folder


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["phase"] == "dqn" and line["step"]]


def stamps(run: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in [run, *run.rglob("*")]}


def test_it_learns_on_with_model_reference_and_replay(
    folder: Path, command_line: Callable[..., Ran], tmp_path: Path
) -> None:
    """With fresh_share=0 the first update is of old episodes alone: it has a loss, and no fresh episode's KL."""
    run, following = folder / "run", tmp_path / "following"
    before = stamps(run)
    command = ["train", run / "recipe.yaml", "--continue", run, f"data.path={folder / 'new'}"]
    ran = command_line(*command, f"output.dir={following}", "replay.fresh_share=0")
    assert ran.code == 0, ran.err
    assert stamps(run) == before
    first, second = steps_of(following)
    assert "loss" in first
    assert "kl_nats" not in first
    assert (first["replay_episodes"], second["replay_episodes"]) == (HELD + 6, HELD + 12)
    assert not [line for line in (following / "metrics.jsonl").read_text().splitlines() if '"mle"' in line]
    for file in ("model.safetensors", "tokenizer.json"):
        assert (following / "reference" / file).read_bytes() == (run / "reference" / file).read_bytes()
    assert (following / "model" / "tokenizer.json").read_bytes() == (run / "model" / "tokenizer.json").read_bytes()
    lines = [json.loads(line) for line in (following / "predictions.jsonl").read_text().splitlines()]
    evaluated = tmp_path / "evaluated.json"
    assert command_line("evaluate", run, f"data.path={folder / 'new'}", "--output", evaluated).code == 0
    assert [line["start"] for line in lines] == json.loads(evaluated.read_text(encoding="utf-8"))["responses"]
    assert command_line("inspect", following, "--prompt", "now say five").code == 0
    again = command_line(
        "train", following / "recipe.yaml", "--continue", following, f"output.dir={tmp_path / 'third'}"
    )
    assert again.code == 0, again.err
    assert steps_of(tmp_path / "third")[0]["replay_episodes"] == HELD + 12 + 6


def test_the_value_head_goes_on(folder: Path, tmp_path: Path) -> None:
    """Before any step, what is kept is what was kept, value head and all."""
    tree = {**tree_of(folder, "run"), "warm_start": None, "output": {"dir": str(tmp_path / "following")}}
    tree |= {"continued": {"run": str(folder / "run")}, "qlearning": {"max_steps": 0}}
    lmdqn.train(validate(tree, "test"), Tracker())
    for file in ("model.safetensors", "value_head.safetensors"):
        kept, mine = (load_file(of / "model" / file) for of in (folder / "run", tmp_path / "following"))
        assert kept.keys() == mine.keys()
        assert all(torch.equal(kept[name], mine[name]) for name in kept)


def test_scored_episodes_join_the_replay(folder: Path, command_line: Callable[..., Ran], tmp_path: Path) -> None:
    prompts = ("say one\n", "now say five\n", "quite another prompt\n")
    rows = [{"prompt": p, "response": r, "reward": len(r) / 10} for p in prompts for r in ("it is", "we say so")]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["train", folder / "run" / "recipe.yaml", "--continue", folder / "run", f"data.path={folder / 'new'}"]
    command += [f"output.dir={tmp_path / 'following'}", f"continued.episodes={tmp_path / 'people.jsonl'}"]
    ran = command_line(*command, "replay.sampling=prioritised", "replay.batch_groups=12")
    assert ran.code == 0, ran.err
    assert "joining the replay: 6 episodes of 3 prompts" in ran.err
    assert steps_of(tmp_path / "following")[0]["replay_episodes"] == HELD + 6 + 6
    shutil.rmtree(tmp_path / "following")
    (tmp_path / "people.jsonl").write_text(json.dumps({**rows[0], "reward": "good"}) + "\n", encoding="utf-8")
    refused = command_line(*command)
    assert refused.code == 2
    assert "'reward', a finite number" in refused.err
    assert not (tmp_path / "following").exists()


def unfinished(run: Path) -> None:
    (run / "results.json").unlink()


def no_run(run: Path) -> None:
    (run / "recipe.yaml").unlink()


def no_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


def broken_checkpoint(run: Path) -> None:
    (run / "checkpoints" / "last" / "state.json").write_text("{", encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (unfinished, "has no results.json: it has not ended"),
        (no_run, "is no run of lmdqn"),
        (no_checkpoints, "holds no checkpoint"),
        (broken_checkpoint, "state.json is not what was written"),
    ],
)
def test_a_run_that_cannot_be_continued(
    harm: Callable[[Path], None], told: str, folder: Path, command_line: Callable[..., Ran], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run, symlinks=True)
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(run / "recipe.yaml", recipe)
    harm(run)
    before = stamps(run)
    refused = command_line("train", recipe, "--continue", run, f"output.dir={tmp_path / 'following'}")
    assert refused.code == 2
    assert refused.err.count("\n") == 1
    assert told in refused.err
    assert stamps(run) == before
    assert not (tmp_path / "following").exists()


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.from_scratch.config.n_embd=32", "model.from_scratch.config.n_embd differ"),
        ("model={name: elsewhere}", "model.name"),
        ("qlearning.form=calibrated", "qlearning.form differ"),
        ("qlearning.beta=0.5", "qlearning.beta differ"),
        ("reward.mix={bleu: 1}", "reward.mix.rougeL differ"),
        ("replay.fresh_share=1", "set fresh_share below 1"),
        ("output.dir=RUN", "in or around the continued run"),
        ("output.dir=RUN/next", "in or around the continued run"),
        ("warm_start.epochs=1", "had its warm start: set warm_start=null"),
        ("continued.run=nowhere", "is no run of lmdqn"),
        ("continued.episodes=nowhere.jsonl", "continued.episodes: there is no file"),
    ],
)
def test_a_recipe_that_cannot_continue(
    override: str, told: str, folder: Path, command_line: Callable[..., Ran], tmp_path: Path
) -> None:
    run = folder / "run"
    words = [f"output.dir={tmp_path / 'following'}", "output.overwrite=true", override.replace("RUN", str(run))]
    refused = command_line("train", run / "recipe.yaml", "--continue", run, *words)
    assert refused.code == 2
    assert told in refused.err.splitlines()[-1]
    assert not (tmp_path / "following").exists()
    assert (run / "results.json").exists()


def test_check_tells_what_is_continued(folder: Path, command_line: Callable[..., Ran], tmp_path: Path) -> None:
    words = [f"continued={{run: {folder / 'run'}}}", "warm_start=null", f"output.dir={tmp_path / 'following'}"]
    checked = command_line("check", folder / "run" / "recipe.yaml", *words)
    assert checked.code == 0, checked.err
    assert f"learning on from: {folder / 'run'}" in checked.out
    assert command_line("check", folder / "run" / "recipe.yaml", *words, "qlearning.beta=1").code == 2


def test_an_adapter_with_a_moving_reference_is_continued(folder: Path, tmp_path: Path) -> None:
    """The base stays; adapter, reference adapter and first reference go on."""
    tree = tree_of(folder, "run") | {"warm_start": None}
    tree["model"] = {"name": str(folder / "run" / "model"), "lora": {"rank": 2}}
    tree["qlearning"] = {"max_steps": 2, "reference_reset_every": 1}
    tree["output"] = {"dir": str(tmp_path / "adapter"), "log_every_steps": 1}
    lmdqn.train(validate(tree, "test"), Tracker())
    following = {**tree, "output": {"dir": str(tmp_path / "following"), "log_every_steps": 1}}
    lmdqn.train(validate({**following, "continued": {"run": str(tmp_path / "adapter")}}, "test"), Tracker())
    assert steps_of(tmp_path / "following")[0]["replay_episodes"] == HELD + 6
    kept, begun = (
        load_file(tmp_path / run / "checkpoints" / of / "tensors.safetensors")
        for run, of in (("adapter", "best"), ("following", "last"))
    )
    names = [name for name in kept if name.startswith("/learner/networks/first/") and "lora_B" in name]
    assert names
    assert all(torch.equal(kept[name], begun[name]) for name in names)


class StopAfter(Tracker):
    """Sends this process a signal when a step of DQN is logged."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def log(self, phase: str, record: dict[str, Any], write: bool = True) -> None:
        super().log(phase, record, write)
        if record["step"] == self.step:
            signal.raise_signal(signal.SIGTERM)


def test_a_continued_run_resumes_as_if_never_stopped(folder: Path, tmp_path: Path) -> None:
    """Old and new examples, the order of draws, and the episodes of a finished run come back from its checkpoint."""
    tree = tree_of(folder, "run") | {"warm_start": None, "continued": {"run": str(folder / "run")}}
    tree["data"] = {**tree["data"], "path": str(folder / "new")}
    tree["qlearning"] = {"max_steps": 4}
    runs = {}
    for name in ("straight", "often"):
        output = {"dir": str(tmp_path / name), "log_every_steps": 1, "checkpoint_every_steps": 1}
        runs[name] = validate({**tree, "output": output}, "test")
    lmdqn.train(runs["straight"], Tracker())
    with pytest.raises(Stopped):
        lmdqn.train(runs["often"], StopAfter(0))
    with pytest.raises(Stopped):
        lmdqn.train(runs["often"], StopAfter(3), resume=True)
    lmdqn.train(runs["often"], resume=True)
    straight, often = contents(tmp_path / "straight"), contents(tmp_path / "often")
    assert straight.keys() == often.keys()
    for name, content in straight.items():
        assert content == often[name], name


def test_a_replay_takes_over_what_another_held() -> None:
    """Order stays, numbers follow the log's, the oldest leave when there is too much, and all of it can be drawn."""
    example = Example("s", ("r",), (1,), ((2,),), "s")

    def group(number: int) -> list[Episode]:
        return [Episode(example, [3, 2], False, number, text=f"{number}{k}") for k in "ab"]

    finished = Replay(ReplaySection(fresh_share=0.5))
    finished.add([group(0), group(1)])
    finished.add([group(2)])
    section = ReplaySection(fresh_share=0.0, sampling="prioritised", capacity_episodes=6)
    replay = Replay(section, [group(0), group(1)])  # a log of two
    held = {number: group(number) for number in range(3)}
    replay.take_over(finished.state(held), 2, [group(3)])
    assert [e.text for e in replay.episodes()] == ["1a", "1b", "2a", "2b", "3a", "3b"]
    assert [e.group for e in replay.episodes()] == [3, 3, 4, 4, 5, 5]
    drawn = replay.draw(50, torch.Generator().manual_seed(0), 1.0)
    assert {d.number for d in drawn} == {0, 1, 3, 4, 5}


def test_a_resolved_continued_recipe_is_read_again(folder: Path, tmp_path: Path) -> None:
    tree = tree_of(folder, "following") | {"warm_start": None, "continued": {"run": str(folder / "run")}}
    recipe = validate(tree, "test")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert yaml.safe_load(dump_recipe(recipe))["continued"] == {"run": str(folder / "run"), "episodes": None}
