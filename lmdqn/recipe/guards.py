"""Recipe section `guards`: what is watched while learning, because Q-learning can collapse."""

from typing import Literal

from pydantic import Field

from lmdqn.recipe.section import Section


class GuardsSection(Section):
    action: Literal["warn", "stop", "best"] = Field(
        "warn", description="when a guard fires: say so; or also end learning; or also go back to the best checkpoint"
    )
    reward_drop: float | None = Field(
        0.5, gt=0, description="fires when the sampled reward has fallen by this share of its best value; null: off"
    )
    max_kl_nats: float | None = Field(
        200, gt=0, description="fires when a response's KL to the reference is above this; null: off"
    )
    length_factor: float | None = Field(
        3, gt=1, description="fires when responses are this many times as long or short as the first ones; null: off"
    )
    max_repetition: float | None = Field(
        0.5, gt=0, le=1, description="fires when this share of a response's 4-grams are repetitions; null: off"
    )
    min_entropy_nats: float | None = Field(
        0.01, gt=0, description="fires when a sampled token's entropy is below this; null: off"
    )
