"""Steps with rollout.overlap_scoring against steps without, by the clock on the wall: no other counts what waits."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from itertools import pairwise
from statistics import median
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from lmdqn.learn.trainer import Trainer
from lmdqn.model.networks import Networks
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import validate
from lmdqn.results.tracking import Tracker
from lmdqn.text.rewards import TaskRewards
from speed.material import example_of, loaded_model, pairs, texts_of
from speed.table import Line, Settings, compare

STEPS = 6  # of a turn; the first, which writes two rollouts where scoring overlaps, is not counted
RESPONSE_TOKENS = 32
COMPUTE = """
import os, sys, time
os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])  # the scheduler may leave it where it began
while time.process_time() < float(sys.argv[1]):
    pass
"""
as_long_s = 0.0  # as a rollout takes


def waits(responses: list[str], references: list[list[str]], sources: list[str]) -> list[float]:
    """A reward that another machine computes."""
    time.sleep(as_long_s)
    return [len(set(response)) / 50 for response in responses]


def computes(responses: list[str], references: list[list[str]], sources: list[str]) -> list[float]:
    """A reward that a process of its own computes, on the last of the cores."""
    subprocess.run([sys.executable, "-S", "-c", COMPUTE, str(as_long_s)], check=True)
    return [len(set(response)) / 50 for response in responses]


REWARDS = {
    "a reward that waits as long as a rollout takes": {"speed.overlap:waits": 1.0},
    "a reward that another process computes as long": {"speed.overlap:computes": 1.0},
    "BLEU and ROUGE-L": {"bleu": 0.5, "rougeL": 0.5},
}


def overlap(settings: Settings) -> Iterator[Line]:
    """Whole steps on 16 prompts x 4 of a model of random weights, all responses of nearly the same length."""
    global as_long_s
    loaded = loaded_model(texts_of(settings.data), 160, 3, 1500)
    examples = [example_of(row, loaded.tokenizer) for row in pairs(settings.data, 200, 4)]
    as_long_s = _rollout_s(_trainer(loaded, examples, REWARDS["BLEU and ROUGE-L"], False))
    for name, mix in REWARDS.items():
        ours, theirs = settings.alternate(
            lambda mix=mix: 60 / _step_s(_trainer(loaded, examples, mix, True)),  # type: ignore[misc]
            lambda mix=mix: 60 / _step_s(_trainer(loaded, examples, mix, False)),  # type: ignore[misc]
        )
        what = f"overlap_scoring against without, {name} ({as_long_s:.2f} s; cores: {len(os.sched_getaffinity(0))})"
        yield compare(what, ours, theirs, "steps/min", "")


def _trainer(loaded: Any, examples: list[Any], mix: dict[str, float], overlaps: bool) -> Trainer:
    tree = {
        "model": {"from_scratch": {}},
        "data": {"path": "."},
        "reward": {"mix": mix},
        "rollout": {"overlap_scoring": overlaps},
        "qlearning": {"max_steps": STEPS},
        "optimisation": {"micro_batch_tokens": 2048},
    }
    recipe = validate(tree, "benchmark")
    networks = Networks.build(deepcopy(loaded), recipe.qlearning.beta, 0)
    rollout = Rollout(loaded.layout, loaded.tokenizer, RESPONSE_TOKENS)
    rewards, tracker = TaskRewards(recipe.every_task), Tracker(Console(quiet=True))
    return Trainer(recipe, networks, rollout, examples, rewards, Accelerator(cpu=True), tracker)


def _rollout_s(trainer: Trainer) -> float:
    """What writing one takes."""
    prompts, samples = trainer.recipe.rollout.prompts, trainer.recipe.rollout.samples
    online, examples = trainer.networks.online, trainer.examples[:prompts]
    took = []
    for _ in range(4):
        began = time.perf_counter()
        trainer.rollout.sample(online, examples, samples, trainer.exploration, 0, range(prompts))
        took.append(time.perf_counter() - began)
    return median(took[1:])


def _step_s(trainer: Trainer) -> float:
    """The median of a turn's steps."""
    marks: list[float] = []
    trainer.run(lambda: {"reward": 0.0}, lambda *_: marks.append(time.perf_counter()))
    return median(after - before for before, after in pairwise(marks[1:]))
