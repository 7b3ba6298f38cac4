"""What a full replay costs: filled as training fills it, drawn from as an update does."""

import resource
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lmdqn.episodes import Episode, Example, make_batch, micro_batches
from lmdqn.learn.match_features import measure_matches
from lmdqn.learn.objective import q_loss
from lmdqn.learn.replay import Group, Replay
from lmdqn.model.exploration import Exploration
from lmdqn.model.networks import Networks
from lmdqn.recipe import OptimisationSection, QLearningSection, ReplaySection
from speed.material import example_of, loaded_model, pairs, texts_of
from speed.table import Line, Settings, set_aside

SAMPLES, PROMPTS, TOKENS = 4, 16, 64  # of a group; of a rollout and a batch; of a response


def replay(settings: Settings) -> Iterator[Line]:
    """1,000,000 episodes of 64 tokens in groups of 4: adding, memory, and drawing against an update of 1.4M."""
    loaded = loaded_model(texts_of(settings.data), 160, 3, 1500)
    examples = [example_of(row, loaded.tokenizer) for row in pairs(settings.data, 1250, 4)]
    groups, generator = _rollout(0, examples, loaded.tokenizer), torch.Generator().manual_seed(0)
    sizes = {"uniform": [62_500, 1_000_000], "prioritised": [6_250, 100_000], "reward": [6_250, 100_000]}
    for sampling, (small, large) in sizes.items():
        before, draws = _resident_bytes(), []
        for held, added_s in _fill(sampling, [small, large], examples, loaded.tokenizer):  # noqa: B007
            set_aside()
            draws.append([_draw_seconds(held, generator)[0] for _ in range(settings.repeats + 1)][1:])
        what = f"replay of {large:,} episodes, {sampling}"
        ratios = [d / b for d, b in zip(draws[1], draws[0], strict=True)]
        shown, shown_before = (f"{1000 * statistics.median(times):.1f} ms" for times in (draws[1], draws[0]))
        yield Line(f"{what}: a draw, against one from {small:,}", shown, shown_before, ratios, "<= 1.4 (logarithmic)")
        if sampling == "uniform":
            taken = (_resident_bytes() - before) / held.tokens
            yield Line(f"{what}: bytes a token", f"{taken:.1f}", "24", [taken / 24], "<= 1")
            yield Line(f"{what}: adding", f"{len(held) / added_s:,.0f} episodes/s", "", [], "")
        batches, updates = settings.alternate(
            lambda r=held: sum(_draw_seconds(r, generator)),  # type: ignore[misc]
            lambda: _update_seconds(loaded, groups),
        )
        ratios = [b / u for b, u in zip(batches, updates, strict=True)]
        shown, shown_update = (f"{1000 * statistics.median(times):.1f} ms" for times in (batches, updates))
        yield Line(f"{what}: a batch drawn and measured, against an update", shown, shown_update, ratios, "<= 0.02")


def _rollout(number: int, examples: list[Example], tokenizer: Any) -> list[Group]:
    """Scored groups as a collector gives them, responses made of their prompt's references."""
    groups = []
    for group in range(number, number + PROMPTS):
        example = examples[group % len(examples)]
        ids = [token for reference in example.reference_ids for token in reference]
        ids = (ids * (1 + (TOKENS + SAMPLES) // len(ids)))[: TOKENS + SAMPLES]
        text = tokenizer.decode(ids[:TOKENS])
        members = [Episode(example, ids[k : k + TOKENS], True, group, text=text) for k in range(SAMPLES)]
        for k, episode in enumerate(members):
            episode.behaviour_log_probs = -torch.rand(TOKENS)
            episode.reference_log_probs = -torch.rand(TOKENS)
            episode.reward, episode.baseline, episode.peers = k / 7, 0.3, k / 5
            episode.terms = {"bleu": k / 9, "rougeL": k / 11}
        groups.append(members)
    return groups


def _fill(sampling: str, sizes: list[int], examples: list[Example], tokenizer: Any) -> Iterator[tuple[Replay, float]]:
    """One replay at growing numbers of episodes, each time with the seconds that adding took in all."""
    section = {"sampling": sampling, "fresh_share": 0.0, "capacity_episodes": sizes[-1]}
    replay, spent, number = Replay(ReplaySection.model_validate(section)), 0.0, 0
    for size in sizes:
        while len(replay) < size:
            groups = _rollout(number, examples, tokenizer)
            number += PROMPTS
            began = time.perf_counter()
            replay.add(groups)
            spent += time.perf_counter() - began
        yield replay, spent


def _draw_seconds(replay: Replay, generator: torch.Generator, repeats: int = 20) -> tuple[float, float]:
    """A batch of an update: drawing it, and measuring again how it matches its references."""
    drawing = measuring = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        draws = replay.draw(PROMPTS, generator, 0.5)
        drawn = time.perf_counter()
        measure_matches([episode for draw in draws for episode in draw.group or ()])
        measuring += time.perf_counter() - drawn
        drawing += drawn - began
    return drawing / repeats, measuring / repeats


def _update_seconds(loaded: Any, groups: list[Group]) -> float:
    """One forward and backward pass of the default loss on a batch of such groups, the optimiser left out."""
    networks = Networks.build(loaded, 0.01, 0, OptimisationSection().vocabulary_chunk_mib)
    episodes = [episode for group in groups for episode in group]
    measure_matches(episodes)
    began = time.perf_counter()
    for part in micro_batches(episodes, loaded.layout, 2048):
        q_loss(make_batch(part, loaded.layout), networks, QLearningSection(), Exploration()).loss.backward()
    return time.perf_counter() - began


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
