"""Recipe sections `warm_start` and `optimisation`: how weights move."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lmdqn.recipe.section import Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class WarmStartSection(Section):
    epochs: float = Field(3, gt=0, description="passes over all references of all examples")
    max_seconds: float | None = Field(None, gt=0, description="end earlier, at this wall-clock time")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising rate")
    batch_examples: int = Field(16, ge=1, description="examples an update, each with all its references")


class OptimisationSection(Section):
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="AdamW's peak rate in the Q-learning phase; null: 3e-4 (160 / H)^0.78 at a hidden size of H, "
        "ten times that for a LoRA adapter",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="course of the rate over the budget; linear and cosine fall to zero"
    )
    warmup_steps: int = Field(0, ge=0, description="steps over which the rate rises to that course")
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="AdamW's betas")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    max_skipped: int = Field(
        20,
        ge=0,
        description="steps skipped in a row, because a gradient, reward or logit was not finite, that end the run",
    )
    micro_batch_tokens: int = Field(
        8192, ge=1, description="padded tokens a forward pass; an update accumulates gradients over as many as it needs"
    )
    vocabulary_chunk_mib: float | None = Field(
        128,
        gt=0,
        description="float32 logits of a forward pass that take more than this come in chunks of this size, made a "
        "second time for the gradient; null: always whole",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="Accelerate's autocast type")
    gradient_checkpointing: bool = Field(
        False,
        description="layers keep their inputs alone for the backward pass and work again there: less memory for "
        "activations, and up to a third more work in updates",
    )
    torch_compile: bool = Field(
        False,
        description="run updates (not rollouts) by torch.compile: faster once the first ones have taken a minute or "
        "two; numbers may differ in their last bits, also those of a resumed run",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.torch_compile and self.gradient_checkpointing:
            raise ValueError(
                "optimisation.torch_compile chooses itself what to keep for the backward pass: set "
                "gradient_checkpointing=false"
            )
        return self
