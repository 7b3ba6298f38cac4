"""The whole recipe: its sections, and which of their settings exclude each other."""

import os
import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, model_validator
from pydantic.config import JsonDict

from lmdqn.errors import UserError
from lmdqn.recipe.continued import ContinuedSection
from lmdqn.recipe.data import DataSection
from lmdqn.recipe.decoding import DecodingSection
from lmdqn.recipe.experience import ReplaySection, RolloutSection
from lmdqn.recipe.guards import GuardsSection
from lmdqn.recipe.learning import OptimisationSection, WarmStartSection
from lmdqn.recipe.model import ModelSection
from lmdqn.recipe.offline import OfflineSection
from lmdqn.recipe.qlearning import QLearningSection
from lmdqn.recipe.reward import BETTER_IF_GREATER, METRICS, METRICS_OF_REFERENCES, RewardSection
from lmdqn.recipe.section import Place, Section, nearest
from lmdqn.recipe.tasks import TaskSection

TASK_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class EvaluationSection(Section):
    every_steps: int = Field(25, ge=1, description="steps between validations")
    metric: str = Field("reward", description="metric whose best validation value chooses the model that is kept")
    patience: int | None = Field(None, ge=1, description="stop after this many validations without a better one")
    batch_examples: int = Field(64, ge=1, description="responses decoded together, greedily")
    bootstrap_samples: int = Field(1000, ge=100, description="resamples behind intervals and p-values")


class OutputSection(Section):
    dir: Place = Field("runs/run", description="the run's folder")
    overwrite: bool = Field(False, description="replace a run that is already there")
    log_every_steps: int = Field(5, ge=1, description="steps between lines of metrics.jsonl")
    checkpoint_every_steps: int | None = Field(
        100,
        ge=1,
        description="steps between checkpoints; null: only at the best validation, at a phase's end or a signal",
    )
    keep_checkpoints: int = Field(
        2,
        ge=1,
        description="checkpoints kept besides the best one, the newest first; a damaged one needs another",
    )
    trackers: list[
        Literal["tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "aim", "clearml", "dvclive", "swanlab"]
    ] = Field(default_factory=list, description="experiment trackers that get what metrics.jsonl gets")
    tracked_samples: int = Field(4, ge=0, description="validation responses that trackers show at each evaluation")


_SECTION: JsonDict = {"type": "object"}
_NULL: JsonDict = {"type": "null"}
ONE_FORM: list[JsonValue] = [  # of a recipe's two, for the JSON schema
    {"required": ["data"], "properties": {"data": _SECTION, "reward": _SECTION, "tasks": _NULL}},
    {"required": ["tasks"], "properties": {"tasks": _SECTION, "data": _NULL, "reward": _NULL}},
]


class Recipe(Section):
    """A whole run, from model and data to the folder that keeps the result.

    It has one task, `data` with `reward`, or several in `tasks`; `every_task` and `only_task` read either form.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": ONE_FORM})

    seed: int = Field(0, ge=0, description="of every random generator in the run")
    model: ModelSection = Field(description="what is fine-tuned")
    data: DataSection | None = Field(None, description="what it learns from and is measured on")
    reward: RewardSection | None = Field(None, description="what a good response is")
    tasks: dict[str, TaskSection] | None = Field(
        None, description="instead of data and reward: several tasks by name, each with its own"
    )
    warm_start: WarmStartSection | None = Field(None, description="an MLE phase on the references, before DQN")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="how responses are sampled")
    replay: ReplaySection = Field(default_factory=ReplaySection, description="which episodes an update sees")
    offline: OfflineSection | None = Field(None, description="learn from a fixed log of episodes")
    continued: ContinuedSection | None = Field(None, description="learn on from a finished run")
    qlearning: QLearningSection = Field(default_factory=QLearningSection, description="Q, its targets, loss and budget")
    optimisation: OptimisationSection = Field(default_factory=OptimisationSection, description="how weights move")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="when and how it is measured")
    decoding: DecodingSection = Field(default_factory=DecodingSection, description="how a trained model is used")
    guards: GuardsSection = Field(default_factory=GuardsSection, description="what is watched against collapse")
    output: OutputSection = Field(default_factory=OutputSection, description="where it is kept")

    @property
    def every_task(self) -> dict[str, TaskSection]:
        """The tasks by name; the only one of a recipe without `tasks` is called "" (the empty text)."""
        if self.tasks is not None:
            return self.tasks
        assert self.data is not None
        assert self.reward is not None
        return {"": TaskSection(data=self.data, reward=self.reward)}

    @property
    def only_task(self) -> TaskSection:
        """The one task.

        Raises:
            UserError: there are several.
        """
        if self.tasks is not None:
            raise UserError(f"this recipe has several tasks: name one with --task ({', '.join(self.tasks)})")
        return self.every_task[""]

    def for_task(self, name: str) -> "Recipe":
        """The recipe of one of its tasks alone.

        Raises:
            UserError: there is no such task.
        """
        if self.tasks is None:
            raise UserError(f"there is no task {name!r}: this recipe has one task, which has no name")
        if name not in self.tasks:
            raise UserError(f"there is no task {name!r}{nearest(name, self.tasks)}")
        task = self.tasks[name]
        return self.model_copy(update={"tasks": None, "data": task.data, "reward": task.reward})

    @property
    def task_weights(self) -> dict[str, float]:
        """The weight of every task."""
        return {name: task.weight for name, task in self.every_task.items()}

    @property
    def max_response_tokens(self) -> int:
        """The longest response of any task."""
        return max(task.data.max_response_tokens for task in self.every_task.values())

    def check_new(self) -> None:
        """Refuse what a new run must not have, and runs of earlier versions may, which are still read.

        Raises:
            UserError: the model that is kept would be chosen by a metric that is no gain, or the run's folder, which it
                may replace, holds what it reads.
        """
        run = Path(self.output.dir).resolve()
        for key, place in self._places().items():
            if place is not None and Path(place).resolve().is_relative_to(run):
                raise UserError(f"{key}={place} lies in output.dir={self.output.dir}: choose another output.dir")
        metric = self.evaluation.metric
        if metric not in BETTER_IF_GREATER:
            better = ", ".join(BETTER_IF_GREATER)
            raise UserError(f"evaluation.metric={metric} is no gain by itself: choose one of {better}")

    def _places(self) -> dict[str, str | None]:
        """By key, what it reads from this machine."""
        places = {
            f"tasks.{name}.data.path" if name else "data.path": t.data.path for name, t in self.every_task.items()
        }
        if os.path.isabs(self.model.name or ""):
            places["model.name"] = self.model.name
        if self.offline is not None:
            places["offline.path"] = self.offline.path
        if self.continued is not None:
            places["continued.episodes"] = self.continued.episodes
        return places

    @model_validator(mode="before")
    @classmethod
    def _default_reward(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tasks") is None:
            return {"reward": {}, **given}
        return given

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if self.tasks is None:
            if self.data is None:
                raise ValueError("there are no 'tasks', and 'data' is missing")
            if self.reward is None:
                raise ValueError("reward: input should be a mapping, such as reward.mix, not None")
            return self
        if self.data is not None or self.reward is not None:
            own = "data" if self.data is not None else "reward"
            raise ValueError(f"a recipe has {own} or tasks, not both: with tasks set tasks.NAME.{own}")
        if not self.tasks:
            raise ValueError("tasks needs at least one task")
        for name in self.tasks:
            if not TASK_NAME.fullmatch(name):
                raise ValueError(f"tasks: a name is letters, digits and _, and begins with a letter, not {name!r}")
        return self

    @model_validator(mode="after")
    def _possible(self) -> Self:
        metric = self.evaluation.metric
        if metric not in METRICS:
            raise ValueError(f"evaluation.metric: there is no metric {metric!r}{nearest(metric, BETTER_IF_GREATER)}")
        for name, task in self.every_task.items():
            if task.data.references is None and task.data.conversation is None:
                self._possible_without_references(task, f"tasks.{name}." if name else "")
        if self.qlearning.baseline == "group" and self.rollout.samples < 2:
            raise ValueError("qlearning.baseline=group needs rollout.samples of 2 or more: or use running")
        self._possible_learning()
        return self

    def _possible_without_references(self, task: TaskSection, where: str) -> None:
        wanted = f"set {where}data.references"
        needing = [name for name in task.reward.mix if ":" not in name and name != "repetition"]
        if needing:
            raise ValueError(f"{where}reward.mix term {needing[0]!r} compares with references: {wanted}")
        if self.warm_start is not None:
            raise ValueError(f"warm_start learns the references by heart: {wanted} or drop warm_start")
        if self.replay.demonstrations:
            raise ValueError(f"replay.demonstrations are references: {wanted}, or 0 demonstrations")
        if self.evaluation.metric in METRICS_OF_REFERENCES:
            raise ValueError(f"evaluation.metric={self.evaluation.metric} compares with references: {wanted}")

    def _possible_learning(self) -> None:
        qlearning, offline = self.qlearning, self.offline
        if qlearning.target_dtype is not None and self.model.lora is not None:
            raise ValueError(
                f"qlearning.target_dtype={qlearning.target_dtype} is of a whole copy, and with model.lora the target "
                "is an adapter: drop one of them"
            )
        if qlearning.supervised and not self.replay.demonstrations:
            raise ValueError("qlearning.supervised learns demonstrations: set replay.demonstrations to 1 or more")
        if qlearning.importance != "none" and self.replay.demonstrations:
            raise ValueError(
                f"qlearning.importance={qlearning.importance} needs to know the behaviour policy, and "
                "replay.demonstrations have none: set 0 demonstrations, or importance=none"
            )
        if offline is not None and self.rollout.overlap_scoring:
            raise ValueError(
                "rollout.overlap_scoring scores a rollout until the next step has written another, and with offline "
                "only the first step of a round writes any: set overlap_scoring=false"
            )
        if offline is not None and not offline.rounds and self.replay.demonstrations:
            raise ValueError(
                "replay.demonstrations join rollouts, and with offline.rounds=0 there are none: set rounds, or log the "
                "references as episodes"
            )
        if offline is not None and offline.rounds and self.replay.fresh_share == 1:
            raise ValueError(
                "offline.rounds merges rollouts with the log, and with replay.fresh_share=1 updates see only the "
                "newest rollout: set fresh_share below 1"
            )
        if self.continued is not None and self.warm_start is not None:
            raise ValueError("continued learns on from a run that had its warm start: set warm_start=null")
        if self.continued is not None and self.replay.fresh_share == 1:
            raise ValueError(
                "a continued run keeps its replay, and with replay.fresh_share=1 updates see only the newest rollout: "
                "set fresh_share below 1, such as replay.fresh_share=0.5"
            )
        if offline is not None and offline.boltzmann_js_nats is not None and qlearning.form == "classic":
            raise ValueError(
                "offline.boltzmann_js_nats samples pi_0 exp(b Q), and qlearning.form=classic has no pi_0: use dueling"
            )
        of_group = qlearning.loss == "path" and qlearning.path_value == "group"
        if of_group and self.rollout.samples + self.replay.demonstrations < 2:
            raise ValueError("qlearning.loss=path takes its value from a group: set rollout.samples to 2 or more")
