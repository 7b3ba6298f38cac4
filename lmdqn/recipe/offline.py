"""Recipe section `offline`: learning from a fixed file of logged episodes, and going on from it with rollouts."""

from typing import Literal

from pydantic import Field

from lmdqn.recipe.section import Place, Section


class OfflineSection(Section):
    path: Place = Field(
        description="logged episodes, .jsonl or .parquet: prompt (as the model reads it), response, reward, and where "
        "known behaviour_log_probs (nats, one a token) with response_ids, and prompt_ids; `lmdqn log` writes one"
    )
    behaviour: Literal["logged", "reference"] = Field(
        "logged", description="importance weights: behaviour as the log has it, or estimated by the frozen reference"
    )
    in_memory: bool = Field(
        True, description="hold the whole log; false: leave it on disk as Arrow, and measure each draw again"
    )
    rounds: int = Field(0, ge=0, description="rollouts that join the log; 0 learns from the log alone")
    steps_per_round: int = Field(50, ge=1, description="steps on what there is before each round's rollout")
    boltzmann_js_nats: float | None = Field(
        None,
        gt=0,
        le=0.6931,
        description="rounds sample pi_0 exp(b Q), b the greatest whose Jensen-Shannon divergence from the log's "
        "tokens stays under this, and nothing that `rollout` says of temperature, epsilon or bounds; null: as it says",
    )

    def rollouts_after(self, steps: int) -> int:
        """How many rollouts have joined the log after so many steps."""
        return min(self.rounds, max(0, steps - 1) // self.steps_per_round)
