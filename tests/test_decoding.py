"""Choosing responses by the policy, by Q and by value."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from transformers import GenerationConfig

from lmdqn.episodes import Batch, Episode, Example, SequenceFormat, make_batch
from lmdqn.model.decoding import best_of_each_group, last_values, respond
from lmdqn.model.exploration import Exploration
from lmdqn.model.loading import LoadedModel, load_model
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import StateOutputs
from lmdqn.model.rollout import Rollout
from lmdqn.recipe import DataSection, DecodingSection, Recipe, RewardSection, TaskSection, validate
from lmdqn.text.agreement import agreement
from lmdqn.text.rewards import TaskRewards
from tests.conftest import Ran

SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}
PROMPTS = ("the cat", "a dog on the mat")
REWARDS = TaskRewards({"": TaskSection(data=DataSection(path="."), reward=RewardSection(mix={"rougeL": 1.0}))})


@pytest.fixture(params=SIZES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    tree = {"from_scratch": {"family": request.param, "vocabulary_size": 300, "config": SIZES[request.param]}}
    section = validate({"model": tree, "data": {"path": "."}}, "test").model
    return load_model(section, ["the cat sat on the mat"] * 5, seed=0, max_response_tokens=8)


def decoding_recipe(decoding: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    return validate(
        {"model": {"from_scratch": {}}, "data": {"path": "."}, "decoding": decoding, **sections}, "decoding"
    )


def decode(loaded: LoadedModel, networks: Networks, first: int = 0, **decoding: Any) -> list[str]:
    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]
    rollout = Rollout(loaded.layout, loaded.tokenizer, max_response_tokens=6)
    groups = range(first, first + len(examples))
    recipe = decoding_recipe(decoding)
    return respond(networks.online, rollout, examples, groups, recipe, lambda: networks.reference, lambda: REWARDS)


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
    assert decode(loaded, networks, first=2, method="sample") != decode(loaded, networks, method="sample")
    assert decode(loaded, networks, method="sample", temperature=1e-4) == decode(loaded, networks)
    assert decode(loaded, networks, method="sample", top_k=1) == decode(loaded, networks)
    assert decode(loaded, networks, method="sample", temperature=3.0) != decode(loaded, networks)


@pytest.mark.parametrize("form", ["dueling", "classic"])
def test_top_q_takes_the_greatest_q_among_the_references_likeliest(loaded: LoadedModel, form: str) -> None:
    """Q ranks by the advantage, log(pi / pi_0); classic by the logit."""
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
    recipe = decoding_recipe({"method": "top_q", "top_k": 5}, qlearning={"form": form})
    respond(networks.online, rollout, examples, range(2), recipe, lambda: networks.reference, lambda: REWARDS)
    assert len(kept) == 2
    for episode in kept:
        batch, n = make_batch([episode], loaded.layout), len(episode.response_ids)
        online, reference = (network(batch).logits[:n] for network in (networks.online, networks.reference))
        q = online if form == "classic" else online.log_softmax(-1) - reference.log_softmax(-1)
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
        best = best_of_each_group(episodes, last_values(network, rollout, episodes))
        assert [episode.response_ids for episode in best] == [[4, 4], [1]]


def test_agreement_is_the_mean_reward_against_the_other_judges() -> None:
    """By hand: ROUGE-L of "a b c" and "a b d" is 2/3, of "a b c" and "a x y" 1/3."""
    example = Example("", ("nobody looks at this one",), (5,), (), "")
    texts = [("a b c", 0), ("a b d", 0), ("a x y", 0), ("same", 1), ("same", 1)]
    judges = [Episode(example, [1], False, group, text=text) for text, group in texts]
    also = Episode(example, [1], False, 0, text="a b c")  # no judge, and so judged by all three
    scores = agreement([*judges, also], judges, REWARDS)
    assert scores == pytest.approx([(2 / 3 + 1 / 3) / 2, (2 / 3 + 1 / 3) / 2, 1 / 3, 1, 1, (1 + 2 / 3 + 1 / 3) / 3])
    assert [e.text for e in best_of_each_group(judges, scores[:5])] == ["a b c", "same"]
    assert [judge.example for judge in judges] == [example] * 5


def test_minimum_bayes_risk_takes_the_response_that_the_samples_agree_on(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, 0.1, 0)
    rollout = Rollout(loaded.layout, loaded.tokenizer, max_response_tokens=6)
    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]
    sampled = rollout.sample(networks.online, examples, 5, Exploration(2.0), 0, range(2))
    greedy = decode(loaded, networks)
    scorer, expected = RougeScorer(["rougeL"]), []
    for i in range(2):
        samples = [e.text for e in sampled if e.group == i]
        choices = [(greedy[i], samples), *((s, samples[:k] + samples[k + 1 :]) for k, s in enumerate(samples))]
        agreed = [sum(scorer.score(j, c)["rougeL"].fmeasure for j in judges) / len(judges) for c, judges in choices]
        expected.append(choices[agreed.index(max(agreed))][0])
    assert decode(loaded, networks, method="minimum_bayes_risk", samples=5, temperature=2.0) == expected


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
    refused = ["best_of_n"] if sees_references else []
    methods = get_args(DecodingSection.model_fields["method"].annotation)
    for method in methods:
        shown = command_line("generate", tmp_path / "run", f"decoding.method={method}", *source)
        if method in refused:
            assert shown.code == 2
            assert "value_sees_references=false" in shown.err
        else:
            assert shown.code == 0, shown.err
            assert len(shown.out.splitlines()) == 2
    for method in {"best_of_n", "minimum_bayes_risk"} - set(refused):
        assert command_line("evaluate", tmp_path / "run", f"decoding.method={method}", "decoding.samples=2").code == 0
