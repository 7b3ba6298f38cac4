"""A stopped run goes on as if it had never stopped: bit for bit, in weights, metrics, episodes and responses."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lmdqn
from lmdqn.episodes import Example
from lmdqn.errors import Stopped, UserError
from lmdqn.learn.checkpoint import Checkpoints
from lmdqn.recipe import dump_recipe, load_recipe, validate
from tests.conftest import Ran
from tests.runs import Listening, contents
from tests.several_runs import StopAt

Rows = list[dict[str, Any]]
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
ROWS: Rows = [{"source": f"say {w}", "references": [f"it is {w}", f"we say {w}"]} for w in WORDS]
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}
KINDS: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "replay, demonstrations": (
        "gpt2",
        {"replay": {"fresh_share": 0.5, "updates_per_rollout": 2, "demonstrations": 1, "capacity_episodes": 20}},
    ),
    "seq2seq, running baseline": ("t5", {"qlearning": {"baseline": "running"}}),
    "epsilon-greedy, classic": (
        "gpt2",
        {
            "qlearning": {"form": "classic", "target_polyak": None, "target_copy_every": 2},
            "rollout": {"epsilon_greedy": True, "epsilon_start": 0.5, "epsilon_decay_steps": 4, "top_k": 20},
        },
    ),
    "scoring overlaps the next rollout, a reference that moves": (
        "gpt2",
        {
            "rollout": {"overlap_scoring": True},
            "replay": {"fresh_share": 0.5, "demonstrations": 1, "updates_per_rollout": 2},
            "qlearning": {"baseline": "running", "reference_reset_every": 3},
        },
    ),
    "path, cosine": ("gpt2", {"qlearning": {"loss": "path"}, "optimisation": {"schedule": "cosine"}}),
}


EXPERIENCE: dict[str, dict[str, dict[str, Any]]] = {
    "prioritised, exponential epsilon inside the reference's top-p": {
        "replay": {"fresh_share": 0.5, "sampling": "prioritised", "capacity_episodes": 14},
        "rollout": {
            "epsilon_greedy": True,
            "epsilon_start": 0.5,
            "epsilon_decay": "exponential",
            "epsilon_decay_steps": 2,
            "reference_top_p": 0.9,
        },
    },
    "by reward, by length, after a minimum, quantiles": {
        "replay": {"fresh_share": 0.3, "sampling": "reward", "learning_starts_episodes": 12, "capacity_tokens": 150},
        "rollout": {"prompt_draw": "by_length", "temperature": 0.8, "reference_top_k": 50},
        "qlearning": {"max_steps": 4, "value_quantiles": 4, "reference_reset_every": 2},
    },
}


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """It depends on the clock, and takes longer than the runs."""
    monkeypatch.setattr("lmdqn.pipeline.write_report", lambda folder: None)


@pytest.fixture
def tree(tmp_path: Path, write_data: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """`tree(name, family, **changes)`: a recipe of seconds, kept in a folder of that name."""
    data = write_data(ROWS)

    def build(name: str, family: str = "gpt2", **changes: dict[str, Any]) -> dict[str, Any]:
        built: dict[str, Any] = {
            "seed": 3,
            "model": {"from_scratch": {"family": family, "vocabulary_size": 300, "config": SIZES[family]}},
            "data": {"path": str(data), "max_response_tokens": 12},
            "warm_start": {"epochs": 2, "batch_examples": 4},
            "rollout": {"prompts": 3, "samples": 2},
            "replay": {"batch_groups": 3},
            "qlearning": {"max_steps": 5},
            "evaluation": {"every_steps": 2, "bootstrap_samples": 100},
            "output": {
                "dir": str(tmp_path / name),
                "log_every_steps": 1,
                "checkpoint_every_steps": 2,
                "keep_checkpoints": 1,  # of more, the one before the last depends on where the run stopped
            },
        }
        for section, values in changes.items():
            built[section] = {**(built.get(section) or {}), **values}
        return built

    return build


@pytest.fixture
def recipe(tree: Callable[..., dict[str, Any]], write_recipe: Callable[[Any], Path]) -> Callable[..., lmdqn.Recipe]:
    """`recipe(name, family, **changes)`: the same, loaded."""
    return lambda *names, **changes: load_recipe(write_recipe(tree(*names, **changes)))


def assert_equal(one: Path, other: Path) -> None:
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys()
    for name, content in first.items():
        assert content == second[name], name


def stopped(recipe: lmdqn.Recipe, phase: str, step: int, resume: bool = False) -> None:
    with pytest.raises(Stopped):
        lmdqn.train(recipe, StopAt(phase, step), resume=resume)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_four_times_is_the_run_never_stopped(kind: str, recipe: Callable[..., lmdqn.Recipe]) -> None:
    """In MLE, before the first step of DQN, between checkpoints, and at the last step."""
    family, changes = KINDS[kind]
    straight = recipe("straight", family, **changes)
    lmdqn.train(straight)
    often = recipe("often", family, **changes)
    stopped(often, "mle", 3)
    stopped(often, "dqn", 0, resume=True)
    stopped(often, "dqn", 3, resume=True)
    stopped(often, "dqn", 5, resume=True)
    lmdqn.train(often, resume=True)
    assert_equal(Path(straight.output.dir), Path(often.output.dir))


@pytest.mark.parametrize("kind", EXPERIENCE)
def test_every_kind_of_replay_and_exploration_goes_on(kind: str, recipe: Callable[..., lmdqn.Recipe]) -> None:
    changes = {"warm_start": {"epochs": 1}, "qlearning": {"max_steps": 4}, **EXPERIENCE[kind]}
    straight, once = recipe("straight", **changes), recipe("once", **changes)
    lmdqn.train(straight)
    stopped(once, "dqn", 3)
    lmdqn.train(once, resume=True)
    assert_equal(Path(straight.output.dir), Path(once.output.dir))


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_log_held_to_a_distance_goes_on(in_memory: bool, recipe: Callable[..., lmdqn.Recipe], tmp_path: Path) -> None:
    """Rounds join a log in memory or on disk; priorities are of both."""
    rows = [
        {"prompt": f"say {w}\n", "response": f"{say} {w}", "reward": k} for w in WORDS for k, say in enumerate("xy")
    ]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    offline = {"path": str(log), "in_memory": in_memory, "rounds": 3, "steps_per_round": 1, "behaviour": "reference"}
    changes: dict[str, dict[str, Any]] = {
        "warm_start": {"epochs": 1},
        "qlearning": {"max_steps": 4},
        "offline": {**offline, "boltzmann_js_nats": 0.1},
        "replay": {"fresh_share": 0.5, "sampling": "prioritised"},
    }
    straight, once = recipe("straight", **changes), recipe("once", **changes)
    lmdqn.train(straight)
    stopped(once, "dqn", 3)
    lmdqn.train(once, resume=True)
    assert_equal(Path(straight.output.dir), Path(once.output.dir))


@pytest.mark.parametrize("family", SIZES)
def test_an_adapter_goes_on_too(family: str, recipe: Callable[..., lmdqn.Recipe]) -> None:
    """Its base is a model that another run saved; the base stands in no checkpoint."""
    base = recipe("base", family)
    lmdqn.train(base)
    model = {"name": f"{base.output.dir}/model", "from_scratch": None, "lora": {"rank": 2}}
    straight, often = recipe("straight", model=model), recipe("often", model=model)
    lmdqn.train(straight)
    stopped(often, "mle", 2)
    stopped(often, "dqn", 1, resume=True)
    lmdqn.train(often, resume=True)
    assert_equal(Path(straight.output.dir), Path(often.output.dir))
    tensors = load_file(Path(often.output.dir) / "checkpoints" / "last" / "tensors.safetensors")
    weights = {name for name in tensors if "networks" in name and "value_head" not in name}
    assert weights
    assert all("lora_" in name for name in weights)


API = """
from pathlib import Path

calls = 0

def score(responses, references, sources):
    global calls
    calls += len(responses) == 6  # of a rollout, not of an evaluation
    if calls == 4 and not Path(__file__).with_name("up").exists():
        raise ConnectionError("down")
    return [len(set(response)) / 9 for response in responses]
"""


def test_what_could_not_be_scored_meanwhile_is_scored_when_the_run_goes_on(
    recipe: Callable[..., lmdqn.Recipe], tmp_path: Path
) -> None:
    """The fourth rollout waits, without scores, in the checkpoint of the third step."""
    (tmp_path / "api.py").write_text(API, encoding="utf-8")
    changes: dict[str, dict[str, Any]] = {
        "warm_start": {"epochs": 1},
        "reward": {"mix": {f"{tmp_path}/api.py:score": 1.0}},
        "rollout": {"overlap_scoring": True},
        "output": {"checkpoint_every_steps": 1},
    }
    straight, broken = recipe("straight", **changes), recipe("broken", **changes)
    with pytest.raises(UserError, match="failed with ConnectionError: down"):
        lmdqn.train(broken)
    assert (Path(broken.output.dir) / "checkpoints" / "last").resolve().name == "dqn-000003"
    (tmp_path / "up").touch()
    lmdqn.train(broken, resume=True)
    lmdqn.train(straight)
    assert_equal(Path(straight.output.dir), Path(broken.output.dir))


def test_several_tasks_go_on_too(tree: Callable[..., dict[str, Any]]) -> None:
    """Each task's own walk and running baseline, in MLE and in DQN."""

    def of_tasks(name: str) -> lmdqn.Recipe:
        built = tree(name, qlearning={"baseline": "running"}, replay={"fresh_share": 0.5})
        data = built.pop("data")
        weighted = {"data": {**data, "prompt": "again {source}"}, "reward": {"mix": {"rouge1": 1.0}}, "weight": 0.7}
        return validate({**built, "tasks": {"first": {"data": data}, "second": weighted}}, "test")

    straight, often = of_tasks("straight"), of_tasks("often")
    lmdqn.train(straight)
    stopped(often, "mle", 3)
    stopped(often, "dqn", 3, resume=True)
    lmdqn.train(often, resume=True)
    assert_equal(Path(straight.output.dir), Path(often.output.dir))


# --- which checkpoint ---------------------------------------------------------------------------------------------


@pytest.fixture
def halted(recipe: Callable[..., lmdqn.Recipe]) -> lmdqn.Recipe:
    """A run stopped after three of its five steps, every checkpoint kept."""
    halted = recipe("run", output={"keep_checkpoints": 9}, warm_start={"epochs": 1})
    stopped(halted, "dqn", 3)
    return halted


def test_checkpoints_kept(recipe: Callable[..., lmdqn.Recipe]) -> None:
    run = recipe("run", output={"keep_checkpoints": 2}, evaluation={"every_steps": 5})
    stopped(run, "dqn", 4)
    folder = Path(run.output.dir) / "checkpoints"
    assert {path.name for path in folder.iterdir()} == {"dqn-000000", "dqn-000002", "dqn-000004", "last", "best"}
    assert (folder / "last").resolve().name == "dqn-000004"
    assert (folder / "best").resolve().name == "dqn-000000"


def test_a_kill_before_the_links_moved_is_made_good(recipe: Callable[..., lmdqn.Recipe]) -> None:
    """After the last step no checkpoint is written any more: going on must link to the newest and drop the old."""
    run = recipe("run", qlearning={"max_steps": 2}, warm_start={"epochs": 1})
    lmdqn.train(run)
    folder = Path(run.output.dir) / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    shutil.copytree(folder / "dqn-000002", folder / "mle-000001")
    (folder / "last").unlink()
    (folder / "last").symlink_to("mle-000001")
    lmdqn.train(run, resume=True)
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "last").resolve().name == "dqn-000002"


@pytest.mark.parametrize("harm", ["cut short", "a flipped bit", "no manifest"])
def test_a_broken_checkpoint_is_told_and_the_one_before_is_used(
    harm: str, halted: lmdqn.Recipe, recipe: Callable[..., lmdqn.Recipe]
) -> None:
    folder = Path(halted.output.dir) / "checkpoints"
    tensors = folder / "dqn-000003" / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-9] ^= 1
    if harm == "no manifest":
        (folder / "dqn-000003" / "manifest.json").unlink()
    else:
        tensors.write_bytes(content[:-10] if harm == "cut short" else content)
    tracker = Listening()
    lmdqn.train(halted, tracker, resume=True)
    assert tracker.said[-1] == f"going on from {folder}/dqn-000002"
    if harm != "no manifest":
        assert tracker.said[-2].startswith(f"{tensors} is not what was written")
        assert tracker.said[-2].endswith("going back to dqn-000002")
        assert (folder / "dqn-000003.broken" / "tensors.safetensors").exists()
    straight = recipe("straight", warm_start={"epochs": 1})
    lmdqn.train(straight)
    one, other = contents(Path(straight.output.dir)), contents(Path(halted.output.dir))
    for name, content in one.items():
        if name.startswith(("model", "last", "metrics", "predictions", "checkpoints/dqn-000005")):
            assert content == other[name], name


def test_a_flipped_bit_of_the_manifest_is_a_broken_checkpoint(tmp_path: Path) -> None:
    """Whichever it is, unless what was written can still be read: never one for other data, or a traceback."""
    checkpoints = Checkpoints(tmp_path, 1, [Example("a", ("b",), (5,), ((6, 2),), "a")])
    state = {"step": 3, "weight": torch.ones(2)}
    checkpoints.write("dqn-000003", state, None)
    file = tmp_path / "dqn-000003" / "manifest.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 5, 7):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert checkpoints.problem("dqn-000003") or checkpoints.read("dqn-000003").keys() == state.keys()


def test_nothing_is_touched_when_every_checkpoint_is_broken(halted: lmdqn.Recipe) -> None:
    for file in Path(halted.output.dir).glob("checkpoints/*/state.json"):
        file.write_text("{")
    before = {file: file.stat().st_mtime_ns for file in Path(halted.output.dir).rglob("*")}
    with pytest.raises(UserError, match="no checkpoint in"):
        lmdqn.train(halted, resume=True)
    assert before == {file: file.stat().st_mtime_ns for file in Path(halted.output.dir).rglob("*")}


# --- what may go on -----------------------------------------------------------------------------------------------


def test_another_recipe_is_refused_by_its_keys(halted: lmdqn.Recipe, recipe: Callable[..., lmdqn.Recipe]) -> None:
    other = recipe("run", warm_start={"epochs": 1}, qlearning={"beta": 0.5}, rollout={"samples": 3})
    with pytest.raises(UserError, match=r"rollout\.samples, qlearning\.beta differ"):
        lmdqn.train(other, resume=True)


def test_other_data_are_refused(halted: lmdqn.Recipe) -> None:
    assert halted.only_task.data.path is not None
    train = Path(halted.only_task.data.path) / "train.jsonl"
    train.write_text("".join(train.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="training data are not those of"):
        lmdqn.train(halted, resume=True)


def test_a_longer_budget_may_go_on(halted: lmdqn.Recipe, recipe: Callable[..., lmdqn.Recipe]) -> None:
    longer = recipe("run", warm_start={"epochs": 1}, qlearning={"max_steps": 7}, output={"keep_checkpoints": 1})
    lmdqn.train(longer, resume=True)
    lines = [json.loads(line) for line in (Path(longer.output.dir) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "dqn"] == list(range(8))


def test_a_run_that_has_not_begun_begins(
    recipe: Callable[..., lmdqn.Recipe],
) -> None:
    new = recipe("run", warm_start={"epochs": 1}, qlearning={"max_steps": 1})
    tracker = Listening()
    lmdqn.train(new, tracker, resume=True)
    assert any(line.endswith("holds no checkpoint: starting from the beginning") for line in tracker.said)
    assert (Path(new.output.dir) / "results.json").exists()


def test_a_run_killed_in_its_first_checkpoint_begins_again(recipe: Callable[..., lmdqn.Recipe], tmp_path: Path) -> None:
    new = recipe("run", warm_start={"epochs": 1}, qlearning={"max_steps": 1})
    begun = tmp_path / "run"
    (begun / "checkpoints" / ".mle-000001.new").mkdir(parents=True)
    (begun / "recipe.yaml").write_text(dump_recipe(new), encoding="utf-8")
    (begun / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    lmdqn.train(new, resume=True)
    assert len((begun / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 4  # two of MLE, two of DQN


def test_a_run_without_checkpoints_is_left_alone(halted: lmdqn.Recipe) -> None:
    shutil.rmtree(Path(halted.output.dir) / "checkpoints")
    with pytest.raises(UserError, match="without a checkpoint"):
        lmdqn.train(halted, resume=True)
    assert (Path(halted.output.dir) / "model").exists()


def test_a_folder_that_is_no_run_is_refused(recipe: Callable[..., lmdqn.Recipe], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match=r"no recipe\.yaml"):
        lmdqn.train(recipe("run"), resume=True)


# --- signals, from the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_tells_how_to_go_on(
    number: int, code: int, recipe: Callable[..., lmdqn.Recipe], command_line: Callable[..., Ran], tmp_path: Path
) -> None:
    """The reward takes its time, so that the signal falls into a step."""
    (tmp_path / "slow.py").write_text(
        "import time\n\ndef score(responses, references, sources):\n"
        "    time.sleep(0.05)\n    return [len(r) for r in responses]\n"
    )
    reward = {"mix": {f"{tmp_path}/slow.py:score": 1}}
    run = recipe("run", warm_start={"epochs": 1}, qlearning={"max_steps": 10**6}, reward=reward)
    command = [sys.executable, "-m", "lmdqn", "train", str(tmp_path / "recipe.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "run" / "checkpoints" / "dqn-000002").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate(timeout=300)
    assert process.returncode == code, told
    last = told.strip().splitlines()[-1]
    assert last.startswith(f"lmdqn: stopped by {signal.Signals(number).name} after dqn step ")
    assert last.endswith(f"lmdqn train {run.output.dir}/recipe.yaml --resume")
    step = int(last.split("step ")[1].split(";")[0])
    done = command_line("train", f"{run.output.dir}/recipe.yaml", f"qlearning.max_steps={step + 1}", "--resume")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["phase"] == "dqn"] == list(range(step + 2))
