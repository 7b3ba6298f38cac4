"""Writing episodes: batched sampling, and the reference's view of what was written."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lmdqn.episodes import Episode, Example, SequenceFormat, make_batch, micro_batches
from lmdqn.errors import NotFinite
from lmdqn.model.exploration import Exploration
from lmdqn.model.qnetwork import QNetwork, response_log_probs
from lmdqn.model.reading import beam_search, decode, greedy

LogProbs = Literal["reference_log_probs", "first_log_probs"]  # fields of an episode that a frozen network fills


class Sampler:
    """Samples tokens by uniform numbers that are given, and keeps the log-probability it sampled each with.

    uniforms (B, T) in [0, 1), one for each token: what a row becomes does not depend on the rows beside it.
    """

    def __init__(self, exploration: Exploration, uniforms: Tensor):
        self.exploration = exploration
        self.uniforms = uniforms
        self.log_probs: list[list[float]] = [[] for _ in uniforms]  # of each row, in nats
        self._step = 0

    def __call__(self, rows: Tensor, logits: Tensor, reference: Tensor | None = None) -> Tensor:
        log_probs = self.exploration.log_probs(logits, reference)
        cumulated = log_probs.exp().cumsum(-1, dtype=torch.float64)  # (b, V)
        if not cumulated[:, -1].isfinite().all():
            raise NotFinite("the policy's logits are not finite in a rollout")
        points = self.uniforms[rows.cpu(), self._step, None].to(logits.device) * cumulated[:, -1:]
        chosen = torch.searchsorted(cumulated, points, right=True)  # (b, 1), never a token of probability 0
        self._step += 1
        for row, log_prob in zip(rows.tolist(), log_probs.gather(1, chosen).squeeze(1).tolist(), strict=True):
            self.log_probs[row].append(log_prob)
        return chosen.squeeze(1)


@dataclass
class Rollout:
    """Decodes responses with a network; one for a whole run."""

    layout: SequenceFormat
    tokenizer: Any
    max_response_tokens: int
    batch_examples: int = 64
    limits: Mapping[str, int] = field(default_factory=dict)  # longest response of each task, in tokens

    def sample(
        self,
        network: QNetwork,
        examples: Sequence[Example],
        samples: int,
        exploration: Exploration,
        seed: int,
        groups: Sequence[int],
        reference: QNetwork | None = None,
    ) -> list[Episode]:
        """`samples` episodes of each example, those of one example sharing its number in `groups`.

        What is random in an episode depends on the seed, the group and the sample alone. `reference` reads along
        where the exploration asks what it finds likely.
        """
        models = [network.active]
        if exploration.needs_reference:
            assert reference is not None
            models.append(reference.active)
        drawn: list[list[Episode]] = [[] for _ in examples]
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
        at_once = max(1, self.batch_examples // samples)
        with nullcontext() if exploration.needs_reference else network.merged():
            for start in range(0, len(order), at_once):
                chunk = order[start : start + at_once]
                prompts = [examples[i].prompt_ids for i in chunk]
                sampler = Sampler(exploration, self._uniforms(seed, [groups[i] for i in chunk], samples))
                responses = decode(models, self.layout, prompts, samples, self.max_response_tokens, sampler)
                for row, (response, log_probs) in enumerate(zip(responses, sampler.log_probs, strict=True)):
                    which = chunk[row // samples]
                    drawn[which].append(self._episode(examples[which], response, log_probs, groups[which]))
        return [episode for of_example in drawn for episode in of_example]

    def _episode(self, example: Example, response: list[int], log_probs: list[float], group: int) -> Episode:
        response = self._within_limit(response, example)
        truncated = response[-1] not in self.layout.eos_ids
        episode = Episode(example, response, truncated, group, text=self.decode(response))
        episode.behaviour_log_probs = torch.tensor(log_probs[: len(response)])
        return episode

    def _uniforms(self, seed: int, groups: Sequence[int], samples: int) -> Tensor:
        """(groups * samples, max_response_tokens) in [0, 1)."""
        shape = samples, self.max_response_tokens
        return torch.from_numpy(np.concatenate([np.random.default_rng([seed, g]).random(shape) for g in groups]))

    def greedy(self, model: Any, examples: Sequence[Example], beams: int = 1) -> list[str]:
        """The model's likeliest-token response to each example, or by beam search its likeliest found.

        Prompts of similar length are decoded together.
        """
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
        texts = [""] * len(examples)
        for start in range(0, len(order), self.batch_examples):
            chunk = order[start : start + self.batch_examples]
            prompts = [examples[i].prompt_ids for i in chunk]
            if beams > 1:
                responses = beam_search(model, self.layout, prompts, beams, self.max_response_tokens)
            else:
                alone = [lambda: nullcontext(model)]
                responses = decode(alone, self.layout, prompts, 1, self.max_response_tokens, greedy)
            for i, ids in zip(chunk, responses, strict=True):
                texts[i] = self.decode(self._within_limit(ids, examples[i]))
        return texts

    def _within_limit(self, response: list[int], example: Example) -> list[int]:
        """What the task of a response has room for."""
        return response[: self.limits.get(example.task)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a response, special tokens and outer white space dropped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def measure_log_probs(
    network: QNetwork,
    episodes: Sequence[Episode],
    layout: SequenceFormat,
    micro_batch_tokens: int,
    name: LogProbs = "reference_log_probs",
) -> None:
    """Write a frozen network's log-probabilities into the episodes, once: they change only if it is reset."""
    for chunk in micro_batches(episodes, layout, micro_batch_tokens):
        batch = make_batch(chunk, layout).to(network.device)
        log_probs = response_log_probs(batch, network(batch)).cpu()  # (B, T)
        for i, episode in enumerate(chunk):
            setattr(episode, name, log_probs[i, : len(episode.response_ids)].clone())
