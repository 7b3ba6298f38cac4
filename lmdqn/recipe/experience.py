"""Recipe sections `rollout` and `replay`: where episodes come from, and which of them an update sees."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lmdqn.recipe.section import Section


class RolloutSection(Section):
    prompts: int = Field(16, ge=1, description="prompts drawn a step")
    prompt_draw: Literal["uniform", "by_length"] = Field(
        "uniform", description="each training prompt in turn, or each prompt length as often as any other"
    )
    samples: int = Field(8, ge=1, description="responses sampled for each prompt: one group")
    temperature: float = Field(
        0.7,
        gt=0,
        description="Boltzmann exploration; 1 samples the policy itself, and epsilon_greedy=true takes 1",
    )
    top_k: int | None = Field(None, ge=1, description="explore only inside the policy's k likeliest tokens")
    reference_top_k: int | None = Field(
        None, ge=1, description="explore only inside the frozen reference's k likeliest tokens"
    )
    reference_top_p: float | None = Field(
        None, gt=0, le=1, description="explore only inside the reference's fewest tokens that reach this probability"
    )
    epsilon_start: float = Field(0.0, ge=0, le=1, description="epsilon-greedy exploration: share at the first step")
    epsilon_end: float = Field(0.0, ge=0, le=1, description="share after the decay")
    epsilon_decay: Literal["linear", "exponential"] = Field("linear", description="course of epsilon")
    epsilon_decay_steps: int = Field(
        100, ge=1, description="steps of the linear decay; of the exponential one, until 1/e of the way is left"
    )
    epsilon_greedy: bool = Field(
        False, description="explore by epsilon-greedy instead of Boltzmann: greedy, or uniform with probability epsilon"
    )
    overlap_scoring: bool = Field(
        False,
        description="score a rollout while the last one is learnt from and the next one is written: for slow rewards; "
        "rollouts are one step older",
    )

    @model_validator(mode="before")
    @classmethod
    def _greedy_or_boltzmann(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epsilon_greedy") is True:
            return {"temperature": 1.0} | given
        return given

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in ("epsilon_start", "epsilon_end"):
            if getattr(self, name) and not self.epsilon_greedy:
                raise ValueError(f"rollout.{name} is of epsilon-greedy exploration: set rollout.epsilon_greedy=true")
        if self.epsilon_greedy and self.temperature != 1:
            raise ValueError(
                f"rollout.temperature={self.temperature:g} is of Boltzmann exploration, and "
                "rollout.epsilon_greedy=true takes the likeliest token or any at random: set temperature=1, or "
                "epsilon_greedy=false"
            )
        return self


class ReplaySection(Section):
    capacity_episodes: int = Field(4096, ge=1, description="oldest groups leave when this is exceeded")
    capacity_tokens: int | None = Field(None, ge=1, description="or when their response tokens exceed this")
    learning_starts_episodes: int = Field(
        0, ge=0, description="only roll out until the replay holds so many, or is full"
    )
    sampling: Literal["uniform", "prioritised", "reward"] = Field(
        "uniform",
        description="how groups that are not from the newest rollout are drawn: uniform; prioritised, by residual, "
        "from a sum tree; reward, by the softmax of their mean reward",
    )
    priority_exponent: float = Field(0.6, ge=0, description="sampling=prioritised: alpha, 0 is uniform")
    priority_correction: float = Field(
        0.4, ge=0, le=1, description="exponent of its importance weights at the start, annealed to 1 at the end"
    )
    reward_temperature: float = Field(0.1, gt=0, description="sampling=reward: of the softmax, in reward units")
    demonstrations: int = Field(0, ge=0, description="references that join each group as scored episodes")
    kept_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="of each prompt's samples this share, and no fewer than two, joins the replay: those whose rewards "
        "are furthest from their mean",
    )
    batch_groups: int = Field(16, ge=1, description="prompt groups an update")
    fresh_share: float = Field(
        1.0, ge=0, le=1, description="share of a batch from the newest rollout; the rest is drawn by `sampling`"
    )
    updates_per_rollout: int = Field(1, ge=1, description="updates after each rollout")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sampling != "uniform" and self.fresh_share == 1:
            raise ValueError(
                f"replay.sampling={self.sampling} draws from a replay, and with replay.fresh_share=1 there is none: "
                "set fresh_share below 1"
            )
        if self.learning_starts_episodes > self.capacity_episodes:
            raise ValueError("replay.learning_starts_episodes is more than replay.capacity_episodes will hold")
        return self
