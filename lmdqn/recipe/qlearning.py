"""Recipe section `qlearning`: what Q is, what it is pulled towards, and by which loss."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lmdqn.recipe.section import Section

SOFT_BACKUPS = ("soft", "soft_double")
OF_THE_TEXTBOOK: dict[str, Any] = {"backup": "hard", "trace": 0.0}  # what the classic form takes where nothing is said


class QLearningSection(Section):
    form: Literal["dueling", "calibrated", "classic"] = Field(
        "dueling",
        description="Q(s, a): dueling, a value head plus beta log(pi/pi_0); calibrated, beta (logit - reference's); "
        "classic, the raw logit as the textbook has it (backup=hard and trace=0 unless said)",
    )
    backup: Literal["soft", "soft_double", "hard", "double", "expected"] = Field(
        "soft",
        description="value of the next state: soft, beta log sum pi_0 exp(Q/beta); soft_double, that less beta times "
        "the KL of online to target; hard, max Q; double, Q of the online network's best; expected, the mean Q under "
        "the behaviour policy",
    )
    backup_top_k: int | None = Field(
        None, ge=1, description="backup=hard or double: only among the reference's k likeliest tokens"
    )
    loss: Literal["td", "path"] = Field(
        "td", description="td: Bellman residual of each token; path: one path-consistency residual an episode"
    )
    path_value: Literal["group", "network"] = Field(
        "group", description="loss=path: value of the prompt in closed form from its group, or the network's"
    )
    beta: float = Field(0.004, gt=0, description="temperature, in reward units per nat")
    gamma: float = Field(1.0, gt=0, le=1, description="discount a token")
    trace: float = Field(
        0.95, ge=0, le=1, description="lambda of the TD(lambda) target of Q; 0 is one step, 1 the whole return"
    )
    value_trace: float | None = Field(
        None,
        ge=0,
        le=1,
        description="lambda of the target that the value head learns; null: 1, but with backup=expected that of Q",
    )
    n_step: int | None = Field(None, ge=1, description="an n-step target instead of TD(lambda)")
    baseline: Literal["group", "running", "none"] = Field(
        "group", description="what rewards are centred by: the mean of the prompt's samples, a running mean, nothing"
    )
    huber_delta: float | None = Field(
        None, gt=0, description="residual in nats (classic: in reward) past which the loss is linear; null: squared"
    )
    value_quantiles: int | None = Field(
        None, ge=2, description="the value head gives this many quantiles of the return, learnt by quantile regression"
    )
    value_sees_references: bool = Field(
        True,
        description="in training the value head also sees how the prefix matches the references, and how the "
        "prompt's other samples fared",
    )
    conservative: float = Field(
        0.0, ge=0, description="weight of the conservative term, log sum pi_0 exp(Q/beta) - Q(s, a)/beta a token"
    )
    supervised: float = Field(
        0.0,
        ge=0,
        description="weight of the cross-entropy of demonstrations, nats a token; above 0 they are learnt by it alone, "
        "and residuals are of samples",
    )
    actor: float = Field(
        0.0, ge=0, description="weight of a policy-gradient term a token, its advantage the target minus the value"
    )
    importance: Literal["none", "token", "episode"] = Field(
        "none", description="weigh residuals by pi over the behaviour policy: of the token, or of the whole episode"
    )
    importance_clip: float = Field(2.0, gt=0, description="largest importance weight")
    target_polyak: float | None = Field(
        0.05, gt=0, le=1, description="share of the online weights taken into the target each update"
    )
    target_copy_every: int | None = Field(None, ge=1, description="hard copy of the online weights every n updates")
    target_dtype: Literal["bfloat16"] | None = Field(
        None,
        description="bfloat16: hold the target, a whole copy, in 16 bits a weight, moved by target_copy_every; null: "
        "like the model",
    )
    reference_reset_every: int | None = Field(
        None, ge=1, description="make the reference a copy of the online network every n updates; null: never"
    )
    value_learning_rate: float = Field(
        9e-3,
        gt=0,
        description="AdamW's peak rate for the value head of a model of hidden size 160; a wider one's is less by as "
        "much as it is wider",
    )
    max_steps: int = Field(1000, ge=0, description="steps of rollout and update")
    max_seconds: float | None = Field(None, gt=0, description="wall-clock budget, evaluation not counted")

    @model_validator(mode="before")
    @classmethod
    def _as_the_textbook(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("form") == "classic":
            return OF_THE_TEXTBOOK | given
        return given

    @property
    def is_soft(self) -> bool:
        """Whether values are entropy-regularised, so that log-ratios are part of the return."""
        return self.backup in SOFT_BACKUPS

    @property
    def has_value_head(self) -> bool:
        """Whether V is a head's, apart from the logits."""
        return self.form == "dueling"

    @property
    def trace_of_values(self) -> float:
        """Lambda of what the value head learns: the whole return, where that is right for any policy's data."""
        if self.value_trace is not None:
            return self.value_trace
        return self.trace if self.backup == "expected" else 1.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.target_polyak is None and self.target_copy_every is None:
            raise ValueError("the target network never moves: set qlearning.target_polyak or target_copy_every")
        if self.target_dtype is not None and self.target_polyak is not None:
            raise ValueError(
                f"qlearning.target_dtype={self.target_dtype} rounds the small steps of qlearning.target_polyak away: "
                "set target_polyak=null and target_copy_every"
            )
        if self.loss == "path":
            self._possible_path()
        elif self.path_value == "network":
            raise ValueError("qlearning.path_value=network is the value of a path residual: set qlearning.loss=path")
        if self.backup_top_k is not None and self.backup not in ("hard", "double"):
            raise ValueError(f"qlearning.backup_top_k bounds a maximum: qlearning.backup={self.backup} takes none")
        for name in ("value_quantiles", "value_trace"):
            if getattr(self, name) is not None and not self.has_value_head:
                raise ValueError(f"qlearning.{name} needs the value head of form=dueling, not {self.form}")
        return self

    def _possible_path(self) -> None:
        if self.form == "classic":
            raise ValueError(
                "qlearning.loss=path needs the log-ratio to a reference: use qlearning.form=dueling or calibrated"
            )
        if self.backup != "soft":
            raise ValueError(
                f"qlearning.loss=path holds of the soft value alone and bootstraps nothing: "
                f"qlearning.backup={self.backup} goes with loss=td"
            )
        if self.importance == "token":
            raise ValueError(
                "qlearning.importance=token weighs residuals of tokens: use loss=td, or importance=episode"
            )
        for name in ("n_step", "value_quantiles", "value_trace"):
            if getattr(self, name) is not None:
                raise ValueError(f"qlearning.{name} shapes the target of loss=td: drop it, or loss=path")
        if self.actor:
            raise ValueError("qlearning.actor goes with loss=td: the path residual is a policy gradient already")
