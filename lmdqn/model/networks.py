"""DQN's networks together: online, target and reference, as copies of a model or as adapters over one."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lmdqn.episodes import VALUE_FEATURES, Batch
from lmdqn.model.loading import LoadedModel, hidden_size
from lmdqn.model.qnetwork import QNetwork, ValueHead
from lmdqn.model.sharding import Sharding, own_part

ONLINE_ADAPTER, REFERENCE_ADAPTER, FIRST_ADAPTER = "online", "reference", "first"
TARGET_ADAPTER = "default"  # the target is what ships, and peft saves the adapter "default" as an ordinary one


@dataclass
class Networks:
    """DQN's networks. Only `online` is trained; `target` follows it; `reference` stays where it began.

    Where the reference is reset to the online network now and then, `first` is what it was at the start.
    """

    online: QNetwork
    target: QNetwork
    reference: QNetwork
    first: QNetwork | None = None

    @classmethod
    def build(
        cls,
        loaded: LoadedModel,
        beta: float,
        seed: int,
        chunk_mib: float | None = None,
        quantiles: int = 1,
        keep_first: bool = False,
        target_dtype: str | None = None,
    ) -> "Networks":
        """Equal networks: copies of the whole model, or adapters over one base model.

        Logits of a batch that take more than `chunk_mib` come in chunks. Of copies, the target's weights may be held
        in another type; its value head stays in float32.
        """
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            head = ValueHead(hidden_size(loaded.model), VALUE_FEATURES, beta, quantiles)
        model = loaded.model
        device = next(model.parameters()).device
        heads = [copy.deepcopy(head).to(device) for _ in range(4 if keep_first else 3)]
        if not hasattr(model, "peft_config"):
            models = [model, *(copy.deepcopy(model) for _ in heads[1:])]
            if target_dtype is not None:
                for weight in models[1].parameters():  # not buffers: rotary frequencies need their precision
                    weight.data = weight.data.to(getattr(torch, target_dtype))
            networks = cls(*(QNetwork(each, head, None, chunk_mib) for each, head in zip(models, heads, strict=True)))
        else:
            config = model.peft_config[TARGET_ADAPTER]
            adapters = [ONLINE_ADAPTER, TARGET_ADAPTER, REFERENCE_ADAPTER, FIRST_ADAPTER][: len(heads)]
            for name in adapters:
                if name != TARGET_ADAPTER:
                    model.add_adapter(name, copy.deepcopy(config))
            model.set_adapter(ONLINE_ADAPTER)
            named = zip(heads, adapters, strict=True)
            networks = cls(*(QNetwork(model, head, name, chunk_mib) for head, name in named))
            networks.online.restore(networks.target.weights())  # peft starts each adapter from other random numbers
        networks.settle()
        return networks

    def settle(self) -> None:
        """Make all others equal to the online network, as at the start of Q-learning."""
        for follower in filter(None, (self.target, self.reference, self.first)):
            follower.restore(self.online.weights())
            follower.value_head.requires_grad_(False)
            if follower.adapter is None:
                follower.model.requires_grad_(False)

    def track(self, update: int, polyak: float | None, copy_every: int | None) -> None:
        """Move the target after update number `update` (counted from 1): by Polyak averaging, a hard copy, or both.

        Where weights are shared out, each process moves its part.
        """
        if polyak is not None:
            online = self.online.weights()
            with torch.no_grad():
                for name, weight in self.target.weights().items():
                    own_part(weight).lerp_(own_part(online[name]).to(weight.dtype), polyak)
        if copy_every is not None and update % copy_every == 0:
            self.target.restore(self.online.weights())

    def standardise(self, mean: Tensor, deviation: Tensor, of_returns: Tensor) -> None:
        """Tell every value head the mean and standard deviation (F,) of its features, and the latter of returns, ()."""
        for network in self._all().values():
            network.value_head.standardise(mean, deviation, of_returns)

    def compile_layers(self) -> None:
        """Have all of them read whole responses by compiled layers."""
        for network in self._all().values():
            network.compile_layers()

    def shard(self, device: torch.device, sharding: Sharding, trial: Batch) -> None:
        """Share out the weights of all of them over all processes. Adapters over one model cannot be."""
        for network in self._all().values():
            network.shard(device, sharding, trial)

    def reset_reference(self) -> None:
        """Measure advantages against the online network as it is now; what was measured before is void."""
        self.reference.restore(self.online.weights())

    def go_on_from(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the target network of a finished run's `state()`, which is what it ships, and its reference."""
        self.online.restore(state["target"])
        self.target.restore(state["target"])
        self.reference.restore(state["reference"])
        if self.first is not None:
            self.first.restore(state.get("first", state["reference"]))

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The weights of all of them, for a checkpoint."""
        return {name: network.weights() for name, network in self._all().items()}

    def restore(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what `state()` gave."""
        for role, weights in state.items():
            getattr(self, role).restore(weights)

    def _all(self) -> dict[str, QNetwork]:
        networks = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: network for name, network in networks.items() if network is not None}
