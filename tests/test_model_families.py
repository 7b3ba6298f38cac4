"""Q, V and log-ratios against plain transformers logits, for every kind of head; rollouts against teacher forcing."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lmdqn.episodes import Episode, Example, make_batch
from lmdqn.model.exploration import Exploration
from lmdqn.model.loading import LoadedModel, load_model
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import over_vocabulary, response_log_probs
from lmdqn.model.reading import MOST_KEYS, decode
from lmdqn.model.rollout import Rollout, Sampler, measure_log_probs
from lmdqn.model.vocabulary import log_prob_of
from lmdqn.recipe import validate

LLAMA_LIKE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = LLAMA_LIKE | {"num_key_value_heads": 2}
FAMILIES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": GROUPED | {"head_dim": 8},
    "cohere": GROUPED | {"logit_scale": 0.25},
    "cohere2": GROUPED | {"logit_scale": 0.25},
    "granite": GROUPED | {"logits_scaling": 3.0},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
}
SHARING = {"gpt2", "llama", "qwen2", "qwen3", "cohere", "granite"}  # others: windows, no positions, an encoder
PROMPTS = ("the cat", "a dog sat on the mat, again")
RESPONSES = (("my cat sat", "yes"), ("no dog", "a mat on the dog, so what"))
TEXTS = [*PROMPTS, *(text for texts in RESPONSES for text in texts)] * 5


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    family = request.param
    tree = {"from_scratch": {"family": family, "vocabulary_size": 300, "config": FAMILIES[family]}}
    section = validate({"model": tree, "data": {"path": "."}}, "test").model
    loaded = load_model(section, TEXTS, seed=0, max_response_tokens=12)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.model.parameters():  # far from the start, so that context and scale matter
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if hasattr(loaded.model, "final_logits_bias"):
            loaded.model.final_logits_bias.normal_(generator=generator)
    return loaded


def some_episodes(loaded: LoadedModel) -> list[Episode]:
    """Two groups of two, of different lengths; the last response is truncated."""
    episodes = []
    for group, (prompt, responses) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        example = Example(prompt, responses, tuple(loaded.tokenizer(prompt).input_ids), (), prompt)
        for text in responses:
            ids = loaded.tokenizer(text, add_special_tokens=False).input_ids
            episodes.append(Episode(example, [*ids, loaded.tokenizer.eos_token_id], False, group))
    episodes[-1].response_ids.pop()
    episodes[-1].truncated = True
    return episodes


def plain_logits(loaded: LoadedModel, episode: Episode) -> torch.Tensor:
    """(n + 1, V) logits in the states of one response, from transformers alone and without any padding."""
    prompt, response = torch.tensor([episode.example.prompt_ids]), torch.tensor([episode.response_ids])
    with torch.no_grad():
        if loaded.layout.decoder_prefix is None:
            logits = loaded.model(input_ids=torch.cat([prompt, response], dim=1)).logits[0]
            return logits[prompt.shape[1] - 1 :]
        prefix = torch.tensor([loaded.layout.decoder_prefix])
        decoder = torch.cat([prefix, response], dim=1)
        logits = loaded.model(input_ids=prompt, decoder_input_ids=decoder).logits[0]
        return logits[prefix.shape[1] - 1 :]


def test_logits_and_log_probs_equal_plain_transformers(loaded: LoadedModel) -> None:
    episodes = some_episodes(loaded)
    networks = Networks.build(loaded, beta=0.1, seed=0)
    batch = make_batch(episodes, loaded.layout)
    outputs = networks.online(batch)
    expected = [plain_logits(loaded, e)[: len(e.response_ids) + e.truncated] for e in episodes]
    torch.testing.assert_close(outputs.logits, torch.cat(expected), atol=2e-5, rtol=2e-5)
    log_probs = response_log_probs(batch, outputs)
    for row, (episode, logits) in enumerate(zip(episodes, expected, strict=True)):
        n = len(episode.response_ids)
        wanted = logits[:n].log_softmax(-1)[torch.arange(n), torch.tensor(episode.response_ids)]
        torch.testing.assert_close(log_probs[row, :n], wanted, atol=2e-5, rtol=2e-5)
        assert (log_probs[row, n:] == 0).all()


def test_sharing_a_row_is_used_where_the_model_allows_and_changes_nothing(loaded: LoadedModel) -> None:
    assert loaded.layout.shares_prompts == (loaded.model.config.model_type in SHARING)
    networks = Networks.build(loaded, beta=0.1, seed=0)
    episodes = some_episodes(loaded)
    apart = make_batch(episodes, replace(loaded.layout, shares_prompts=False))
    shared = make_batch(episodes, loaded.layout)
    if loaded.layout.shares_prompts:
        assert len(shared.decoder_ids) == 2
        assert len(apart.decoder_ids) == 4
    torch.testing.assert_close(networks.online(shared).logits, networks.online(apart).logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("most_keys", [MOST_KEYS, 1.5], ids=["until half have left", "until it is crowded"])
def test_rows_that_leave_one_by_one_change_nothing_for_the_others(
    most_keys: float, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words and lengths drawn beforehand: what the model says before each token is what it says of them alone."""
    monkeypatch.setattr("lmdqn.model.reading.MOST_KEYS", most_keys)
    eos = loaded.tokenizer.eos_token_id
    lengths = [1, 9, 3, 2, 12, 5]  # of three responses to each prompt
    words = torch.randint(3, len(loaded.tokenizer), (6, 12), generator=torch.Generator().manual_seed(2))
    for row, length in enumerate(lengths):
        if length < 12:  # the longest is cut
            words[row, length - 1] = eos
    said: list[list[torch.Tensor]] = [[] for _ in lengths]

    def choose(rows: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for row, of_row in zip(rows.tolist(), logits, strict=True):
            said[row].append(of_row)
        return words[rows, [len(said[row]) - 1 for row in rows.tolist()]]

    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]
    prompts = [example.prompt_ids for example in examples]
    responses = decode([lambda: nullcontext(loaded.model)], loaded.layout, prompts, 3, 12, choose)
    assert [len(response) for response in responses] == lengths
    for row, response in enumerate(responses):
        episode = Episode(examples[row // 3], response, response[-1] != eos, group=0)
        wanted = plain_logits(loaded, episode)[: len(response)]
        torch.testing.assert_close(torch.stack(said[row]), wanted, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize(
    "exploration", [Exploration(), Exploration(temperature=0.7, top_k=20), Exploration(epsilon=0.3)]
)
def test_behaviour_log_probs_are_those_of_the_policy_sampled_from(
    loaded: LoadedModel, exploration: Exploration
) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]
    rollout = Rollout(loaded.layout, loaded.tokenizer, max_response_tokens=12)
    episodes = rollout.sample(networks.online, examples, 3, exploration, 0, (7, 8))
    assert [e.group for e in episodes] == [7, 7, 7, 8, 8, 8]
    for episode in episodes:
        n = len(episode.response_ids)
        expected = exploration.log_probs(plain_logits(loaded, episode)[:n])
        expected = expected[torch.arange(n), torch.tensor(episode.response_ids)]
        torch.testing.assert_close(episode.behaviour_log_probs, expected, atol=5e-5, rtol=5e-5)
        assert episode.truncated == (episode.response_ids[-1] != loaded.tokenizer.eos_token_id)
        assert n == 12 or not episode.truncated


@pytest.mark.parametrize("inside", [{"reference_top_k": 5}, {"reference_top_p": 0.3}, {"sharpness": 0.4}])
def test_the_reference_that_reads_along_bounds_the_choice(loaded: LoadedModel, inside: dict[str, Any]) -> None:
    """Prompts of two lengths, so that one is padded; the bound is that of the reference read as a whole."""
    networks = Networks.build(loaded, beta=0.1, seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in networks.reference.weights().values():
            weight.add_(0.02 * torch.randn(weight.shape, generator=generator))
    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]
    rollout = Rollout(loaded.layout, loaded.tokenizer, max_response_tokens=6)
    exploration = Exploration(**inside)
    for episode in rollout.sample(networks.online, examples, 2, exploration, 0, (0, 1), networks.reference):
        n = len(episode.response_ids)
        batch = make_batch([episode], loaded.layout)
        online, reference = (network(batch).logits[:n] for network in (networks.online, networks.reference))
        expected = exploration.log_probs(online, reference)[torch.arange(n), torch.tensor(episode.response_ids)]
        assert expected.isfinite().all()
        torch.testing.assert_close(episode.behaviour_log_probs, expected, atol=5e-4, rtol=5e-4)
        assert not torch.allclose(
            expected, Exploration().log_probs(online)[torch.arange(n), torch.tensor(episode.response_ids)]
        )


def test_reference_log_probs_equal_the_policys_at_the_start(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    episodes = some_episodes(loaded)
    measure_log_probs(networks.reference, episodes, loaded.layout, micro_batch_tokens=20)
    batch = make_batch(episodes, loaded.layout)
    log_ratios = response_log_probs(batch, networks.online(batch)) - batch.reference_log_probs
    torch.testing.assert_close(log_ratios, torch.zeros_like(log_ratios), atol=2e-5, rtol=0)


def test_greedy_equals_plain_generate_one_by_one(loaded: LoadedModel) -> None:
    rollout = Rollout(loaded.layout, loaded.tokenizer, max_response_tokens=12)
    examples = [Example(p, (), tuple(loaded.tokenizer(p).input_ids), (), p) for p in PROMPTS]
    plain = []
    for example in examples:
        ids = torch.tensor([example.prompt_ids])
        config = GenerationConfig(
            max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=loaded.layout.eos_ids[0]
        )
        if loaded.layout.decoder_prefix:
            config.decoder_start_token_id = loaded.layout.decoder_prefix[0]
        output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0]
        output = output[1:] if loaded.layout.is_seq2seq else output[ids.shape[1] :]
        plain.append(rollout.decode(output.tolist()))
    assert rollout.greedy(loaded.model, examples) == plain


def test_sampling_repeats_under_a_seed_and_follows_the_policy() -> None:
    """10,000 draws from a known two-token policy, within four standard errors."""
    logits = torch.tensor([0.0, 1.0]).repeat(10_000, 1)
    seeded = torch.Generator().manual_seed(0)
    sampler = Sampler(Exploration(), torch.rand(10_000, 1, dtype=torch.float64, generator=seeded))
    share = sampler(torch.arange(10_000), logits).float().mean()
    assert abs(share - 0.7311) < 4 * (0.7311 * 0.2689 / 10_000) ** 0.5


def test_epsilon_greedy_probabilities_by_hand() -> None:
    """Three tokens, two of them in the top-k, epsilon .4: .2 + .6 for the best, .2 for the second."""
    probabilities = Exploration(top_k=2, epsilon=0.4).log_probs(torch.tensor([[2.0, 1.0, 0.0]])).exp()
    torch.testing.assert_close(probabilities, torch.tensor([[0.8, 0.2, 0.0]]))


def test_logits_in_chunks_give_the_same_numbers_and_gradients(loaded: LoadedModel) -> None:
    """Three states at a time, and two networks together, against whole logits."""

    def reduce(ours: torch.Tensor, theirs: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        kl = (ours.log_softmax(-1).exp() * (ours.log_softmax(-1) - theirs.log_softmax(-1))).sum(-1)
        return log_prob_of(ours, tokens), kl

    batch = make_batch(some_episodes(loaded), loaded.layout)
    chunk_mib = 3 * 4 * loaded.model.get_output_embeddings().weight.shape[0] / 2**20
    found = []
    for limit in (None, chunk_mib):
        networks = Networks.build(loaded, beta=0.1, seed=0, chunk_mib=limit)
        with torch.no_grad():
            for weight in networks.reference.model.parameters():
                weight.mul_(1.1)
            reference = networks.reference(batch)
        online = networks.online(batch)
        assert len(online.logits) == (len(batch.actions) if limit is None else 1)
        log_probs, kl = over_vocabulary([online, reference], reduce, batch.actions)
        assert kl.min() > 0
        networks.online.model.zero_grad()
        (log_probs.square().sum() + kl.sum()).backward()
        gradient = [p.grad.flatten() for p in networks.online.model.parameters() if p.grad is not None]
        found.append((log_probs, kl, torch.cat(gradient)))
    for whole, in_chunks in zip(*found, strict=True):
        assert (whole - in_chunks).norm() <= 2e-4 * whole.norm()
