"""Bytes: the peak of an update, and what target and reference take."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from speed.material import loaded_model, texts_of
from speed.table import Line, Settings


def memory(settings: Settings) -> Iterator[Line]:
    """Peak memory of an update: 151,936 tokens, 4,096 response tokens, hidden 896, two layers; then of many layers."""
    peak = {kind: _peak_mib(kind) for kind in ("chunks", "whole", "supervised", "deep", "deep_checkpointed")}
    ours = f"{peak['chunks']:,.0f} MiB"
    for other, bar in (("whole", "<= 0.25"), ("supervised", "<= 1.1")):
        name = {"whole": "the same on whole logits", "supervised": "SFT, torch's chunked cross-entropy"}[other]
        ratio = [peak["chunks"] / peak[other]]
        yield Line(
            f"peak of an update, vocabulary 151,936, against {name}", ours, f"{peak[other]:,.0f} MiB", ratio, bar
        )
    kept, again = peak["deep"], peak["deep_checkpointed"]
    name = "peak of an update, 16 layers of 512, with gradient_checkpointing against without"
    yield Line(name, f"{again:,.0f} MiB", f"{kept:,.0f} MiB", [again / kept], "")


def _peak_mib(kind: str) -> float:
    command = [sys.executable, str(Path(__file__).parent), "--peak", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def print_peak(kind: str) -> None:
    """In a process of its own: MiB that one update takes above what was there."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lmdqn.episodes import Episode, Example, SequenceFormat, make_batch
    from lmdqn.learn.objective import q_loss
    from lmdqn.model.exploration import Exploration
    from lmdqn.model.loading import LoadedModel
    from lmdqn.model.networks import Networks
    from lmdqn.recipe import OptimisationSection, QLearningSection

    wide = {"vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 2, "intermediate_size": 4864}
    deep = {"vocab_size": 8_000, "hidden_size": 512, "num_hidden_layers": 16, "intermediate_size": 1536}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
    if is_deep := kind.startswith("deep"):
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = Qwen2Config(**(deep if is_deep else wide), **heads, tie_word_embeddings=True)
    layout = SequenceFormat(0, (1,), None, None)
    loaded = LoadedModel(Qwen2ForCausalLM(config).eval(), None, layout)
    networks = Networks.build(loaded, 0.01, 0, None if kind == "whole" else OptimisationSection().vocabulary_chunk_mib)
    if kind == "deep_checkpointed":
        networks.online.checkpoint_layers()
    episodes = [Episode(Example("", (), (2, 3, 4), (), ""), [5 + i] * 127 + [1], False, i // 4) for i in range(32)]
    batch = make_batch(episodes, layout)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
    if kind == "supervised":
        model, (row, place) = networks.online.model, batch.states.unbind(1)
        hidden = model.model(input_ids=batch.decoder_ids, attention_mask=batch.decoder_mask).last_hidden_state
        chunked = torch.nn.LinearCrossEntropyOptions()
        torch.nn.functional.linear_cross_entropy(
            hidden[row, place], model.lm_head.weight, batch.actions, options=chunked
        ).backward()
    else:
        q_loss(batch, networks, QLearningSection(), Exploration()).loss.backward()
    assert any(p.grad is not None for p in networks.online.model.parameters())
    assert torch.is_grad_enabled()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)


def adapters(settings: Settings) -> Iterator[Line]:
    """Bytes of target and reference beside the online network under LoRA."""
    from lmdqn.model.networks import Networks
    from lmdqn.model.qnetwork import trained_parameters

    loaded = loaded_model(texts_of(settings.data), 512, 8, 8000, lora=True)
    before = sum(p.numel() for p in loaded.model.parameters())
    networks = Networks.build(loaded, 0.01, 0)
    adapter = sum(p.numel() for p in trained_parameters(networks.online))
    extra = sum(p.numel() for p in loaded.model.parameters()) - before
    name = "target and reference under LoRA, beside one adapter's size"
    yield Line(name, f"{4 * extra / 2**20:.2f} MiB", f"{4 * adapter / 2**20:.2f} MiB", [extra / adapter], "<= 2")
