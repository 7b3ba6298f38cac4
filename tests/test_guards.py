"""Guards against collapse: each can be made to fire, once, and a run warns, stops or goes back to its best."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lmdqn
from lmdqn.learn.guards import FIRST_STEPS, SOUND_STEPS, Guards
from lmdqn.recipe import GuardsSection, load_recipe
from tests.runs import Listening
from tests.text_world import World, trainer_of, world_recipe

SOUND = {
    "reward": 0.5,
    "kl_nats": 1.0,
    "response_tokens": 10.0,
    "repeated_4grams": 0.0,
    "behaviour_nats": 1.0,
}
BAD = {
    "reward": ({"reward": 0.0}, "reward has fallen from 0.5 to"),
    "kl": ({"kl_nats": 1000.0}, "nats from the reference"),
    "long": ({"response_tokens": 60.0}, "times as long as at first"),
    "short": ({"response_tokens": 1.0}, "times as long as at first"),
    "repetition": ({"repeated_4grams": 1.0}, "of the 4-grams of responses are repetitions"),
    "entropy": ({"behaviour_nats": 0.0}, "entropy has fallen"),
}


def watched(*records: dict[str, float], **settings: Any) -> list[list[str]]:
    """What is said at each of the records, after as many sound ones as it takes."""
    guards = Guards(GuardsSection(**settings))
    for _ in range(FIRST_STEPS + 1):
        assert guards.check(SOUND) == []
    return [guards.check(record) for record in records]


@pytest.mark.parametrize("kind", BAD)
def test_each_guard_fires_once_and_again_after_a_recovery(kind: str) -> None:
    change, sentence = BAD[kind]
    sound = SOUND_STEPS + 40  # the means take some steps to be sound
    said = watched(*[{**SOUND, **change}] * 30, *[SOUND] * sound, *[{**SOUND, **change}] * 30)
    first, between, again = said[:30], said[30 : 30 + sound], said[30 + sound :]
    assert [len(of_step) for of_step in first].count(1) == 1
    assert sentence in next(of_step for of_step in first if of_step)[0]
    assert not any(between)
    assert [len(of_step) for of_step in again].count(1) == 1


def test_a_number_that_swings_is_told_once() -> None:
    said = watched(*([{**SOUND, "reward": 0.0}] * 20 + [SOUND] * 20) * 5)
    assert sum(map(len, said)) == 1


def test_one_bad_step_is_no_collapse() -> None:
    assert not any(watched({**SOUND, "reward": 0.0}, *[SOUND] * 9))


def test_half_the_reward_by_hand() -> None:
    """Means after n steps of reward 0: .5 x .8^n, below .25 when n is 4."""
    said = watched(*[{**SOUND, "reward": 0.0}] * 4)
    assert [len(of_step) for of_step in said] == [0, 0, 0, 1]


def test_a_negative_reward_falls_too() -> None:
    """From -1 to -2: -1.2, -1.36, -1.49, -1.59 is below -1.5."""
    guards = Guards(GuardsSection())
    for _ in range(FIRST_STEPS + 1):
        guards.check({**SOUND, "reward": -1.0})
    said = [guards.check({**SOUND, "reward": -2.0}) for _ in range(4)]
    assert [len(of_step) for of_step in said] == [0, 0, 0, 1]


def test_every_guard_can_be_turned_off() -> None:
    settings = ("reward_drop", "max_kl_nats", "length_factor", "max_repetition", "min_entropy_nats")
    all_bad = {"reward": 0.0, "kl_nats": 1e3, "response_tokens": 60.0, "repeated_4grams": 1.0, "behaviour_nats": 0.0}
    assert not any(watched(*[all_bad] * 30, **dict.fromkeys(settings)))


def test_skipped_steps_are_passed_over() -> None:
    assert watched({"step": 3, "skipped_updates": 1.0}) == [[]]


def test_its_state_goes_on() -> None:
    one, other = Guards(GuardsSection()), Guards(GuardsSection())
    for record in [SOUND] * 6 + [{**SOUND, "reward": 0.0}] * 2:
        one.check(record)
    other.restore(json.loads(json.dumps(one.state())))
    for _ in range(2):
        assert one.check({**SOUND, "reward": 0.0}) == other.check({**SOUND, "reward": 0.0})
    assert one.state() == other.state()
    assert one.state()["fired"] == {"reward": 10}


def test_what_is_unsound_in_the_best_networks_themselves_is_no_cause_to_go_back_again() -> None:
    guards = Guards(GuardsSection())
    for _ in range(FIRST_STEPS + 1):
        guards.check(SOUND)
    long = {**SOUND, "response_tokens": 200.0}
    assert guards.check(long)  # .8 x 10 + .2 x 200 = 48 tokens, more than three times 10
    guards.start_again()
    assert not any(guards.check(long) for _ in range(50))
    for _ in range(SOUND_STEPS + 40):
        guards.check(SOUND)
    assert any(guards.check(long) for _ in range(5))


# --- in a run -----------------------------------------------------------------------------------------------------

FALLING = """
calls = 0
def score(responses, references, sources):
    global calls
    calls += 1
    return [0.0 if 12 < calls < 20 else 1.0 + len(r) / 1000 for r in responses]
"""


@pytest.mark.parametrize(("action", "steps"), [("warn", 20), ("stop", 14), ("best", 20)])
def test_a_run_warns_stops_or_goes_back(
    action: str, steps: int, tmp_path: Path, write_data: Callable[..., Path], write_recipe: Callable[[Any], Path]
) -> None:
    """The reward is lost at step 11 (two calls are evaluations): the guard fires at step 14."""
    (tmp_path / "falling.py").write_text(FALLING, encoding="utf-8")
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}
    tree = {
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": size}},
        "data": {"path": str(write_data()), "max_response_tokens": 8},
        "reward": {"mix": {f"{tmp_path}/falling.py:score": 1}},
        "rollout": {"prompts": 2, "samples": 2},
        "qlearning": {"max_steps": 20},
        "guards": {"action": action},
        "evaluation": {"every_steps": 99, "bootstrap_samples": 100},
        "output": {"dir": str(tmp_path / "run"), "log_every_steps": 1},
    }
    tracker = Listening()
    lmdqn.train(load_recipe(write_recipe(tree)), tracker)
    warnings = [text for text in tracker.said if text.startswith("step 14:")]
    assert len(warnings) == 1
    assert "the sampled reward has fallen from 1" in warnings[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == steps
    kl = {line["step"]: line["kl_nats"] for line in lines if "kl_nats" in line}
    assert kl[14] != 0
    if action == "best":
        assert kl[15] == pytest.approx(0, abs=1e-5)  # the best was the start
    elif action == "warn":
        assert abs(kl[15]) > 1e-5


def test_going_back_to_the_best_goes_back_to_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference is reset after the third step, a guard fires after the fourth: what the reset one said is void."""
    recipe = world_recipe(
        5,
        rollout={"prompts": 4, "samples": 2},
        replay={"batch_groups": 4, "fresh_share": 0.0},
        qlearning={"reference_reset_every": 3},
        evaluation={"every_steps": 9},
        guards={"action": "best"},
    )
    trainer = trainer_of(World(), recipe)
    monkeypatch.setattr(trainer.guards, "check", lambda record: ["it fell"] if record["step"] == 4 else [])
    start, known = trainer.state(), {}

    def look(step: int, *_: bool) -> None:
        known[step] = [episode.reference_log_probs is not None for episode in trainer.replay.episodes()]

    trainer.run(lambda: {"reward": 0.0}, look, lambda: start)
    assert any(known[2])
    assert not any(known[4])
