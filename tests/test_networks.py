"""The three networks: equal at the start, still until told, an adapter each under LoRA, and saved as they answer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import lmdqn
from lmdqn.episodes import VALUE_FEATURES, Batch, Episode, Example, make_batch
from lmdqn.learn.learning_rates import default_rate, value_head_rate
from lmdqn.model.head import LMHead
from lmdqn.model.loading import LoadedModel, add_lora, load_model, load_trained
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import over_vocabulary, trained_parameters
from lmdqn.recipe import Lora, ModelSection, OutputSection, validate
from lmdqn.results.run_folder import RunFolder

SIZES = {
    "llama": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
}


def scratch(family: str, **sizes: int) -> LoadedModel:
    tree = {"from_scratch": {"family": family, "vocabulary_size": 300, "config": SIZES[family] | sizes}}
    section = validate({"model": tree, "data": {"path": "."}}, "test").model
    return load_model(section, ["the cat sat on the mat"] * 5, seed=0, max_response_tokens=8)


@pytest.fixture(params=["gpt2", "t5", "gpt2 lora", "t5 lora"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    family, _, lora = request.param.partition(" ")
    plain = scratch(family)
    if not lora:
        return plain
    base = tmp_path / "base"
    plain.model.save_pretrained(base)
    plain.tokenizer.save_pretrained(base)
    section = ModelSection(name=str(base), lora=Lora(rank=4, target_modules="all-linear"))
    return load_model(section, (), seed=0, max_response_tokens=8)


@pytest.mark.parametrize(
    ("family", "wider", "model_rate"),
    [("llama", 1, 3e-4), ("llama", 2, 1.746e-4), ("llama lora", 1, 3e-3), ("t5 lora", 2, 1.746e-3)],
)
def test_rates_are_those_measured_and_fall_with_the_width(
    family: str, wider: int, model_rate: float, tmp_path: Path
) -> None:
    """Twice as wide: divided by 2 to the .781, 1.718; the value head's by 2."""
    family, _, lora = family.partition(" ")
    size = {"llama": {"hidden_size": 160 * wider}, "t5": {"d_model": 160 * wider}}[family]
    plain = scratch(family, **size)
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    section = ModelSection(name=str(tmp_path), lora=Lora(rank=4) if lora else None)
    network = Networks.build(load_model(section, (), 0, max_response_tokens=8), beta=0.1, seed=0).online
    assert default_rate(network) == pytest.approx(model_rate, rel=1e-3)
    assert value_head_rate(network, 9e-3) == pytest.approx(9e-3 / wider)


def a_batch(loaded: LoadedModel) -> Batch:
    example = Example("", (), tuple(loaded.tokenizer("the cat").input_ids), (), "")
    eos = loaded.tokenizer.eos_token_id
    return make_batch([Episode(example, [7, 8, eos], False, 0), Episode(example, [9, eos], False, 0)], loaded.layout)


def nudge(networks: Networks) -> None:
    """A step of plain gradient ascent on everything that learns."""
    with torch.no_grad():
        for parameter in [*trained_parameters(networks.online), *networks.online.value_head.parameters()]:
            parameter.add_(0.1 * torch.ones_like(parameter))


def test_the_target_moves_only_when_it_is_told(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    batch = a_batch(loaded)
    before = networks.target(batch)
    torch.testing.assert_close(networks.online(batch).logits, before.logits)
    assert (before.values == 0).all()
    nudge(networks)
    torch.testing.assert_close(networks.target(batch).logits, before.logits, rtol=0, atol=0)
    assert not torch.allclose(networks.online(batch).logits, before.logits)
    networks.track(update=1, polyak=None, copy_every=2)
    torch.testing.assert_close(networks.target(batch).logits, before.logits, rtol=0, atol=0)
    networks.track(update=2, polyak=None, copy_every=2)
    for mine, online in zip(networks.target(batch), networks.online(batch), strict=True):
        torch.testing.assert_close(mine, online)
    torch.testing.assert_close(networks.reference(batch).logits, before.logits, rtol=0, atol=0)


def test_polyak_moves_the_target_by_the_given_share(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    before = {name: weight.clone() for name, weight in networks.target.weights().items()}
    nudge(networks)
    networks.track(update=1, polyak=0.25, copy_every=None)
    online = networks.online.weights()
    assert before.keys() == online.keys()
    for name, weight in networks.target.weights().items():
        torch.testing.assert_close(weight, 0.75 * before[name] + 0.25 * online[name])


@pytest.mark.parametrize("modules", ["all-linear", ["c_attn", "lm_head", "wte"]], ids=["linear", "tied"])
def test_an_adapter_is_merged_for_a_while(modules: str | list[str], tmp_path: Path) -> None:
    """The network says what it said, and afterwards all weights are bit by bit what they were; also after an error."""
    plain = scratch("gpt2")
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(ModelSection(name=str(tmp_path), lora=Lora(rank=4, target_modules=modules)), (), 0, 8)
    networks = Networks.build(loaded, beta=0.1, seed=0)
    with torch.no_grad():
        for parameter in trained_parameters(networks.online):
            parameter.normal_(std=0.1)
    batch, first = a_batch(loaded), next(m for m in loaded.model.modules() if isinstance(m, Linear))
    before = {name: weight.clone() for name, weight in loaded.model.state_dict().items()}
    wanted, others = networks.online(batch).logits, networks.reference(batch).logits

    def decode_until_interrupted() -> None:
        with networks.online.merged():
            assert first.merged_adapters == ["online"]
            torch.testing.assert_close(networks.online(batch).logits, wanted)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_until_interrupted()
    assert not any(m.merged_adapters for m in loaded.model.modules() if isinstance(m, Linear))
    for name, weight in loaded.model.state_dict().items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=0)
    torch.testing.assert_close(networks.online(batch).logits, wanted, rtol=0, atol=0)
    torch.testing.assert_close(networks.reference(batch).logits, others, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_a_target_of_16_bits_takes_half_the_memory_and_says_nearly_the_same(family: str) -> None:
    loaded = scratch(family)
    networks = Networks.build(loaded, beta=0.1, seed=0, target_dtype="bfloat16")
    batch = a_batch(loaded)
    torch.nn.init.ones_(networks.online.value_head.outer.weight)
    networks.track(update=1, polyak=None, copy_every=1)
    wanted, target = networks.online(batch), networks.target(batch)
    held = {role: sum(p.nbytes for p in getattr(networks, role).model.parameters()) for role in networks.state()}
    assert held["online"] == held["reference"] == 2 * held["target"]
    assert target.values.dtype == torch.float32
    for mine, exact in ((target.logits.float(), wanted.logits), (target.values, wanted.values)):
        assert 0 < (mine - exact).abs().max() < 0.02 * exact.abs().max()  # a bfloat16 has a relative error of 0.004


def test_the_reference_is_reset_and_the_first_one_kept(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0, keep_first=True)
    assert networks.first is not None
    batch = a_batch(loaded)
    before = networks.reference(batch).logits
    nudge(networks)
    networks.reset_reference()
    torch.testing.assert_close(networks.reference(batch).logits, networks.online(batch).logits)
    torch.testing.assert_close(networks.first(batch).logits, before, rtol=0, atol=0)
    assert not torch.allclose(networks.reference(batch).logits, before)
    assert set(networks.state()) == {"online", "target", "reference", "first"}
    assert set(Networks.build(scratch("gpt2"), 0.1, 0).state()) == {"online", "target", "reference"}


def test_gradients_reach_the_online_network_alone(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    batch = a_batch(loaded)
    networks.target(batch)
    outputs = networks.online(batch)
    (outputs.logits.square().mean() + (outputs.values - 1).square().mean()).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained_parameters(networks.online))
    for follower in (networks.target, networks.reference):
        assert all(p.grad is None for p in follower.weights().values())


def test_the_value_head_sends_no_gradient_into_the_language_model(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    nudge(networks)
    networks.online(a_batch(loaded)).values.sum().backward()
    assert all(p.grad is None for p in trained_parameters(networks.online))
    assert networks.online.value_head.outer.weight.grad is not None


def test_the_value_head_sees_features_by_their_distance_from_the_usual(loaded: LoadedModel) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    nudge(networks)
    batch = a_batch(loaded)
    batch.value_features[:] = torch.nan
    unknown = networks.online(batch).values
    mean, deviation = torch.full((VALUE_FEATURES,), 0.5), torch.full((VALUE_FEATURES,), 0.25)
    deviation[0] = 0.0  # this one never varied: nothing is to be learnt from it
    networks.standardise(mean, deviation, torch.tensor(0.1))
    batch.value_features[:] = 0.5
    assert torch.allclose(networks.online(batch).values, unknown)
    batch.value_features[..., 0] = 1.0
    assert torch.allclose(networks.online(batch).values, unknown)
    batch.value_features[..., VALUE_FEATURES - 1] = 1.0
    seen = networks.online(batch).values
    assert not torch.allclose(seen, unknown)
    deviation[-1] = 1e-3
    networks.standardise(mean, deviation, torch.tensor(0.1))
    assert networks.online(batch).values.isfinite().all()  # 500 deviations away, it counts as 10
    for follower in (networks.target, networks.reference):
        assert torch.equal(follower.value_head.feature_rate, networks.online.value_head.feature_rate)


def test_under_lora_the_base_is_held_once(loaded: LoadedModel) -> None:
    is_lora = hasattr(loaded.model, "peft_config")
    networks = Networks.build(loaded, beta=0.1, seed=0)
    assert (networks.online.model is networks.target.model) == is_lora
    assert (networks.online.model is networks.reference.model) == is_lora
    if is_lora:
        trained = {id(p) for p in trained_parameters(networks.online)}
        assert trained == {id(p) for n, p in networks.online.weights().items() if not n.startswith("value_head")}


@pytest.mark.parametrize(("family", "modules"), [("gpt2", ["c_attn", "lm_head"]), ("t5", ["q", "lm_head"])])
def test_logits_in_chunks_keep_to_their_adapter_even_on_the_head(
    family: str, modules: list[str], tmp_path: Path
) -> None:
    """An adapter on the LM head itself: each network's chunks go through its own, and only online's learns."""
    plain = scratch(family)
    plain.model.save_pretrained(tmp_path)
    plain.tokenizer.save_pretrained(tmp_path)
    section = ModelSection(name=str(tmp_path), lora=Lora(rank=4, target_modules=modules))
    loaded = load_model(section, (), seed=0, max_response_tokens=8)
    batch = a_batch(loaded)
    found = []
    networks = Networks.build(loaded, beta=0.1, seed=0)
    nudge(networks)
    vocabulary = len(loaded.tokenizer)
    for limit in (None, 2 * 4 * vocabulary / 2**20):
        for network in (networks.online, networks.target):
            network.chunk_mib = limit
        ours = networks.online(batch)
        with torch.no_grad():
            theirs = networks.target(batch)
        both = over_vocabulary([ours, theirs], lambda a, b: torch.cat([a, b], dim=1))  # (N, 2 V)
        both.square().sum().backward()
        gradient = [p.grad.flatten() for p in trained_parameters(networks.online) if p.grad is not None]
        assert all(p.grad is None for p in networks.target.weights().values())
        found.append((both, torch.cat(gradient)))
        networks.online.model.zero_grad()
    assert not torch.allclose(found[0][0][:, :vocabulary], found[0][0][:, vocabulary:])
    for whole, in_chunks in zip(*found, strict=True):
        assert (whole - in_chunks).norm() <= 2e-4 * whole.norm()


@pytest.mark.parametrize("family", ["gpt2", "llama"])  # tied, and not
def test_a_chunk_adds_its_gradient_of_the_head_in_place(family: str) -> None:
    """Of matrices as large as the head, at most two are there at a time: the sum so far, and what is added to it."""
    loaded = scratch(family)
    head = loaded.model.get_output_embeddings().weight
    networks = Networks.build(loaded, beta=0.1, seed=0, chunk_mib=2 * 4 * len(head) / 2**20)
    assert len(a_batch(loaded).actions) > 4  # chunks enough
    outputs = networks.online(a_batch(loaded))
    loss = outputs.over_vocabulary(lambda logits: logits.square().sum(-1)).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    sums = [e for e in profile.events() if e.name == "aten::add" and e.self_cpu_memory_usage >= head.nbytes]
    assert head.grad is not None
    assert not sums


def test_what_is_saved_answers_as_the_target_does_and_holds_its_value_head(loaded: LoadedModel, tmp_path: Path) -> None:
    networks = Networks.build(loaded, beta=0.1, seed=0)
    nudge(networks)
    networks.track(1, 0.5, None)
    folder = RunFolder.check(OutputSection(dir=str(tmp_path / "run")))
    folder.path.mkdir()
    folder.save_model(networks.target, loaded.tokenizer, folder.model)
    again = load_trained(folder.model, ModelSection(name="as saved"), 8)
    assert again.layout.eos_ids == loaded.layout.eos_ids
    plain = _plain(folder.model, loaded.layout.is_seq2seq)
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if loaded.layout.is_seq2seq else {})
    with torch.no_grad(), networks.target.active() as model:
        torch.testing.assert_close(plain(**inputs).logits, model(**inputs).logits)
    saved_head = load_file(folder.model / "value_head.safetensors")
    for name, weight in networks.target.value_head.state_dict().items():
        torch.testing.assert_close(saved_head[name], weight)


def _plain(folder: Path, seq2seq: bool) -> torch.nn.Module:
    """The saved model as a user would load it."""
    auto = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    if (folder / "adapter_config.json").exists():
        base = folder.parent.parent / "base"
        return PeftModel.from_pretrained(auto.from_pretrained(base), str(folder)).eval()
    return auto.from_pretrained(folder).eval()


def test_trying_the_head_takes_none_of_dropouts_random_numbers() -> None:
    """A resumed warm start tries it once more than one that never stopped."""
    model = scratch("gpt2").model.train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    LMHead(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_equal_returns_do_not_set_the_value_heads_scale(tmp_path: Path, write_data: Callable[..., Path]) -> None:
    """The first rollouts are worth the same, whatever they say; later ones differ."""
    (tmp_path / "late.py").write_text(
        "calls = []\n"
        "def score(responses, references, sources):\n"
        "    calls.append(0)\n"
        "    return [len(r) / 10 if len(calls) > 4 else 0.7 for r in responses]\n"
    )
    tree = {
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": SIZES["gpt2"]}},
        "data": {"path": str(write_data()), "max_response_tokens": 8},
        "reward": {"mix": {f"{tmp_path}/late.py:score": 1}},
        "rollout": {"prompts": 2, "samples": 3},  # the mean of three times .7 is not .7
        "qlearning": {"max_steps": 6},
        "evaluation": {"every_steps": 99, "bootstrap_samples": 100},
        "output": {"dir": str(tmp_path / "run")},
    }
    lmdqn.train(validate(tree, "test"))
    head = load_file(tmp_path / "run" / "last" / "value_head.safetensors")
    assert head["scale"] > 0.05  # of returns that differ by tenths; beta is .004
    assert head["feature_rate"][-1] > 0  # that of the other samples' rewards


def test_an_adapter_is_saved_with_the_revision_of_its_base(tmp_path: Path) -> None:
    """Else PEFT would load it over whatever the base's main branch holds by then."""
    adapted = add_lora(scratch("llama").model, Lora(rank=4), 0, revision="v1.0")
    adapted.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).revision == "v1.0"
