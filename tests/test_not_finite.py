"""NaN and infinity: the step is skipped and counted, and too many in a row end the run with the batch kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import lmdqn
from lmdqn.errors import NotFinite, UserError
from lmdqn.learn.optimisation import Optimiser, Skips
from lmdqn.model.exploration import Exploration
from lmdqn.model.rollout import Sampler
from lmdqn.recipe import load_recipe

CALLS = """
calls = 0
def score(responses, references, sources):
    global calls
    if len(responses) != 4:  # an evaluation
        return [0.0] * len(responses)
    calls += 1
    return [{value} if {when} else float(len(r)) for r in responses]
"""


@pytest.fixture
def run_with(
    tmp_path: Path, write_data: Callable[..., Path], write_recipe: Callable[[Any], Path]
) -> Callable[..., list[dict[str, Any]]]:
    """`run_with(value, when, most, overlap)`: the DQN lines of a run whose reward is `value` in some of its calls."""
    data = write_data()

    def run(value: str, when: str, most: int, overlap: bool) -> list[dict[str, Any]]:
        reward = tmp_path / "reward.py"
        reward.write_text(CALLS.format(value=value, when=when), encoding="utf-8")
        size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
        tree = {
            "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": size}},
            "data": {"path": str(data), "max_response_tokens": 8},
            "reward": {"mix": {f"{reward}:score": 1}},
            "rollout": {"prompts": 2, "samples": 2, "overlap_scoring": overlap},
            "replay": {"batch_groups": 2},
            "qlearning": {"max_steps": 4, "baseline": "none"},
            "optimisation": {"max_skipped": most},
            "evaluation": {"every_steps": 9, "bootstrap_samples": 100},
            "output": {"dir": str(tmp_path / "run"), "log_every_steps": 1},
        }
        lmdqn.train(load_recipe(write_recipe(tree)))
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["step"] > 0]

    return run


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("value", ["float('nan')", "1e300"], ids=["reward", "gradient"])
def test_a_step_is_skipped_and_counted(
    value: str, overlap: bool, run_with: Callable[..., list[dict[str, Any]]]
) -> None:
    """Every second rollout; 1e300 is infinite in float32, and so is the gradient."""
    lines = run_with(value, "calls % 2 == 1", 1, overlap)
    assert [line.get("skipped_updates", 0) for line in lines] == [1, 1, 2, 2]
    assert ["loss" in line for line in lines] == [False, True, False, True]
    assert all(math.isfinite(number) for line in lines for number in line.values() if not isinstance(number, str))


@pytest.mark.parametrize("overlap", [False, True])
def test_too_many_in_a_row_end_the_run_and_keep_the_batch(
    overlap: bool, run_with: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"gradient .* more than 1 times in a row: its episodes are in .*batch\.json"):
        run_with("1e300", "True", 1, overlap)
    episodes = json.loads((tmp_path / "run" / "skipped_batch.json").read_text(encoding="utf-8"))
    assert len(episodes) == 4
    assert episodes[0]["reward"] == 1e300
    assert episodes[0]["example"]["source"].startswith("copy the word")
    assert len(episodes[0]["reference_log_probs"]) == len(episodes[0]["response_ids"])


def test_no_weight_moves() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimiser = Optimiser(Accelerator(cpu=True), [([weight], 0.1)], (0.9, 0.95), 0.0, 1.0)
    for factor in (math.nan, math.inf):
        with pytest.raises(NotFinite):
            optimiser.update([factor], lambda part: (weight * part).sum(), 1.0)
        assert weight.tolist() == [1, 1, 1]
    assert optimiser.update([3.0], lambda part: (weight * part).sum(), 1.0) == pytest.approx(math.sqrt(27))
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_skips_in_a_row() -> None:
    skips, problem = Skips(2), NotFinite("nan")
    for _ in range(3):
        skips.note(problem)
        skips.note(problem)
        skips.in_a_row = 0
    assert skips.total == 6
    skips.note(problem)
    skips.note(problem)
    with pytest.raises(NotFinite):
        skips.note(problem)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_of_a_rollout(bad: float) -> None:
    sampler = Sampler(Exploration(), torch.full((2, 1), 0.5, dtype=torch.float64))
    with pytest.raises(NotFinite, match="logits"):
        sampler(torch.zeros(2, 1), torch.tensor([[0.0, 1.0, 2.0], [0.0, bad, 2.0]]))
