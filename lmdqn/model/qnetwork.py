"""The Q-network: a pretrained model whose LM head is read as Q, and its online, target and reference copies."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lmdqn.episodes import MATCH_FEATURES, Batch
from lmdqn.model.loading import LoadedModel, hidden_size
from lmdqn.model.sharing import causal_inputs
from lmdqn.model.vocabulary import log_prob_of

ONLINE_ADAPTER, REFERENCE_ADAPTER = "online", "reference"
TARGET_ADAPTER = "default"  # the target is what ships, and peft saves the adapter "default" as an ordinary one


class ValueHead(nn.Module):
    """V(s) from the last hidden state and, in training, from how the response so far matches the references.

    Zero at the start. The network's output is in nats and `scale` (the temperature beta) turns it into reward units,
    so that its gradient through the Bellman residual is as large as that of a log-probability. No gradient goes into
    the language model: with it, updates were measured to run away.
    """

    def __init__(self, hidden: int, features: int, scale: float):
        super().__init__()
        self.scale = scale
        self.inner = nn.Linear(hidden + features, hidden)
        self.outer = nn.Linear(hidden, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """hidden (N, H), features (N, F) -> (N,) in reward units."""
        seen = torch.cat([hidden.detach().float(), features], dim=-1)
        inner = nn.functional.gelu(self.inner(seen))
        return self.scale * self.outer(inner).squeeze(-1).float()


class StateOutputs(NamedTuple):
    """What a network says about the N states of a batch."""

    logits: Tensor  # (N, V); one row only where logits were not asked for
    values: Tensor  # (N,) V(s) of the value head, reward units


class QNetwork(nn.Module):
    """A language model and a value head. With LoRA, several networks share one model and differ by adapter."""

    def __init__(self, model: Any, value_head: ValueHead, adapter: str | None = None):
        super().__init__()
        self.model = model
        self.value_head = value_head
        self.adapter = adapter

    def forward(self, batch: Batch, need_logits: bool = True) -> StateOutputs:
        """Logits and values at the states of the batch.

        Only those states go through the LM head. The model's own `forward` applies the head, so scaling,
        soft-capping and bias are exactly the family's own.
        """
        row, position = batch.states.unbind(1)  # (N,), (N,)
        seen: list[Tensor] = []

        def pick_states(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            states = inputs[0][row, position]  # (N, H)
            seen.append(states)
            return (states[None] if need_logits else states[None, :1],)

        hook = self.model.get_output_embeddings().register_forward_pre_hook(pick_states)
        try:
            with self.active():
                logits = self.model(**self._inputs(batch), use_cache=False).logits  # (1, N, V)
        finally:
            hook.remove()
        return StateOutputs(logits[0], self.value_head(seen[0], batch.match_features[batch.state_mask]))

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The underlying model, with this network's adapter switched on."""
        if self.adapter is None:
            yield self.model
            return
        before = self.model.active_adapter
        if before != self.adapter:
            self.model.set_adapter(self.adapter)
        yield self.model
        if before != self.adapter:
            self.model.set_adapter(before)

    def weights(self) -> dict[str, Tensor]:
        """The network's own weights by a name that its copies share."""
        mark = f".{self.adapter}."
        named = {
            name.replace(mark, "."): p
            for name, p in self.model.named_parameters()
            if self.adapter is None or mark in name
        }
        return named | {f"value_head.{name}": p for name, p in self.value_head.named_parameters()}

    @property
    def device(self) -> torch.device:
        return self.value_head.outer.weight.device

    def _inputs(self, batch: Batch) -> Mapping[str, Any]:
        if batch.encoder_ids is not None:
            encoder = self.model.get_encoder()
            encoded = encoder(input_ids=batch.encoder_ids, attention_mask=batch.encoder_mask).last_hidden_state
            assert batch.encoder_mask is not None
            return {
                "encoder_outputs": BaseModelOutput(last_hidden_state=encoded[batch.encoder_rows]),
                "attention_mask": batch.encoder_mask[batch.encoder_rows],
                "decoder_input_ids": batch.decoder_ids,
                "decoder_attention_mask": batch.decoder_mask.long(),
            }
        return causal_inputs(batch, self.model.dtype)


@dataclass
class Networks:
    """DQN's three networks. Only `online` is trained; `target` follows it; `reference` stays where it began."""

    online: QNetwork
    target: QNetwork
    reference: QNetwork

    @classmethod
    def build(cls, loaded: LoadedModel, beta: float, seed: int) -> "Networks":
        """Three equal networks: copies of the whole model, or three adapters over one base model."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = ValueHead(hidden_size(loaded.model), MATCH_FEATURES, beta)
        model = loaded.model
        device = next(model.parameters()).device
        heads = [copy.deepcopy(head).to(device) for _ in range(3)]
        if not hasattr(model, "peft_config"):
            networks = cls(
                QNetwork(model, heads[0]),
                QNetwork(copy.deepcopy(model), heads[1]),
                QNetwork(copy.deepcopy(model), heads[2]),
            )
        else:
            config = model.peft_config[TARGET_ADAPTER]
            for name in (ONLINE_ADAPTER, REFERENCE_ADAPTER):
                model.add_adapter(name, copy.deepcopy(config))
            model.set_adapter(ONLINE_ADAPTER)
            networks = cls(
                QNetwork(model, heads[0], ONLINE_ADAPTER),
                QNetwork(model, heads[1], TARGET_ADAPTER),
                QNetwork(model, heads[2], REFERENCE_ADAPTER),
            )
            _copy(networks.target, networks.online)  # peft starts each adapter from other random numbers
        networks.settle()
        return networks

    def settle(self) -> None:
        """Make target and reference equal to the online network, as at the start of Q-learning."""
        for follower in (self.target, self.reference):
            _copy(self.online, follower)
            follower.value_head.requires_grad_(False)
            if follower.adapter is None:
                follower.model.requires_grad_(False)

    def track(self, update: int, polyak: float | None, copy_every: int | None) -> None:
        """Move the target after update number `update` (counted from 1): by Polyak averaging, a hard copy, or both."""
        if polyak is not None:
            online = self.online.weights()
            with torch.no_grad():
                for name, weight in self.target.weights().items():
                    weight.lerp_(online[name].to(weight.dtype), polyak)
        if copy_every is not None and update % copy_every == 0:
            _copy(self.online, self.target)


def response_log_probs(batch: Batch, outputs: StateOutputs) -> Tensor:
    """log pi(y_t | s_t) in nats, (B, T), zero on padding."""
    return batch.at_tokens(log_prob_of(outputs.logits, batch.actions))


def trained_parameters(network: QNetwork) -> list[nn.Parameter]:
    """The language model's parameters that learn (all, or the adapter's); the value head is not among them."""
    return [p for p in network.model.parameters() if p.requires_grad]


def _copy(source: QNetwork, destination: QNetwork) -> None:
    weights = source.weights()
    with torch.no_grad():
        for name, weight in destination.weights().items():
            weight.copy_(weights[name])
