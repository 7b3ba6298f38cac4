"""What a value method can show of a response: the advantage of each token, the value's course, what else there was."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmdqn.answering import load_on_device, rollout_of
from lmdqn.episodes import VALUE_FEATURES, Episode, Example, make_batch
from lmdqn.errors import UserError
from lmdqn.learn.match_features import measure_matches
from lmdqn.model.exploration import Exploration
from lmdqn.model.loading import LoadedModel, hidden_size
from lmdqn.model.qnetwork import QNetwork, ValueHead, load_value_head
from lmdqn.recipe import Recipe, load_recipe
from lmdqn.results.run_folder import RunFolder
from lmdqn.text.data import Pair, load_pairs
from lmdqn.text.prompts import encode_examples

GREEDY = Exploration(epsilon=0.0)


@dataclass(frozen=True)
class Choice:
    """A token that could be chosen in a state. Reward units; `q` is None where the form has no value of its own."""

    text: str
    q: float | None
    advantage: float
    before: float  # probability under the reference policy
    after: float  # probability under the trained policy


@dataclass(frozen=True)
class Step:
    """A state of the response and the token chosen in it."""

    chosen: Choice
    value: float | None  # V(s_t)
    nats: float  # log(pi / pi_0) of the chosen token
    alternatives: list[Choice]  # the likeliest under either policy, the likeliest after training first
    instead_of: str | None  # what the reference policy prefers here, where that is another token


@dataclass(frozen=True)
class Inspected:
    """A greedy response, looked at token by token."""

    example: Example
    response: str
    before: str  # the reference policy's own greedy response
    steps: list[Step]
    truncated: bool


@dataclass(frozen=True)
class _View:
    """What one policy says in the n states of a response."""

    log_probs: Tensor  # (n, V) nats
    logits: Tensor  # (n, V)
    values: Tensor  # (n,) of its value head


def inspect_run(run: str | Path, pairs: Sequence[Pair], recipe: Recipe | None = None, top: int = 5) -> list[Inspected]:
    """Decode each source greedily with a run's best model and lay the trained and the reference policy side by side.

    A = beta log(pi / pi_0), Q = V + A (calibrated: V = beta (LSE f - LSE f_0); classic: Q the logit, V its maximum,
    A = Q - V; a dueling path loss trains no value head: there is A alone). V sees how the response matches the
    references only where it learnt with them and the pairs have some. One model is in memory at a time.

    Raises:
        UserError: no such run, or its reference policy is not there.
    """
    folder = RunFolder(Path(run))
    if not folder.model.is_dir():
        raise UserError(f"{folder.path} has no model/ folder: it is no run of lmdqn, or ended before a validation")
    recipe = recipe or load_recipe(folder.recipe)
    loaded = load_on_device(str(folder.model), recipe)
    examples, _ = encode_examples(pairs, recipe.only_task.data, loaded.tokenizer, loaded.layout)
    head = load_value_head(folder.model, hidden_size(loaded.model))
    network = QNetwork(loaded.model, head.to(loaded.model.device))
    rollout = rollout_of(loaded, recipe)
    episodes = rollout.sample(network, examples, 1, GREEDY, recipe.seed, range(len(examples)))
    if recipe.qlearning.value_sees_references:
        measure_matches(episodes)
    after = [_view(network, episode, loaded) for episode in episodes]
    del network, loaded
    loaded = load_on_device(folder.reference_name(recipe), recipe)
    zero = ValueHead(hidden_size(loaded.model), VALUE_FEATURES, recipe.qlearning.beta).to(loaded.model.device)
    reference = QNetwork(loaded.model, zero)
    before = [_view(reference, episode, loaded) for episode in episodes]
    texts = rollout_of(loaded, recipe).greedy(loaded.model, examples)
    return [
        Inspected(e.example, e.text, text, _steps(e, b, a, recipe, rollout.tokenizer, top), e.truncated)
        for e, text, b, a in zip(episodes, texts, before, after, strict=True)
    ]


def pairs_to_inspect(
    recipe: Recipe, prompts: Sequence[str], references: Sequence[str], split: str | None, limit: int
) -> list[Pair]:
    """Sources given one by one, and the first `limit` of a split.

    Raises:
        UserError: nothing to inspect, references without the one source they belong to, or data that cannot be read.
    """
    if references and len(prompts) != 1:
        raise UserError("--reference belongs to one --prompt")
    pairs = [Pair(prompt, tuple(references), {"source": prompt}) for prompt in prompts]
    if split is not None:
        pairs += load_pairs(recipe.only_task.data, split, recipe.seed)[:limit]
    if not pairs:
        raise UserError("nothing to inspect: give --prompt TEXT or --data test")
    return pairs


@torch.no_grad()
def _view(network: QNetwork, episode: Episode, loaded: LoadedModel) -> _View:
    batch = make_batch([episode], loaded.layout).to(network.device)
    outputs = network(batch)
    n = len(episode.response_ids)
    logits = outputs.over_vocabulary(lambda logits: logits)[:n].cpu()
    return _View(logits.log_softmax(-1), logits, outputs.values[:n].cpu())


def _steps(episode: Episode, before: _View, after: _View, recipe: Recipe, tokenizer: Any, top: int) -> list[Step]:
    advantages = recipe.qlearning.beta * (after.log_probs - before.log_probs)  # (n, V)
    values: Tensor | None = after.values
    if recipe.qlearning.form == "classic":
        values = after.logits.amax(-1)
        advantages = after.logits - values[:, None]
    elif recipe.qlearning.form == "calibrated":
        values = recipe.qlearning.beta * (after.logits.logsumexp(-1) - before.logits.logsumexp(-1))
    elif recipe.qlearning.loss == "path" or recipe.qlearning.reference_reset_every is not None:
        values = None  # there is none, or it is measured against a later reference than the one that is kept
    ids = episode.response_ids
    steps = []
    for t, token in enumerate(ids):
        old, new = before.log_probs[t], after.log_probs[t]

        def choice(action: int, t: int = t, old: Tensor = old, new: Tensor = new) -> Choice:
            advantage = float(advantages[t, action])
            q = None if values is None else float(values[t]) + advantage
            text = piece(tokenizer, ids[:t], action)
            return Choice(text, q, advantage, float(old[action].exp()), float(new[action].exp()))

        k = min(top, len(new))
        likely = dict.fromkeys([token, *new.topk(k).indices.tolist(), *old.topk(k).indices.tolist()])
        preferred = int(old.argmax())
        steps.append(
            Step(
                choice(token),
                None if values is None else float(values[t]),
                float(new[token] - old[token]),
                sorted((choice(action) for action in likely), key=lambda c: -c.after),
                piece(tokenizer, ids[:t], preferred) if preferred != int(new.argmax()) else None,
            )
        )
    return steps


def piece(tokenizer: Any, prefix: Sequence[int], token: int) -> str:
    """What a token adds to the text after a prefix; a special token's own name."""
    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token))
    start = tokenizer.decode(list(prefix), skip_special_tokens=True)
    whole = tokenizer.decode([*prefix, token], skip_special_tokens=True)
    return str(whole[len(start) :]) if whole.startswith(start) else str(tokenizer.decode([token]))
