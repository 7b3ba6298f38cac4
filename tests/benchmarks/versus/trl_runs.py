"""TRL's GRPOTrainer and RLOOTrainer from the same checkpoint, on the same prompts, reward and clock.

What is set is what makes them equal to the others or faster; everything else is TRL's default (GRPO: loss "dapo",
rewards scaled by group; RLOO: advantages not normalised; AdamW's betas .9 and .999; gradients clipped at 1).
"""

import tempfile
from collections.abc import Sequence
from itertools import islice
from statistics import fmean
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from lmdqn.episodes import Example
from lmdqn.errors import UserError
from lmdqn.learn.learning_rates import rate_factor
from lmdqn.recipe import Recipe
from versus.arena import Arena, Recorder, Variant

STEPS_A_SECOND = 50  # no run is faster: so many prompts are laid out, at most MOST_STEPS
MOST_STEPS = 20_000


def run_trl_grpo(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    trl = _trl()
    _run(trl.GRPOTrainer, trl.GRPOConfig, arena, recipe, recorder)


def run_trl_rloo(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    trl = _trl()
    _run(trl.RLOOTrainer, trl.RLOOConfig, arena, recipe, recorder)


def _trl() -> Any:
    try:
        import trl
    except ImportError as error:
        raise UserError("TRL is not installed: pip install -c constraints.txt -e '.[bench]'") from error
    return trl


def _run(trainer_class: Any, config_class: Any, arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
    from datasets import Dataset

    loaded = arena.fresh()
    train = arena.examples["train"]
    check_prompts(train, loaded.tokenizer)
    steps = min(MOST_STEPS, int(arena.settings.seconds * STEPS_A_SECOND) + 1)
    place = {id(example): i for i, example in enumerate(train)}
    order = [place[id(e)] for examples in islice(arena.prompts(recipe.seed), steps) for e in examples]
    prompts = Dataset.from_dict({"prompt": [e.prompt for e in train], "example": list(range(len(train)))})

    def reward(completions: Sequence[str], example: Sequence[int], **_: Any) -> list[float]:
        chosen = [train[i] for i in example]
        texts = [text.strip() for text in completions]  # as lmdqn decodes
        return arena.reward(texts, [e.references for e in chosen], [e.source for e in chosen])

    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_class(
            model=loaded.model,
            reward_funcs=reward,
            args=config_class(output_dir=scratch, max_steps=steps, **_arguments(recipe, train)),
            train_dataset=prompts.select(order),
            processing_class=loaded.tokenizer,
            callbacks=[_Watch(recipe, recorder)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def check_prompts(examples: Sequence[Example], tokenizer: Any) -> None:
    """TRL tokenises a prompt's text by itself and cuts nothing: the text, already cut, must give lmdqn's ids.

    Raises:
        UserError: it does not.
    """
    ids = tokenizer(text=[example.prompt for example in examples])["input_ids"]
    for example, own in zip(examples, ids, strict=True):
        if tuple(own) != example.prompt_ids:
            raise UserError(f"TRL would read this prompt as other tokens than lmdqn does: {example.prompt[:80]!r}")


def _arguments(recipe: Recipe, train: Sequence[Example]) -> dict[str, Any]:
    episodes = recipe.rollout.prompts * recipe.rollout.samples
    parts = parts_for(episodes, train, recipe.optimisation.micro_batch_tokens)
    return {
        "seed": recipe.seed,
        "learning_rate": recipe.optimisation.learning_rate,
        "lr_scheduler_type": "constant",  # the callback writes the schedule, by the clock
        "per_device_train_batch_size": episodes // parts,
        "gradient_accumulation_steps": parts,
        "steps_per_generation": parts,  # one rollout and one update a step
        "num_iterations": 1,
        "num_generations": recipe.rollout.samples,
        "max_completion_length": recipe.max_response_tokens,
        "temperature": recipe.rollout.temperature,
        "top_k": recipe.rollout.top_k or 0,
        "beta": 0.0,
        "shuffle_dataset": False,  # the prompts come in lmdqn's order
        "disable_dropout": True,
        "gradient_checkpointing": False,  # TRL's default is slower
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "log_level": "error",
    }


def parts_for(episodes: int, train: Sequence[Example], micro_batch_tokens: int) -> int:
    """In how many micro-batches TRL should learn from a step's episodes: as many tokens in each as lmdqn takes.

    On a CPU that is a quarter faster than all at once. Padding about doubles the mean length.
    """
    mean = fmean(len(e.prompt_ids) + fmean(map(len, e.reference_ids)) for e in train)
    parts = 1
    while episodes * 2 * mean / parts > micro_batch_tokens and episodes % (2 * parts) == 0:
        parts *= 2
    return parts


class _Watch(TrainerCallback):
    """The schedule of the rate, the curve, and the end, all by the recorder's clock."""

    def __init__(self, recipe: Recipe, recorder: Recorder):
        self.recipe = recipe
        self.recorder = recorder

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.recorder.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        settings = self.recipe.optimisation
        assert settings.learning_rate is not None  # a benchmark's settings name it
        factor = rate_factor(settings.schedule, self.recorder.budget.progress(0), 0.0)
        for group in has["optimizer"].param_groups:
            group["lr"] = settings.learning_rate * factor

    def on_step_end(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        rollout = self.recipe.rollout
        episodes = state.global_step * rollout.prompts * rollout.samples
        variants = {"online": Variant(has["model"])}
        if self.recorder.spent or state.global_step == state.max_steps:
            control.should_training_stop = True
            self.recorder.finish(episodes, variants)
        else:
            self.recorder.step(episodes, variants)
