"""How many parameters a model will have, by arithmetic on its config: for families whose layers are known here.

Building a model on the meta device counts any family, but imports torch and transformers, which takes seconds. A test
holds each formula against the real model.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdqn.recipe import ModelSection


@dataclass
class Size:
    """Of a model with its LM head."""

    vocabulary: int
    parameters: int = 0
    lora_parameters: int = 0  # a unit of rank, of an adapter on all linear layers but the LM head

    def linear(self, times: int, inputs: int, outputs: int, bias: bool) -> None:
        """Add linear layers."""
        self.parameters += times * (inputs * outputs + (outputs if bias else 0))
        self.lora_parameters += times * (inputs + outputs)


def size_of(section: ModelSection) -> Size | None:
    """None where only the model itself could tell, or a field is unusual: then transformers must judge it."""
    if section.lora is not None and section.lora.target_modules != "all-linear":
        return None
    if section.from_scratch is not None:
        scratch = section.from_scratch
        fields = {**scratch.config, "vocab_size": scratch.vocabulary_size}
        family = scratch.family
        if family not in FAMILIES or scratch.config.keys() - FAMILIES[family].sizes.keys():
            return None
    else:
        file = Path(str(section.name)) / "config.json"
        if not file.is_file():
            return None
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return None
        family = fields.get("model_type")
        if family not in FAMILIES or fields.keys() & UNUSUAL - FAMILIES[family].sizes.keys():
            return None
    known = FAMILIES[family]
    if section.architecture not in ("auto", known.architecture):
        return None
    sizes = {name: fields.get(name, default) for name, default in known.sizes.items()}
    return known.count(sizes) if all(_is_usual(sizes[name], known.sizes[name]) for name in sizes) else None


def _is_usual(value: Any, default: Any) -> bool:
    """Of the default's type and, as a number, positive; sizes that follow from others may be left out."""
    if default is None and value is None:
        return True
    wanted = int if default is None else type(default)
    return type(value) is wanted and (wanted is not int or value > 0)


def _gpt2(of: Mapping[str, Any]) -> Size | None:
    width, layers, inner = of["n_embd"], of["n_layer"], of["n_inner"] or 4 * of["n_embd"]
    if width % of["n_head"] or of["add_cross_attention"]:
        return None
    size = _embedded(of, width)
    size.parameters += of["n_positions"] * width + (2 * layers + 1) * 2 * width  # positions and norms
    size.linear(layers, width, 3 * width, True)
    size.linear(layers, width, width, True)
    size.linear(layers, width, inner, True)
    size.linear(layers, inner, width, True)
    return size


def _llama(of: Mapping[str, Any]) -> Size | None:
    return _llama_like(of, of["attention_bias"], of["attention_bias"], of["mlp_bias"])


def _qwen2(of: Mapping[str, Any]) -> Size | None:
    return _llama_like(of, True, False, False)


def _llama_like(of: Mapping[str, Any], qkv_bias: bool, output_bias: bool, mlp_bias: bool) -> Size | None:
    width, layers, heads, inner = (
        of[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    groups = of["num_key_value_heads"] or heads
    if width % heads or heads % groups:
        return None
    each = of.get("head_dim") or width // heads
    size = _embedded(of, width)
    size.parameters += (2 * layers + 1) * width  # norms
    size.linear(layers, width, heads * each, qkv_bias)
    size.linear(2 * layers, width, groups * each, qkv_bias)
    size.linear(layers, heads * each, width, output_bias)
    size.linear(2 * layers, width, inner, mlp_bias)
    size.linear(layers, inner, width, mlp_bias)
    return size


def _t5(of: Mapping[str, Any]) -> Size | None:
    width, inner, heads = of["d_model"], of["d_ff"], of["num_heads"]
    encoder, decoder = of["num_layers"], of["num_decoder_layers"] or of["num_layers"]
    if of["feed_forward_proj"] not in ("relu", "gated-gelu") or not of["tie_word_embeddings"]:
        return None
    size = _embedded(of, width)
    size.parameters += (2 * encoder + 3 * decoder + 2) * width  # norms
    size.parameters += 2 * of["relative_attention_num_buckets"] * heads  # of encoder and decoder
    attentions = encoder + 2 * decoder
    size.linear(3 * attentions, width, heads * of["d_kv"], False)
    size.linear(attentions, heads * of["d_kv"], width, False)
    size.linear((2 if of["feed_forward_proj"] == "gated-gelu" else 1) * (encoder + decoder), width, inner, False)
    size.linear(encoder + decoder, inner, width, False)
    return size


def _bart(of: Mapping[str, Any]) -> Size | None:
    width, encoder, decoder = of["d_model"], of["encoder_layers"], of["decoder_layers"]
    if width % of["encoder_attention_heads"] or width % of["decoder_attention_heads"] or not of["tie_word_embeddings"]:
        return None
    size = _embedded(of, width)
    size.parameters += 2 * (of["max_position_embeddings"] + 2) * width  # BART counts positions from 2
    size.parameters += (2 * encoder + 3 * decoder + 2) * 2 * width  # norms
    size.linear(4 * (encoder + 2 * decoder), width, width, True)
    for layers, inner in ((encoder, of["encoder_ffn_dim"]), (decoder, of["decoder_ffn_dim"])):
        size.linear(layers, width, inner, True)
        size.linear(layers, inner, width, True)
    return size


def _embedded(of: Mapping[str, Any], width: int) -> Size:
    """Token embeddings, and the LM head where it has weights of its own."""
    vocabulary = of["vocab_size"]
    return Size(vocabulary, vocabulary * width * (1 if of["tie_word_embeddings"] else 2))


@dataclass(frozen=True)
class _Family:
    architecture: str
    count: Callable[[Mapping[str, Any]], Size | None]
    sizes: Mapping[str, Any]  # the config's fields that count, with transformers' defaults; None follows from others


UNUSUAL = {"auto_map", "quantization_config", "head_dim"}  # fields that change the count, unless among the sizes
_LLAMA_SIZES = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "gpt2": _Family(
        "causal",
        _gpt2,
        {
            "vocab_size": 50257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_inner": None,
            "n_positions": 1024,
            "add_cross_attention": False,
            "tie_word_embeddings": True,
        },
    ),
    "llama": _Family(
        "causal",
        _llama,
        _LLAMA_SIZES
        | {
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "head_dim": None,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "qwen2": _Family(
        "causal",
        _qwen2,
        _LLAMA_SIZES | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    ),
    "t5": _Family(
        "seq2seq",
        _t5,
        {
            "vocab_size": 32128,
            "d_model": 512,
            "d_kv": 64,
            "d_ff": 2048,
            "num_layers": 6,
            "num_decoder_layers": None,
            "num_heads": 8,
            "relative_attention_num_buckets": 32,
            "feed_forward_proj": "relu",
            "tie_word_embeddings": True,
        },
    ),
    "bart": _Family(
        "seq2seq",
        _bart,
        {
            "vocab_size": 50265,
            "d_model": 1024,
            "encoder_layers": 12,
            "encoder_ffn_dim": 4096,
            "encoder_attention_heads": 16,
            "decoder_layers": 12,
            "decoder_ffn_dim": 4096,
            "decoder_attention_heads": 16,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
    ),
}
