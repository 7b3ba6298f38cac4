"""Recipe section `decoding`: how `generate` and `evaluate` choose a response. Training always validates greedily."""

from typing import Literal

from pydantic import Field

from lmdqn.recipe.section import Section


class DecodingSection(Section):
    method: Literal["greedy", "sample", "beam", "top_q", "best_of_n", "minimum_bayes_risk"] = Field(
        "greedy",
        description="greedy: the policy's likeliest token; sample: from the policy; beam: beam search; top_q: that "
        "of greatest Q among the reference's `top_k`; best_of_n: the sample that the value head ranks first; "
        "minimum_bayes_risk: the one with the greatest mean reward against the other samples as references",
    )
    temperature: float = Field(1.0, gt=0, description="of sample, best_of_n and minimum_bayes_risk")
    top_k: int | None = Field(
        None,
        ge=1,
        description="sample, best_of_n and minimum_bayes_risk: among the policy's k likeliest tokens; top_q: the "
        "reference's (20)",
    )
    beams: int = Field(4, ge=2, description="width of beam")
    samples: int = Field(
        8, ge=2, description="n of best_of_n and minimum_bayes_risk; the greedy response is one more candidate"
    )
