"""Choosing responses by the policy, by Q and by value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lmdqn.episodes import Batch, Episode, Example, SequenceFormat, make_batch
from lmdqn.model.decoding import best_by_value, respond
from lmdqn.model.loading import LoadedModel, load_model
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import StateOutputs
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import DecodingSection, validate
from tests.conftest import Ran

SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}
PROMPTS = ("the cat", "a dog on the mat")


@pytest.fixture(params=SIZES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    tree = {"from_scratch": {"family": request.param, "vocabulary_size": 300, "config": SIZES[request.param]}}
    section = validate({"model": tree, "data": {"path": "."}}, "test").model
    return load_model(section, ["the cat sat on the mat"] * 5, seed=0, max_response_tokens=8)


def decode(loaded: LoadedModel, networks: Networks, **decoding: Any) -> list[str]:
    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]
    rollout = Rollout(loaded.layout, loaded.tokenizer, max_response_tokens=6)
    return respond(networks.online, rollout, examples, DecodingSection(**decoding), 0, lambda: networks.reference)


def test_beam_search_is_that_of_transformers(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, 0.1, 0)
    plain = []
    for prompt in PROMPTS:
        ids = torch.tensor([loaded.tokenizer(prompt).input_ids])
        settings: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "pad_token_id": 0}
        config = GenerationConfig(eos_token_id=list(loaded.layout.eos_ids), **settings)
        if loaded.layout.decoder_prefix:
            config.decoder_start_token_id = loaded.layout.decoder_prefix[0]
        output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
        output = output[1:] if loaded.layout.is_seq2seq else output[ids.shape[1] :]
        plain.append(loaded.tokenizer.decode(output, skip_special_tokens=True).strip())
    assert decode(loaded, networks, method="beam", beams=3) == plain


def test_sampling_repeats_under_its_seed_and_greedy_is_its_cold_end(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, 0.1, 0)
    assert decode(loaded, networks, method="sample") == decode(loaded, networks, method="sample")
    assert decode(loaded, networks, method="sample", temperature=1e-4) == decode(loaded, networks)
    assert decode(loaded, networks, method="sample", top_k=1) == decode(loaded, networks)
    assert decode(loaded, networks, method="sample", temperature=3.0) != decode(loaded, networks)


def test_top_q_takes_the_greatest_advantage_among_the_references_likeliest(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, 0.1, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in networks.reference.weights().values():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    kept: list[Episode] = []
    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]

    class Watched(Rollout):
        def sample(self, *args: Any, **kwargs: Any) -> list[Episode]:
            kept.extend(super().sample(*args, **kwargs))
            return kept

    rollout = Watched(loaded.layout, loaded.tokenizer, max_response_tokens=6)
    respond(networks.online, rollout, examples, DecodingSection(method="top_q", top_k=5), 0, lambda: networks.reference)
    assert len(kept) == 2
    for episode in kept:
        batch, n = make_batch([episode], loaded.layout), len(episode.response_ids)
        online, reference = (network(batch).logits[:n] for network in (networks.online, networks.reference))
        q = online.log_softmax(-1) - reference.log_softmax(-1)
        best = q.masked_fill(reference < reference.topk(5).values[:, -1:], -torch.inf).argmax(-1)
        assert best.tolist() == episode.response_ids


def test_the_best_of_a_group_is_that_of_greatest_value_in_its_last_state() -> None:
    """Group 0: the ended episode's last state is the one before EOS; the cut one's is the state after its end."""
    layout = SequenceFormat(pad_id=0, eos_ids=(1,), decoder_prefix=None, context_tokens=None)
    example = Example("", (), (5,), (), "")
    ids = [([3, 1], False, 0), ([4, 4], True, 0), ([1], False, 1), ([2, 1], False, 1)]
    episodes = [Episode(example, response, truncated, group) for response, truncated, group in ids]
    values = [9.0, 0.2, 9.0, 9.0, 0.7, 0.5, 9.0, 0.4]  # states of each episode in turn, the last of each is what counts

    class Judge:
        device = torch.device("cpu")

        def __call__(self, batch: Batch, need_logits: bool) -> StateOutputs:
            first = 0 if len(batch.response_ids) != 2 or batch.groups[0] == 0 else 5
            here = torch.tensor(values[first : first + int(batch.state_mask.sum())])
            return StateOutputs(torch.zeros(1, 7), here, hidden=torch.zeros(len(here), 1))

    network: Any = Judge()
    for at_once in (4, 2):
        rollout = Rollout(layout, None, 2, batch_examples=at_once)
        best = best_by_value(network, rollout, episodes)
        assert [episode.response_ids for episode in best] == [[4, 4], [1]]


@pytest.mark.parametrize("sees_references", [True, False])
def test_every_method_from_the_command_line(
    sees_references: bool,
    write_data: Callable[..., Path],
    write_recipe: Callable[[Any], Path],
    command_line: Callable[..., Ran],
    tmp_path: Path,
) -> None:
    tree = {
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": SIZES["gpt2"]}},
        "data": {"path": str(write_data()), "max_response_tokens": 8},
        "rollout": {"prompts": 3, "samples": 2},
        "qlearning": {"max_steps": 1, "value_sees_references": sees_references},
        "output": {"dir": str(tmp_path / "run")},
    }
    assert command_line("train", write_recipe(tree)).code == 0
    source = ["--source", "copy the word one", "--source", "copy the word two"]
    methods = ["best_of_n"] if sees_references else ["greedy", "sample", "beam", "top_q", "best_of_n"]
    for method in methods:
        shown = command_line("generate", tmp_path / "run", f"decoding.method={method}", *source)
        if sees_references:
            assert shown.code == 2
            assert "value_sees_references=false" in shown.err
        else:
            assert shown.code == 0, shown.err
            assert len(shown.out.splitlines()) == 2
    if not sees_references:
        assert command_line("evaluate", tmp_path / "run", "decoding.method=best_of_n", "decoding.samples=2").code == 0
