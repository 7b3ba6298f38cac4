"""The whole recipe: its sections, and which of their settings exclude each other."""

from typing import Literal, Self

from pydantic import Field, model_validator

from lmdqn.recipe.data import DataSection
from lmdqn.recipe.decoding import DecodingSection
from lmdqn.recipe.experience import ReplaySection, RolloutSection
from lmdqn.recipe.guards import GuardsSection
from lmdqn.recipe.learning import OptimisationSection, WarmStartSection
from lmdqn.recipe.model import ModelSection
from lmdqn.recipe.offline import OfflineSection
from lmdqn.recipe.qlearning import QLearningSection
from lmdqn.recipe.reward import METRICS, METRICS_OF_REFERENCES, RewardSection
from lmdqn.recipe.section import Section, nearest


class EvaluationSection(Section):
    every_steps: int = Field(25, ge=1, description="steps between validations")
    metric: str = Field("reward", description="metric whose best validation value chooses the model that is kept")
    patience: int | None = Field(None, ge=1, description="stop after this many validations without a better one")
    batch_examples: int = Field(64, ge=1, description="responses decoded together, greedily")
    bootstrap_samples: int = Field(1000, ge=100, description="resamples behind intervals and p-values")


class OutputSection(Section):
    dir: str = Field("runs/run", description="the run's folder")
    overwrite: bool = Field(False, description="replace a run that is already there")
    log_every_steps: int = Field(5, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every_steps: int | None = Field(
        100,
        ge=1,
        description="steps between checkpoints; null: only at the best validation, at a phase's end or a signal",
    )
    keep_checkpoints: int = Field(1, ge=1, description="checkpoints kept besides the best one, the newest first")
    trackers: list[
        Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab"]
    ] = Field(default_factory=list, description="experiment trackers that get what metrics.jsonl gets")
    tracked_samples: int = Field(4, ge=0, description="validation responses that trackers show at each evaluation")


class Recipe(Section):
    """A whole run, from model and data to the folder that keeps the result."""

    seed: int = Field(0, ge=0, description="of every random generator in the run")
    model: ModelSection = Field(description="what is fine-tuned")
    data: DataSection = Field(description="what it learns from and is measured on")
    reward: RewardSection = Field(default_factory=RewardSection, description="what a good response is")
    warm_start: WarmStartSection | None = Field(None, description="an MLE phase on the references, before DQN")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="how responses are sampled")
    replay: ReplaySection = Field(default_factory=ReplaySection, description="which episodes an update sees")
    offline: OfflineSection | None = Field(None, description="learn from a fixed log of episodes")
    qlearning: QLearningSection = Field(default_factory=QLearningSection, description="Q, its targets, loss and budget")
    optimisation: OptimisationSection = Field(default_factory=OptimisationSection, description="how weights move")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="when and how it is measured")
    decoding: DecodingSection = Field(default_factory=DecodingSection, description="how a trained model is used")
    guards: GuardsSection = Field(default_factory=GuardsSection, description="what is watched against collapse")
    output: OutputSection = Field(default_factory=OutputSection, description="where it is kept")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        without_references = self.data.references is None and self.data.conversation is None
        if without_references:
            needing = [name for name in self.reward.mix if ":" not in name and name != "repetition"]
            if needing:
                raise ValueError(f"reward.mix term {needing[0]!r} compares with references: set data.references")
            if self.warm_start is not None:
                raise ValueError("warm_start learns the references by heart: set data.references or drop warm_start")
            if self.replay.demonstrations:
                raise ValueError("replay.demonstrations are references: set data.references, or 0 demonstrations")
        metric = self.evaluation.metric
        if metric not in METRICS:
            raise ValueError(f"evaluation.metric: there is no metric {metric!r}{nearest(metric, METRICS)}")
        if without_references and metric in METRICS_OF_REFERENCES:
            raise ValueError(f"evaluation.metric={metric} compares with references: set data.references")
        if self.qlearning.baseline == "group" and self.rollout.samples < 2:
            raise ValueError("qlearning.baseline=group needs rollout.samples of 2 or more: or use running")
        self._possible_learning()
        return self

    def _possible_learning(self) -> None:
        qlearning, offline = self.qlearning, self.offline
        if qlearning.supervised and not self.replay.demonstrations:
            raise ValueError("qlearning.supervised learns demonstrations: set replay.demonstrations to 1 or more")
        if qlearning.importance != "none" and self.replay.demonstrations:
            raise ValueError(
                f"qlearning.importance={qlearning.importance} needs to know the behaviour policy, and "
                "replay.demonstrations have none: set 0 demonstrations, or importance=none"
            )
        if offline is not None and offline.rounds and self.replay.fresh_share == 1:
            raise ValueError(
                "offline.rounds merges rollouts with the log, and with replay.fresh_share=1 updates see only the "
                "newest rollout: set fresh_share below 1"
            )
        if offline is not None and offline.boltzmann_js_nats is not None and qlearning.form == "classic":
            raise ValueError(
                "offline.boltzmann_js_nats samples pi_0 exp(b Q), and qlearning.form=classic has no pi_0: use dueling"
            )
        of_group = qlearning.loss == "path" and qlearning.path_value == "group"
        if of_group and self.rollout.samples + self.replay.demonstrations < 2:
            raise ValueError("qlearning.loss=path takes its value from a group: set rollout.samples to 2 or more")
