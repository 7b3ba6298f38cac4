"""An update in small pieces is the update at once; and under bfloat16 autocast, Q, V and targets stay float32."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import lmdqn
from lmdqn.episodes import MATCH_FEATURES, Batch, Episode, Example, make_batch, micro_batches
from lmdqn.learn.objective import loss_terms, q_loss
from lmdqn.learn.optimisation import Optimiser
from lmdqn.learn.targets import continuing, lambda_targets
from lmdqn.learn.trainer import Trainer
from lmdqn.model.exploration import Exploration
from lmdqn.model.loading import LoadedModel, load_model
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import ValueHead, trained_parameters
from lmdqn.recipe import QLearningSection, validate

BETA = 0.02
SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}


def scratch(family: str = "gpt2") -> LoadedModel:
    tree = {"from_scratch": {"family": family, "vocabulary_size": 300, "config": SIZES[family]}}
    section = validate({"model": tree, "data": {"path": "."}}, "test").model
    return load_model(section, ["the cat sat on the mat"] * 5, seed=0, max_response_tokens=8)


def episodes() -> list[Episode]:
    """Six groups of two, of all lengths, every third one truncated, with rewards and what was measured."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for group in range(6):
        example = Example("", (), tuple(range(5, 7 + 2 * group)), (), "")
        for k in range(2):
            ids = torch.randint(5, 250, (1 + group + 3 * k,), generator=generator).tolist()
            truncated = (group + k) % 3 == 0
            episode = Episode(example, ids if truncated else [*ids, 2], truncated, group, reward=float(k) - 0.1 * group)
            n = len(episode.response_ids)
            episode.reference_log_probs = -5 - torch.rand(n, generator=generator)
            episode.match_features = torch.rand(n + 1, MATCH_FEATURES, generator=generator)
            made.append(episode)
    return made


def learnt_weights(recipe: QLearningSection, family: str, micro_batch_tokens: int) -> tuple[dict[str, Tensor], int]:
    """The online network after three updates on the same batch, and in how many pieces each was made."""
    loaded = scratch(family)
    networks = Networks.build(loaded, BETA, seed=0)
    heads = list(networks.online.value_head.parameters())
    parameters = [(trained_parameters(networks.online), 1e-3), (heads, 1e-2)]
    optimiser = Optimiser(Accelerator(cpu=True), parameters, (0.9, 0.95), 0.0, clip_norm=1.0)
    batches = [make_batch(part, loaded.layout) for part in micro_batches(episodes(), loaded.layout, micro_batch_tokens)]
    terms = sum(loss_terms(batch, recipe) for batch in batches)
    for _ in range(3):
        optimiser.update(batches, lambda b: q_loss(b, networks, recipe, Exploration()).loss / terms, 1.0)
    return {name: w.detach() for name, w in networks.online.weights().items()}, len(batches)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("loss", ["td", "path"])
def test_accumulated_gradients_are_those_of_the_large_batch(loss: str, family: str) -> None:
    """Adam moves a weight by about the rate however small its gradient: what differs by rounding alone stays near."""
    recipe = QLearningSection(beta=BETA, loss=loss)
    whole, once = learnt_weights(recipe, family, 10**6)
    accumulated, pieces = learnt_weights(recipe, family, 1)
    start = {name: w.detach() for name, w in Networks.build(scratch(family), BETA, seed=0).online.weights().items()}
    assert (once, pieces) == (1, 6)
    moved = max(float((whole[name] - start[name]).abs().max()) for name in whole)
    apart = max(float((whole[name] - accumulated[name]).abs().max()) for name in whole)
    assert moved > 1e-3
    assert apart < 0.02 * moved


def test_under_bfloat16_values_and_targets_are_float32() -> None:
    """Against float64 from the same bfloat16 logits; log-probabilities in the logits' own type would miss widely."""
    loaded = scratch()
    with torch.no_grad():
        loaded.model.get_output_embeddings().weight *= 30  # logits of tens, where bfloat16 knows quarters
    networks = Networks.build(loaded, BETA, seed=0)
    generator = torch.Generator().manual_seed(0)
    heads = networks.online.value_head, networks.target.value_head
    for head in heads:
        nn.init.normal_(head.outer.weight, generator=generator)
    batch = make_batch(episodes(), loaded.layout)
    seen: list[Tensor] = []  # what the online network's LM head read, and the logits it gave
    lm_head: Any = networks.online.model.get_output_embeddings()
    lm_head.register_forward_hook(lambda _, inputs, output: seen.extend((inputs[0][0].detach(), output[0].detach())))
    with torch.autocast("cpu", torch.bfloat16):
        learnt = q_loss(batch, networks, QLearningSection(beta=BETA, trace=0.7), Exploration())
    hidden, logits = seen
    assert logits.dtype == torch.bfloat16
    assert {t.dtype for t in (learnt.loss, learnt.residuals, learnt.log_ratios, learnt.values)} == {torch.float32}

    log_probs = at_tokens(batch, logits.double().log_softmax(-1))
    ratios = (log_probs - batch.reference_log_probs.double()) * batch.response_mask
    mine, target = (batch.at_states(value_of_state(head, hidden, batch)) for head in heads)  # their trunks are equal
    goes_on = continuing(batch.response_mask)
    y = lambda_targets(batch.rewards.double(), target, BETA * ratios, goes_on, 1.0, 0.7)
    residuals = ((mine[:, :-1] - y) / BETA + ratios) * batch.response_mask
    torch.testing.assert_close(learnt.log_ratios.double(), ratios, atol=1e-4, rtol=0)
    torch.testing.assert_close(learnt.residuals.double(), residuals, atol=1e-3, rtol=1e-4)
    careless = at_tokens(batch, logits.log_softmax(-1)).double()
    assert (careless - log_probs).abs().max() > 0.05


def value_of_state(head: ValueHead, hidden: Tensor, batch: Batch) -> Tensor:
    """V in float64, (N,), of what the LM head read."""
    features = batch.value_features[batch.state_mask].nan_to_num(0.0)  # standardised by nothing yet
    seen = torch.cat([hidden.double(), features.double()], dim=-1)
    inner, outer = copy.deepcopy(head.inner).double(), copy.deepcopy(head.outer).double()
    return head.scale * outer(nn.functional.gelu(inner(seen))).squeeze(1).detach()


def at_tokens(batch: Batch, log_probs: Tensor) -> Tensor:
    """(N, V) -> (B, T), those of the tokens that were chosen."""
    return batch.at_tokens(log_probs.gather(1, batch.actions[:, None]).squeeze(1))


def test_q_learning_has_the_accelerator_to_itself(
    tmp_path: Path, write_data: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp16 unscales the gradients of every optimiser that Accelerate knows: the warm start's would do it again."""
    known, run = [], Trainer.run

    def watched(self: Trainer, *arguments: Any) -> float:
        known.append(len(self.accelerator._optimizers))
        return run(self, *arguments)

    monkeypatch.setattr(Trainer, "run", watched)
    tree = {
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": SIZES["gpt2"]}},
        "data": {"path": str(write_data()), "max_response_tokens": 8},
        "warm_start": {"epochs": 1},
        "rollout": {"prompts": 2, "samples": 2},
        "qlearning": {"max_steps": 1},
        "evaluation": {"bootstrap_samples": 100},
        "output": {"dir": str(tmp_path / "run")},
    }
    lmdqn.train(validate(tree, "test"))
    assert known == [1]
