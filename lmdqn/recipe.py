"""The recipe: everything a run is told, as typed and validated data.

This file is the one place for defaults. A field's description is at once the help text and what an editor
shows from the JSON schema.
"""

import difflib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmdqn.errors import UserError


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class FromScratch(Section):
    family: str = Field("gpt2", description="transformers model type: gpt2, llama, qwen2, t5, bart, ...")
    config: dict[str, Any] = Field(
        default_factory=dict, description="fields of that family's config, such as n_layer and n_embd"
    )
    vocabulary_size: int = Field(1500, ge=300, description="tokens of the byte-level BPE trained on the data")


class Lora(Section):
    rank: int = Field(16, ge=1, description="rank of the update matrices")
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank")
    target_modules: str | list[str] = Field(
        "all-linear", description="modules to adapt: PEFT's 'all-linear', one name, or a list of names"
    )


class ModelSection(Section):
    name: str | None = Field(None, description="hub name or local folder of a pretrained model")
    from_scratch: FromScratch | None = Field(
        None, description="build a small model and its tokenizer from the data instead of loading one"
    )
    architecture: Literal["auto", "causal", "seq2seq"] = Field(
        "auto", description="auto reads it from the model's config"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = Field(
        "float32", description="type the weights are held in"
    )
    lora: Lora | None = Field(None, description="train a LoRA adapter instead of all weights")
    pad_token: str | None = Field(None, description="pad token, for a tokenizer that has none")
    eos_token: str | None = Field(None, description="end token, for a tokenizer that has none")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.name is None) == (self.from_scratch is None):
            raise ValueError("model needs exactly one of model.name and model.from_scratch")
        if self.from_scratch is not None and self.lora is not None:
            raise ValueError("model.lora adapts pretrained weights: drop it, or replace from_scratch by model.name")
        return self


class Splits(Section):
    train: str = Field("train", description="name of the training split")
    validation: str = Field("validation", description="name of the validation split")
    test: str = Field("test", description="name of the test split")


class Limits(Section):
    train: int | None = Field(None, ge=1, description="first n training examples, after a seeded shuffle")
    validation: int | None = Field(300, ge=1, description="first n validation examples, after a seeded shuffle")
    test: int | None = Field(None, ge=1, description="first n test examples, in file order")


class Conversation(Section):
    column: str = Field("dialog", description="column that holds a whole conversation, a list of turns")
    history: int = Field(4, ge=1, description="turns of context before the reply that is learnt")


class DataSection(Section):
    path: str | None = Field(
        None, description="folder of {train,validation,test}.{jsonl,csv,parquet}, or a folder saved by datasets"
    )
    hub: str | None = Field(None, description="data set name on the Hugging Face hub")
    hub_config: str | None = Field(None, description="the hub data set's configuration")
    hub_revision: str | None = Field(
        None, description="its branch or commit; refs/convert/parquet serves sets that were made by a script"
    )
    splits: Splits = Field(default_factory=Splits, description="what the three splits are called")
    source: str = Field("source", description="column of the source: text, or a list of turns or messages")
    references: str | None = Field(
        "references", description="column of the reference or list of references; a dot reaches into a record"
    )
    conversation: Conversation | None = Field(
        None, description="learn every reply of whole conversations instead of source and references"
    )
    merge_references: bool = Field(True, description="rows of equal prompt become one example")
    prompt: str | None = Field(
        None, description="template over the columns, such as 'summarize: {source}'; default: the source alone"
    )
    chat: bool = Field(False, description="wrap the prompt in the tokenizer's chat template")
    system: str | None = Field(None, description="system message, with chat")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="longer prompts are cut inside the source, and the cut is reported"
    )
    cut: Literal["end", "start"] = Field(
        "end", description="which end of a long source is cut: end for documents, start for dialogues"
    )
    max_response_tokens: int = Field(64, ge=1, description="longest response, its EOS included")
    limits: Limits = Field(default_factory=Limits, description="how many examples of each split are used")

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.path is not None and self.hub is not None:
            raise ValueError("data needs only one of data.path and data.hub")
        if self.system is not None and not self.chat:
            raise ValueError("data.system is part of a chat template: set data.chat=true")
        return self


class RewardSection(Section):
    mix: dict[str, float] = Field(
        default_factory=lambda: {"bleu": 0.5, "rougeL": 0.5},
        description="weight of each term: bleu, chrf, rouge1, rouge2, rougeL, rougeLsum, length, repetition, "
        "or your own as module:function or file.py:function",
    )
    bleu_smoothing: Literal["exp", "floor", "add-k", "none"] = Field(
        "exp", description="sacrebleu's smoothing of sentence BLEU"
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


class WarmStartSection(Section):
    epochs: float = Field(3, gt=0, description="passes over all references of all examples")
    max_seconds: float | None = Field(None, gt=0, description="end earlier, at this wall-clock time")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate")
    warmup_share: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising rate")
    batch_examples: int = Field(16, ge=1, description="examples an update, each with all its references")


class RolloutSection(Section):
    prompts: int = Field(16, ge=1, description="prompts drawn a step")
    samples: int = Field(4, ge=1, description="responses sampled for each prompt: one group")
    temperature: float = Field(1.0, gt=0, description="Boltzmann exploration; 1 samples the policy itself")
    top_k: int | None = Field(None, ge=1, description="explore only inside the policy's k likeliest tokens")
    epsilon_start: float = Field(0.0, ge=0, le=1, description="epsilon-greedy exploration: share at the first step")
    epsilon_end: float = Field(0.0, ge=0, le=1, description="share after the decay")
    epsilon_decay_steps: int = Field(100, ge=1, description="steps of the linear decay")
    epsilon_greedy: bool = Field(
        False, description="explore by epsilon-greedy instead of Boltzmann: greedy, or uniform with probability epsilon"
    )


class ReplaySection(Section):
    capacity_episodes: int = Field(4096, ge=1, description="oldest groups leave when this is exceeded")
    demonstrations: int = Field(0, ge=0, description="references that join each group as scored episodes")
    batch_groups: int = Field(16, ge=1, description="prompt groups an update")
    fresh_share: float = Field(
        1.0, ge=0, le=1, description="share of a batch from the newest rollout; the rest is uniform over the replay"
    )
    updates_per_rollout: int = Field(1, ge=1, description="updates after each rollout")


class QLearningSection(Section):
    form: Literal["dueling", "classic"] = Field(
        "dueling", description="Q from a value head plus the soft advantage, or raw logits as the textbook has it"
    )
    loss: Literal["td", "path"] = Field(
        "td", description="td: Bellman residual of each token; path: one residual an episode, value in closed form"
    )
    beta: float = Field(0.01, gt=0, description="temperature, in reward units per nat")
    gamma: float = Field(1.0, gt=0, le=1, description="discount a token")
    trace: float = Field(0.95, ge=0, le=1, description="lambda of the soft TD(lambda) target; 1 is the whole return")
    baseline: Literal["group", "running", "none"] = Field(
        "group", description="what rewards are centred by: the mean of the prompt's samples, a running mean, nothing"
    )
    huber_delta: float | None = Field(
        None, gt=0, description="residual in nats (classic: in reward) past which the loss is linear; null: squared"
    )
    target_polyak: float | None = Field(
        0.05, gt=0, le=1, description="share of the online weights taken into the target each update"
    )
    target_copy_every: int | None = Field(None, ge=1, description="hard copy of the online weights every n updates")
    value_learning_rate_scale: float = Field(30.0, gt=0, description="value head's rate over the model's")
    max_steps: int = Field(1000, ge=0, description="steps of rollout and update")
    max_seconds: float | None = Field(None, gt=0, description="wall-clock budget, evaluation not counted")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.form == "classic" and self.loss == "path":
            raise ValueError("qlearning.loss=path needs the log-ratio to a reference: use qlearning.form=dueling")
        if self.target_polyak is None and self.target_copy_every is None:
            raise ValueError("the target network never moves: set qlearning.target_polyak or target_copy_every")
        return self


class OptimisationSection(Section):
    learning_rate: float = Field(4e-4, gt=0, description="AdamW's rate in the Q-learning phase")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="course of the rate over the budget, after the warm-up"
    )
    warmup_steps: int = Field(0, ge=0, description="steps with a rising rate")
    adam_betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's betas")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    clip_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    micro_batch_tokens: int = Field(
        8192, ge=1, description="padded tokens a forward pass; an update accumulates gradients over as many as it needs"
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field("no", description="Accelerate's autocast type")


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


class Recipe(Section):
    """A whole run, from model and data to the folder that keeps the result."""

    seed: int = Field(0, ge=0, description="of every random generator in the run")
    model: ModelSection = Field(description="what is fine-tuned")
    data: DataSection = Field(description="what it learns from and is measured on")
    reward: RewardSection = Field(default_factory=RewardSection, description="what a good response is")
    warm_start: WarmStartSection | None = Field(None, description="an MLE phase on the references, before DQN")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="how responses are sampled")
    replay: ReplaySection = Field(default_factory=ReplaySection, description="which episodes an update sees")
    qlearning: QLearningSection = Field(default_factory=QLearningSection, description="Q, its targets, loss and budget")
    optimisation: OptimisationSection = Field(default_factory=OptimisationSection, description="how weights move")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="when and how it is measured")
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
        if self.qlearning.loss == "path" and self.rollout.samples + self.replay.demonstrations < 2:
            raise ValueError("qlearning.loss=path takes its value from a group: set rollout.samples to 2 or more")
        return self


METRICS_OF_REFERENCES = ("bleu", "rouge1", "rouge2", "rougeL", "rougeLsum", "chrf")
METRICS = ("reward", *METRICS_OF_REFERENCES, "length_words", "distinct2", "repeated_4grams")
REWARD_TERMS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "length", "repetition")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: 1e-4 is one without a point, too."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a YAML recipe, apply dotted `key=value` overrides in order, and validate the whole.

    Raises:
        UserError: the file is missing or no YAML mapping, a key is unknown (the nearest one is named), a value
            has the wrong type, or two settings exclude each other.
    """
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold sections such as model: and data:, not {type(tree).__name__}")
    for override in overrides:
        _apply_override(tree, override)
    return validate(tree, str(path))


def validate(tree: dict[str, Any], origin: str) -> Recipe:
    """The recipe that a plain tree of keys and values describes; `origin` names it in errors."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_first_problem(error)}") from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def changed_recipe(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """A validated copy with some keys of some sections replaced, as in `changed_recipe(r, output={"dir": d})`."""
    tree = recipe.model_dump()
    for section, values in sections.items():
        tree[section] = {**(tree[section] or {}), **values}
    return validate(tree, "recipe")


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint for the end of an error message: the choice that was probably meant, else all if they are few."""
    choices = list(choices)
    if close := difflib.get_close_matches(word, choices, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; there are {', '.join(choices)}" if len(choices) <= 20 else ""


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} must read key=value, such as qlearning.max_steps=200")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML") from error
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {parent} is a value, not a section")
    tree[last] = value


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(_key(problem["loc"]))
    if problem["type"] == "extra_forbidden":
        *parents, last = [str(part) for part in problem["loc"]]
        return f"unknown key {key!r}{nearest(last, _keys_at(parents))}"
    if problem["type"] == "missing":
        return f"{key!r} is missing"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _key(loc: tuple[int | str, ...]) -> list[str]:
    """A location without pydantic's marks of which member of a union was tried."""
    section: type[BaseModel] | None = Recipe
    for depth, part in enumerate(loc):
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None:
            break
        section = next(_sections_of(field.annotation), None)
        if section is None and "dict" not in str(field.annotation):
            return [str(part) for part in loc[: depth + 1]]
    return [str(part) for part in loc]


def _keys_at(parents: list[str]) -> list[str]:
    section: type[BaseModel] = Recipe
    for parent in parents:
        section = next(_sections_of(section.model_fields[parent].annotation))
    return list(section.model_fields)


def _sections_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_of(argument)
