"""Checkpointed layers learn what others learn, and keep less for it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lmdqn.episodes import MATCH_FEATURES, Episode, Example, make_batch
from lmdqn.errors import UserError
from lmdqn.learn.objective import q_loss
from lmdqn.model import activation_checkpointing
from lmdqn.model.activation_checkpointing import checkpointed_layers
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.model.qnetwork import trained_parameters
from lmdqn.recipe import QLearningSection
from tests.conftest import Ran
from tests.runs import tiny_model

BETA = 0.02
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 3, "n_embd": 32, "n_head": 4},
    "llama": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
    "bart": {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 128,
    },
}


def episodes() -> list[Episode]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for group in range(3):
        example = Example("", (), tuple(range(5, 12 + 9 * group)), (), "")
        for k in range(3):
            ids = torch.randint(5, 250, (9 + 4 * k,), generator=generator).tolist()
            episode = Episode(example, [*ids, 2], False, group, reward=float(k))
            episode.reference_log_probs = -5 - torch.rand(len(ids) + 1, generator=generator)
            episode.match_features = torch.rand(len(ids) + 2, MATCH_FEATURES, generator=generator)
            made.append(episode)
    return made


def gradients_and_kept_bytes(kind: str, is_checkpointed: bool) -> tuple[dict[str, Tensor], int]:
    """Of a loss of the online network: its gradients, and the size of what the forward pass kept for them."""
    loaded = tiny_model(kind, SIZES)
    networks = Networks.build(loaded, BETA, seed=0)
    if is_checkpointed:
        networks.online.checkpoint_layers()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = make_batch(episodes(), loaded.layout)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = q_loss(batch, networks, QLearningSection(beta=BETA, backup="soft_double"), Exploration()).loss
    for weight in networks.online.weights().values():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    loss.backward()
    named = networks.online.weights()
    trained = {id(weight) for weight in trained_parameters(networks.online)}
    return {n: w.grad for n, w in named.items() if id(w) in trained and w.grad is not None}, sum(kept.values())


@pytest.mark.parametrize("kind", [*SIZES, "llama lora", "t5 lora"])
def test_gradients_are_the_same_and_less_is_kept(kind: str) -> None:
    plain, kept = gradients_and_kept_bytes(kind, is_checkpointed=False)
    again, kept_less = gradients_and_kept_bytes(kind, is_checkpointed=True)
    assert plain.keys() == again.keys()
    assert len(plain) > 5
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=0)
    assert kept_less < 0.75 * kept


def test_layers_that_are_not_known_to_bear_it() -> None:
    model = SimpleNamespace(modules=lambda: [torch.nn.Linear(2, 2)], config=SimpleNamespace(model_type="own"))
    with pytest.raises(UserError, match=r"this own model cannot be checkpointed.*gradient_checkpointing=false"):
        checkpointed_layers(model)


def test_a_whole_run_learns_the_same(
    command_line: Any, write_recipe: Any, write_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout in the warm start included: what it left out is left out again."""
    tree = {
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": SIZES["gpt2"]}},
        "data": {"path": str(write_data()), "max_response_tokens": 8},
        "warm_start": {"epochs": 2},
        "rollout": {"prompts": 2, "samples": 2},
        "qlearning": {"max_steps": 2},
        "evaluation": {"bootstrap_samples": 100},
        "output": {"dir": str(tmp_path / "plain")},
    }
    recipe = write_recipe(tree)
    ran: Ran = command_line("train", recipe)
    assert ran.code == 0, ran.err
    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(activation_checkpointing, "checkpoint", counted)
    changed = ["optimisation.gradient_checkpointing=true", f"output.dir={tmp_path}/checkpointed"]
    ran = command_line("train", recipe, *changed)
    assert ran.code == 0, ran.err
    weights = [tmp_path / run / "last" / "model.safetensors" for run in ("plain", "checkpointed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert len(calls) > 3 * 2  # layers of two updates, and of MLE's
