"""The benchmark against TRL: its lean baselines learn, its numbers are lmdqn's own, finished work is never repeated."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import versus_trl
from versus.arena import Arena, Recorder, Settings, Task, Variant
from versus.bootstrap import draw_counts, interval, paired_p, resampled
from versus.gains import first_reaches
from versus.methods import best_sample, run_best_of_group, run_lean_grpo, run_lmdqn, run_more_mle, standardised
from versus.trl_runs import check_prompts, parts_for, run_trl_grpo, run_trl_rloo
from versus.units import METHODS, Bench, Setting, Unit, better_variant, choose

from lmdqn.episodes import Episode, Example
from lmdqn.errors import UserError
from lmdqn.learn.budget import Budget
from lmdqn.recipe import Recipe
from lmdqn.results.evaluate import score_responses
from lmdqn.text.metrics import References, corpus_metrics
from lmdqn.text.rewards import Reward
from tests.runs import write_splits

WITHOUT_TRL = "TRL is not installed: pip install -c constraints.txt -e '.[bench]'"
Run = Callable[[Arena, Recipe, Recorder], None]
TASK = Task("data", "causal")
TINY = (
    "model.from_scratch={family: llama, vocabulary_size: 300, config: {hidden_size: 48, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 4, intermediate_size: 96, tie_word_embeddings: true}}",
    "warm_start={epochs: 100, learning_rate: 3.0e-3, batch_examples: 8}",
    "data.max_response_tokens=24",
    "rollout={prompts: 8, samples: 4}",
    "replay.batch_groups=8",
)
ROWS = [
    {
        "source": f"{animal} {place}",
        "references": [f"the {animal} is in the {place}", f"the {animal} sleeps in the {place}", f"look, a {animal}"],
    }
    for animal in ("cat", "dog", "cow", "hen")
    for place in ("barn", "yard", "wood")
]


class StepRecorder(Recorder):
    """Its time is up after so many steps, however long they take."""

    steps = 1

    @property
    def spent(self) -> bool:
        self.steps -= 1
        return self.steps <= 0


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A set of twelve pairs, and the overrides that make everything about it tiny."""
    folder = tmp_path_factory.mktemp("sets")
    write_splits(folder / "data", ROWS)
    return Settings(folder, folder / "out", seconds=1e6, evaluations=1, threads=1, overrides=TINY)


@pytest.fixture(scope="module")
def arena(settings: Settings) -> Arena:
    return Arena(TASK, settings)


def recorded(run: Run, arena: Arena, steps: int, rate: float) -> Recorder:
    recorder = StepRecorder(arena)
    recorder.steps = steps
    run(arena, arena.recipe(f"optimisation.learning_rate={rate}", f"qlearning.max_steps={steps}", "seed=1"), recorder)
    return recorder


@pytest.mark.parametrize(("run", "gain"), [(run_lean_grpo, 1.0), (run_best_of_group, 0.0)])
def test_a_lean_loop_learns(run: Run, gain: float, arena: Arena) -> None:
    """In 40 steps GRPO must gain; best-of-group, which repeats what is already likely, must not lose."""
    start = arena.evaluate(arena.fresh().model.state_dict(), "validation").metrics["reward"]
    recorder = recorded(run, arena, steps=40, rate=3e-4)
    for variant in ("online", "average"):
        (last,) = recorder.curves[variant]
        assert last["episodes"] == 40 * 8 * 4
        assert last["reward"] >= start + gain
        assert arena.evaluate(recorder.last[variant], "validation").metrics["reward"] == last["reward"]


def test_more_mle_goes_on_with_the_references(arena: Arena) -> None:
    """It writes every reference of a step's prompts, and nears them."""
    start = arena.evaluate(arena.fresh().model.state_dict(), "validation").metrics["reward"]
    recorder = recorded(run_more_mle, arena, steps=40, rate=3e-4)
    (last,) = recorder.curves["online"]
    assert last["episodes"] == 40 * 8 * len(ROWS[0]["references"])
    assert last["reward"] >= start + 1.0


class Spy(Reward):
    """Remembers whose responses it scored."""

    def __init__(self, like: Reward):
        super().__init__(like.recipe)
        self.sources: list[str] = []

    def __call__(self, responses: Sequence[str], references: References, sources: Sequence[str]) -> list[float]:
        self.sources += sources
        return super().__call__(responses, references, sources)


@pytest.mark.parametrize("run", [run_trl_grpo, run_trl_rloo])
def test_trl_runs_from_the_same_start_on_the_same_prompts(run: Run, settings: Settings) -> None:
    pytest.importorskip("trl", reason=WITHOUT_TRL)
    arena = Arena(TASK, settings)
    arena.reward = spy = Spy(arena.reward)
    recorder = recorded(run, arena, steps=2, rate=1e-3)
    walk = arena.prompts(seed=1)
    assert spy.sources[:64] == [example.source for _ in range(2) for example in next(walk) for _ in range(4)]
    (last,) = recorder.curves["online"]
    assert last["episodes"] == 2 * 8 * 4
    start = arena.fresh().model.state_dict()
    assert any((weight != start[name]).any() for name, weight in recorder.last["online"].items())


@pytest.mark.parametrize("run", [run_lmdqn, run_lean_grpo, run_trl_rloo])
def test_with_lora_a_method_trains_an_adapter_over_the_start(run: Run, settings: Settings, arena: Arena) -> None:
    if run is run_trl_rloo:
        pytest.importorskip("trl", reason=WITHOUT_TRL)
    adapted = Arena(TASK, replace(settings, lora=2))
    fresh = Variant(adapted.fresh().model).weights()
    start = Variant(arena.fresh().model).weights()
    assert fresh.keys() & start.keys() == set()  # of the adapter, nothing else
    assert adapted.evaluate(fresh, "test").responses == arena.evaluate(start, "test").responses
    recorder = recorded(run, adapted, steps=2, rate=0.1)
    for variant, curve in recorder.curves.items():
        last = recorder.last[variant]
        assert last.keys() == fresh.keys()
        assert any((weight != fresh[name]).any() for name, weight in last.items())
        assert adapted.evaluate(last, "validation").metrics["reward"] == curve[-1]["reward"]


def test_a_prompt_that_trl_would_read_otherwise_is_refused(arena: Arena) -> None:
    example = arena.examples["train"][0]
    check_prompts([example], arena.decoder.tokenizer)
    with pytest.raises(UserError, match="other tokens"):
        check_prompts([replace(example, prompt_ids=example.prompt_ids[1:])], arena.decoder.tokenizer)


def test_micro_batches_of_trl_hold_about_as_many_tokens_as_ours(arena: Arena) -> None:
    example = replace(arena.examples["train"][0], prompt_ids=(1,) * 30, reference_ids=((1,) * 20, (1,) * 20))
    assert parts_for(64, [example], 6400) == 1  # 64 episodes of 50 tokens, doubled by padding
    assert parts_for(64, [example], 2048) == 4
    assert parts_for(12, [example], 50) == 4  # 8 does not divide 12


def test_what_the_lean_loops_learn_from_a_group() -> None:
    example = Example("", (), (1,), (), "")
    group = [Episode(example, [2], False, 0, reward=r) for r in (0.2, 0.8)]
    spread = math.sqrt(0.18)  # 0.3 from the mean each, one degree of freedom
    assert [e.reward for e in standardised(group)] == pytest.approx([-0.3 / (spread + 1e-4), 0.3 / (spread + 1e-4)])
    (best,) = best_sample(group)
    assert best.response_ids is group[1].response_ids
    assert best.reward == 1.0
    assert [e.reward for e in group] == [0.2, 0.8]


def test_a_finished_unit_is_not_run_again(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
        ran.append((recipe.seed, recipe.optimisation.learning_rate, recipe.optimisation.schedule))
        recorder.finish(64, {"online": Variant(arena.fresh().model)})

    monkeypatch.setitem(METHODS, "lean_grpo", replace(METHODS["lean_grpo"], run=run))
    tuning, final = (Unit(TASK, "lean_grpo", Setting(1e-4, "linear"), seed) for seed in (0, 1))
    first = [Bench(settings).result(unit) for unit in (tuning, final)]
    assert [Bench(settings).result(unit) for unit in (tuning, final)] == first
    assert ran == [(0, 1e-4, "linear"), (1, 1e-4, "linear")]
    assert first[0]["test"] == {}
    assert set(first[1]["test"]["online"]) == {"last", "best"}
    with pytest.raises(UserError, match=r"settings\.json says"):
        Bench(replace(settings, seconds=5.0))


def test_the_whole_course_from_the_command_line(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuning, comparison, report, by CPU time; a second time everything is there and nothing runs."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: it comes with the extra bench")
    output = tmp_path / "out"
    words = ["versus_trl.py", "--data", settings.data, "--sets", "data", "--seconds", 0.3, "--evaluations", 2]
    words += ["--seeds", 2, "--output", output, "--methods", "lmdqn", "lean_grpo", "--tune-lrs", 1e-3, 2e-3]
    words += ["--clock", "cpu", "--override", *TINY, "warm_start.epochs=5"]
    monkeypatch.setattr(Budget, "clock", Budget.clock)  # as it was, when the test is over
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    versus_trl.main()
    folder = output / "data-causal"
    report = (folder / "report.md").read_text(encoding="utf-8")
    for part in (
        "s of learning (CPU time)",
        "| warm start |",
        "| lmdqn | best on validation |",
        "Gains",
        "Differences",
        "equal rollouts",
        "taken",
    ):
        assert part in report
    lines = [json.loads(line) for line in (folder / "table.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["table"] for line in lines} == {"test", "difference", "gains", "equal rollouts", "tuning"}
    assert (folder / "curves.png").stat().st_size > 10_000
    units = list((folder / "units").iterdir())
    assert len(units) == 1 + 2 * 2 + 2 * 2  # the start; two rates tuned, two seeds compared, for each method

    def refuse(arena: Arena, recipe: Recipe, recorder: Recorder) -> None:
        pytest.fail("a finished unit ran again")

    for name in ("lmdqn", "lean_grpo"):
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], run=refuse))
    versus_trl.main()
    assert (folder / "report.md").read_text(encoding="utf-8") == report
    (folder / "data.json").write_text('{"train.jsonl": "of another day"}', encoding="utf-8")
    with pytest.raises(SystemExit, match=r"data\.json is of other data than"):
        versus_trl.main()


def test_resampled_scores_are_the_metrics_themselves(arena: Arena) -> None:
    """The whole split's row is what lmdqn's own evaluation says; the row of a draw is that of the drawn texts."""
    examples = arena.examples["test"]
    references = [e.references for e in examples]
    responses = [refs[i % 3] + " and the hen" for i, refs in enumerate(references)]
    evaluation = score_responses(responses, examples, arena.reward)
    counts = draw_counts(len(examples), draws=3)
    assert counts.sum(axis=1).tolist() == [12] * 4
    scores = resampled({"responses": responses, "scores": evaluation.per_response}, references, counts)
    for name in ("reward", "bleu", "rouge2", "rougeL", "chrf", "distinct2", "repeated_4grams"):
        assert scores[name][0] == pytest.approx(evaluation.metrics[name]), name
    drawn = [i for i, times in enumerate(counts[2]) for _ in range(times)]
    again = corpus_metrics([responses[i] for i in drawn], [references[i] for i in drawn])
    for name in ("bleu", "rouge2", "chrf", "distinct2"):
        assert scores[name][2] == pytest.approx(again[name]), name


def test_intervals_and_p_values_by_hand() -> None:
    values = np.array([5.0, *range(101)])  # the draws' mean is 50, their 2.5 % and 97.5 % points 2.5 and 97.5
    assert interval(values) == pytest.approx((5 - 47.5, 5 + 47.5))
    gains = np.array([2.0, 1.0, 2.0, 3.0, 6.0])  # the draws' mean is 3: they lie 2, 1, 0 and 3 from it
    assert paired_p(gains, np.zeros(5)) == pytest.approx((2 + 1) / 5)


def test_when_a_curve_reaches_a_score() -> None:
    """From 2 at 10 s to 6 at 20 s it is 3 at 12.5 s; later falls do not count, and 7 never comes."""
    curve = [{"seconds": s, "reward": r} for s, r in ((0.0, 1.0), (10.0, 2.0), (20.0, 6.0), (30.0, 0.0))]
    assert first_reaches(curve, 3.0) == pytest.approx(12.5)
    assert first_reaches(curve, 1.0) == 0.0
    assert first_reaches(curve, 7.0) is None


def test_choices_by_validation() -> None:
    slow, fast = Setting(1e-4, "linear"), Setting(1e-3, "linear")
    assert choose({slow: 40.0, fast: 41.0}) == fast
    rising, falling = ([{"reward": r} for r in rewards] for rewards in ((1.0, 5.0), (7.0, 0.0)))
    assert better_variant([{"curves": {"online": rising, "average": falling}}]) == "average"
