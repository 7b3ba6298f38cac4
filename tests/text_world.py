"""A text world small enough to enumerate: every response has its reward, and dynamic programming knows the optimum.

States are prefixes, numbered as in a heap: the empty one is 0 and token a leads from s to V s + a + 1. The model is a
table of logits by prefix, behind the interface of a Hugging Face model.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lmdqn.episodes import Episode, Example, SequenceFormat
from lmdqn.learn.learning_rates import MEASURED_WIDTH
from lmdqn.learn.trainer import Trainer
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import QNetwork
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import Recipe, validate
from lmdqn.results.tracking import Tracker

EOS = 1
PROMPT = 9
LAYOUT = SequenceFormat(pad_id=0, eos_ids=(EOS,), decoder_prefix=None, context_tokens=None)
EXAMPLE = Example("", ("",), (PROMPT,), (), "")


class TableModel(nn.Module):
    """Logits (prefixes, V) as an LM head over one-hot hidden states."""

    dtype = torch.float32

    def __init__(self, logits: Tensor):
        super().__init__()
        self.head = nn.Linear(logits.shape[0], logits.shape[1], bias=False)
        self.head.weight.data = logits.T.clone()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        prefixes, vocabulary = self.head.in_features, self.head.out_features
        state = torch.zeros(len(input_ids), dtype=torch.int64)
        states = [state]
        for token in input_ids[:, 1:].unbind(1):
            state = (state * vocabulary + token + 1).clamp(max=prefixes - 1)
            states.append(state)
        hidden = nn.functional.one_hot(torch.stack(states, 1), prefixes).to(self.head.weight.dtype)  # (R, L, prefixes)

        class Output:
            logits = self.head(hidden)

        return Output


class TableHead(nn.Module):
    """A value for each prefix, zero at the start."""

    is_standardised = True  # it sees no features
    width = MEASURED_WIDTH  # one row of it is read at a time, so its rate is that of the recipe at any size
    scale: Tensor

    def __init__(self, prefixes: int, scale: float, quantiles: int):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.outer = nn.Linear(prefixes, quantiles, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, hidden: Tensor, features: Tensor) -> Tensor:
        return self.scale * self.outer(hidden.detach().float())

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters()) | dict(self.named_buffers())


class World:
    """All responses of up to `length` tokens and their rewards; the reference policy is random, too."""

    def __init__(self, vocabulary: int = 4, length: int = 3, seed: int = 0):
        self.vocabulary, self.length = vocabulary, length
        generator = torch.Generator().manual_seed(seed)
        self.internal = sum(vocabulary**depth for depth in range(length))
        self.prefixes = self.internal + vocabulary**length
        self.reference = torch.randn(self.prefixes, vocabulary, generator=generator)
        self.reference[self.internal :] = 0.0  # cut responses: nothing is learnt of what follows them
        self.responses = list(self._responses([]))
        self.rewards = {ids: float(torch.rand((), generator=generator) * 2 - 1) for ids in self.responses}

    def _responses(self, prefix: list[int]) -> Any:
        for token in range(self.vocabulary):
            ids = [*prefix, token]
            if token == EOS or len(ids) == self.length:
                yield tuple(ids)
            else:
                yield from self._responses(ids)

    def episode(self, ids: Sequence[int], group: int = 0) -> Episode:
        log_probs = self.reference.log_softmax(-1)
        measured = [float(log_probs[s, a]) for s, a in self.path(ids)]
        episode = Episode(EXAMPLE, list(ids), ids[-1] != EOS, group, reward=self.rewards[tuple(ids)])
        episode.text = " ".join(map(str, ids))
        episode.reference_log_probs = torch.tensor(measured)
        episode.behaviour_log_probs = torch.tensor(measured)
        return episode

    def path(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """The states and actions of a response."""
        state, path = 0, []
        for token in ids:
            path.append((state, token))
            state = state * self.vocabulary + token + 1
        return path

    def live(self) -> list[int]:
        """Prefixes in which a token is chosen."""
        return sorted({s for ids in self.responses for s, _ in self.path(ids)})

    def optimum(self, value: Callable[[int, Tensor], Tensor], gamma: float = 1.0) -> Tensor:
        """Q by dynamic programming, (prefixes, V); `value(s, Q(s, .))` is the backup. Cut responses have Q = 0."""
        q = torch.zeros(self.prefixes, self.vocabulary)
        values = {s: float(value(s, q[s])) for s in range(self.internal, self.prefixes)}
        for s in reversed(self.live()):
            for a in range(self.vocabulary):
                following = s * self.vocabulary + a + 1
                ids = self._ids(s, a)
                if a == EOS:
                    q[s, a] = self.rewards[ids]
                else:
                    q[s, a] = self.rewards.get(ids, 0.0) + gamma * values[following]
            values[s] = float(value(s, q[s]))
        return q

    def _ids(self, state: int, action: int) -> tuple[int, ...]:
        ids = [action]
        while state:
            state, token = divmod(state - 1, self.vocabulary)
            ids.append(token)
        return tuple(reversed(ids))


def world_recipe(updates: int, **sections: dict[str, Any]) -> Recipe:
    tree: dict[str, Any] = {
        "model": {"from_scratch": {}},
        "data": {"path": "."},
        "replay": {"kept_share": 1.0},  # rare tokens are learnt from few samples: each of them counts
        "qlearning": {"beta": 0.5, "baseline": "none", "max_steps": updates, "value_learning_rate": 0.1},
        "optimisation": {"learning_rate": 0.1, "schedule": "cosine", "clip_norm": 1e6, "adam_betas": [0.9, 0.99]},
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return validate(tree, "world")


class WorldRollout(Rollout):
    """Samples from the table."""

    world: World

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
        generator = torch.Generator().manual_seed(seed * 1_000_003 + groups[0])
        log_probs = exploration.log_probs(network.model.head.weight.T.detach(), self.world.reference)
        episodes = []
        for i in range(len(examples) * samples):
            ids: list[int] = []
            state, behaviour = 0, []
            while len(ids) < self.world.length and EOS not in ids:
                ids.append(int(torch.multinomial(log_probs[state].exp(), 1, generator=generator)))
                behaviour.append(log_probs[state, ids[-1]])
                state = state * self.world.vocabulary + ids[-1] + 1
            episodes.append(self.world.episode(ids, groups[i // samples]))
            episodes[-1].behaviour_log_probs = torch.stack(behaviour)
        return episodes


def networks_of(world: World, recipe: Recipe, start: Tensor | None = None) -> Networks:
    """Online and target tables that start at `start`, or where the reference is."""
    qlearning = recipe.qlearning
    tables = [world.reference if start is None else start] * 2 + [world.reference]
    if qlearning.reference_reset_every is not None:
        tables.append(world.reference)
    networks = [
        QNetwork(TableModel(table), TableHead(world.prefixes, qlearning.beta, qlearning.value_quantiles or 1))  # type: ignore[arg-type]
        for table in tables
    ]
    if qlearning.target_dtype is not None:
        networks[1].model.to(getattr(torch, qlearning.target_dtype))
    return Networks(*networks)


class WorldReward:
    """The world's own rewards, by the ids that stand in for text."""

    def __init__(self, world: World):
        self.world = world

    def score(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            episode.reward = self.world.rewards[tuple(map(int, episode.text.split()))]
            episode.terms = {"world": episode.reward}


def trainer_of(world: World, recipe: Recipe, start: Tensor | None = None, log: Sequence[list[Episode]] = ()) -> Trainer:
    rollout = WorldRollout(LAYOUT, None, world.length)
    rollout.world = world
    networks = networks_of(world, recipe, start)
    reward: Any = WorldReward(world)
    return Trainer(recipe, networks, rollout, [EXAMPLE], reward, Accelerator(cpu=True), Tracker(), log)


def learn(world: World, recipe: Recipe, log: Sequence[Sequence[int]], start: Tensor | None = None) -> Trainer:
    """Update on a fixed log of responses, all of them in every batch, by the trainer of a real run."""
    trainer = trainer_of(world, recipe, start)
    trainer.replay.add([[world.episode(ids) for ids in log]])
    for _ in range(recipe.qlearning.max_steps):
        trainer.updater.update(trainer.budget.progress(trainer.step + 1), trainer.step, trainer.exploration)
        trainer.step += 1
    return trainer


def learnt_q(world: World, trainer: Trainer) -> Tensor:
    """The online network's Q, (prefixes, V)."""
    online, qlearning = trainer.networks.online, trainer.recipe.qlearning
    logits = online.model.head.weight.T.detach()
    if qlearning.form == "classic":
        return logits
    if qlearning.form == "calibrated":
        return qlearning.beta * (logits - world.reference)
    value = online.value_head.scale * online.value_head.outer.weight.detach().mean(0)[:, None]
    return value + qlearning.beta * (logits.log_softmax(-1) - world.reference.log_softmax(-1))


def learnt_log_policy(trainer: Trainer) -> Tensor:
    """(prefixes, V) nats."""
    return trainer.networks.online.model.head.weight.T.detach().log_softmax(-1)
