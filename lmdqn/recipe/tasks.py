"""Recipe section `tasks`: several data sets learnt by one model, each with its own prompt and reward."""

from pydantic import Field

from lmdqn.recipe.data import DataSection
from lmdqn.recipe.reward import RewardSection
from lmdqn.recipe.section import Section


class TaskSection(Section):
    data: DataSection = Field(description="what the task is learnt from and measured on, and how it is prompted")
    reward: RewardSection = Field(default_factory=RewardSection, description="what a good response is in this task")
    weight: float = Field(
        1.0,
        gt=0,
        description="its share of the prompts drawn, in rollouts and in the warm start, and of the mean over the "
        "tasks that chooses the model, in proportion to the other tasks' weights",
    )
