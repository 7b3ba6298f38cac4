"""Updates of 0.5B and 250M models in bf16 on a GPU: tokens/s, share of its peak, memory; compiled and not."""

import copy
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from speed.against_trainer import Manner, batches_of, trainer_step, update_of
from speed.material import groups_of_random_words, model_of_config, tokens_of
from speed.table import Line, Settings

TEXTS = ["the cat sat on the mat"] * 5  # for a tokenizer that nothing reads
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312}  # bf16, not sparse


@dataclass(frozen=True)
class Shape:
    """A model with random weights, and what it learns from: groups of four responses."""

    family: str
    config: Mapping[str, Any]
    vocabulary: int
    groups: int = 16
    prompt_tokens: int = 128
    response_tokens: int = 128
    micro_batch_tokens: int = 8192


MODELS = {
    "Qwen2-0.5B's config": Shape(
        "qwen2",
        {
            "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "intermediate_size": 4864, "tie_word_embeddings": True,
        },
        151_936,
    ),
    "T5-base v1.1's config": Shape(
        "t5",
        {
            "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0,
        },
        32_128,
    ),
}  # fmt: skip


def accelerator(settings: Settings) -> Iterator[Line]:
    """The models of `MODELS` on a GPU; without one, lines that say so."""
    yield from updates_on("cuda", MODELS, settings)


def updates_on(device: str, models: Mapping[str, Shape], settings: Settings) -> Iterator[Line]:
    """An update against a step of `Trainer`, both under bf16 autocast: without torch.compile, then both with."""
    for name, shape in models.items():
        for torch_compile in (False, True):
            what = f"update against Trainer's SFT step, {name}, bf16{', torch.compile' if torch_compile else ''}"
            if device == "cuda" and not torch.cuda.is_available():
                yield Line(what, "not measured: no CUDA device", "", [], ">= 0.9")
                continue
            rows_at_once = shape.micro_batch_tokens // (shape.prompt_tokens + shape.response_tokens)
            manner = Manner(device, "bf16", shape.micro_batch_tokens, rows_at_once, torch_compile)
            yield _line(what, shape, manner, settings)


def _line(what: str, shape: Shape, manner: Manner, settings: Settings) -> Line:
    loaded = model_of_config(TEXTS, shape.family, dict(shape.config), shape.vocabulary)
    episodes = groups_of_random_words(shape.groups, shape.prompt_tokens, shape.response_tokens)
    if manner.torch_compile:
        torch.compiler.reset()
    supervised = copy.deepcopy(loaded.model)
    teraflops = [work / 1e12 for work in flops(loaded, episodes, manner)]
    sides, peaks = [], []
    for make in (
        lambda: _timed(update_of(loaded, episodes, manner), settings),
        lambda: trainer_step(supervised, episodes, loaded.layout, settings.clock, manner),
    ):
        side, peak_gib = _with_peak(make, manner)
        sides.append(side)
        peaks.append(peak_gib)
    turns = settings.alternate(*sides)
    tokens = tokens_of(episodes)
    ours, theirs = (
        _shown(tokens, seconds, work, peak_gib, settings)
        for seconds, work, peak_gib in zip(turns, teraflops, peaks, strict=True)
    )
    return Line(what, ours, theirs, [slow / fast for fast, slow in zip(*turns, strict=True)], ">= 0.9")


def flops(loaded: Any, episodes: list[Any], manner: Manner) -> tuple[float, float]:
    """Of an update and of an SFT step: 6 for each weight that a token passes.

    Ours: in the layers, on the tokens that rows hold (a shared prompt counts once), and in the LM head, on the states
    alone. SFT: in everything, on all tokens. Padding, the products inside attention, and logits made a second time do
    not count; all of a decoder's weights count on its own tokens.
    """
    layers = _weights(loaded.model.get_decoder())
    head = loaded.model.get_output_embeddings().weight.numel()
    encoder = _weights(loaded.model.get_encoder()) if loaded.layout.is_seq2seq else 0
    ours = 0.0
    for batch in batches_of(episodes, loaded.layout, manner):
        mask = batch.decoder_mask  # (R, L), or (R, 1, L, L) where rows are shared: a token sees itself
        tokens = int((mask if mask.dim() == 2 else mask.diagonal(dim1=-2, dim2=-1)).sum())
        encoded = 0 if batch.encoder_mask is None else int(batch.encoder_mask.sum())
        ours += 6.0 * (layers * tokens + encoder * encoded + head * len(batch.states))
    prompts = sum(len(e.example.prompt_ids) for e in episodes)
    responses = sum(len(e.response_ids) for e in episodes)
    decoded = responses if loaded.layout.is_seq2seq else prompts + responses
    return ours, 6.0 * ((layers + head) * decoded + encoder * prompts)


def _weights(stack: torch.nn.Module) -> int:
    """Those of the matrices that a token is multiplied by."""
    layers = (module for module in stack.modules() if not isinstance(module, torch.nn.Embedding))
    return sum(p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.dim() == 2)


def _timed(work: Callable[[], None], settings: Settings) -> Callable[[], float]:
    return lambda: settings.seconds(work)


def _with_peak(make: Callable[[], Callable[[], float]], manner: Manner) -> tuple[Callable[[], float], float | None]:
    """A side that has had its first turn, and the GiB that it took at most beside what was there before."""
    if manner.device != "cuda":
        side = make()
        side()
        return side, None
    gc.collect()  # a Trainer that is done is a cycle
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    side = make()
    side()
    return side, (torch.cuda.max_memory_allocated() - before) / 2**30


def _shown(tokens: int, seconds: list[float], teraflops: float, peak_gib: float | None, settings: Settings) -> str:
    """Tokens/s, the share of the device's peak, and memory."""
    took = statistics.median(seconds)
    parts = [f"{tokens / took:,.0f} tokens/s"]
    peak_tflops = settings.peak_tflops or _known_peak()
    if peak_tflops is not None:
        parts.append(f"{100 * teraflops / took / peak_tflops:.1f} % of peak")
    if peak_gib is not None:
        parts.append(f"{peak_gib:.1f} GiB")
    return ", ".join(parts)


def _known_peak() -> float | None:
    """TFLOPS of the GPU by its name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for known, peak in PEAK_TFLOPS.items() if known in name), None)
