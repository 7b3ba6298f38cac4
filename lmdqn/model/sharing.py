"""Whether a causal model lets several responses share one row with their prompt, found out by trying."""

import inspect
from typing import Any

import torch
from torch import Tensor

from lmdqn.episodes import Episode, Example, SequenceFormat, make_batch


@torch.no_grad()
def can_share_prompts(model: Any, layout: SequenceFormat) -> bool:
    """Compare the logits of two responses in one row with those of the same responses in rows of their own.

    Models without `position_ids`, with a sliding window, or with a recurrent state cannot share; a model whose
    attention ignores the mask is found by its logits.
    """
    text_config = model.config.get_text_config()
    if layout.is_seq2seq or "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    if getattr(text_config, "sliding_window", None) is not None:
        return False
    generator = torch.Generator().manual_seed(0)
    prompt, *responses = torch.randint(text_config.vocab_size, (3, 5), generator=generator).tolist()
    example = Example("", (), tuple(prompt), (), "")
    episodes = [Episode(example, ids, truncated=True, group=0) for ids in responses]
    shared_layout = SequenceFormat(layout.pad_id, layout.eos_ids, None, None, shares_prompts=True)
    apart_layout = SequenceFormat(layout.pad_id, layout.eos_ids, None, None)
    shared, apart = (_logits(model, episodes, form) for form in (shared_layout, apart_layout))
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((shared - apart).abs().max() <= tolerance * apart.std())


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """transformers' four-dimensional mask: 0 where True, the smallest number where False, to be added to scores."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def _logits(model: Any, episodes: list[Episode], layout: SequenceFormat) -> Tensor:
    """(N, V) float32 logits at the states of the episodes."""
    batch = make_batch(episodes, layout).to(next(model.parameters()).device)
    inputs = {"attention_mask": batch.decoder_mask.long()}
    if batch.position_ids is not None:
        mask = additive_mask(batch.decoder_mask, model.dtype)
        inputs = {"attention_mask": mask, "position_ids": batch.position_ids}
    logits = model(input_ids=batch.decoder_ids, use_cache=False, **inputs).logits.float()
    row, position = batch.states.unbind(1)
    return logits[row, position]
