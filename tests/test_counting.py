"""Parameters by arithmetic, against those of the real models."""

import json
from pathlib import Path
from typing import Any

import pytest

from lmdqn.model.counting import FAMILIES, size_of
from lmdqn.model.memory import built_size
from lmdqn.recipe import ModelSection, validate

LLAMA_LIKE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES if family != "qwen2"),
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 50}),
    ("gpt2", {"n_embd": 36, "tie_word_embeddings": False, "n_positions": 77}),
    ("llama", LLAMA_LIKE | {"head_dim": 12, "attention_bias": True, "mlp_bias": True}),
    ("llama", LLAMA_LIKE | {"num_key_value_heads": None, "tie_word_embeddings": True, "max_position_embeddings": 64}),
    ("qwen2", LLAMA_LIKE),
    ("qwen2", LLAMA_LIKE | {"tie_word_embeddings": True}),
    ("t5", {"d_model": 32, "d_kv": 6, "d_ff": 50, "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu"}),
    ("t5", {"d_model": 32, "num_heads": 4, "relative_attention_num_buckets": 16}),
    ("bart", {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "decoder_ffn_dim": 44}),
    ("bart", {"d_model": 32, "max_position_embeddings": 50}),
]


def scratch(family: str, config: dict[str, Any]) -> ModelSection:
    tree = {"from_scratch": {"family": family, "vocabulary_size": 500, "config": config}}
    return validate({"model": tree, "data": {"path": "."}}, "test").model


def pretrained(folder: Path, **fields: Any) -> ModelSection:
    return validate({"model": {"name": str(folder), **fields}, "data": {"path": "."}}, "test").model


@pytest.mark.parametrize(("family", "config"), CONFIGS)
def test_arithmetic_gives_what_the_real_model_has(family: str, config: dict[str, Any]) -> None:
    section = scratch(family, config)
    found = size_of(section)
    assert found is not None
    built = built_size(section, 0)
    assert (found.vocabulary, found.parameters) == (built.vocabulary, built.parameters)


@pytest.mark.parametrize(("family", "config"), CONFIGS[len(FAMILIES) - 1 :])
def test_a_folder_with_weights_and_an_adapter_on_them(family: str, config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(family, **config, vocab_size=500).save_pretrained(tmp_path)
    for section in (pretrained(tmp_path), pretrained(tmp_path, lora={"rank": 8})):
        found, built = size_of(section), built_size(section, 0)
        assert found is not None
        assert (found.vocabulary, found.parameters) == (built.vocabulary, built.parameters)
        if section.lora is not None:
            assert found == built


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gemma2", {}),
        ("gpt2", {"n_embd": 15, "n_head": 2}),
        ("gpt2", {"n_embd": "wide"}),
        ("gpt2", {"n_layers": 2}),
        ("llama", {"num_hidden_layers": 0}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 3}),
        ("qwen2", LLAMA_LIKE | {"head_dim": 12}),
        ("t5", {"feed_forward_proj": "gated-silu"}),
        ("t5", {"tie_word_embeddings": False}),
        ("bart", {"tie_word_embeddings": False}),
    ],
)
def test_what_is_unusual_is_left_to_transformers(family: str, config: dict[str, Any]) -> None:
    assert size_of(scratch(family, config)) is None


@pytest.mark.parametrize(
    "fields", [{"quantization_config": {}}, {"auto_map": {}}, {"add_cross_attention": True}, {"model_type": "bloom"}]
)
def test_so_is_an_unusual_folder(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert size_of(pretrained(tmp_path)) is not None
    assert size_of(pretrained(tmp_path, architecture="seq2seq")) is None
    assert size_of(pretrained(tmp_path, lora={"target_modules": ["c_attn"]})) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **fields}))
    assert size_of(pretrained(tmp_path)) is None
    (tmp_path / "config.json").unlink()
    assert size_of(pretrained(tmp_path)) is None


def test_every_family_is_tested() -> None:
    assert {family for family, _ in CONFIGS} == set(FAMILIES)
