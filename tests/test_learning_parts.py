"""The budget's clock, early stopping, and the course of the learning rate."""

from contextlib import nullcontext

import pytest

from lmdqn.learn.budget import Budget
from lmdqn.learn.learning_rates import rate_factor
from tests.text_world import World, trainer_of, world_recipe


class Clock:
    """Stands in for the budget's clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(Budget, "clock", clock)
    return clock


def test_seconds_leave_pauses_out(clock: Clock) -> None:
    budget = Budget(10, None)
    clock.now_s += 3
    with budget.paused():
        clock.now_s += 100
    clock.now_s += 2
    with budget.paused():
        clock.now_s += 50
    assert budget.seconds == 5


def test_progress_is_that_of_the_nearer_limit(clock: Clock) -> None:
    budget = Budget(max_steps=10, max_seconds=20)
    assert budget.progress(0) == 0
    assert budget.progress(3) == 0.3
    clock.now_s += 8
    assert budget.progress(3) == 0.4
    assert budget.progress(5) == 0.5


def test_steps_spend_the_budget(clock: Clock) -> None:
    budget = Budget(max_steps=10, max_seconds=None)
    clock.now_s += 1e9
    assert not budget.spent(9)
    assert budget.spent(10)
    assert budget.progress(11) == 1


def test_seconds_of_work_spend_the_budget(clock: Clock) -> None:
    budget = Budget(max_steps=10, max_seconds=20)
    clock.now_s += 19
    with budget.paused():
        clock.now_s += 19
    assert not budget.spent(1)
    clock.now_s += 1
    assert budget.spent(1)
    clock.now_s += 100
    assert budget.progress(1) == 1


def test_a_budget_of_no_steps_is_spent(clock: Clock) -> None:
    assert Budget(0, None).spent(0)


def test_learning_ends_when_patience_has_run_out() -> None:
    """Validated at steps 0, 2, 4, ...: the third one that is not better than the best so far is the last."""
    recipe = world_recipe(100, evaluation={"every_steps": 2, "patience": 3})
    trainer = trainer_of(World(), recipe)
    scores, told = iter([0.5, 0.6, 0.4, 0.6, 0.5]), list[tuple[int, bool, bool]]()
    trainer.run(lambda: {"reward": next(scores)}, lambda *step_last_better: told.append(step_last_better))
    assert [step for step, _, is_better in told if is_better] == [0, 2]
    assert told[-1] == (8, True, False)


def test_patience_that_was_lowered_has_run_out() -> None:
    """As by the recipe of a run that is resumed."""
    trainer = trainer_of(World(), world_recipe(100, evaluation={"patience": 2}))
    trainer.checks_without_better = 5
    assert trainer.is_over


def test_a_run_whose_seconds_pass_between_two_steps_ends_with_a_validation(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(World(), world_recipe(100, qlearning={"max_seconds": 5}))
    lines = []

    def log(phase: str, record: dict[str, float], write: bool = True) -> None:
        lines.append(record)
        clock.now_s += 3  # the budget is spent while the second step is told of

    monkeypatch.setattr(trainer.tracker, "log", log)
    told = list[tuple[int, bool, bool]]()
    trainer.run(lambda: {"reward": 0.0}, lambda *step_last_better: told.append(step_last_better))
    assert "validation_reward" in lines[-1]
    assert [is_last for _, is_last, _ in told] == [False] * (len(told) - 1) + [True]


def test_the_warm_up_is_so_many_steps_however_the_budget_is_counted(clock: Clock) -> None:
    """Of a rate of .1, two steps: .025, .075, then all of it."""
    optimisation = {"schedule": "constant", "warmup_steps": 2}
    trainer = trainer_of(World(), world_recipe(1000, optimisation=optimisation, qlearning={"max_seconds": 4}))
    rates = []

    def tick(*_: object) -> None:
        clock.now_s += 1
        rates.append(trainer.optimiser._adamw.param_groups[0]["lr"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.budget, "paused", nullcontext)
        trainer.run(lambda: {"reward": 0.0}, tick)
    assert rates[1:4] == pytest.approx([0.025, 0.075, 0.1])


def test_learning_starts_when_the_replay_is_full() -> None:
    """Groups of three: of a capacity of ten, nine are ever held."""
    replay = {"capacity_episodes": 10, "learning_starts_episodes": 10, "kept_share": 0.75, "batch_groups": 2}
    trainer = trainer_of(World(), world_recipe(9, replay=replay, rollout={"prompts": 1, "samples": 4}))
    trainer.run(lambda: {"reward": 0.0}, lambda *_: None)
    assert len(trainer.replay) == 9
    assert trainer.updater.updates == 7  # two groups are held after two steps; with a third, another would be too much


def test_every_step_moves_where_the_rate_falls_to_zero() -> None:
    """Each takes the rate of its middle: of a rate of .1 over two steps three quarters, then one."""
    trainer = trainer_of(World(), world_recipe(2, optimisation={"schedule": "linear"}))
    rates = []
    trainer.run(lambda: {"reward": 0.0}, lambda *_: rates.append(trainer.optimiser._adamw.param_groups[0]["lr"]))
    assert rates[1:] == pytest.approx([0.075, 0.025])


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("progress", "factor"), [(0.0, 0.0), (0.05, 0.25), (0.15, 0.75)])
def test_the_rate_rises_linearly(schedule: str, progress: float, factor: float) -> None:
    assert rate_factor(schedule, progress, warmup=0.2) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("schedule", "progress", "factor"),
    [
        ("constant", 0.2, 1.0),
        ("constant", 0.6, 1.0),
        ("constant", 1.0, 1.0),
        ("linear", 0.2, 1.0),
        ("linear", 0.4, 0.75),
        ("linear", 0.6, 0.5),
        ("linear", 1.0, 0.0),
        ("cosine", 0.2, 1.0),
        ("cosine", 0.2 + 0.8 / 3, 0.75),  # (1 + cos 60°) / 2
        ("cosine", 0.6, 0.5),
        ("cosine", 1.0, 0.0),
    ],
)
def test_the_rate_after_its_peak(schedule: str, progress: float, factor: float) -> None:
    assert rate_factor(schedule, progress, warmup=0.2) == pytest.approx(factor)


@pytest.mark.parametrize(("schedule", "half_way"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_the_rate_without_a_rise(schedule: str, half_way: float) -> None:
    assert rate_factor(schedule, 0.0, warmup=0.0) == 1
    assert rate_factor(schedule, 0.5, warmup=0.0) == pytest.approx(half_way)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_rise_over_the_whole_budget(schedule: str) -> None:
    assert rate_factor(schedule, 0.5, warmup=1.0) == 0.5
    assert rate_factor(schedule, 1.0, warmup=1.0) == 1.0
