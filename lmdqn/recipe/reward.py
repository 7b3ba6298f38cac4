"""Recipe section `reward`, and the names of metrics."""

from typing import Literal, Self

from pydantic import Field, model_validator

from lmdqn.recipe.section import Section, nearest

METRICS_OF_REFERENCES = ("bleu", "rouge1", "rouge2", "rougeL", "rougeLsum", "chrf")
BETTER_IF_GREATER = ("reward", *METRICS_OF_REFERENCES)
METRICS = (*BETTER_IF_GREATER, "length_words", "distinct2", "repeated_4grams")
REWARD_TERMS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "length", "repetition")


class RewardSection(Section):
    mix: dict[str, float] = Field(
        default_factory=lambda: {"bleu": 0.5, "rougeL": 0.5},
        description="weight of each term: bleu, chrf, rouge1, rouge2, rougeL, rougeLsum, length, repetition, "
        "or your own as module:function or file.py:function",
    )
    bleu_smoothing: Literal["exp", "floor", "add-k", "none"] = Field(
        "exp", description="sacrebleu's smoothing of sentence BLEU"
    )
    max_seconds: float | None = Field(
        600, gt=0, description="a function of your own that takes longer for one call ends the run; null: no limit"
    )
    lowercase: bool = Field(False, description="compare lower-cased text in BLEU and chrF, as ROUGE always does")

    @model_validator(mode="after")
    def _terms(self) -> Self:
        if not self.mix:
            raise ValueError("reward.mix needs at least one term")
        for name in self.mix:
            if ":" not in name and name not in REWARD_TERMS:
                raise ValueError(f"reward.mix has no term {name!r}{nearest(name, REWARD_TERMS)}")
        return self
