"""The Q-network: a pretrained model whose LM head is read as Q, with a value head."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lmdqn.episodes import VALUE_FEATURES, Batch
from lmdqn.errors import UserError
from lmdqn.model.activation_checkpointing import checkpointed_layers
from lmdqn.model.compiling import Forward, compiled_layers
from lmdqn.model.head import LMHead, forward_replaced, head_reads
from lmdqn.model.merging import adapter_merged
from lmdqn.model.sharding import Sharding, Shards, own_part, part_of
from lmdqn.model.sharing import causal_inputs
from lmdqn.model.vocabulary import LogitsOf, Reduce, log_prob_of, reduce_in_chunks
from lmdqn.model.zero import Zero

FAR = 10.0  # standard deviations from the mean, past which the value head does not tell features apart


class ValueHead(nn.Module):
    """V(s) from the last hidden state and, in training, from how the response so far matches the references.

    Zero at the start. `scale`, the spread of returns, turns the network's output into reward units, and features count
    by how far they are from their usual value: it learns several times faster so. No gradient goes into the language
    model: with it, updates were measured to run away. It computes in float32 under autocast too: an error of V is
    divided by beta in every residual.
    """

    feature_mean: Tensor  # (F,)
    feature_rate: Tensor  # (F,) one over the standard deviation
    scale: Tensor  # () reward units

    def __init__(self, hidden: int, features: int, scale: float, quantiles: int = 1):
        super().__init__()
        self.width = hidden
        self.inner = nn.Linear(hidden + features, hidden)
        self.outer = nn.Linear(hidden, quantiles)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)
        self.register_buffer("feature_mean", torch.zeros(features))
        self.register_buffer("feature_rate", torch.ones(features))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        """hidden (N, H), features (N, F) -> (N, K) quantiles of the return (or, with one, its mean), reward units.

        A feature that is NaN, not known, is taken for its mean.
        """
        standardised = ((features - self.feature_mean) * self.feature_rate).clamp(-FAR, FAR).nan_to_num(0.0)
        with torch.autocast(hidden.device.type, enabled=False):
            seen = torch.cat([hidden.detach().float(), standardised], dim=-1)
            return self.scale * self.outer(nn.functional.gelu(self.inner(seen)))

    def tensors(self) -> dict[str, Tensor]:
        """All that it is, by name: its parameters, and its features' usual values."""
        return dict(self.named_parameters()) | dict(self.named_buffers())

    @property
    def is_standardised(self) -> bool:
        """Whether it knows what is usual: from its first batch, or from a run that it continues."""
        return bool((self.feature_rate != 1).any())

    def standardise(self, mean: Tensor, deviation: Tensor, of_returns: Tensor) -> None:
        """From here on see features (F,) less their mean, over their deviation; one that does not vary, not at all.

        `of_returns` () is the deviation of what it learns, above 0, in reward units.
        """
        self.feature_mean.copy_(mean)
        self.feature_rate.copy_(torch.where(deviation > 1e-6, 1 / deviation, 0.0))
        self.scale.copy_(of_returns)


class StateOutputs(NamedTuple):
    """What a network says about the N states of a batch."""

    logits: Tensor  # (N, V); one row only where logits were not asked for, or come in chunks
    values: Tensor  # (N,) V(s) of the value head, reward units
    hidden: Tensor  # (N, H) what the LM head and the value head read
    quantiles: Tensor | None = None  # (N, K) where the value head gives more than the mean, reward units
    logits_of: LogitsOf | None = None  # where logits come in chunks: those of some of the states
    at_once: int | None = None  # states in such a chunk
    is_compiled: bool = False  # whether what is made of logits goes through torch.compile

    def over_vocabulary(self, reduce: Reduce, *per_state: Tensor) -> Any:
        """`reduce(logits, *per_state)`: numbers of each state from its float32 logits, (n, V) -> (n, ...)."""
        return over_vocabulary([self], reduce, *per_state)


def over_vocabulary(outputs: Sequence[StateOutputs], reduce: Reduce, *per_state: Tensor) -> Any:
    """Numbers of each state from what one or several networks say about it.

    The one way from logits to numbers: `reduce(logits, ..., *per_state)` is given float32 logits (n, V) of each
    network in turn and n rows of each of `per_state`, and gives a tensor, or a tuple of tensors, with n rows.
    It must treat every state alone, as states may come in chunks; one call is then cheaper than several.
    """
    states = len(outputs[0].values)
    at_once = min(o.at_once or states for o in outputs)
    if at_once < states:
        at_once = max(1, at_once // len(outputs))
    logits_of = [o.logits_of or o.logits.__getitem__ for o in outputs]
    return reduce_in_chunks(reduce, logits_of, per_state, states, at_once, any(o.is_compiled for o in outputs))


class QNetwork(nn.Module):
    """A language model and a value head. With LoRA, several networks share one model and differ by adapter.

    Where the float32 logits of a batch take more than `chunk_mib`, they come in chunks of that size.
    """

    def __init__(self, model: Any, value_head: ValueHead, adapter: str | None = None, chunk_mib: float | None = None):
        super().__init__()
        self.model = model
        self.value_head = value_head
        self.adapter = adapter
        self.chunk_mib = chunk_mib
        self._head: LMHead | None = None
        self._layers: list[tuple[nn.Module, Forward]] = []  # and what they work by in `forward`, instead of their own
        self._is_compiled = False
        self.shards: Shards | Zero | None = None  # where several processes share the weights out
        self._vocabulary = model.get_output_embeddings().weight.shape[0]

    def forward(self, batch: Batch, need_logits: bool = True) -> StateOutputs:
        """Logits and values at the states of the batch.

        Only those states go through the LM head. The model's own `forward` applies the head, so scaling,
        soft-capping and bias are exactly the family's own.
        """
        row, position = batch.states.unbind(1)  # (N,), (N,)
        at_once = self._states_at_once()
        in_chunks = need_logits and at_once is not None and at_once < len(row)
        seen: list[Tensor] = []

        def pick_states(hidden: Tensor) -> Tensor:
            states = hidden[row, position]  # (N, H)
            seen.append(states)
            return (states[:1] if in_chunks or not need_logits else states)[None]

        with self.active(), self._layers_replaced(), head_reads(self.model, pick_states):
            logits = self.model(**self._inputs(batch), use_cache=False).logits.squeeze(0)  # (N, V) or (1, V)
        quantiles = self._quantiles(batch, seen[0])
        several = quantiles if quantiles.shape[-1] > 1 else None
        outputs = StateOutputs(logits, quantiles.mean(-1), seen[0], several, is_compiled=self._is_compiled)
        if not in_chunks:
            return outputs
        return outputs._replace(logits=logits.detach(), logits_of=self._logits_later(seen[0]), at_once=at_once)

    def values_of(self, batch: Batch, hidden: Tensor) -> Tensor:
        """(N,) V(s) of this network's value head at the states of the batch, from hidden states (N, H)."""
        return self._quantiles(batch, hidden).mean(-1)

    def _quantiles(self, batch: Batch, hidden: Tensor) -> Tensor:
        """(N, K) what the value head gives at the states of the batch; with one quantile, the mean itself."""
        quantiles: Tensor = self.value_head(hidden, batch.value_features[batch.state_mask])
        return quantiles

    def _logits_later(self, hidden: Tensor) -> LogitsOf:
        """Logits of some of the states, made when asked for, with gradient if there was one when it was made."""
        with_gradient = torch.is_grad_enabled()
        with self.active():
            head = self._head = self._head or LMHead(self.model)  # sharded: it is there already

        def logits_of(chunk: slice) -> Tensor:
            with self.active(), torch.set_grad_enabled(with_gradient and torch.is_grad_enabled()):
                return head(hidden[chunk])

        return logits_of

    def _states_at_once(self) -> int | None:
        if self.chunk_mib is None:
            return None
        return max(1, int(self.chunk_mib * 2**20) // (4 * self._vocabulary))

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

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Inside, this network decodes as fast as one without an adapter, and others of the model must not be asked."""
        if self.adapter is None:
            yield
            return
        with self.active() as model, adapter_merged(model, self.adapter):
            yield

    def compile_layers(self) -> None:
        """From here on `forward` runs compiled; decoding and the names of weights stay as they are."""
        self._layers, self._is_compiled = compiled_layers(self.model), True

    def checkpoint_layers(self) -> None:
        """From here on `forward` keeps the layers' inputs alone for the backward pass, where they work again."""
        self._layers = checkpointed_layers(self.model)

    @contextmanager
    def _layers_replaced(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, forward in self._layers:
                stack.enter_context(forward_replaced(layer, forward))
            yield

    def shard(self, device: torch.device, sharding: Sharding, trial: Batch) -> None:
        """Share the weights out over all processes; all must call it, and pass `trial` through what came out.

        Raises:
            UserError: logits are to come in chunks, and this model's cannot.
        """
        if sharding.zero_stage == 3:
            self.chunk_mib = None  # each chunk would gather the LM head, and processes have differently many
        if self.chunk_mib is not None:
            self._head = LMHead(self.model)
        if sharding.zero_stage is not None:
            self.shards = Zero(self.to(device), sharding.zero_stage)
            return
        layers = {*self.model._no_split_modules, ValueHead.__name__}
        self.shards = Shards(self, layers, device, sharding.reshard_after_forward)
        with torch.no_grad():  # the first pass must be through the whole, and tells each part what it is of
            self(trial.to(device))
        self.shards.rest()

    def whole(self) -> "AbstractContextManager[QNetwork]":
        """Inside, a network that this process can pass through alone. If weights are shared out, all must enter."""
        return nullcontext(self) if self.shards is None else self.shards.whole()

    def weights(self) -> dict[str, Tensor]:
        """The network's own weights by a name that its copies share; where they are shared out, this process's part."""
        if self.shards is not None:
            self.shards.rest()
        mark = f".{self.adapter}."
        named = {
            name.replace(mark, "."): p
            for name, p in self.model.named_parameters()
            if self.adapter is None or mark in name
        }
        return named | {f"value_head.{name}": weight for name, weight in self.value_head.tensors().items()}

    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Take what `weights()` of an equal network gave."""
        own = self.weights()
        if own.keys() != weights.keys():
            raise ValueError(f"weights of another network: {sorted(own.keys() ^ weights.keys())[:3]}")
        with torch.no_grad():
            for name, weight in own.items():
                own_part(weight).copy_(part_of(weights[name], weight))

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


def response_log_probs(batch: Batch, outputs: StateOutputs) -> Tensor:
    """log pi(y_t | s_t) in nats, (B, T), zero on padding."""
    return batch.at_tokens(outputs.over_vocabulary(log_prob_of, batch.actions))


def trained_parameters(network: QNetwork) -> list[nn.Parameter]:
    """The language model's parameters that learn (all, or the adapter's); the value head is not among them."""
    return [p for p in network.model.parameters() if p.requires_grad]


def load_value_head(folder: Path, hidden: int) -> ValueHead:
    """The value head that a run saved beside its model."""
    file = folder / "value_head.safetensors"
    if not file.exists():
        raise UserError(f"{file} is missing: without it there is no value")
    tensors = load_file(file)
    if "scale" not in tensors:
        raise UserError(f"{file} was written by an older version of lmdqn, whose value heads this one cannot read")
    head = ValueHead(hidden, VALUE_FEATURES, float(tensors["scale"]), len(tensors["outer.bias"]))
    head.load_state_dict(tensors)
    return head
