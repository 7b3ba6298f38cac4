"""Guards against collapse: reward, KL, length, repetition and entropy of what is sampled, watched as running means."""

from typing import Any

from lmdqn.recipe import GuardsSection

WATCHED = ("reward", "kl_nats", "response_tokens", "repeated_4grams", "behaviour_nats")
SMOOTHING = 0.8  # share of the running mean that stays at each step
FIRST_STEPS = 5  # guards are silent so long, and the length is compared with the mean over them
SOUND_STEPS = 100  # in a row, after which a guard that has fired speaks again


class Guards:
    """Reads each step's record. A guard that has fired is silent until its number has long been sound again."""

    def __init__(self, recipe: GuardsSection):
        self.recipe = recipe
        self.stopped = False  # a guard has ended learning
        self._steps = 0
        self._means: dict[str, float] = {}
        self._first_tokens = 0.0
        self._best_reward: float | None = None
        self._fired: dict[str, int] = {}  # the last step at which each guard's number was not sound

    def check(self, record: dict[str, float]) -> list[str]:
        """Take in a step; gives a sentence for each guard that fires now.

        What is unsound at once after `start_again` is so in the networks that were gone back to: it counts as told.
        """
        went_back = self._steps > FIRST_STEPS and not self._means
        for key in WATCHED:
            if key in record:
                before = self._means.get(key, record[key])
                self._means[key] = SMOOTHING * before + (1 - SMOOTHING) * record[key]
        if "reward" not in record:  # the step was skipped
            return []
        self._steps += 1
        if self._steps <= FIRST_STEPS:
            self._first_tokens += record["response_tokens"] / FIRST_STEPS
            return []
        reward = self._means["reward"]
        self._best_reward = reward if self._best_reward is None else max(reward, self._best_reward)
        firing = self._firing()
        silent = {name for name, step in self._fired.items() if self._steps - step <= SOUND_STEPS}
        news = [sentence for name, sentence in firing.items() if name not in silent and not went_back]
        self._fired |= dict.fromkeys(firing, self._steps)
        if news and self.recipe.action == "stop":
            self.stopped = True
        return news

    def start_again(self) -> None:
        """Forget the running means: the networks are others now."""
        self._means, self._fired = {}, {}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "stopped": self.stopped,
            "steps": self._steps,
            "means": self._means,
            "first_tokens": self._first_tokens,
            "best_reward": self._best_reward,
            "fired": self._fired,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.stopped, self._steps = state["stopped"], state["steps"]
        self._means, self._first_tokens = state["means"], state["first_tokens"]
        self._best_reward, self._fired = state["best_reward"], state["fired"]

    def _firing(self) -> dict[str, str]:
        """A sentence for each guard whose number is not sound."""
        recipe, means, found = self.recipe, self._means, {}
        best = self._best_reward
        assert best is not None
        if recipe.reward_drop is not None and means["reward"] < best - recipe.reward_drop * abs(best):
            found["reward"] = f"the sampled reward has fallen from {best:.3g} to {means['reward']:.3g}"
        if recipe.max_kl_nats is not None and means.get("kl_nats", 0.0) > recipe.max_kl_nats:
            found["kl"] = f"responses are {means['kl_nats']:.3g} nats from the reference"
        if recipe.length_factor is not None:
            ratio = means["response_tokens"] / self._first_tokens
            if not 1 / recipe.length_factor <= ratio <= recipe.length_factor:
                found["length"] = f"responses are {ratio:.2g} times as long as at first"
        if recipe.max_repetition is not None and means["repeated_4grams"] > recipe.max_repetition:
            found["repetition"] = f"{100 * means['repeated_4grams']:.0f} % of the 4-grams of responses are repetitions"
        if recipe.min_entropy_nats is not None and means["behaviour_nats"] < recipe.min_entropy_nats:
            found["entropy"] = f"the policy's entropy has fallen to {means['behaviour_nats']:.2g} nats a token"
        return found
