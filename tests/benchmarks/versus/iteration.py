"""How many episodes a second lmdqn and TRL's GRPO roll out, score and learn from, at the same sizes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

from lmdqn.learn.budget import Budget
from versus.arena import NO_LIMIT, Arena, Settings, Task, Variant
from versus.methods import run_lmdqn
from versus.trl_runs import run_trl_grpo

STEPS = 6  # of a turn; the first is not counted
EPOCHS = "warm_start.epochs=1"  # so that responses are of the data's lengths


class StepClock:
    """Stands in for a `Recorder`: it times steps, evaluates nothing, and ends a run after `STEPS`."""

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.budget = Budget(NO_LIMIT, float(NO_LIMIT))
        self.start()

    def start(self) -> None:
        self.marks = [self.clock()]

    @property
    def spent(self) -> bool:
        return len(self.marks) > STEPS

    def step(self, episodes: int, variants: Mapping[str, Variant]) -> None:
        self.marks.append(self.clock())

    finish = step

    @property
    def step_s(self) -> float:
        return median(after - before for before, after in zip(self.marks[1:], self.marks[2:], strict=False))


def episode_rates(data: Path, output: Path, clock: Callable[[], float]) -> tuple[Callable, Callable]:
    """Episodes a second of lmdqn's default recipe and of TRL's GRPO, from one warm start that is kept in `output`."""
    settings = Settings(data.parent, output, 60.0, 1, 1, overrides=(EPOCHS,))
    arena = Arena(Task(data.name, "causal"), settings)
    steps = "qlearning.max_seconds=null", f"qlearning.max_steps={STEPS}"
    recipe = arena.recipe("optimisation.learning_rate=3e-4", *steps)
    episodes = recipe.rollout.prompts * recipe.rollout.samples

    def rate(run: Callable[..., None]) -> float:
        steps = StepClock(clock)
        run(arena, recipe, steps)
        return episodes / steps.step_s

    return lambda: rate(run_lmdqn), lambda: rate(run_trl_grpo)
