"""Rollouts against one padded `generate` call, and whole iterations against TRL's GRPO."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from speed.material import loaded_model, pairs, texts_of
from speed.table import Line, Settings, compare


def rollout(settings: Settings) -> Iterator[Line]:
    """Tokens/s of responses of 5 to 128 tokens in groups of 8, against one padded call of `generate`."""
    for loaded, prompts, size in _models_and_prompts(settings, lora=False):
        fast, slow = settings.alternate(*_rollout_against_generate(loaded, prompts, settings))
        yield compare(f"rollout against one padded generate call, {size}", fast, slow, "tokens/s", ">= 2")


def merged_rollout(settings: Settings) -> Iterator[Line]:
    """The same responses by a model with a LoRA adapter: merged meanwhile, as rollouts do it, against as it is."""
    from lmdqn.model.merging import adapter_merged

    for loaded, prompts, size in _models_and_prompts(settings, lora=True):
        as_it_is, _ = _rollout_against_generate(loaded, prompts, settings)

        def merged(loaded: Any = loaded, as_it_is: Callable[[], float] = as_it_is) -> float:
            with adapter_merged(loaded.model, "default"):
                return as_it_is()

        fast, slow = settings.alternate(merged, as_it_is)
        yield compare(f"rollout with the adapter merged against as it is, {size}", fast, slow, "tokens/s", "")


def _models_and_prompts(settings: Settings, lora: bool) -> Iterator[tuple[Any, list[list[int]], str]]:
    """Two models, eight prompts as each reads them, and its size in words."""
    rows, texts = pairs(settings.data, 8, 1), texts_of(settings.data)
    for width, layers in ((160, 3), (512, 8)):
        loaded = loaded_model(texts, width, layers, 1500, lora)
        prompts = [loaded.tokenizer(row["source"] + "\n").input_ids for row in rows]
        yield loaded, prompts, f"{sum(p.numel() for p in loaded.model.parameters()) / 1e6:.1f}M"


def _rollout_against_generate(
    loaded: Any, prompts: list[list[int]], settings: Settings
) -> tuple[Callable[[], float], Callable[[], float]]:
    """Both sample from the model, but end each row at a length drawn beforehand."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from lmdqn.model.exploration import Exploration
    from lmdqn.model.reading import decode
    from lmdqn.model.rollout import Sampler

    eos, pad = loaded.layout.eos_ids[0], loaded.layout.pad_id
    lengths = torch.randint(5, 129, (8 * len(prompts),), generator=torch.Generator().manual_seed(0))

    def ended(scores: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, eos] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, eos] = 0.0
        return scores

    def ours() -> float:
        written = torch.zeros_like(lengths)
        sampler = Sampler(Exploration(), torch.rand(len(lengths), 128, dtype=torch.float64))

        def choose(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            written[rows] += 1
            return sampler(rows, ended(scores, written[rows] >= lengths[rows]))

        return int(lengths.sum()) / settings.seconds(
            lambda: decode([lambda: nullcontext(loaded.model)], loaded.layout, prompts, 8, 128, choose)
        )

    class Ends(LogitsProcessor):
        written = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.written += 1
            return ended(scores, self.written >= lengths)

    def theirs() -> float:
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]).repeat_interleave(8, 0)
        given = {"attention_mask": (ids != pad).long(), "logits_processor": LogitsProcessorList([Ends()])}
        return int(lengths.sum()) / settings.seconds(
            lambda: loaded.model.generate(ids, do_sample=True, top_k=0, max_new_tokens=128, **given)
        )

    return ours, theirs


def iteration(settings: Settings) -> Iterator[Line]:
    """A whole iteration, rollout, score and update, against TRL's GRPO; DIR is a folder of its set's name."""
    from versus.iteration import episode_rates

    fast, slow = settings.alternate(*episode_rates(settings.data, settings.output, settings.clock))
    yield compare("whole iteration against TRL's GRPO, 16 prompts x 4, 1.2M", fast, slow, "episodes/s", ">= 2")
