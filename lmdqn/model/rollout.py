"""Writing episodes: batched sampling with transformers' `generate`, and the reference's view of what was written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from lmdqn.episodes import Episode, Example, SequenceFormat, make_batch, micro_batches
from lmdqn.model.qnetwork import QNetwork, response_log_probs


@dataclass(frozen=True)
class Exploration:
    """How tokens are chosen in a rollout: Boltzmann at `temperature`, or epsilon-greedy when `epsilon` is given."""

    temperature: float = 1.0
    top_k: int | None = None
    epsilon: float | None = None

    def log_probs(self, logits: Tensor) -> Tensor:
        """The behaviour policy. logits (B, V) -> (B, V) log-probabilities in nats."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            weakest = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < weakest, -torch.inf)
        if self.epsilon is None:
            return logits.log_softmax(-1)
        allowed = logits.isfinite()
        uniform = allowed / allowed.sum(-1, keepdim=True)
        greedy = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return (self.epsilon * uniform + (1 - self.epsilon) * greedy).log()


class _Sampler(LogitsProcessor):
    """Samples each token itself, from a generator the run owns, and keeps the log-probability it sampled it with."""

    def __init__(self, exploration: Exploration, generator: torch.Generator):
        self.exploration = exploration
        self.generator = generator
        self.log_probs: list[Tensor] = []  # a (B,) tensor for each token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_probs = self.exploration.log_probs(scores)
        chosen = torch.multinomial(log_probs.exp(), 1, generator=self.generator)  # (B, 1)
        self.log_probs.append(log_probs.gather(1, chosen).squeeze(1))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@dataclass
class Rollout:
    """Decodes responses with a network; one for a whole run."""

    layout: SequenceFormat
    tokenizer: Any
    max_response_tokens: int
    batch_examples: int = 64

    def sample(
        self,
        network: QNetwork,
        examples: Sequence[Example],
        samples: int,
        exploration: Exploration,
        generator: torch.Generator,
        first_group: int = 0,
    ) -> list[Episode]:
        """`samples` episodes of each example, those of one example sharing a group number from `first_group` on."""
        episodes = []
        at_once = max(1, self.batch_examples // samples)
        for start in range(0, len(examples), at_once):
            sampler = _Sampler(exploration, generator)
            with network.active() as model:
                responses = self._generate(model, examples[start : start + at_once], samples, sampler)
            behaviour = torch.stack(sampler.log_probs, dim=1).cpu()  # (B, T)
            for row, ids in enumerate(responses):
                which = start + row // samples
                truncated = ids[-1] not in self.layout.eos_ids
                episode = Episode(examples[which], ids, truncated, first_group + which, text=self.decode(ids))
                episode.behaviour_log_probs = behaviour[row, : len(ids)].clone()
                episodes.append(episode)
        return episodes

    def greedy(self, model: Any, examples: Sequence[Example]) -> list[str]:
        """The model's likeliest-token response to each example; prompts of similar length are decoded together."""
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
        texts = [""] * len(examples)
        for start in range(0, len(order), self.batch_examples):
            chunk = order[start : start + self.batch_examples]
            for i, ids in zip(chunk, self._generate(model, [examples[i] for i in chunk]), strict=True):
                texts[i] = self.decode(ids)
        return texts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, special tokens and outer white space dropped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    @torch.no_grad()
    def _generate(
        self, model: Any, examples: Sequence[Example], samples: int = 1, sampler: _Sampler | None = None
    ) -> list[list[int]]:
        """Response ids up to and including the first EOS, `samples` of them for each example in turn."""
        device = next(model.parameters()).device
        ids, mask = (t.to(device) for t in self._pad_prompts(examples))
        start: dict[str, Any] = {"attention_mask": mask.repeat_interleave(samples, 0)}
        if self.layout.decoder_prefix is not None:
            prefix = torch.tensor([self.layout.decoder_prefix], device=device)
            encoded = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            start["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded.repeat_interleave(samples, 0))
            start["decoder_input_ids"] = prefix.expand(len(examples) * samples, -1)
            skip = prefix.shape[1]
        else:
            start["input_ids"] = ids.repeat_interleave(samples, 0)
            skip = ids.shape[1]
            if samples > 1 and skip > 1 and self.layout.shares_prompts:
                start["past_key_values"] = _prompt_cache(model, ids, mask, samples)
        output = model.generate(
            **start,
            max_new_tokens=self.max_response_tokens,
            logits_processor=LogitsProcessorList([sampler] if sampler else []),
        )
        return [_until_eos(row, self.layout.eos_ids) for row in output[:, skip:].tolist()]

    def _pad_prompts(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """(B, longest) ids and mask; a causal model goes on from the right end, so its padding is on the left."""
        longest = max(len(e.prompt_ids) for e in examples)
        ids = torch.full((len(examples), longest), self.layout.pad_id)
        mask = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            n = len(example.prompt_ids)
            where = slice(0, n) if self.layout.is_seq2seq else slice(longest - n, None)
            ids[row, where] = torch.tensor(example.prompt_ids)
            mask[row, where] = 1
        return ids, mask


def _prompt_cache(model: Any, ids: Tensor, mask: Tensor, samples: int) -> Any:
    """Keys and values of all but each prompt's last token, computed once and repeated for its samples."""
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]
    cache = model(
        input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=position_ids, use_cache=True
    ).past_key_values
    cache.batch_repeat_interleave(samples)
    return cache


@torch.no_grad()
def measure_reference(
    reference: QNetwork, episodes: Sequence[Episode], layout: SequenceFormat, micro_batch_tokens: int
) -> None:
    """Write the frozen reference's log-probabilities into the episodes, once: they never change."""
    for chunk in micro_batches(episodes, layout, micro_batch_tokens):
        batch = make_batch(chunk, layout).to(reference.device)
        log_probs = response_log_probs(batch, reference(batch)).cpu()  # (B, T)
        for i, episode in enumerate(chunk):
            episode.reference_log_probs = log_probs[i, : len(episode.response_ids)].clone()


def _until_eos(ids: list[int], eos_ids: Sequence[int]) -> list[int]:
    for n, token in enumerate(ids, start=1):
        if token in eos_ids:
            return ids[:n]
    return ids
