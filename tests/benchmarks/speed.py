"""lmdqn's speed and memory against what a user would otherwise run, as one table with ratios and spread.

    OMP_NUM_THREADS=1 taskset -c 1 python tests/benchmarks/speed.py --data DIR [row ...]

DIR holds train.jsonl of {"source", "references"}; rows are those of `ROWS`, all of them where none is named. The two
sides of a row take turns, --repeats times each after one turn that is not counted; the table shows medians and the
range of the ratios of turns. --clock cpu counts the seconds that the process had its core, and not the wall's: for one
thread on a machine that others use. Memory is a process's peak resident set above what it held before the first update.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"


def cpu_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


CLOCKS = {"wall": time.perf_counter, "cpu": cpu_seconds}


def clock() -> float:
    """Seconds, by the clock that was asked for."""
    return CLOCKS[options().clock]()


class Line(NamedTuple):
    """A line of the table. Ratios are ours to theirs in the direction the bar names."""

    what: str
    ours: str
    theirs: str
    ratios: list[float]
    bar: str


def alternate(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[list[float], list[float]]:
    """Both in turn, the first turn of each thrown away."""
    turns = [(ours(), theirs()) for _ in range(repeats + 1)][1:]
    return [o for o, _ in turns], [t for _, t in turns]


def seconds(work: Callable[[], object]) -> float:
    began = clock()
    work()
    return clock() - began


def compare(what: str, ours: list[float], theirs: list[float], unit: str, bar: str) -> Line:
    """Rates of both, and their ratio turn by turn."""
    ratios = [o / t for o, t in zip(ours, theirs, strict=True)]
    return Line(what, f"{statistics.median(ours):,.0f} {unit}", f"{statistics.median(theirs):,.0f} {unit}", ratios, bar)


# --- what is measured on ----------------------------------------------------------------------------------------------


def pairs(data: Path, count: int, references: int) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (data / "train.jsonl").open(encoding="utf-8")]
    return [row for row in rows if len(row["references"]) >= references][:count]


def loaded_model(texts: list[str], width: int, layers: int, vocabulary: int, lora: bool = False) -> Any:
    """A GPT-2 of that size with random weights."""
    from lmdqn.model.loading import LoadedModel, add_lora, load_model
    from lmdqn.recipe import Lora, validate

    config = {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 512}
    scratch = {"family": "gpt2", "vocabulary_size": vocabulary, "config": config}
    section = validate({"model": {"from_scratch": scratch}, "data": {"path": "."}}, "benchmark").model
    loaded = load_model(section, texts, 0, 80)
    loaded.model.resize_token_embeddings(vocabulary, mean_resizing=False)  # the data may not have so many
    if lora:
        adapted = add_lora(loaded.model, Lora(rank=16, target_modules="all-linear"), 0).eval()
        return LoadedModel(adapted, loaded.tokenizer, loaded.layout)
    return loaded


def groups_of_references(rows: list[dict[str, Any]], loaded: Any) -> list[Any]:
    """Four references of each source as four scored episodes of one group, everything measured as in training."""
    from lmdqn.episodes import Example, demonstration
    from lmdqn.learn.match_features import measure_matches

    eos = loaded.tokenizer.eos_token_id
    episodes = []
    for group, row in enumerate(rows):
        ids = tuple((*loaded.tokenizer(text).input_ids, eos) for text in row["references"][:4])
        prompt = tuple(loaded.tokenizer(row["source"] + "\n").input_ids)
        example = Example(row["source"], tuple(row["references"][:4]), prompt, ids, row["source"])
        for k in range(4):
            episodes.append(demonstration(example, k, group, (eos,)))
            episodes[-1].reward = k / 4
    measure_matches(episodes)
    return episodes


# --- rows -------------------------------------------------------------------------------------------------------------


def update(data: Path, repeats: int) -> Iterator[Line]:
    """One update of the default loss on 16 groups of 4 against one step of transformers' Trainer on their tokens."""
    rows = pairs(data, 16, 4)
    texts = [text for row in pairs(data, 2000, 1) for text in (row["source"], *row["references"])]
    for width, layers, vocabulary in ((160, 3, 1500), (256, 6, 8000), (512, 8, 32000)):
        for lora in (False, True):
            loaded = loaded_model(texts, width, layers, vocabulary, lora)
            size = sum(p.numel() for p in loaded.model.parameters()) / 1e6
            ours, theirs = _update_against_trainer(loaded, rows)
            fast, slow = alternate(ours, theirs, repeats)
            name = f"update against Trainer's SFT step, {size:.1f}M{' LoRA' if lora else ''}"
            yield compare(name, fast, slow, "tokens/s", ">= 0.9")


def _update_against_trainer(loaded: Any, rows: list[dict[str, Any]]) -> tuple[Callable, Callable]:
    import copy

    import torch
    from accelerate import Accelerator

    from lmdqn.episodes import make_batch, micro_batches
    from lmdqn.learn.objective import loss_terms, q_loss
    from lmdqn.learn.optimisation import Optimiser
    from lmdqn.model.exploration import Exploration
    from lmdqn.model.networks import Networks
    from lmdqn.model.qnetwork import trained_parameters
    from lmdqn.model.rollout import measure_log_probs
    from lmdqn.recipe import QLearningSection

    supervised = copy.deepcopy(loaded.model)
    recipe = QLearningSection()
    networks = Networks.build(loaded, recipe.beta, 0, 256)
    episodes = groups_of_references(rows, loaded)
    measure_log_probs(networks.reference, episodes, loaded.layout, 2048)
    heads = list(networks.online.value_head.parameters())
    groups = [(trained_parameters(networks.online), 1e-4), (heads, 1e-3)]
    optimiser = Optimiser(Accelerator(cpu=True), groups, (0.9, 0.95), 0.0, 1.0)

    def update() -> None:
        batches = [make_batch(part, loaded.layout) for part in micro_batches(episodes, loaded.layout, 2048)]
        terms = sum(loss_terms(batch, recipe) for batch in batches)
        optimiser.update(batches, lambda b: q_loss(b, networks, recipe, Exploration()).loss / terms, 1.0)
        networks.track(1, 0.05, None)

    sequences = [torch.tensor([*e.example.prompt_ids, *e.response_ids]) for e in episodes]
    step = _trainer_step(supervised, sequences, [len(e.example.prompt_ids) for e in episodes], loaded.layout.pad_id)
    tokens = sum(map(len, sequences))
    return lambda: tokens / seconds(update), lambda: tokens / step()


def _trainer_step(model: Any, sequences: list[Any], prompts: list[int], pad_id: int) -> Callable[[], float]:
    """A step of `Trainer` on all sequences as one batch, by its own clock: the second step of two."""
    from torch.nn.utils.rnn import pad_sequence
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    rows = []
    for ids, prompt in zip(sequences, prompts, strict=True):
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append({"input_ids": ids, "labels": labels})

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        ids = pad_sequence([row["input_ids"] for row in batch], True, pad_id)
        mask = pad_sequence([row["input_ids"] * 0 + 1 for row in batch], True)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": pad_sequence([r["labels"] for r in batch], True, -100),
        }

    class StepClock(TrainerCallback):
        began = 0.0
        took = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = clock()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.took = clock() - self.began

    def step() -> float:
        watch = StepClock()
        arguments = TrainingArguments(
            tempfile.mkdtemp(), per_device_train_batch_size=len(rows), max_steps=2, save_strategy="no", report_to=[],
            disable_tqdm=True, logging_strategy="no", use_cpu=True, dataloader_drop_last=False,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows * 2, data_collator=collate, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return watch.took

    return step


def memory(data: Path, repeats: int) -> Iterator[Line]:
    """Peak memory of an update: 151,936 tokens, 4,096 response tokens, hidden 896, two layers."""
    peak = {kind: _peak_mib(kind) for kind in ("chunks", "whole", "supervised")}
    ours = f"{peak['chunks']:,.0f} MiB"
    for other, bar in (("whole", "<= 0.25"), ("supervised", "<= 1.1")):
        name = {"whole": "the same on whole logits", "supervised": "SFT, torch's chunked cross-entropy"}[other]
        ratio = [peak["chunks"] / peak[other]]
        yield Line(
            f"peak of an update, vocabulary 151,936, against {name}", ours, f"{peak[other]:,.0f} MiB", ratio, bar
        )


def _peak_mib(kind: str) -> float:
    done = subprocess.run([sys.executable, __file__, "--peak", kind], capture_output=True, text=True, check=True)
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
    from lmdqn.recipe import QLearningSection

    config = Qwen2Config(
        vocab_size=151_936, hidden_size=896, num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2,
        intermediate_size=4864, tie_word_embeddings=True,
    )  # fmt: skip
    layout = SequenceFormat(0, (1,), None, None)
    loaded = LoadedModel(Qwen2ForCausalLM(config).eval(), None, layout)
    networks = Networks.build(loaded, 0.01, 0, None if kind == "whole" else 256)
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


def adapters(data: Path, repeats: int) -> Iterator[Line]:
    """Bytes of target and reference beside the online network under LoRA."""
    from lmdqn.model.networks import Networks
    from lmdqn.model.qnetwork import trained_parameters

    texts = [text for row in pairs(data, 500, 1) for text in (row["source"], *row["references"])]
    loaded = loaded_model(texts, 512, 8, 8000, lora=True)
    before = sum(p.numel() for p in loaded.model.parameters())
    networks = Networks.build(loaded, 0.01, 0)
    adapter = sum(p.numel() for p in trained_parameters(networks.online))
    extra = sum(p.numel() for p in loaded.model.parameters()) - before
    name = "target and reference under LoRA, beside one adapter's size"
    yield Line(name, f"{4 * extra / 2**20:.2f} MiB", f"{4 * adapter / 2**20:.2f} MiB", [extra / adapter], "<= 2")


def rollout(data: Path, repeats: int) -> Iterator[Line]:
    """Tokens/s of responses of 5 to 128 tokens in groups of 8, against one padded call of `generate`."""
    rows = pairs(data, 8, 1)
    texts = [text for row in pairs(data, 2000, 1) for text in (row["source"], *row["references"])]
    for width, layers in ((160, 3), (512, 8)):
        loaded = loaded_model(texts, width, layers, 1500)
        prompts = [loaded.tokenizer(row["source"] + "\n").input_ids for row in rows]
        fast, slow = alternate(*_rollout_against_generate(loaded, prompts), repeats)
        size = sum(p.numel() for p in loaded.model.parameters()) / 1e6
        yield compare(f"rollout against one padded generate call, {size:.1f}M", fast, slow, "tokens/s", ">= 2")


def _rollout_against_generate(loaded: Any, prompts: list[list[int]]) -> tuple[Callable, Callable]:
    """Both sample from the model, but end each row at a length drawn beforehand."""
    import torch
    from transformers import LogitsProcessor, LogitsProcessorList

    from lmdqn.model.exploration import Exploration
    from lmdqn.model.reading import decode
    from lmdqn.model.rollout import Sampler

    eos, pad = loaded.layout.eos_ids[0], loaded.layout.pad_id
    lengths = torch.randint(5, 129, (8 * len(prompts),), generator=torch.Generator().manual_seed(0))

    def ended(scores: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, eos] = -torch.inf
        scores[ends] = -torch.inf
        scores[ends, eos] = 0.0
        return scores

    def ours() -> float:
        written = torch.zeros_like(lengths)
        sampler = Sampler(Exploration(), torch.rand(len(lengths), 128, dtype=torch.float64))

        def choose(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            written[rows] += 1
            return sampler(rows, ended(scores, written[rows] >= lengths[rows]))

        return int(lengths.sum()) / seconds(
            lambda: decode([lambda: nullcontext(loaded.model)], loaded.layout, prompts, 8, 128, choose)
        )

    class Ends(LogitsProcessor):
        written = 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.written += 1
            return ended(scores, self.written >= lengths)

    def theirs() -> float:
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]).repeat_interleave(8, 0)
        given = {"attention_mask": (ids != pad).long(), "logits_processor": LogitsProcessorList([Ends()])}
        return int(lengths.sum()) / seconds(
            lambda: loaded.model.generate(ids, do_sample=True, top_k=0, max_new_tokens=128, **given)
        )

    return ours, theirs


def iteration(data: Path, repeats: int) -> Iterator[Line]:
    """A whole iteration, rollout, score and update, against TRL's GRPO; DIR is a folder of its set's name."""
    from versus.iteration import episode_rates

    fast, slow = alternate(*episode_rates(data, options().output, clock), repeats)
    yield compare("whole iteration against TRL's GRPO, 16 prompts x 4, 1.2M", fast, slow, "episodes/s", ">= 2")


def scoring(data: Path, repeats: int) -> Iterator[Line]:
    """BLEU and ROUGE-1/2/L of 10,000 responses, 8 to a source of 4 references; the libraries on the first 1,000."""
    import random

    from rouge_score import rouge_scorer
    from sacrebleu.metrics import BLEU

    from lmdqn.text import metrics, sentence_scores

    generator = random.Random(0)
    rows = pairs(data, 1250, 4)
    responses, references = [], []
    for row in rows:
        for _ in range(8):
            words = generator.choice(row["references"]).split()
            for _ in range(4):
                words[generator.randrange(len(words))] = generator.choice(
                    generator.choice(rows)["references"][0].split()
                )
            responses.append(" ".join(words))
            references.append(row["references"][:4])
    kinds = ["rouge1", "rouge2", "rougeL"]
    bleu, rouge = BLEU(effective_order=True), rouge_scorer.RougeScorer(kinds)

    def theirs() -> float:
        def work() -> None:
            for response, refs in zip(responses[:1000], references, strict=False):
                bleu.sentence_score(response, refs)
                rouge.score_multi(refs, response)

        return 1000 / seconds(work)

    def ours(first_time: bool) -> float:
        if first_time:
            sentence_scores._bleu_references.cache_clear()
            sentence_scores._rouge_references.cache_clear()

        def work() -> None:
            metrics.sentence_bleu(responses, references)
            metrics.rouge(responses, references, kinds)

        return len(responses) / seconds(work)

    for name, first_time in (("references met before", False), ("new references", True)):
        fast, slow = alternate(lambda f=first_time: ours(f), theirs, repeats)  # type: ignore[misc]
        yield compare(f"BLEU + ROUGE-1/2/L, one by one by the libraries; {name}", fast, slow, "responses/s", ">= 20")


def replay(data: Path, repeats: int) -> Iterator[Line]:
    """1,000,000 episodes of 64 tokens in groups of 4: adding, memory, and drawing against an update of 1.4M."""
    import speed_replay as of_replay
    import torch

    texts = [text for row in pairs(data, 2000, 1) for text in (row["source"], *row["references"])]
    loaded = loaded_model(texts, 160, 3, 1500)
    examples = of_replay.examples_of(pairs(data, 1250, 4), loaded.tokenizer)
    groups, generator = of_replay.rollout(0, examples, loaded.tokenizer), torch.Generator().manual_seed(0)
    sizes = {"uniform": [62_500, 1_000_000], "prioritised": [6_250, 100_000], "reward": [6_250, 100_000]}
    for sampling, (small, large) in sizes.items():
        before, draws = of_replay.resident_bytes(), []
        for held, added_s in of_replay.fill(sampling, [small, large], examples, loaded.tokenizer):  # noqa: B007
            draws.append([of_replay.draw_seconds(held, generator)[0] for _ in range(repeats + 1)][1:])
        what = f"replay of {large:,} episodes, {sampling}"
        ratios = [d / b for d, b in zip(draws[1], draws[0], strict=True)]
        shown, shown_before = (f"{1000 * statistics.median(times):.1f} ms" for times in (draws[1], draws[0]))
        yield Line(f"{what}: a draw, against one from {small:,}", shown, shown_before, ratios, "<= 1.4 (logarithmic)")
        if sampling == "uniform":
            taken = (of_replay.resident_bytes() - before) / held.tokens
            yield Line(f"{what}: bytes a token", f"{taken:.1f}", "24", [taken / 24], "<= 1")
            yield Line(f"{what}: adding", f"{len(held) / added_s:,.0f} episodes/s", "", [], "")
        batches, updates = alternate(
            lambda r=held: sum(of_replay.draw_seconds(r, generator)),  # type: ignore[misc]
            lambda: of_replay.update_seconds(loaded, groups),
            repeats,
        )
        ratios = [b / u for b, u in zip(batches, updates, strict=True)]
        shown, shown_update = (f"{1000 * statistics.median(times):.1f} ms" for times in (batches, updates))
        yield Line(f"{what}: a batch drawn and measured, against an update", shown, shown_update, ratios, "<= 0.02")


def growth(data: Path, repeats: int) -> Iterator[Line]:
    """Time of an update as batch, length and vocabulary grow: the exponent fitted over three sizes; 1 is linear."""
    import torch

    from lmdqn.episodes import Episode, Example, make_batch
    from lmdqn.learn.objective import q_loss
    from lmdqn.model.exploration import Exploration
    from lmdqn.model.networks import Networks
    from lmdqn.recipe import QLearningSection

    texts = [text for row in pairs(data, 2000, 1) for text in (row["source"], *row["references"])]

    def once(groups: int, length: int, vocabulary: int) -> Callable[[], float]:
        loaded = loaded_model(texts, 160, 3, vocabulary)
        networks = Networks.build(loaded, 0.01, 0, 256)
        words = torch.randint(5, 200, (length,)).tolist()
        example = Example("", (), tuple(words[:20]), (), "")
        episodes = [Episode(example, words, True, i // 4) for i in range(4 * groups)]
        batch = make_batch(episodes, loaded.layout)
        return lambda: seconds(lambda: q_loss(batch, networks, QLearningSection(), Exploration()).loss.backward())

    for name, sizes, work in (
        ("groups", (8, 16, 32), lambda size: once(size, 32, 1500)),
        ("response tokens", (16, 32, 64), lambda size: once(16, size, 1500)),
        ("vocabulary", (2000, 4000, 8000), lambda size: once(16, 32, size)),
    ):
        updates = [work(size) for size in sizes]
        turns = [[update() for update in updates] for _ in range(repeats + 1)][1:]
        logs = [math.log(size) for size in sizes]
        exponents = [statistics.linear_regression(logs, [math.log(s) for s in turn]).slope for turn in turns]
        times = [f"{1000 * statistics.median(of_size):.0f}" for of_size in zip(*turns, strict=True)]
        shown = f"{', '.join(times)} ms"
        yield Line(f"update as {name} grow: {', '.join(map(str, sizes))}", shown, "", exponents, "exponent <= 1")


def start(data: Path, repeats: int) -> Iterator[Line]:
    """Start-up, by the wall clock."""
    recipe = Path(__file__).parents[2] / "recipes" / "from_scratch_causal.yaml"
    commands = {
        "lmdqn --help": ([sys.executable, "-m", "lmdqn", "--help"], 0.4),
        "import lmdqn": ([sys.executable, "-c", "import lmdqn"], 0.2),
        "lmdqn check RECIPE": ([sys.executable, "-m", "lmdqn", "check", str(recipe), f"data.path={data}"], 1.5),
    }
    for name, (command, bar) in commands.items():
        run = lambda c=command: seconds(lambda: subprocess.run(c, capture_output=True, check=True))  # noqa: E731
        times = [run() for _ in range(repeats + 1)][1:]
        yield Line(name, f"{statistics.median(times):.2f} s", f"{bar} s", [t / bar for t in times], "<= 1")


ROWS = {
    "update": update,
    "memory": memory,
    "adapters": adapters,
    "rollout": rollout,
    "iteration": iteration,
    "scoring": scoring,
    "replay": replay,
    "growth": growth,
    "start": start,
}


@cache
def options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="row", help=f"{', '.join(ROWS)}; all where none is named")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl, four references to many sources")
    parser.add_argument("--output", type=Path, default=Path("runs/speed"), help="keeps the warm start of `iteration`")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    if options().peak:
        print_peak(options().peak)
        return
    print("| what | lmdqn | the other | ratio (range) | bar |\n|---|---|---|---|---|")
    for name in options().rows or ROWS:
        for line in ROWS[name](options().data, options().repeats):
            spread = f"{statistics.median(line.ratios):.3g}" if line.ratios else ""
            if len(line.ratios) > 1:
                spread += f" ({min(line.ratios):.3g} to {max(line.ratios):.3g})"
            print(f"| {line.what} | {line.ours} | {line.theirs} | {spread} | {line.bar} |", flush=True)


if __name__ == "__main__":
    main()
