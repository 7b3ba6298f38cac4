"""Whether a causal model lets several responses share one row with their prompt, found out by trying."""

import inspect
from typing import Any

import torch
from torch import Tensor

from lmdqn.episodes import Batch, Episode, Example, SequenceFormat, make_batch


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


def causal_inputs(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a causal model's forward takes; where rows are shared, the mask is one that is added to scores."""
    if batch.position_ids is None:
        return {"input_ids": batch.decoder_ids, "attention_mask": batch.decoder_mask.long()}
    mask = torch.zeros(batch.decoder_mask.shape, dtype=dtype, device=batch.decoder_mask.device)
    mask.masked_fill_(~batch.decoder_mask, torch.finfo(dtype).min)
    return {"input_ids": batch.decoder_ids, "attention_mask": mask, "position_ids": batch.position_ids}


def _logits(model: Any, episodes: list[Episode], layout: SequenceFormat) -> Tensor:
    """(N, V) float32 logits at the states of the episodes."""
    batch = make_batch(episodes, layout).to(next(model.parameters()).device)
    logits = model(**causal_inputs(batch, model.dtype), use_cache=False).logits.float()
    row, position = batch.states.unbind(1)
    return logits[row, position]
