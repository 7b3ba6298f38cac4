"""The recipe: everything a run is told, as typed and validated data.

This package is the one place for defaults. A field's description is at once the help text and what an editor
shows from the JSON schema.
"""

from lmdqn.recipe.continued import ContinuedSection
from lmdqn.recipe.data import Conversation, DataSection, Limits, Splits
from lmdqn.recipe.decoding import DecodingSection
from lmdqn.recipe.experience import ReplaySection, RolloutSection
from lmdqn.recipe.guards import GuardsSection
from lmdqn.recipe.learning import OptimisationSection, WarmStartSection
from lmdqn.recipe.model import FromScratch, Lora, ModelSection
from lmdqn.recipe.offline import OfflineSection
from lmdqn.recipe.qlearning import QLearningSection
from lmdqn.recipe.reading import differing_keys, dump_recipe, load_recipe, recipe_schema, validate
from lmdqn.recipe.recipe import EvaluationSection, OutputSection, Recipe
from lmdqn.recipe.reward import BETTER_IF_GREATER, METRICS, METRICS_OF_REFERENCES, REWARD_TERMS, RewardSection
from lmdqn.recipe.section import Section, nearest
from lmdqn.recipe.tasks import TaskSection

__all__ = [
    "BETTER_IF_GREATER",
    "METRICS",
    "METRICS_OF_REFERENCES",
    "REWARD_TERMS",
    "ContinuedSection",
    "Conversation",
    "DataSection",
    "DecodingSection",
    "EvaluationSection",
    "FromScratch",
    "GuardsSection",
    "Limits",
    "Lora",
    "ModelSection",
    "OfflineSection",
    "OptimisationSection",
    "OutputSection",
    "QLearningSection",
    "Recipe",
    "ReplaySection",
    "RewardSection",
    "RolloutSection",
    "Section",
    "Splits",
    "TaskSection",
    "WarmStartSection",
    "differing_keys",
    "dump_recipe",
    "load_recipe",
    "nearest",
    "recipe_schema",
    "validate",
]
