"""What is measured on: pairs of a data set, models with random weights, and groups of episodes."""

import json
from pathlib import Path
from typing import Any


def pairs(data: Path, count: int, references: int) -> list[dict[str, Any]]:
    """The first rows that have so many references."""
    rows = [json.loads(line) for line in (data / "train.jsonl").open(encoding="utf-8")]
    return [row for row in rows if len(row["references"]) >= references][:count]


def texts_of(data: Path) -> list[str]:
    """What a tokenizer is trained on."""
    return [text for row in pairs(data, 2000, 1) for text in (row["source"], *row["references"])]


def loaded_model(texts: list[str], width: int, layers: int, vocabulary: int, lora: bool = False) -> Any:
    """A GPT-2 of that size with random weights."""
    from lmdqn.model.loading import LoadedModel, add_lora
    from lmdqn.recipe import Lora

    config = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 512}
    loaded = model_of_config(texts, "gpt2", config, vocabulary)
    if lora:
        adapted = add_lora(loaded.model, Lora(rank=16, target_modules="all-linear"), 0).eval()
        return LoadedModel(adapted, loaded.tokenizer, loaded.layout)
    return loaded


def model_of_config(texts: list[str], family: str, config: dict[str, Any], vocabulary: int) -> Any:
    """A model of any family with random weights."""
    from lmdqn.model.loading import load_model
    from lmdqn.recipe import validate

    scratch = {"family": family, "vocabulary_size": vocabulary, "config": config}
    section = validate({"model": {"from_scratch": scratch}, "data": {"path": "."}}, "benchmark").model
    loaded = load_model(section, texts, 0, 80)
    loaded.model.resize_token_embeddings(vocabulary, mean_resizing=False)  # the texts may not have so many
    return loaded


def example_of(row: dict[str, Any], tokenizer: Any) -> Any:
    """A pair with its first four references, as a model reads it."""
    from lmdqn.episodes import Example

    references = tuple(row["references"][:4])
    ids = tuple((*tokenizer(text).input_ids, tokenizer.eos_token_id) for text in references)
    return Example(row["source"], references, tuple(tokenizer(row["source"] + "\n").input_ids), ids, row["source"])


def groups_of_references(rows: list[dict[str, Any]], loaded: Any) -> list[Any]:
    """Four references of each source as four scored episodes of one group, everything measured as in training."""
    from lmdqn.episodes import demonstration
    from lmdqn.learn.match_features import measure_matches

    episodes = []
    for group, row in enumerate(rows):
        example = example_of(row, loaded.tokenizer)
        for k in range(4):
            episodes.append(demonstration(example, k, group, loaded.layout.eos_ids))
            episodes[-1].reward = k / 4
    measure_matches(episodes)
    return episodes


def groups_of_random_words(groups: int, prompt_tokens: int, response_tokens: int) -> list[Any]:
    """Four responses of one length to each prompt, as truncated episodes; all prompts are equal."""
    import torch

    from lmdqn.episodes import Episode, Example

    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, 200, (prompt_tokens + response_tokens,), generator=generator).tolist()
    example = Example("", (), tuple(words[:prompt_tokens]), (), "")
    return [Episode(example, words[prompt_tokens:], True, i // 4) for i in range(4 * groups)]


def tokens_of(episodes: list[Any]) -> int:
    """Those of SFT: each response with its prompt."""
    return sum(len(e.example.prompt_ids) + len(e.response_ids) for e in episodes)
