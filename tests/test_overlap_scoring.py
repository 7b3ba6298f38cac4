"""A rollout is scored while the last one is learnt from and the next one is written, and nothing else changes."""

import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lmdqn.episodes import Episode
from lmdqn.learn.trainer import Trainer
from tests.text_world import World, WorldReward, trainer_of, world_recipe

STEPS, PROMPTS = 3, 4
ONE_AFTER_ANOTHER = [
    *("wrote 0 after 0 updates", "scored 0", "learnt from 0"),
    *("wrote 1 after 1 updates", "scored 1", "learnt from 1"),
    *("wrote 2 after 2 updates", "scored 2", "learnt from 2"),
]
OVERLAPPING = [
    *("wrote 0 after 0 updates", "wrote 1 after 0 updates", "scored 0", "learnt from 0"),
    *("wrote 2 after 1 updates", "scored 1", "learnt from 1"),
    *("wrote 3 after 2 updates", "scored 2", "learnt from 2"),
    "scored 3",
]


class Watched:
    """A trainer, what happened in it in order, and a reward whose scores come when something else has happened."""

    def __init__(self, scored_after: dict[int, str], **rollout: Any):
        self.recipe = world_recipe(
            STEPS,
            rollout={"prompts": PROMPTS, "samples": 2, **rollout},
            replay={"batch_groups": PROMPTS},
            evaluation={"every_steps": 9},
        )
        world = World()
        self.trainer: Trainer = trainer_of(world, self.recipe)
        self.happened: list[str] = []
        self.changed = threading.Condition()
        reward, rollouts, updater = WorldReward(world), self.trainer.rollout, self.trainer.updater
        sample, update = rollouts.sample, updater.update

        def write(*arguments: Any) -> list[Episode]:
            episodes = sample(*arguments)
            self.note(f"wrote {_number(episodes)} after {updater.updates} updates")
            return episodes

        def learn(*arguments: Any) -> Any:
            made = update(*arguments)
            self.note(f"learnt from {_number([e for part in made.parts for e in part])}")
            return made

        def score(episodes: Sequence[Episode]) -> None:
            number = _number(episodes)
            with self.changed:
                after = scored_after.get(number)
                assert self.changed.wait_for(lambda: after is None or after in self.happened, timeout=60)
            reward.score(episodes)
            self.note(f"scored {number}")

        rollouts.sample, updater.update = write, learn  # type: ignore[assignment, method-assign]
        self.trainer.collector.reward.score = score  # type: ignore[method-assign]

    def note(self, what: str) -> None:
        with self.changed:
            self.happened.append(what)
            self.changed.notify_all()

    def run(self) -> "Watched":
        self.trainer.run(lambda: {"reward": 0.0}, lambda *_: None)
        return self


def _number(episodes: Sequence[Episode]) -> int:
    """Of the rollout that they are all from."""
    (number,) = {episode.group // PROMPTS for episode in episodes}
    return number


def test_by_default_one_comes_after_another() -> None:
    assert Watched({}).run().happened == ONE_AFTER_ANOTHER


def test_the_next_rollout_and_the_update_come_while_a_rollout_is_scored() -> None:
    """Its scores come when both have been made: had they to wait for it, nothing would ever happen."""
    wanted = {
        0: "wrote 1 after 0 updates",
        1: "wrote 2 after 1 updates",
        2: "wrote 3 after 2 updates",
        3: "learnt from 2",
    }
    assert Watched(wanted, overlap_scoring=True).run().happened == OVERLAPPING


def test_learning_waits_for_scores() -> None:
    """They may come at once, too: each step learns from the same."""
    happened = Watched({}, overlap_scoring=True).run().happened
    assert sorted(happened) == sorted(OVERLAPPING)
    for number in range(STEPS):
        assert happened.index(f"scored {number}") < happened.index(f"learnt from {number}")


def test_what_was_written_by_networks_that_are_given_up_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard goes back to the best after the second step: rollout 2 is not learnt from."""
    watched = Watched({}, overlap_scoring=True)
    trainer = watched.trainer
    guarding = trainer.recipe.guards.model_copy(update={"action": "best"})
    monkeypatch.setattr(trainer, "recipe", trainer.recipe.model_copy(update={"guards": guarding}))
    monkeypatch.setattr(trainer.guards, "check", lambda record: ["it fell"] if record["step"] == 2 else [])
    start = trainer.state()
    trainer.run(lambda: {"reward": 0.0}, lambda *_: None, lambda: start)
    assert [what for what in watched.happened if what.startswith("learnt")] == [f"learnt from {n}" for n in (0, 1, 3)]
    assert {"wrote 3 after 2 updates", "wrote 4 after 2 updates"} < set(watched.happened)


# --- from the command line ----------------------------------------------------------------------------------------

HANGS = """
import time

calls = 0

def score(responses, references, sources):
    global calls
    calls += len(responses) == 4  # of a rollout, not of an evaluation
    if calls == 3:
        time.sleep(1e6)
    return [len(response) / 9 for response in responses]
"""


def test_a_reward_that_hangs_ends_the_run_and_the_process(
    tmp_path: Path, write_data: Callable[..., Path], write_recipe: Callable[[Any], Path]
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS, encoding="utf-8")
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    recipe = write_recipe(
        {
            "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": size}},
            "data": {"path": str(write_data()), "max_response_tokens": 8},
            "reward": {"mix": {f"{tmp_path}/hangs.py:score": 1}, "max_seconds": 0.5},
            "rollout": {"prompts": 2, "samples": 2, "overlap_scoring": True},
            "qlearning": {"max_steps": 9},
            "evaluation": {"every_steps": 9, "bootstrap_samples": 100},
            "output": {"dir": str(tmp_path / "run"), "log_every_steps": 1},
        }
    )
    command = [sys.executable, "-m", "lmdqn", "train", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    told = " ".join(done.stderr.split())
    assert "hangs.py:score' took longer than reward.max_seconds=0.5 for 4 responses, the first response 0" in told
