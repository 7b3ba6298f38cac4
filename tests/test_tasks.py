"""Several tasks at once: who has which turn, reward and limit, what the mean over them is, and whole runs."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

import lmdqn
from lmdqn.episodes import Episode, Example
from lmdqn.errors import UserError
from lmdqn.learn.collector import Collector
from lmdqn.learn.prompt_draw import ExampleWalk
from lmdqn.recipe import RewardSection, TaskSection, dump_recipe, load_recipe, recipe_schema, validate
from lmdqn.results.evaluate import score_responses, score_tasks
from lmdqn.results.model_card import Published, model_card, snippet
from lmdqn.results.run_folder import RunFolder
from lmdqn.results.significance import paired_significance
from lmdqn.results.tracking import Tracker
from lmdqn.run import _samples
from lmdqn.text.rewards import Reward, TaskRewards
from tests.conftest import Ran
from tests.runs import Listening, write_splits

WORDS = ("one", "two", "three", "four", "five", "six")
SAYING = [{"source": word, "references": [f"it is {word}", f"we say {word}"]} for word in WORDS]
ECHOING = [{"text": f"{word} {word}", "answer": word} for word in WORDS[:4]]
SIZE = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64}


def tree_of(folder: Path, run: str = "run") -> dict[str, Any]:
    """A recipe of seconds: two tasks that differ in everything a task may differ in."""
    saying = {"path": str(folder / "saying"), "prompt": "say {source}: ", "max_response_tokens": 10}
    echoing = {"path": str(folder / "echoing"), "source": "text", "references": "answer", "max_response_tokens": 5}
    return {
        "seed": 3,
        "model": {"from_scratch": {"family": "gpt2", "vocabulary_size": 300, "config": SIZE}},
        "tasks": {
            "saying": {"data": saying, "weight": 2},
            "echoing": {"data": echoing, "reward": {"mix": {"rougeL": 1.0, "length": 0.25}}},
        },
        "warm_start": {"epochs": 2, "batch_examples": 4},
        "rollout": {"prompts": 6, "samples": 2},
        "replay": {"batch_groups": 6},
        "qlearning": {"max_steps": 2},
        "evaluation": {"every_steps": 2, "bootstrap_samples": 100},
        "output": {"dir": str(folder / run), "log_every_steps": 1},
    }


# --- the recipe ---------------------------------------------------------------------------------------------------


def data_too(tree: dict[str, Any]) -> None:
    tree["data"] = {"path": "folder"}


def reward_too(tree: dict[str, Any]) -> None:
    tree["reward"] = {"mix": {"bleu": 1}}


def neither(tree: dict[str, Any]) -> None:
    del tree["tasks"]


def no_tasks(tree: dict[str, Any]) -> None:
    tree["tasks"] = {}


def spaced_name(tree: dict[str, Any]) -> None:
    tree["tasks"]["my task"] = tree["tasks"].pop("saying")


def unknown_key(tree: dict[str, Any]) -> None:
    tree["tasks"]["saying"]["data"]["promt"] = "{source}"


def no_weight(tree: dict[str, Any]) -> None:
    tree["tasks"]["saying"]["weight"] = 0


def no_references(tree: dict[str, Any]) -> None:
    tree["tasks"]["echoing"]["data"]["references"] = None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (data_too, "data or tasks, not both: with tasks set tasks.NAME.data"),
        (reward_too, "reward or tasks, not both: with tasks set tasks.NAME.reward"),
        (neither, "there are no 'tasks', and 'data' is missing"),
        (no_tasks, "at least one task"),
        (spaced_name, "not 'my task'"),
        (unknown_key, "'tasks.saying.data.promt'; did you mean 'prompt'?"),
        (no_weight, "tasks.saying.weight: input should be greater than 0"),
        (no_references, "tasks.echoing.reward.mix term 'rougeL' compares with references: set tasks.echoing.data"),
    ],
)
def test_what_tasks_cannot_be(change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    change(tree)
    with pytest.raises(UserError) as refused:
        validate(tree, "recipe.yaml")
    assert told in str(refused.value)


def test_the_schema_knows_both_forms(tmp_path: Path, write_recipe: Callable[[Any], Path]) -> None:
    schema, tree = recipe_schema(), tree_of(tmp_path)
    jsonschema.validate(tree, schema)
    jsonschema.validate(yaml.safe_load(dump_recipe(load_recipe(write_recipe(tree)))), schema)
    for change in (data_too, reward_too, neither, unknown_key):
        wrong = copy.deepcopy(tree)
        change(wrong)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)


def test_overrides_reach_into_a_task_and_one_task_is_a_recipe(
    tmp_path: Path, write_recipe: Callable[[Any], Path]
) -> None:
    recipe = load_recipe(write_recipe(tree_of(tmp_path)), ["tasks.saying.data.path=there", "tasks.echoing.weight=.5"])
    assert recipe.task_weights == {"saying": 2.0, "echoing": 0.5}
    assert recipe.max_response_tokens == 10
    alone = recipe.for_task("saying")
    assert alone.only_task.data.path == "there"
    assert alone.tasks is None
    with pytest.raises(UserError, match=r"name one with --task \(saying, echoing\)"):
        recipe.only_task  # noqa: B018  (a property that raises)
    with pytest.raises(UserError, match="did you mean 'saying'"):
        recipe.for_task("sayin")
    with pytest.raises(UserError, match="has no name"):
        alone.for_task("saying")


# --- turns, rewards, means ------------------------------------------------------------------------------------------


def example(task: str, reference: str = "a b c d", length: int = 1) -> Example:
    return Example(f"{task} source", (reference,), (1,) * length, ((2,),), f"{task} prompt", task)


def episode(of: Example, text: str, group: int = 0) -> Episode:
    return Episode(of, [5, 2], False, group, text=text)


def test_tasks_take_turns_by_their_weights_and_go_over_all_examples() -> None:
    """2 to 1: who is furthest behind has the turn, so a, b, a and again."""
    examples = [example("a") for _ in range(4)] + [example("b") for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    walk = ExampleWalk(examples, {"a": 2.0, "b": 1.0}, "uniform", generator)
    first = walk.next(4)
    state, random_state = walk.state(), generator.get_state()
    rest = walk.next(8)
    assert "".join(examples[i].task for i in first + rest) == "abaabaabaaba"
    of_a = [i for i in first + rest if i < 4]
    assert sorted(of_a[:4]) == sorted(of_a[4:]) == [0, 1, 2, 3]
    again = ExampleWalk(examples, {"a": 2.0, "b": 1.0}, "uniform", generator)
    again.restore(state)
    generator.set_state(random_state)
    assert again.next(8) == rest


def test_each_episode_is_scored_by_its_own_task() -> None:
    sections = {"a": {"rougeL": 1.0}, "b": {"length": 2.0}}
    data = validate({"model": {"name": "m"}, "data": {}}, "test").only_task.data
    tasks = {name: TaskSection(data=data, reward=RewardSection(mix=mix)) for name, mix in sections.items()}
    episodes = [episode(example("b"), "x y"), episode(example("a"), "a b"), episode(example("b"), "a b c d")]
    TaskRewards(tasks).score(episodes)
    assert [e.reward for e in episodes] == pytest.approx([1.0, 2 / 3, 2.0])  # F of precision 1 and recall 1/2: 2/3
    assert [list(e.terms) for e in episodes] == [["length"], ["rougeL"], ["length"]]


def test_the_running_baseline_is_each_tasks_own(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    tree["qlearning"]["baseline"] = "running"
    unused: Any = None
    generator = torch.Generator()
    examples = [example("saying"), example("echoing")]
    collector = Collector(
        validate(tree, "test"), unused, unused, examples, unused, unused, unused, prompt_generator=generator
    )
    rollouts = [[0.0, 1.0, 4.0], [1.0, 1.0, 8.0]]  # two of saying, one of echoing
    for rewards in rollouts:
        groups = [[episode(examples[0], "x"), episode(examples[0], "y")], [episode(examples[1], "z", group=1)]]
        for e, reward in zip([e for group in groups for e in group], rewards, strict=True):
            e.reward = reward
        collector._centre(groups)
    assert [e.baseline for group in groups for e in group] == pytest.approx([0.55, 0.55, 4.4])  # .9 * .5 + .1 * 1


def test_the_mean_over_tasks_and_its_significance_follow_the_weights() -> None:
    data = validate({"model": {"name": "m"}, "data": {}}, "test").only_task.data
    tasks = {name: TaskSection(data=data, reward=RewardSection(mix={"rougeL": 1.0})) for name in ("a", "b")}
    rewards, weights = TaskRewards(tasks), {"a": 3.0, "b": 1.0}
    examples = [example("a"), example("a"), example("b")]
    before = score_tasks(["a b c d", "x", "x"], examples, rewards, weights)
    after = score_tasks(["a b c d", "a b c d", "x"], examples, rewards, weights)
    assert (
        before.tasks["a"].metrics == score_responses(["a b c d", "x"], examples[:2], Reward(tasks["a"].reward)).metrics
    )
    assert before.metrics["reward"] == pytest.approx((3 * 50 + 1 * 0) / 4)
    assert after.metrics["reward"] == pytest.approx(75)
    found = paired_significance(
        {"start": before, "dqn": after}, "start", [e.references for e in examples], 200, weights=weights
    )
    assert found.interval["dqn"]["reward"] == pytest.approx((75, 75))  # within a task all responses are alike
    low, high = found.interval["start"]["reward"]
    assert (low, high) == pytest.approx((0, 75))  # both of a's draws are the wrong one, or the right one
    assert "bleu" not in found.interval["dqn"]
    own = {"start": before.tasks["a"], "dqn": after.tasks["a"]}
    alone = paired_significance(own, "start", [e.references for e in examples[:2]], 200)
    assert found.tasks["a"].p_value == alone.p_value
    assert found.tasks["a"].interval == alone.interval


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of both tasks, and a finished run on them."""
    folder = tmp_path_factory.mktemp("tasks")
    write_splits(folder / "saying", SAYING)
    write_splits(folder / "echoing", ECHOING)
    lmdqn.train(validate(tree_of(folder), "test"), Tracker())
    return folder


def test_results_are_told_by_task(folder: Path) -> None:
    results = json.loads((folder / "run" / "results.json").read_text(encoding="utf-8"))
    assert list(results["tasks"]) == ["saying", "echoing"]
    for phase, mean in results["test"].items():
        parts = [results["tasks"][name]["test"][phase]["reward"] for name in ("saying", "echoing")]
        assert mean["reward"] == pytest.approx((2 * parts[0] + parts[1]) / 3, abs=1e-3)
    assert "bleu" in results["tasks"]["echoing"]["p_value"]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    mean = (2 * last["validation_saying_reward"] + last["validation_echoing_reward"]) / 3
    assert last["validation_reward"] == pytest.approx(mean, rel=1e-4)
    assert {"reward_of_saying", "reward_of_echoing", "reward_bleu", "reward_length"} <= last.keys()
    predictions = [json.loads(line) for line in (folder / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["task"] for line in predictions] == ["saying"] * 6 + ["echoing"] * 4
    report = (folder / "run" / "report.html").read_text(encoding="utf-8")
    for words in ("<h3>saying</h3>", "<h3>echoing</h3>", "Mean over the tasks", "echoing: 1 rougeL, 0.25 length"):
        assert words in report


def test_evaluate_takes_all_tasks_or_one(folder: Path, command_line: Callable[..., Ran], tmp_path: Path) -> None:
    run, out = folder / "run", tmp_path / "all.json"
    both = command_line("evaluate", run, "--output", out)
    assert both.code == 0, both.err
    assert "saying: 6 examples" in both.out
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["metrics"]["reward"] == pytest.approx(results["test"]["dqn"]["reward"], abs=1e-3)
    one = command_line("evaluate", run, "--task", "echoing", "--output", tmp_path / "one.json")
    assert "4 test examples" in one.out
    metrics = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["reward"] == pytest.approx(written["tasks"]["echoing"]["reward"])
    assert metrics["reward"] == pytest.approx(results["tasks"]["echoing"]["test"]["dqn"]["reward"], abs=1e-3)


def test_commands_that_need_one_task_say_so(folder: Path, command_line: Callable[..., Ran]) -> None:
    run = folder / "run"
    for words in (["generate", run, "--source", "x"], ["inspect", run, "--prompt", "x"], ["compare", run, f"{run}/"]):
        refused = command_line(*words)
        assert refused.code == 2, words
        assert refused.err.count("\n") == 1
    for words in (["generate", run, "--source", "x"], ["inspect", run, "--prompt", "x"]):
        assert "name one with --task (saying, echoing)" in command_line(*words).err
        assert command_line(*words, "--task", "saying").code == 0
    assert "there is no task 'sing'" in command_line("evaluate", run, "--task", "sing").err


def test_a_task_is_compared_with_a_run_of_its_own(
    folder: Path, command_line: Callable[..., Ran], write_recipe: Callable[[Any], Path]
) -> None:
    alone = load_recipe(write_recipe(tree_of(folder, "alone")), ["qlearning.max_steps=1"]).for_task("echoing")
    lmdqn.train(alone, Tracker())
    assert "name one with --task" in command_line("compare", folder / "alone", folder / "run").err
    compared = command_line("compare", folder / "alone", folder / "run", "--task", "echoing", "--metric", "rougeL")
    assert compared.code in (0, 1), compared.err
    assert "4 test examples" in compared.out
    refused = command_line("compare", folder / "alone", f"{folder}/alone/../alone", "--task", "echoing")
    assert refused.code == 2


def test_a_log_holds_every_tasks_episodes_within_its_limit(
    folder: Path, command_line: Callable[..., Ran], tmp_path: Path
) -> None:
    made = command_line("log", folder / "run", "--output", tmp_path / "log.jsonl")
    assert made.code == 0, made.err
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    longest = {True: 0, False: 0}
    for row in rows:
        saying = row["prompt"].startswith("say ")
        longest[saying] = max(longest[saying], len(row["response_ids"]))
        assert len(row["behaviour_log_probs"]) == len(row["response_ids"])
        assert row["truncated"] or len(row["response_ids"]) <= (10 if saying else 5)
    assert longest == {True: 10, False: 5}  # an untrained model seldom ends


def test_check_reads_every_tasks_data(
    folder: Path, command_line: Callable[..., Ran], write_recipe: Callable[[Any], Path]
) -> None:
    recipe = write_recipe(tree_of(folder, "new"))
    checked = command_line("check", recipe)
    assert checked.code == 0, checked.err
    assert "saying: data: 6 train" in checked.out.replace("\n", " ")
    refused = command_line("check", recipe, "tasks.echoing.data.path=nowhere")
    assert refused.code == 2
    assert "nowhere" in refused.err


def test_the_model_card_has_every_task(folder: Path) -> None:
    run = RunFolder(folder / "run")
    recipe = load_recipe(run.recipe)
    published = Published("jane/both", "main", is_adapter=False, is_seq2seq=False)
    card = str(model_card(recipe, run.read_results(), 10, published))
    for words in ("Task `saying`, weight 2", "`echoing`:", "mean over the tasks", "1 `rougeL` + 0.25 `length`"):
        assert words in card
    assert str(folder) not in card
    measured = model_card(recipe, run.read_results(), 10, published).data.to_dict()["model-index"][0]["results"]
    assert {result["dataset"]["name"] for result in measured} == {"saying", "echoing"}
    assert 'prompt = "say {source}: "' in snippet(recipe, published)


def test_trackers_are_shown_samples_of_each_task() -> None:
    shown = _samples([example("a"), example("a"), example("b")], ["1", "2", "3"])
    assert [response for _, _, response in shown] == ["1", "3", "2"]


def test_a_run_says_what_it_read(folder: Path) -> None:
    tracker = Listening()
    lmdqn.train(validate({**tree_of(folder, "told"), "warm_start": None, "qlearning": {"max_steps": 0}}, "t"), tracker)
    assert tracker.said[:2] == [
        "saying, examples: 6 train, 6 validation, 6 test",
        "echoing, examples: 4 train, 4 validation, 4 test",
    ]


def test_a_prompt_has_room_for_the_longest_response_of_any_task(folder: Path, command_line: Callable[..., Ran]) -> None:
    """Tasks are decoded together: of 64 places the ten of saying are kept free for echoing, which takes five."""
    long = write_splits(folder / "long", [{"text": "0123456789" * 6, "answer": "one"}])
    tree = tree_of(folder, "never")
    tree["tasks"]["echoing"]["data"]["path"] = str(long)
    recipe = folder / "long.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    refused = command_line("train", recipe)
    assert refused.code == 2
    assert "set data.max_prompt_tokens=54" in refused.err
