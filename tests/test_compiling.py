"""With torch.compile updates are what they are without, whatever their shape; weights keep names, errors are clear.

By the backend that traces, guards, and runs what it traced as it is: it needs no compiler, and seconds.
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch._dynamo.utils import counters

import lmdqn
from lmdqn.episodes import MATCH_FEATURES, Batch, Episode, Example, make_batch
from lmdqn.errors import UserError
from lmdqn.learn.objective import loss_terms, q_loss
from lmdqn.learn.optimisation import Optimiser
from lmdqn.model import compiling, vocabulary
from lmdqn.model.exploration import Exploration
from lmdqn.model.loading import LoadedModel
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import trained_parameters
from lmdqn.model.rollout import Rollout
from lmdqn.model.vocabulary import Reduce, Scores
from lmdqn.recipe import QLearningSection, validate
from tests.runs import tiny_model, write_splits

BETA = 0.02
SIZES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
    },
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4},
}
KINDS = {
    "llama": QLearningSection(beta=BETA, backup="soft_double"),
    "llama lora": QLearningSection(beta=BETA, backup="double"),
    "t5": QLearningSection(beta=BETA, loss="path"),
}
RELATIVE = Scores(relative=True, top_k=20)
EXPLORATION = Exploration(temperature=0.7, top_k=50, epsilon=0.1, reference_top_k=30, reference_top_p=0.9)
REDUCES: dict[str, tuple[Reduce, int]] = {  # what is made of the logits of so many networks
    "log-probability": (vocabulary.log_prob_of, 1),
    "logit": (vocabulary.value_of, 1),
    "log-sum-exp": (lambda logits, _: vocabulary.log_normaliser(logits), 1),
    "log-sum-exp at a temperature": (lambda logits, _: vocabulary.log_normaliser(logits, BETA), 1),
    "max": (lambda logits, reference, _: vocabulary.greatest(logits, reference, RELATIVE), 2),
    "max of raw logits": (lambda logits, _: vocabulary.greatest(logits, None, Scores(relative=False)), 1),
    "argmax of another": (lambda logits, actor, prior, _: vocabulary.score_of_best(logits, actor, prior, RELATIVE), 3),
    "greedy or not": (partial(vocabulary.is_best, scores=RELATIVE), 2),
    "mean under a policy": (
        lambda logits, actor, prior, _: vocabulary.expected_score(
            logits, actor, prior, Scores(relative=True), EXPLORATION.log_probs
        ),
        3,
    ),
    "soft mean": (lambda logits, actor, _: vocabulary.soft_expectation(logits, actor, BETA), 2),
    "KL": (lambda logits, actor, _: vocabulary.negative_kl(logits, actor), 2),
}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.CRITICAL, "torch.__trace")  # whole graphs as text, for a handler that is not there
    torch._dynamo.reset()
    vocabulary._compiled_reduced.cache_clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    vocabulary._compiled_reduced.cache_clear()
    torch._dynamo.reset()


def scratch(kind: str) -> LoadedModel:
    return tiny_model(kind, SIZES)


def episodes(count: int, seed: int) -> list[Episode]:
    """So many groups of two, of all lengths, every third episode truncated, with rewards and what was measured."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for group in range(count):
        example = Example("", (), tuple(range(5, 7 + 2 * group + seed)), (), "")
        for k in range(2):
            ids = torch.randint(5, 250, (2 + group + 3 * k,), generator=generator).tolist()
            truncated = (group + k) % 3 == 0
            episode = Episode(example, ids if truncated else [*ids, 2], truncated, group, reward=float(k))
            episode.reference_log_probs = -5 - torch.rand(len(episode.response_ids), generator=generator)
            episode.match_features = torch.rand(len(episode.response_ids) + 1, MATCH_FEATURES, generator=generator)
            made.append(episode)
    return made


def learnt(loaded: LoadedModel, recipe: QLearningSection, is_compiled: bool) -> tuple[Networks, list[int]]:
    """The networks after updates on batches of four shapes, logits in chunks; and graphs made after each."""
    vocabulary_size = loaded.model.get_output_embeddings().weight.shape[0]
    networks = Networks.build(loaded, BETA, seed=0, chunk_mib=7 * 4 * vocabulary_size / 2**20)
    if is_compiled:
        networks.compile_layers()
    heads = list(networks.online.value_head.parameters())
    groups = [(trained_parameters(networks.online), 1e-3), (heads, 1e-2)]
    optimiser = Optimiser(Accelerator(cpu=True), groups, (0.9, 0.95), 0.0, clip_norm=1.0)

    def loss_of(batch: Batch) -> Tensor:
        return q_loss(batch, networks, recipe, Exploration()).loss / loss_terms(batch, recipe)

    graphs = []
    for seed in range(4):
        batch = make_batch(episodes(3 + seed, seed), loaded.layout)
        optimiser.update([batch], loss_of, 1.0)
        networks.track(seed + 1, 0.2, None)
        graphs.append(counters["stats"]["unique_graphs"])
    return networks, graphs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("traced")
def test_updates_are_what_they_are_without(kind: str) -> None:
    """Every weight of every network, under its own name; more shapes take no more graphs; decoding is untouched."""
    counters.clear()
    plain, graphs = learnt(scratch(kind), KINDS[kind], is_compiled=False)
    assert graphs[-1] == 0
    loaded = scratch(kind)
    compiled, graphs = learnt(loaded, KINDS[kind], is_compiled=True)
    assert graphs[0] > 0
    assert graphs[3] == graphs[1]
    for role, weights in plain.state().items():
        found = compiled.state()[role]
        assert list(found) == list(weights)
        for name, weight in weights.items():
            torch.testing.assert_close(found[name], weight)
    rollout = Rollout(loaded.layout, loaded.tokenizer, max_response_tokens=5)
    example = Example("", (), (5, 6, 7), (), "")
    count = counters["stats"]["unique_graphs"]
    with compiled.online.active() as ours, plain.online.active() as theirs:
        assert rollout.greedy(ours, [example]) == rollout.greedy(theirs, [example])
    assert counters["stats"]["unique_graphs"] == count


@pytest.mark.parametrize("name", REDUCES)
@pytest.mark.usefixtures("traced")
def test_whatever_is_made_of_logits_is_one_graph(name: str) -> None:
    """With equal numbers and gradients, for any number of states but one."""
    reduce, count = REDUCES[name]
    compiled: Callable[..., Tensor] = torch.compile(vocabulary._reduced, dynamic=True, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    counters.clear()
    for states in (5, 9, 33):
        logits = [torch.randn(states, 300, generator=generator).requires_grad_() for _ in range(count)]
        tokens = [torch.randint(300, (states,), generator=generator)]
        expected, found = (function(reduce, logits, tokens) for function in (vocabulary._reduced, compiled))
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            gradients = [torch.autograd.grad(total.sum(), logits[0])[0] for total in (found, expected)]
            torch.testing.assert_close(*gradients)
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_that_hold_the_head_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = scratch("llama")
    monkeypatch.setattr(loaded.model, "get_decoder", lambda: loaded.model)
    with pytest.raises(UserError, match=r"this llama model cannot .* set optimisation\.torch_compile=false"):
        Networks.build(loaded, BETA, seed=0).online.compile_layers()


def test_a_compiler_that_is_missing_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*_: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(compiling, "compiled", lambda function: cannot)
    data = write_splits(tmp_path / "data", [{"source": "copy one", "references": ["one"]}])
    tree = {
        "model": {"from_scratch": {"family": "llama", "vocabulary_size": 300, "config": SIZES["llama"]}},
        "data": {"path": str(data)},
        "optimisation": {"torch_compile": True},
        "output": {"dir": str(tmp_path / "run")},
    }
    with pytest.raises(UserError, match=r"optimisation\.torch_compile.* g\+\+.*: No working C\+\+ compiler found$"):
        lmdqn.train(validate(tree, "test"))
    assert not (tmp_path / "run").exists()
